"""What pruning costs the shipped denoiser: PSNR of whole held-out photos, without and with fine-tuning.

    python -m benchmarks.denoiser_accuracy --json benchmarks/results/denoiser_accuracy.json --finetuned FILE ...

"Global" shares the ratio unevenly over the layers; the others have it in each. Of "filters" it is the share of filters,
whose channels leave the next layer too. Calibrated networks see
`examples.photos.calibration_crops()`, noisy crops of two photos that are in neither the training nor the test set.
Beside them stands the paper's criterion, the L2 norm, without calibration, in both of its patterns. Networks run in
PyTorch as `wsp_compiler.prune` returns them, which is what `compile` lowers.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import wsp_compiler
from benchmarks.accuracy.methods import kept_share
from benchmarks.results import new_record
from examples import photos
from examples.denoiser import load_denoiser
from examples.finetune_denoiser import held_out_psnr, load_pruned, mean_drop

METHODS: dict[str, dict[str, Any]] = {
    "calibrated, global": {"method": "wsp", "pr_scope": "global"},
    "calibrated": {"method": "wsp"},
    "calibrated, balanced": {"method": "bwsp"},
    "calibrated, filters": {"method": "fp"},
    "L2, WSP-R": {"method": "wsp", "importance": "l2"},
    "L2, BWSP-R": {"method": "bwsp", "importance": "l2"},
}
DEFAULT = ["calibrated", "calibrated, balanced", "L2, WSP-R", "L2, BWSP-R"]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.denoiser_accuracy", description=__doc__)
    parser.add_argument("--pr", type=float, nargs="+", default=[0.3, 0.5, 0.8])
    parser.add_argument("--methods", nargs="+", default=DEFAULT, choices=list(METHODS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--crops", type=int, default=8, help="calibration crops (default: 8)")
    parser.add_argument("--side", type=int, default=128, help="their side in pixels (default: 128)")
    parser.add_argument(
        "--finetuned", type=Path, nargs="+", default=[], help="networks of examples.finetune_denoiser to add"
    )
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune by every method and ratio; one row each, with the drop of PSNR against the dense network."""
    options = parse(arguments)
    device = torch.device(options.device)
    given = list(sys.argv[1:] if arguments is None else arguments)
    record = new_record("benchmarks.denoiser_accuracy", given, options.device)
    dense = load_denoiser().to(device)
    reference = held_out_psnr(dense, device)
    record.rows.append({"method": "dense", "pr": 0.0, "psnr_db": reference, "mean_drop_db": 0.0})
    crops = photos.calibration_crops(options.crops, options.side)
    for pr in options.pr:
        for name in options.methods:
            data = crops if name.startswith("calibrated") else None
            begin = time.perf_counter()
            model = wsp_compiler.prune(dense, pr, calibration=data, **METHODS[name])
            seconds = time.perf_counter() - begin
            row: dict[str, Any] = {
                "method": name,
                "pr": pr,
                **_quality(reference, model, device),
                "prune_seconds": seconds,
                "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
            record.rows.append(row)
            record.save(options.json)
            print(f"pr={pr:g} {name}: {row['mean_drop_db']:.2f} dB below dense ({seconds:.0f} s)", flush=True)
    for path in options.finetuned:
        model = load_pruned(path).to(device)
        pr = round(1 - kept_share(model), 3)
        record.rows.append({"method": "fine-tuned", "pr": pr, **_quality(reference, model, device)})
        record.save(options.json)
        print(f"pr={pr:g} fine-tuned: {record.rows[-1]['mean_drop_db']:.2f} dB below dense", flush=True)


def _quality(reference: dict[str, float], model: nn.Module, device: torch.device) -> dict[str, Any]:
    """PSNR of every held-out photo, and how far below `reference` it is."""
    quality = held_out_psnr(model, device)
    drops = [reference[photo] - found for photo, found in quality.items()]
    return {
        "psnr_db": quality,
        "mean_drop_db": mean_drop(reference, quality),
        "largest_drop_db": max(drops),
    }


if __name__ == "__main__":
    main()
