"""Train the example denoiser from scratch on the photos of `examples/photos.py`.

    python -m examples.train_denoiser --minutes 4 --out examples/denoiser.safetensors --json summary.json

Every patch of every batch has its own photo, scale, place, rotation, mirroring, colour mix, contrast and
noise (`examples/patches.py`). A time budget drives the learning rate (short warm-up, then a cosine to zero),
so a run ends when it is told to but does not repeat exactly; `--steps` counts steps in its stead. On a GPU
the convolutions run in bfloat16 (autocast); the weights and the loss stay float32.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples import optional_module, photos
from examples.denoiser import WEIGHTS, Denoiser, psnr
from examples.patches import PatchSource

MAXIMUM_BYTES = 2_500_000
"""The weights are shipped in the repository: no file larger than this is written."""


def initialise(model: Denoiser) -> None:
    """He initialisation, with the last convolution at zero: the untrained network returns its input."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.zeros_(model.last.weight)


def learning_rate(fraction: float, peak: float, warm_up: float = 0.02) -> float:
    """Learning rate once `fraction` of the budget is spent: linear up to `peak`, then a cosine to zero."""
    if fraction < warm_up:
        return peak * (fraction + 1e-3) / (warm_up + 1e-3)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min((fraction - warm_up) / (1.0 - warm_up), 1.0)))


def train(
    model: Denoiser,
    source: PatchSource,
    *,
    seconds: float = math.inf,
    steps: int | None = None,
    batch: int = 128,
    peak_learning_rate: float = 1e-3,
    sigma: float = photos.SIGMA,
    report_every: int = 100,
    report: Callable[[str], None] = print,
) -> list[float]:
    """Fit the model, in place, to patches of `source`, until `seconds` have passed or `steps` are done.

    The loss is the mean square error of the predicted noise over the noise's variance: 1 for a network that
    returns its input, 0.1 for one that gains 10 dB.

    Returns:
        The mean loss of every `report_every` steps (the last value, of fewer where the steps don't divide).
    """
    if steps is None and math.isinf(seconds):
        raise ValueError("train needs a budget: seconds, steps or both")
    on_gpu = source.device.type == "cuda"
    model.to(source.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=1e-4, fused=on_gpu)
    variance = (sigma / 255.0) ** 2
    losses: list[float] = []
    total = torch.zeros((), device=source.device)
    start = time.perf_counter()
    step = 0
    fraction = 0.0
    while fraction < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(fraction, peak_learning_rate)
        clean = source.sample(batch)  # [batch, 1, patch, patch]
        noisy = (clean + source.noise(clean.shape, sigma)).to(memory_format=torch.channels_last)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=on_gpu):
            denoised = model(noisy)
        loss = nn.functional.mse_loss(denoised.float(), clean) / variance
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.detach()
        step += 1
        since_report = (step - 1) % report_every + 1
        spent = time.perf_counter() - start
        fraction = max(spent / seconds, step / steps if steps else 0.0)
        if since_report == report_every or fraction >= 1.0:
            losses.append(total.item() / since_report)  # waits for the GPU, which keeps the clock honest
            total.zero_()
            spent = time.perf_counter() - start
            report(
                f"step {step:6d}  {spent:6.1f} s  {step * batch / spent:8.0f} patches/s  "
                f"loss {losses[-1]:.4f}  gain {-10 * math.log10(losses[-1]):5.2f} dB"
            )
    return losses


@torch.no_grad()
def evaluate(model: Denoiser, names: tuple[str, ...], device: torch.device) -> dict[str, dict[str, float]]:
    """PSNR in decibels of each photo, noisy and denoised (clipped to [0, 1]), with the noise of seed 0."""
    model.to(device).eval()
    results: dict[str, dict[str, float]] = {}
    for name in names:
        clean = photos.load(name).to(device)  # [1, 1, height, width]
        noisy = photos.noisy(clean)
        denoised = model(noisy).clamp(0.0, 1.0)
        results[name] = {"noisy": round(psnr(noisy, clean), 3), "denoised": round(psnr(denoised, clean), 3)}
    return results


