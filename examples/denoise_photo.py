"""The main job: denoise a held-out photo with PyTorch and with compiled, pruned networks, side by side.

    python -m examples.denoise_photo --photo camera --pr 0 0.3 0.8 --out denoised.png

Loads the shipped denoiser, adds noise (sigma 25 of 255, a fixed seed) to a photo it was not trained on,
compiles the network at each pruning ratio, calibrated on crops of two other photos, and prints the compiler's
report and a table of quality and time.
All timings are taken in one process, in turns: one run of PyTorch, one of each compiled network, and again
from the start. PyTorch runs eagerly, in whichever memory layout is the faster here.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples import optional_module, photos
from examples.denoiser import load_denoiser, psnr

RUNS = {"cpu": 7, "cuda": 50}  # timed runs of each network, unless the time budget ends them
FEWEST_RUNS = 3  # even then

CALIBRATED = (
    "The pruned networks above were calibrated on {count} crops of two other photos (docs/accuracy.md), without\n"
    "labels and without fine-tuning; fine-tuning wins back most of what they lose (examples/finetune_denoiser.py)."
)
NOT_CALIBRATED = (
    "The pruned networks above were pruned without calibration and without fine-tuning, which destroys them at\n"
    "high pruning ratios: read their times, not their PSNR."
)


@dataclass(frozen=True)
class Outcome:
    """One row of the table.

    Attributes:
        label: "noisy photo", "PyTorch eager, dense" or "compiled, pr=0.3".
        picture: the (denoised) photo, [1, 1, height, width], float32, not clipped, on the CPU.
        decibels: PSNR of `picture`, clipped to [0, 1] if denoised, to the clean photo.
        milliseconds: of every timed run.
    """

    label: str
    picture: Tensor
    decibels: float
    milliseconds: Sequence[float] = ()

    @property
    def median(self) -> float | None:
        """Median time in milliseconds, None where nothing ran."""
        return statistics.median(self.milliseconds) if self.milliseconds else None


def time_one_run(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call: by CUDA events on a GPU, by the wall clock on a CPU."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def time_in_turns(
    runs: Mapping[str, Callable[[], object]], device: torch.device, *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Time several calls in turns (A B C A B C ...), so that a slow spell of the machine hits all alike.

    Args:
        runs: what to time, by label; each is warmed up by the caller.
        device: that the calls run on.
        rounds: how often each is run.
        seconds: no round starts after this long, once each call was timed `FEWEST_RUNS` times.

    Returns:
        Milliseconds of every run by label.
    """
    times: dict[str, list[float]] = {label: [] for label in runs}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= FEWEST_RUNS and time.perf_counter() - begin > seconds:
            break
        for label, run in runs.items():
            times[label].append(time_one_run(run, device))
    return times


def eager_in_faster_layout(model: nn.Module, noisy: Tensor) -> tuple[Callable[[], Tensor], str]:
    """The dense network in PyTorch, in the faster of its two memory layouts; `model` itself stays as it is.

    Returns:
        A call that denoises `noisy`, and the layout's name.
    """
    runs: dict[str, Callable[[], Tensor]] = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        network = copy.deepcopy(model).to(memory_format=layout)
        photo = noisy.contiguous(memory_format=layout)
        runs[str(layout).removeprefix("torch.")] = partial(network, photo)
    times = time_in_turns(runs, noisy.device, rounds=2 if noisy.device.type == "cpu" else 10, seconds=5)
    fastest = min(times, key=lambda name: min(times[name][1:]))  # the first round warms up
    return runs[fastest], fastest


def compile_network(model: nn.Module, pr: float, noisy: Tensor, crops: int = 0) -> nn.Module:
    """Compile a copy of the network.

    Args:
        model: the dense network.
        pr: the fraction of Winograd-domain weights that go.
        noisy: a photo of the size that will be denoised.
        crops: how many crops of the calibration photos the pruned weights are fitted to; 0 does without.
    """
    import wsp_compiler  # here, not above: nothing else in this file needs the compiler

    if pr == 0:
        return wsp_compiler.compile(model, pr=pr, method="dense", example_inputs=(noisy,))
    calibration = photos.calibration_crops(crops) if crops else None
    return wsp_compiler.compile(model, pr=pr, calibration=calibration, example_inputs=(noisy,))


def results_table(outcomes: Sequence[Outcome]) -> Any:
    """A rich table; the first outcome is the noisy photo, the second PyTorch, which speedups compare with."""
    table = optional_module("rich.table").Table(title="Denoising: quality and time of one photo")
    for heading in ("", "PSNR dB", "gain dB", "median ms", "speedup", "runs"):
        table.add_column(heading, justify="right" if heading else "left")
    noisy, reference = outcomes[0], outcomes[1]
    for outcome in outcomes:
        cells = [outcome.label, f"{outcome.decibels:.2f}"]
        cells.append("" if outcome is noisy else f"{outcome.decibels - noisy.decibels:+.2f}")
        if outcome.median is None or reference.median is None:
            cells += ["", "", ""]
        else:
            cells += [f"{outcome.median:.2f}", f"{reference.median / outcome.median:.2f}x"]
            cells.append(str(len(outcome.milliseconds)))
        table.add_row(*cells)
    return table


