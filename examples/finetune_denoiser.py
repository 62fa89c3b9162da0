"""Fine-tune the pruned denoiser by distillation: it learns to return what the dense network returns.

    python -m examples.finetune_denoiser --pr 0.8 --minutes 8 --device cuda --out denoiser_pr80.safetensors

The network is pruned and calibrated on the calibration photos, then trained in the Winograd domain on noisy patches
of the training photos; no label and no clean photo is used, and the held-out photos are only looked at before and
after. Needs PyTorch, not the compiler's code generator. A run that was killed goes on from its checkpoint. What it
writes is a packed state_dict of `wsp_compiler.prune(...)`: `load_pruned` reads it, `wsp_compiler.compile` takes that.
On a GPU both networks run in bfloat16 and through torch.compile, which fuses what lies between the convolutions.
What it made is shipped: examples/denoiser_pr80.safetensors (rows, --pr 0.8), denoiser_filters_pr80.safetensors and
denoiser_filters_pr90.safetensors (--method fp --pr 0.594 and 0.706: 82 and 90% of the multiplications); their runs
are in benchmarks/results/denoiser_finetuning_h100.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples import photos
from examples.denoiser import load_denoiser, psnr
from examples.patches import PatchSource
from examples.pruned_file import load_pruned_state, save_pruned

EVERY_STEPS = 100
PRUNED_WEIGHTS = Path(__file__).with_name("denoiser_pr80.safetensors")


def held_out_psnr(model: nn.Module, device: torch.device) -> dict[str, float]:
    """PSNR in dB of every held-out photo, whole, denoised in float32 and clipped to [0, 1]."""
    found: dict[str, float] = {}
    for name in photos.HELD_OUT:
        clean = photos.load(name)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            denoised = model(photos.noisy(clean).to(device)).clamp(0, 1).cpu()
        found[name] = psnr(denoised, clean)
    return found


def mean_drop(dense: dict[str, float], other: dict[str, float]) -> float:
    """Mean over the photos of how many dB `other` loses against `dense`."""
    return sum(dense[name] - other[name] for name in dense) / len(dense)


def patches(device: torch.device, batch: int, patch: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of noisy training patches, [batch, 1, patch, patch]."""
    source = PatchSource(photos.TRAIN, patch, device, seed=seed)
    while True:
        clean = source.sample(batch)
        noisy = clean + source.noise(clean.shape, photos.SIGMA)
        yield noisy.contiguous(memory_format=torch.channels_last)


