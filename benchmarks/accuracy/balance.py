"""Measured times of every layer under WSP and BWSP on this device, for ABWSP's balanced speedups.

    python -m benchmarks.accuracy.balance --folder work --networks resnet20 --pr 0.4 0.6 0.8 --json times.json

The trained dense networks are read from --folder, where `benchmarks.accuracy.run` has put them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import wsp_compiler
from benchmarks.accuracy.experiments import DENSE_EPOCHS, Job
from benchmarks.accuracy.models import NETWORKS, make
from benchmarks.arguments import fraction, positive
from benchmarks.results import new_record


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.balance", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    default = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--folder", type=Path, required=True, help="with the dense networks")
    made.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet20"])
    made.add_argument("--pr", type=fraction, nargs="+", default=[0.4, 0.6, 0.8])
    made.add_argument("--batch", type=positive, default=128, help="images; default: %(default)s")
    made.add_argument("--device", choices=("cuda", "cpu"), default=default, help="default: %(default)s")
    made.add_argument("--tune", choices=("off", "fast", "full"), default="fast", help="default: %(default)s")
    made.add_argument("--json", type=Path, required=True)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command: fp16 on CUDA, float32 on the CPU."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parser().parse_args(arguments)
    dtype = torch.float16 if given.device == "cuda" else torch.float32
    record = new_record("benchmarks.accuracy.balance", arguments, given.device)
    record.rows.append({"name": "balanced speedup", "failure": None, "times": {}})
    for network in given.networks:
        model = make(network, 10)
        job = Job("dense", network, 0, epochs=DENSE_EPOCHS)
        path = given.folder / (job.name.replace("/", "_") + ".pt")
        if not path.is_file():
            raise FileNotFoundError(f"no {path}: train it with benchmarks.accuracy.run --only {job.name}")
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        model.to(given.device, dtype, memory_format=torch.channels_last)
        x = torch.randn(given.batch, 3, 32, 32, device=given.device, dtype=dtype)
        for pr in given.pr:
            found = wsp_compiler.balanced_speedup(
                model, pr, (x.contiguous(memory_format=torch.channels_last),), tune=given.tune
            )
            record.rows[0]["times"][f"{network}/{pr}"] = found
            record.save(given.json)
            total = sum(entry["wsp_us"] for entry in found.values()) / sum(
                entry["bwsp_us"] for entry in found.values()
            )
            print(
                f"{network} pr={pr:g}: BWSP is {total:.3f} times as fast as WSP over its layers", flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