def write_picture(clean: Tensor, outcomes: Sequence[Outcome], path: Path) -> None:
    """Write a PNG of the clean photo and every outcome side by side, each with its label above it."""
    image, draw, font = (optional_module(f"PIL.{name}") for name in ("Image", "ImageDraw", "ImageFont"))
    panels = [("clean photo", clean)]
    panels += [(f"{outcome.label}: {outcome.decibels:.2f} dB", outcome.picture) for outcome in outcomes]
    height, width = clean.shape[-2:]
    gap, strip = 8, 32  # pixels between panels, and above each for its label
    canvas = image.new("L", (len(panels) * (width + gap) - gap, height + strip), 255)
    pencil, letters = draw.Draw(canvas), font.load_default(size=20)
    for index, (label, picture) in enumerate(panels):
        left = index * (width + gap)
        values = (picture.reshape(height, width).clamp(0, 1) * 255).round().to(torch.uint8)
        canvas.paste(image.fromarray(values.numpy()), (left, strip))
        pencil.text((left + 4, 4), label, fill=0, font=letters)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line of the job, checked."""
    parser = argparse.ArgumentParser(prog="python -m examples.denoise_photo", description=main.__doc__)
    parser.add_argument("--photo", default="camera", choices=photos.HELD_OUT, help="default: camera")
    parser.add_argument("--pr", type=float, nargs="+", default=[0.0, 0.3, 0.8], help="default: 0 0.3 0.8")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: auto")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16"], help="float16: GPU")
    parser.add_argument("--crops", type=int, default=6, help="to calibrate on; 0: do not (default: 6)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for the timed runs (default: 60)")
    parser.add_argument("--out", type=Path, default=Path("denoised.png"), help="default: denoised.png")
    parser.add_argument("--json", type=Path, help="also write the table with device, versions and commit")
    parser.add_argument("--verbose", action="store_true", help="print the report of every compiled network")
    options = parser.parse_args(arguments)
    if not all(0 <= pr < 1 for pr in options.pr):
        parser.error(f"--pr {options.pr}: a pruning ratio is at least 0 and less than 1")
    options.pr = list(dict.fromkeys(options.pr))
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA GPU here")
    if options.dtype == "float16" and options.device == "cpu":
        parser.error("--dtype float16 needs a CUDA GPU")
    return options


@contextmanager
def progress_line(console: Any, description: str) -> Iterator[None]:
    """Show a spinner and the time that has passed for as long as a long step runs."""
    progress = optional_module("rich.progress")
    columns = (progress.SpinnerColumn(), progress.TextColumn(description), progress.TimeElapsedColumn())
    with progress.Progress(*columns, console=console) as display:
        task = display.add_task(description, total=1)
        yield
        display.update(task, completed=1)


def denoise(run: Callable[[], Tensor]) -> Tensor:
    """One denoised photo, [1, 1, height, width], float32 on the CPU; also warms the call up."""
    return run().float().cpu()


def main(arguments: Sequence[str] | None = None) -> None:
    """Denoise a held-out photo with PyTorch and with compiled, pruned networks, side by side."""
    options = parse(arguments)
    console = optional_module("rich.console").Console()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    clean = photos.load(options.photo)  # [1, 1, height, width]
    noisy = photos.noisy(clean).to(device, dtype)
    model = load_denoiser().to(device, dtype)

    with progress_line(console, "PyTorch eager: choosing the faster memory layout"), torch.inference_mode():
        eager, layout = eager_in_faster_layout(model, noisy)
    runs = {"PyTorch eager, dense": eager}
    reports: dict[float, str] = {}
    for pr in options.pr:
        with progress_line(console, f"compiling, pr={pr:g}"):
            network = compile_network(model, pr, noisy, options.crops)
        reports[pr] = network.report()
        runs[f"compiled, pr={pr:g}"] = partial(network, noisy)
    with progress_line(console, "denoising with each network"), torch.inference_mode():
        pictures = {label: denoise(run) for label, run in runs.items()}
    with progress_line(console, "timing in turns"), torch.inference_mode():
        times = time_in_turns(runs, device, rounds=RUNS[device.type], seconds=options.seconds)

    outcomes = [Outcome("noisy photo", noisy.float().cpu(), psnr(noisy.float(), clean))]
    for label, picture in pictures.items():
        outcomes.append(Outcome(label, picture, psnr(picture.clamp(0, 1), clean), times[label]))
    for pr in options.pr if options.verbose else options.pr[-1:]:
        print(f"\nReport of the network compiled with pr={pr:g}:\n{reports[pr]}\n")
    console.print(results_table(outcomes))
    print(
        f"{options.photo}, {clean.shape[3]}x{clean.shape[2]}, {describe(device, dtype)}; PyTorch in {layout}"
    )
    if any(pr > 0 for pr in options.pr):
        print(f"\n{CALIBRATED.format(count=options.crops) if options.crops else NOT_CALIBRATED}")
    if options.json:
        write_json(options, outcomes, arguments)
    write_picture(clean, outcomes, options.out)
    print(f"\nWrote {options.out}: " + " | ".join(["clean photo", *(outcome.label for outcome in outcomes)]))


def write_json(
    options: argparse.Namespace, outcomes: Sequence[Outcome], arguments: Sequence[str] | None
) -> None:
    """Write the table's rows as a benchmark record."""
    from benchmarks.results import new_record

    given = list(sys.argv[1:] if arguments is None else arguments)
    record = new_record("examples.denoise_photo", given, options.device)
    for outcome in outcomes:
        record.rows.append(
            {
                "label": outcome.label,
                "psnr_db": outcome.decibels,
                "median_ms": outcome.median,
                "photo": options.photo,
            }
        )
    record.save(options.json)


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """What the timings were taken on, in words."""
    name = str(dtype).removeprefix("torch.")
    if device.type == "cpu":
        return f"{name}, {torch.get_num_threads()} CPU threads"
    if dtype == torch.float32:
        name += ", PyTorch with TF32" if torch.backends.cudnn.allow_tf32 else ", PyTorch without TF32"
    return f"{name}, {torch.cuda.get_device_name(device)}"


if __name__ == "__main__":
    main()
