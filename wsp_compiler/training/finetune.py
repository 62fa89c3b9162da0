"""A training loop for pruned networks: distillation from the dense network, or a loss on labels; resumable.

Learning rates in the Winograd domain. For white-noise inputs the squared error curves by 1 along every weight of a
3x3 filter; along Winograd weights it curves by up to 6.9 for F(2x2, 3x3) and 97,500 for F(4x4, 3x3), the largest
eigenvalues of :func:`wsp_compiler.pruning.moments.white_gram`. :class:`WinogradConv2d` scales its weights by position,
which leaves 2.2 and 8.0. Plain SGD therefore needs about half (F2) or an eighth (F4) of the rate that suits the
3x3 filters. Adam's steps follow each weight's own gradients and need no such change; half of the rate that trained
the network is a good start all the same, since a calibrated network only has to be mended.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsp_compiler.errors import InputError, OptionError

LEARNING_RATE = 5e-4
WARM_UP = 0.02
"""Share of the run in which the learning rate rises to its peak."""


def learning_rate_at(fraction: float, peak: float) -> float:
    """Learning rate once ``fraction`` of the run is done: a linear rise, then a cosine to zero."""
    if fraction < WARM_UP:
        return peak * max(fraction / WARM_UP, 0.02)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - WARM_UP) / (1 - WARM_UP))))


def finetune(
    model: nn.Module,
    data: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    learning_rate: float = LEARNING_RATE,
    weight_decay: float = 0.0,
    autocast: torch.dtype | None = None,
    train_norms: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    on_step: Callable[[int, Tensor, float], None] | None = None,
) -> nn.Module:
    """Train a pruned model with Adam.

    Args:
        model: what :func:`wsp_compiler.prune` returned; trained in place and left in eval mode.
        data: batches, started over when they end: a tensor, or (inputs, labels). Moved to the model's device.
        teacher: the dense model. With it the target is its output and labels are not used.
        loss: (output, target) -> scalar. By default the mean squared error to a teacher's output (divided by the
            target's mean square) and cross-entropy with labels.
        steps, seconds: length of the run; the learning rate follows the one that is given.
        learning_rate: peak of Adam's, see the module's docstring.
        weight_decay: AdamW's.
        autocast: dtype of the convolutions, such as torch.bfloat16; weights and loss stay float32.
        train_norms: let batch norms normalise with batch statistics and update their own. False keeps the
            calibrated statistics and trains their scale and shift alone.
        checkpoint: file with the state of the run, written now and then; if it exists, the run goes on from there.
            The data start over.
        checkpoint_seconds: how often it is written.
        on_step: called with (step, loss as a tensor without dimensions, fraction of the run).

    Returns:
        ``model``.

    Raises:
        OptionError: not exactly one of steps and seconds. InputError: no batch, or a loss that is not finite.
    """
    if (steps is None) == (seconds is None) or (steps or seconds or 0) <= 0:
        raise OptionError(
            "give either steps or seconds, more than 0", where="finetune", fix="for example steps=1000"
        )
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    state = _Run(model, optimizer, None if checkpoint is None else Path(checkpoint))
    model.train()
    if not train_norms:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
                module.eval()
    batches, begin, saved = iter(data), time.monotonic() - state.elapsed, time.monotonic()
    try:
        while (fraction := state.step / steps if steps else (time.monotonic() - begin) / (seconds or 1)) < 1:
            batch = next(batches, None)
            if batch is None:
                batches = iter(data)
                batch = next(batches, None)
            if batch is None:
                raise InputError("it holds no batch", where="finetune data", fix="give at least one batch")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(fraction, learning_rate)
            value = _train_step(model, teacher, loss, optimizer, batch, device, autocast)
            state.step += 1
            if state.step % 50 == 1 and not math.isfinite(float(value)):
                raise InputError(
                    f"the loss is {float(value)} at step {state.step}",
                    where="finetune",
                    fix="use a smaller learning_rate, or check the data",
                )
            if on_step is not None:
                on_step(state.step, value, fraction)
            if time.monotonic() - saved > checkpoint_seconds:
                saved = time.monotonic()
                state.save(saved - begin)
    finally:
        model.eval()
    state.save(time.monotonic() - begin)
    return model


class _Run:
    """The part of a run that a checkpoint holds."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, path: Path | None) -> None:
        self.model, self.optimizer, self.path = model, optimizer, path
        self.step, self.elapsed = 0, 0.0
        if path is not None and path.is_file():
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            self.step, self.elapsed = int(state["step"]), float(state["elapsed"])

    def save(self, elapsed: float) -> None:
        """Write the checkpoint in one step: a killed run leaves the old one or the new one."""
        if self.path is None:
            return
        partial = self.path.with_name(self.path.name + ".partial")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"step": self.step, "elapsed": elapsed}, partial)
        partial.replace(self.path)


def _train_step(
    model: nn.Module,
    teacher: nn.Module | None,
    loss: Callable[[Any, Any], Tensor] | None,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    device: torch.device,
    autocast: torch.dtype | None,
) -> Tensor:
    parts: list[Any] = list(cast("Any", batch)) if isinstance(batch, (tuple, list)) else [batch]
    given = [value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for value in parts]
    with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
        output: Any = model(given[0])
        with torch.no_grad():
            target: Any = teacher(given[0]) if teacher is not None else given[1] if len(given) > 1 else None
    if target is None:
        raise InputError(
            "the batch holds no labels", where="finetune data", fix="give (inputs, labels), or a teacher"
        )
    value = (loss or (_relative_square if teacher is not None else _cross_entropy))(output, target)
    optimizer.zero_grad(set_to_none=True)
    cast("Any", value).backward()
    optimizer.step()
    return value.detach()


def _relative_square(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error / mean square of the target."""
    return F.mse_loss(output.float(), target.float()) / (target.float().square().mean() + 1e-12)


def _cross_entropy(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.float(), labels)