def save(model: Denoiser, path: Path, metadata: dict[str, str]) -> int:
    """Write the weights as float32 safetensors with metadata; returns the file's size in bytes."""
    safetensors = optional_module("safetensors.torch")
    tensors = {
        name: value.detach().cpu().float().contiguous() if value.is_floating_point() else value.detach().cpu()
        for name, value in model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    content: bytes = safetensors.save(tensors, metadata=metadata)
    if len(content) > MAXIMUM_BYTES:
        raise ValueError(f"the weights take {len(content)} bytes, more than the {MAXIMUM_BYTES} allowed")
    path.write_bytes(content)
    return len(content)


def main(arguments: list[str] | None = None) -> None:
    """Train, evaluate on the held-out photos, write the weights and, if asked, a JSON summary."""
    parser = argparse.ArgumentParser(prog="python -m examples.train_denoiser", description=main.__doc__)
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="time budget of the training itself (default: 4)"
    )
    parser.add_argument("--steps", type=int, help="train for this many steps, whatever time they take")
    parser.add_argument("--batch", type=int, help="patches a step (default: 128 on a GPU, 16 on a CPU)")
    parser.add_argument(
        "--patch", type=int, help="side of a patch in pixels (default: 64 on a GPU, 40 on a CPU)"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="its peak (default: 0.001)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, patches and noise (default: 0)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument(
        "--out", type=Path, default=WEIGHTS, help=f"weights to write (default: {WEIGHTS.name})"
    )
    parser.add_argument("--json", type=Path, help="summary to write")
    options = parser.parse_args(arguments)

    optional_module("safetensors.torch")  # missing: say so before the training, not after it
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    device = torch.device(kind)
    on_gpu = kind == "cuda"
    report_every = 100 if on_gpu else 10
    batch = options.batch or (128 if on_gpu else 16)
    patch = options.patch or (64 if on_gpu else 40)
    seconds = math.inf if options.steps else options.minutes * 60.0
    device_name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    torch.manual_seed(options.seed)
    torch.backends.cudnn.benchmark = True

    source = PatchSource(photos.TRAIN, patch, device, seed=options.seed)
    contents = f"{len(photos.TRAIN)} photos, {source.pixels.shape[1] / 1e6:.1f} megapixels with all scales"
    print(f"{device_name}: {contents}, batch {batch}")
    model = Denoiser()
    initialise(model)
    start = time.perf_counter()
    losses = train(
        model,
        source,
        seconds=seconds,
        steps=options.steps,
        batch=batch,
        peak_learning_rate=options.learning_rate,
        report_every=report_every,
    )
    elapsed = time.perf_counter() - start
    torch.backends.cudnn.benchmark = False  # every photo has a size of its own: nothing to search for
    results = evaluate(model, photos.HELD_OUT, device)
    for name, decibels in results.items():
        print(f"{name:>12}  noisy {decibels['noisy']:.2f} dB  denoised {decibels['denoised']:.2f} dB")

    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "device": device_name,
        "seconds": round(elapsed, 1),
        "sigma": photos.SIGMA,
        "train": list(photos.TRAIN),
        "held_out": list(photos.HELD_OUT),
    }
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
    size = save(model, options.out, metadata)
    print(f"wrote {options.out} ({size} bytes)")
    if options.json:
        summary = facts | {
            "calibration": list(photos.CALIBRATION),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "bytes": size,
            "arithmetic": "bfloat16 autocast" if on_gpu else "float32",
            "seed": options.seed,
            "batch": batch,
            "patch": patch,
            "peak_learning_rate": options.learning_rate,
            "losses": {"every_steps": report_every, "values": [round(loss, 5) for loss in losses]},
            "psnr": results,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(summary, indent=2) + "\n")
        print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
