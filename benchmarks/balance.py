"""What balance gains, layer by layer: time(WSP) / time(BWSP) at the same pruning ratio, the paper's figure 5.

    python -m benchmarks.balance --device cuda --dtype fp16 --networks denoiser resnet18 --importance output l2

"denoiser" is the example's trained network; the others have random weights. Kernels are tuned for both patterns
(tune="fast"). On the CPU positions do not run side by side, and ratios are near 1.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import wsp_compiler
from benchmarks.arguments import DTYPES, add_common, check_device, fraction, positive, prepare
from benchmarks.network_models import NETWORKS, build
from benchmarks.report import STDERR, failure_lines, row_line, text_table, time_cell
from benchmarks.results import Row, geomean, new_record

Measure = Callable[..., dict[str, Any]]


def network(name: str, size: int | None) -> tuple[nn.Module, tuple[int, int, int]]:
    """The network and the shape [c, h, w] of one input."""
    if name == "denoiser":
        from examples.denoiser import load_denoiser

        return load_denoiser(), (1, size or 512, size or 512)
    return build(name), (3, size or 224, size or 224)


def rows_of(name: str, importance: str, given: argparse.Namespace, measure: Measure) -> list[Row]:
    """One row per layer; where something raises, one failed row."""
    about = {
        "network": name,
        "importance": importance,
        "weights": "trained" if name == "denoiser" else "random",
    }
    about |= {key: getattr(given, key) for key in ("batch", "pr", "tile", "dtype", "device")}
    try:
        model, shape = network(name, given.size)
        model = model.eval().requires_grad_(False)
        model = model.to(given.device, DTYPES[given.dtype], memory_format=torch.channels_last)
        x = torch.randn(given.batch, *shape, device=given.device, dtype=DTYPES[given.dtype])
        found = measure(
            model,
            given.pr,
            x.contiguous(memory_format=torch.channels_last),
            tile=given.tile,
            precision="tf32" if given.dtype == "tf32" else None,
            tune=given.tune,
            importance=importance,
        )
    except Exception as problem:
        STDERR.print(traceback.format_exc(), markup=False)
        return [{"name": name, **about, "failure": f"{type(problem).__name__}: {problem}"}]
    return [
        {"name": f"{name} {path}", "layer": path, **about, **times, "failure": None}
        for path, times in found.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """One line per layer, then one per network and importance."""
    good = [row for row in rows if not row["failure"]]
    lines = [
        [
            row["name"],
            row["importance"],
            time_cell(row["wsp_us"]),
            time_cell(row["bwsp_us"]),
            f"{row['ratio']:.2f}x",
        ]
        for row in good
    ]
    text = [text_table(["microseconds", "importance", "WSP", "BWSP", "WSP / BWSP"], lines)]
    for network, importance in dict.fromkeys((row["network"], row["importance"]) for row in good):
        ratios = [r["ratio"] for r in good if (r["network"], r["importance"]) == (network, importance)]
        text.append(
            f"{network}, {importance}: geomean {geomean(ratios):.2f}x over {len(ratios)} layers, "
            f"from {min(ratios):.2f}x to {max(ratios):.2f}x"
        )
    return "\n".join(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.balance", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    add_common(made, ("fp32", "tf32", "fp16"))
    names = ("denoiser", *NETWORKS)
    made.add_argument("--networks", nargs="+", choices=names, default=["denoiser", "resnet18"])
    made.add_argument("--importance", nargs="+", choices=("output", "l2"), default=["output"])
    made.add_argument("--batch", type=positive, default=1, help="default: %(default)s")
    made.add_argument("--size", type=positive, help="pixels; default: 512 for the denoiser, else 224")
    made.add_argument("--pr", type=fraction, default=0.8, help="default: %(default)s")
    made.add_argument("--tile", type=int, choices=(2, 4), default=2, help="default: %(default)s")
    made.add_argument("--tune", choices=("off", "fast", "full"), default="fast", help="default: %(default)s")
    return made


def main(arguments: Sequence[str] | None = None, measure: Measure | None = None) -> int:
    """Runs the command; 0 if every network succeeded, else 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    made = parser()
    given = made.parse_args(arguments)
    check_device(made, given.device, given.dtype, on_cpu=("fp32",))
    prepare(given.device, given.threads)
    record = new_record("benchmarks.balance", arguments, given.device)
    for name in given.networks:
        for importance in given.importance:
            for row in rows_of(name, importance, given, measure or wsp_compiler.balanced_speedup):
                record.rows.append(row)
                if row["failure"]:
                    STDERR.print(row_line(row), markup=False, highlight=False)
            if given.json:
                record.save(given.json)
    print(table(record.rows))
    for line in failure_lines(record.rows):
        print(line)
    return int(any(row["failure"] for row in record.rows))


if __name__ == "__main__":
    sys.exit(main())
