"""Times of the fine-tuned networks on this device, against their dense originals.

    python -m benchmarks.accuracy.speed --folder work --only methods_resnet20 --device cuda --json speed.json

One row for each file NAME.safetensors in --folder: ours, compiled from the trained weights as they are, and dense:
PyTorch eager, torch.compile with frozen weights, and Winograd of this package without pruning (the paper's baseline).
On CUDA everything runs in fp16 and as CUDA graphs, on the CPU in float32 against every runtime of
:mod:`benchmarks.cpu_peers`. All candidates of one network are timed interleaved, in one process.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy.saved import job_of, load_dense, load_tuned
from benchmarks.arguments import positive, prepare
from benchmarks.results import Row, new_record
from benchmarks.timing import Call, measure, rotating_inputs

WINOGRAD = "dense_winograd"
INPUTS = 4


def baselines(dense: nn.Module, x: Tensor) -> tuple[dict[str, Call], dict[str, str]]:
    """Calls of the dense network by the name of the runtime, and why others are missing."""
    from benchmarks.cpu_networks import peers
    from benchmarks.networks import EAGER, INDUCTOR, compile_inductor

    calls: dict[str, Call] = {}
    missing: dict[str, str] = {}
    starts: Mapping[str, Any] = peers(dense, x.contiguous())
    if x.is_cuda:
        starts = {
            EAGER: lambda: dense,
            INDUCTOR: lambda: compile_inductor(dense, x, "reduce-overhead"),
        }
    for label, start in starts.items():
        try:
            calls[label] = start()
            calls[label](x if x.is_cuda or label in CHANNELS_LAST else x.contiguous())
        except Exception as problem:
            calls.pop(label, None)
            missing[label] = f"{type(problem).__name__}: {problem}".partition("\n")[0]
    return calls, missing


CHANNELS_LAST = ("torch_channels_last", "torch_compile")
"""Runtimes on the CPU that like it better."""


def compare(dense: nn.Module, tuned: Mapping[str, nn.Module], shape: Sequence[int], device: str) -> list[Row]:
    """One row for every network of `tuned`, and one for dense Winograd.

    Args:
        dense: float32, on the CPU.
        tuned: label -> what `compile` gets; float32, on the CPU.
        shape: of the input.
        device: "cuda" (fp16) or "cpu" (float32).
    """
    import wsp_compiler

    dtype = torch.float16 if device == "cuda" else torch.float32
    last = {"memory_format": torch.channels_last}
    xs = rotating_inputs(tuple(shape), dtype, device, torch.channels_last, count=INPUTS)
    dense = copy.deepcopy(dense).requires_grad_(False).to(device, dtype, **last)
    ours: dict[str, Call] = {}
    rows: list[Row] = []
    options: dict[str, Any] = {"example_inputs": (xs[0],), "cuda_graph": device == "cuda"}
    with torch.no_grad():
        for label, model in {WINOGRAD: dense, **tuned}.items():
            row: Row = {"name": label, "failure": None}
            rows.append(row)
            try:
                if model is dense:
                    compiled = wsp_compiler.compile(dense, method="dense", keep_slower=True, **options)
                else:
                    compiled = wsp_compiler.compile(copy.deepcopy(model).to(device, dtype, **last), **options)
                ours[label] = compiled
                if not torch.isfinite(compiled(xs[0])).all():
                    raise ArithmeticError("the output is not finite")
            except Exception as problem:
                ours.pop(label, None)
                row["failure"] = f"{type(problem).__name__}: {problem}".partition("\n")[0]
        rivals, missing = baselines(dense, xs[0])
        plain = [x.contiguous() for x in xs]
        inputs = {
            label: xs if device == "cuda" or label in ours or label in CHANNELS_LAST else plain
            for label in (*rivals, *ours)
        }
        own_graphs = [*ours, *(label for label in rivals if label != "eager")] if device == "cuda" else []
        times = measure({**rivals, **ours}, inputs, uncaptured=own_graphs)
    found = {label: times[label] for label in rivals}
    strongest = min(found, key=lambda label: found[label])
    for row in rows:
        row |= {"shape": list(shape), "dtype": "fp16" if device == "cuda" else "fp32", "unavailable": missing}
        if row["failure"]:
            continue
        us = times[row["name"]]
        row |= {
            "ours_us": us,
            "baselines_us": found,
            "strongest": strongest,
            "strongest_ratio": found[strongest] / us,
            "least_us": {label: times.least[label] for label in (row["name"], strongest)},
        }
        if WINOGRAD in ours:
            row["winograd_ratio"] = times[WINOGRAD] / us
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.speed", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    default = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--folder", type=Path, required=True, help="with the networks' weights")
    made.add_argument("--only", default="", help="regular expression on the files' names")
    made.add_argument("--device", choices=("cuda", "cpu"), default=default, help="default: %(default)s")
    made.add_argument("--batch", type=positive, help="images; default: 128 on CUDA, 1 on the CPU")
    made.add_argument("--threads", type=positive, help="CPU threads; default: torch.get_num_threads()")
    made.add_argument("--json", type=Path, required=True)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0 if every network was timed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    made = parser()
    given = made.parse_args(arguments)
    prepare(given.device, given.threads)
    files = [path for path in sorted(given.folder.glob("*.safetensors")) if re.search(given.only, path.name)]
    groups: dict[str, dict[str, Path]] = {}
    for path in files:
        job = job_of(path)
        groups.setdefault(job.dense.name, {})[job.name] = path
    if not groups:
        made.error(f"no fine-tuned network in {given.folder} matches {given.only!r}")
    record = new_record("benchmarks.accuracy.speed", arguments, given.device)
    shape = (given.batch or (128 if given.device == "cuda" else 1), 3, 32, 32)
    for name, paths in groups.items():
        torch.compiler.reset()
        dense = load_dense(given.folder, job_of(next(iter(paths.values()))))
        tuned = {label: load_tuned(path) for label, path in paths.items()}
        for row in compare(dense, tuned, shape, given.device):
            record.rows.append(row | {"dense": name})
            about = row["failure"] or (
                f"{row['ours_us']:.1f} us, {row['strongest_ratio']:.2f}x {row['strongest']}, "
                f"{row.get('winograd_ratio', float('nan')):.2f}x dense Winograd"
            )
            print(f"{row['name']}: {about}", flush=True)
        record.save(given.json)
    return int(any(row["failure"] for row in record.rows))


if __name__ == "__main__":
    sys.exit(main())
