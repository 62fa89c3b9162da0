"""Time and memory of calibrating a network: ResNet-18, pr=0.8, F(2x2, 3x3), 64 images of 224x224 by default.

    python -m benchmarks.calibration_cost --json benchmarks/results/calibration_cost_cpu.json

Weights and images are random: the cost depends on neither. Images are smoothed noise, so that activations are
correlated as those of photos are.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from torchvision import models

import wsp_compiler
from benchmarks.arguments import prepare
from benchmarks.cpu_networks import own_peak
from benchmarks.results import new_record


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration_cost", description=__doc__)
    parser.add_argument("--network", default="resnet18", choices=["resnet18", "resnet34", "vgg16"])
    parser.add_argument("--pr", type=float, default=0.8)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument(
        "--pr-scope",
        default="layer",
        choices=["layer", "global"],
        help="default: the same ratio in every layer",
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, help="on the CPU; default: torch.get_num_threads()")
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune and calibrate once; one row."""
    options = parse(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    prepare(options.device, options.threads)
    torch.manual_seed(0)
    model = models.get_model(options.network, weights=None).eval().to(options.device)
    noise = torch.randn(options.images, 3, options.side + 4, options.side + 4)
    images = 5 * F.avg_pool2d(noise, 5, stride=1)
    before = own_peak()
    begin = time.perf_counter()
    pruned = wsp_compiler.prune(model, options.pr, calibration=images, pr_scope=options.pr_scope)
    seconds = time.perf_counter() - begin
    layers = sum(isinstance(module, wsp_compiler.WinogradConv2d) for module in pruned.modules())
    record = new_record("benchmarks.calibration_cost", given, options.device)
    record.rows.append(
        {
            "network": options.network,
            "pr": options.pr,
            "images": options.images,
            "side": options.side,
            "pr_scope": options.pr_scope,
            "threads": torch.get_num_threads(),
            "layers": layers,
            "seconds": seconds,
            "host_memory_before_mb": before >> 20,
            "host_memory_peak_mb": own_peak() >> 20,
            "gpu_memory_peak_mb": torch.cuda.max_memory_allocated() // 2**20
            if options.device == "cuda"
            else None,
        }
    )
    record.save(options.json)
    print(f"{options.network}: {layers} layers calibrated in {seconds:.0f} s")


if __name__ == "__main__":
    main()
