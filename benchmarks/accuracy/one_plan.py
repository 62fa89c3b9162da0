"""One plan, both numbers: what a fine-tuned network loses, and how fast that same network is.

    python -m benchmarks.accuracy.one_plan --network denoiser --files pr80.safetensors pr90.safetensors --json FILE
    python -m benchmarks.accuracy.one_plan --network resnet20 --folder work --data folder --json FILE

Of several fine-tuned networks, the most pruned one counts that loses at most 0.3 dB (the denoiser, mean over the
held-out photos) or one point of accuracy (ResNets, test images). Quality is that of the compiled network on this
device, in the arithmetic that is timed: fp16 on CUDA, float32 on the CPU. All networks are timed together. "pr" is
1 - kept Winograd weights / all, on every device the CPU's: channels that leave with pruned filters count as pruned.
"device_pr" counts those as kept that fill up the multiple of channels that this device's kernels want.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import wsp_compiler
from benchmarks.accuracy.models import NETWORKS
from benchmarks.accuracy.outlook import accuracy
from benchmarks.accuracy.saved import job_of, load_dense, load_tuned
from benchmarks.accuracy.speed import compare
from benchmarks.accuracy.tasks import load_task
from benchmarks.arguments import positive, prepare
from benchmarks.results import Row, new_record
from examples import photos
from examples.denoiser import load_denoiser
from examples.finetune_denoiser import held_out_psnr, load_pruned


@dataclass(frozen=True)
class Subject:
    """A network, its fine-tuned descendants, and how they are judged.

    Attributes:
        dense: on the CPU, float32.
        tuned: label -> network.
        quality: higher is better; gets a function from float32 images on the device to outputs.
        allowed: largest loss of quality.
        shape: input that is timed.
        unit: of the quality.
    """

    dense: nn.Module
    tuned: dict[str, nn.Module]
    quality: Callable[[nn.Module], float]
    allowed: float
    shape: tuple[int, ...]
    unit: str


class Cast(nn.Module):
    """A network of any dtype behind float32 inputs and outputs."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, x: Tensor) -> Tensor:
        """Any float32 input that the network takes."""
        return self.network(x.to(self.dtype).contiguous(memory_format=torch.channels_last)).float()


def denoiser(files: Sequence[Path], device: torch.device, batch: int) -> Subject:
    """The shipped denoiser; PSNR in dB, mean over the held-out photos."""

    def quality(network: nn.Module) -> float:
        found = held_out_psnr(network, device)
        return sum(found.values()) / len(found)

    tuned = {path.stem: load_pruned(path) for path in files}
    side = photos.load("camera").shape[-1]
    return Subject(
        load_denoiser(), tuned, quality, 0.3, (batch, 1, side, side), "dB",
    )  # fmt: skip


def classifier(network: str, folder: Path, data: Path | None, device: torch.device, batch: int) -> Subject:
    """A ResNet of the experiments; share of the test images, a loss of 0.01 is one point."""
    files = sorted(folder.glob(f"one_plan_{network}_*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"no one_plan_{network}_*.safetensors in {folder}: run benchmarks.accuracy.run --only one_plan"
        )
    task = load_task("digits", data, device)

    def quality(model: nn.Module) -> float:
        return accuracy(model, (piece for x, y in task.test for piece in _pieces(x, y, batch)))

    tuned = {path.stem: load_tuned(path) for path in files}
    return Subject(
        load_dense(folder, job_of(files[0])),
        tuned, quality, 0.01, (batch, 3, 32, 32), "share",
    )  # fmt: skip


def _pieces(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Whole batches of the size that is timed; what is left over is left out."""
    whole = len(y) // size * size
    return list(zip(x[:whole].split(size), y[:whole].split(size), strict=True))


def judge(subject: Subject, device: str) -> list[Row]:
    """A row for every fine-tuned network, most pruned first; the first that loses little enough is chosen."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    reference = subject.quality(copy.deepcopy(subject.dense).to(device))
    rows: list[Row] = []
    for label, model in subject.tuned.items():
        compiled = wsp_compiler.compile(
            copy.deepcopy(model).to(device, dtype, memory_format=torch.channels_last)
        )
        found = subject.quality(Cast(compiled, dtype))
        plan_pr = wsp_compiler.compile(copy.deepcopy(model), target="cpu").achieved_pr
        row: Row = {"name": label, "failure": None, "pr": plan_pr, "device_pr": compiled.achieved_pr}
        row |= {"dense_quality": reference, "quality": found, "loss": reference - found}
        rows.append(row | {"allowed": subject.allowed, "unit": subject.unit})
        print(f"{label}: pr={row['pr']:.3f}, loses {row['loss']:.4f} {subject.unit}", flush=True)
    rows.sort(key=lambda row: -row["pr"])
    good = [row["name"] for row in rows if row["loss"] <= subject.allowed]
    times = {row["name"]: row for row in compare(subject.dense, subject.tuned, subject.shape, device)}
    return [row | times[row["name"]] | {"chosen": row["name"] == (good or [None])[0]} for row in rows]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.one_plan", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    default = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--network", choices=("denoiser", *NETWORKS), default="denoiser")
    made.add_argument("--files", type=Path, nargs="+", default=[], help="fine-tuned denoisers")
    made.add_argument("--folder", type=Path, help="with the fine-tuned ResNets")
    made.add_argument("--data", type=Path, help="folder with the task's files")
    made.add_argument("--device", choices=("cuda", "cpu"), default=default, help="default: %(default)s")
    made.add_argument("--batch", type=positive, help="images; default: 1, of ResNets on CUDA 128")
    made.add_argument("--threads", type=positive, help="CPU threads; default: torch.get_num_threads()")
    made.add_argument("--json", type=Path, required=True)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0 if some network loses little enough."""
    arguments = sys.argv[1:] if arguments is None else arguments
    made = parser()
    given = made.parse_args(arguments)
    if (given.network == "denoiser" and not given.files) or (
        given.network != "denoiser" and not given.folder
    ):
        made.error("give --files with --network denoiser, --folder with any other network")
    prepare(given.device, given.threads)
    record = new_record("benchmarks.accuracy.one_plan", arguments, given.device)
    device = torch.device(given.device)
    if given.network == "denoiser":
        subject = denoiser(given.files, device, given.batch or 1)
    else:
        batch = given.batch or (128 if given.device == "cuda" else 1)
        subject = classifier(given.network, given.folder, given.data, device, batch)
    record.rows = [row | {"network": given.network} for row in judge(subject, given.device)]
    record.save(given.json)
    for row in record.rows:
        speed = row["failure"] or f"{row['strongest_ratio']:.2f}x {row['strongest']}"
        mark = ", chosen" if row["chosen"] else ""
        print(f"{row['name']} pr={row['pr']:.3f}: loses {row['loss']:.4f} {row['unit']}, {speed}{mark}")
    chosen = [row for row in record.rows if row["chosen"]]
    if not chosen:
        print("no network loses little enough")
    return int(not chosen or bool(chosen[0]["failure"]))


if __name__ == "__main__":
    sys.exit(main())