def load_pruned(path: Path | str = PRUNED_WEIGHTS) -> nn.Module:
    """The fine-tuned network in `path`, on the CPU in evaluation mode; `wsp_compiler.compile` takes it."""
    import wsp_compiler

    model = wsp_compiler.prune(
        load_denoiser(), 0.5, method="wsp", importance="l2"
    )  # keep comes with the weights
    return load_pruned_state(model, Path(path))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line of the job, checked."""
    parser = argparse.ArgumentParser(prog="python -m examples.finetune_denoiser", description=main.__doc__)
    parser.add_argument("--pr", type=float, default=0.8, help="default: 0.8")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="of training (default: 8)")
    length.add_argument("--steps", type=int, help="of training instead")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: auto")
    parser.add_argument("--batch", type=int, default=64, help="patches in a batch (default: 64)")
    parser.add_argument("--patch", type=int, default=64, help="side of a patch (default: 64)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak (default: 0.003)")
    parser.add_argument(
        "--method",
        default="wsp",
        choices=["wsp", "bwsp", "fp"],
        help="pattern; fp: --pr of the filters (default: wsp)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--torch-compile", action=argparse.BooleanOptionalAction, help="default: on a GPU, after a try"
    )
    parser.add_argument("--out", type=Path, default=Path("denoiser_pruned.safetensors"))
    parser.add_argument("--json", type=Path, help="summary of the run")
    options = parser.parse_args(arguments)
    if not 0 <= options.pr < 1:
        parser.error(f"--pr {options.pr}: a pruning ratio is at least 0 and less than 1")
    if options.minutes is None and options.steps is None:
        options.minutes = 8.0
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.torch_compile is None:
        options.torch_compile = options.device == "cuda"
    return options


def compile_networks(dense: nn.Module, model: nn.Module, batch: Tensor, autocast: torch.dtype | None) -> None:
    """torch.compile both networks, in place, for batches like this one; they stay eager where that fails."""
    for network in (dense, model):
        network.compile()
    for module in model.modules():  # as in wsp_compiler.finetune: what is compiled depends on it
        module.training = not isinstance(module, nn.BatchNorm2d)
    try:
        with torch.autocast(batch.device.type, autocast, enabled=autocast is not None):
            output = model(batch)
            with torch.no_grad():
                target = dense(batch)
        noise_error()(output, target).backward()
    except Exception as problem:  # a compiler's: of any kind
        print(f"going on without torch.compile: {type(problem).__name__}: {problem}".partition("\n")[0])
        for network in (dense, model):
            network._compiled_call_impl = None
    model.zero_grad(set_to_none=True)
    model.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Prune, calibrate and fine-tune the shipped denoiser."""
    import wsp_compiler

    options = parse(arguments)
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    began = time.monotonic()
    dense = load_denoiser().to(device)
    model = wsp_compiler.prune(
        dense, options.pr, method=options.method, calibration=photos.calibration_crops()
    )
    quality = {"dense": held_out_psnr(dense, device), "calibrated": held_out_psnr(model, device)}
    print(
        f"calibrated in {time.monotonic() - began:.0f} s: "
        f"{mean_drop(quality['dense'], quality['calibrated']):.2f} dB below dense on the held-out photos"
    )
    for network in (dense, model):
        network.to(memory_format=torch.channels_last)
    losses: list[float] = []

    def report(step: int, loss: Tensor, fraction: float) -> None:
        if step % EVERY_STEPS == 0:
            losses.append(float(loss))
            print(f"step {step}, {fraction:.0%}: relative squared error {losses[-1]:.5f}", flush=True)

    batches = patches(device, options.batch, options.patch, options.seed)
    autocast = torch.bfloat16 if device.type == "cuda" else None
    torch.backends.cudnn.benchmark = True
    began = time.monotonic()
    if options.torch_compile:
        compile_networks(dense, model, next(batches), autocast)
        print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
    checkpoint = options.out.with_suffix(".checkpoint")
    wsp_compiler.finetune(
        model,
        batches,
        teacher=dense,
        steps=options.steps,
        seconds=None if options.minutes is None else 60 * options.minutes,
        learning_rate=options.learning_rate,
        autocast=autocast,
        checkpoint=checkpoint,
        loss=noise_error(),
        on_step=report,
    )
    seconds = time.monotonic() - began
    torch.backends.cudnn.benchmark = False  # every photo has a size of its own: nothing to search for
    quality["fine-tuned"] = held_out_psnr(model, device)
    drops = {name: f"{mean_drop(quality['dense'], found):.4f}" for name, found in quality.items()}
    size = save_pruned(model, options.out, {"pr": str(options.pr), "mean_drop_db": json.dumps(drops)})
    for name in ("calibrated", "fine-tuned"):
        print(
            f"{name}: {mean_drop(quality['dense'], quality[name]):.3f} dB below dense, mean of the held-out photos"
        )
    if options.json:
        write_summary(options, quality, losses, seconds)
    checkpoint.unlink(missing_ok=True)
    print(f"wrote {options.out} ({size} bytes)")


def noise_error() -> Any:
    """Squared error of what the two networks take for noise, in units of the noise's own variance."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output.float() - target.float()).square().mean() / (photos.SIGMA / 255.0) ** 2

    return loss


def write_summary(
    options: argparse.Namespace, quality: dict[str, dict[str, float]], losses: list[float], seconds: float
) -> None:
    """Write what was run, PSNR of every held-out photo before and after, and the seconds that training took."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    summary: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "device": device,
        "seconds": round(seconds, 1),
        "options": {name: str(value) for name, value in vars(options).items() if name not in ("out", "json")},
        "psnr": quality,
        "mean_drop": {name: mean_drop(quality["dense"], found) for name, found in quality.items()},
        "losses": {"every_steps": EVERY_STEPS, "values": [round(value, 6) for value in losses]},
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
