"""One training loop for dense and pruned networks: AdamW, a cosine learning rate, on CUDA one graph for every step.

Small networks leave a GPU waiting for Python: forward, backward and update are captured once and replayed. Batches
are drawn and augmented many at a time for the same reason.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WARM_UP = 0.05
DRAWN = 16
"""Batches drawn and augmented at once."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Args:
        steps: updates.
        batch: images of a step.
        learning_rate: AdamW's at its peak; a linear rise over 5% of the steps, then a cosine to zero.
        weight_decay: AdamW's.
        smoothing: of the labels.
        narrow: convolutions in bfloat16 (autocast) on CUDA; weights and loss stay float32.
        graph: replay one CUDA graph per step.
    """

    steps: int
    batch: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    smoothing: float = 0.1
    narrow: bool = True
    graph: bool = True

    def rate(self, step: int) -> float:
        """Learning rate of update number `step`, from 0."""
        done = (step + 1) / self.steps
        if done < WARM_UP:
            return self.learning_rate * done / WARM_UP
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - WARM_UP) / (1 - WARM_UP))))


class _Step:
    """One update of a model in training mode on the batch in `x`, `y`, eager or as a CUDA graph."""

    def __init__(self, model: nn.Module, recipe: Recipe, x: Tensor, y: Tensor) -> None:
        self.model, self.recipe = model, recipe
        self.x, self.y = x.clone(memory_format=torch.channels_last), y.clone()
        self.cuda = x.is_cuda
        self.rate = torch.zeros((), device=x.device)
        self.loss = torch.zeros((), device=x.device)
        options: dict[str, Any] = {"lr": 0.0}
        if self.cuda:
            options = {"lr": self.rate, "fused": True, "capturable": True}
        self.optimizer = torch.optim.AdamW(model.parameters(), weight_decay=recipe.weight_decay, **options)
        self.graph: torch.cuda.CUDAGraph | None = None
        if self.cuda and recipe.graph:
            self.graph = self._captured()

    def _update(self) -> None:
        narrow = self.cuda and self.recipe.narrow
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if narrow else nullcontext():
            output = self.model(self.x)
        loss = F.cross_entropy(output.float(), self.y, label_smoothing=self.recipe.smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        """The graph of an update; None where the capture fails, and updates then run eagerly."""
        before = copy.deepcopy(self.model.state_dict())
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # chooses algorithms, makes the optimizer's state; the rate is zero
                    self._update()
            torch.cuda.current_stream().wait_stream(side)
            self.optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._update()
        except Exception as problem:
            torch.cuda.synchronize()
            print(f"no CUDA graph: {type(problem).__name__}: {problem}", flush=True)
            graph = None
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(before[name])
            for state in self.optimizer.state.values():
                for tensor in state.values():
                    tensor.zero_()
        return graph

    def __call__(self, x: Tensor, y: Tensor, rate: float) -> None:
        """Update on images x [n, 3, h, w] and labels y [n]."""
        self.x.copy_(x)
        self.y.copy_(y)
        if self.cuda:
            self.rate.fill_(rate)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        if self.graph is not None:
            self.graph.replay()
        else:
            self._update()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the update."""
        return self.optimizer.state_dict()

    def resume(self, state: dict[str, Any]) -> None:
        """Go on with the optimizer's state of a checkpoint; tensors of a graph keep their places."""
        if not self.optimizer.state:
            self.optimizer.load_state_dict(state)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate if self.cuda else 0.0
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, saved in state["state"].items():
            for name, tensor in self.optimizer.state[parameters[index]].items():
                tensor.copy_(saved[name])


def _batches(source: Any, batch: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches of a task's training images, drawn many at a time."""
    while steps > 0:
        count = min(DRAWN, steps)
        x, y = source.sample(count * batch)
        yield from zip(x.split(batch), y.split(batch), strict=True)
        steps -= count


def train(
    model: nn.Module,
    source: Any,
    recipe: Recipe,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 30.0,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> nn.Module:
    """Train a network in place, batch norms with batch statistics; it is left in eval mode.

    Args:
        model: on the device that trains.
        source: a task's training images.
        recipe: how.
        seed: of the batches.
        checkpoint: file that the state is written to now and then, and that a killed run goes on from; the batches
            then begin anew. Removed at the end.
        on_step: called with the number of updates done and the loss (a tensor without dimensions).

    Raises:
        ArithmeticError: the loss is not finite at the end.
    """
    model.to(memory_format=torch.channels_last).train()
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
        torch.backends.cudnn.benchmark = True
    source.seed(seed)
    step_of = _Step(model, recipe, *source.sample(recipe.batch))
    source.seed(seed)
    first, saved = 0, time.monotonic()
    if checkpoint is not None and checkpoint.is_file():
        state: dict[str, Any] = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        step_of.resume(state["optimizer"])
        first = int(state["step"])
        source.seed(seed + 1000 * first)
    for step, (x, y) in enumerate(_batches(source, recipe.batch, recipe.steps - first), start=first):
        step_of(x, y, recipe.rate(step))
        if on_step is not None:
            on_step(step + 1, step_of.loss)
        if checkpoint is not None and time.monotonic() - saved > checkpoint_seconds:
            saved = time.monotonic()
            partial = checkpoint.with_name(checkpoint.name + ".partial")
            torch.save({"model": model.state_dict(), "optimizer": step_of.state(), "step": step + 1}, partial)
            partial.replace(checkpoint)
    model.zero_grad(set_to_none=True)
    model.eval()
    if not math.isfinite(float(step_of.loss)):
        raise ArithmeticError(f"the loss is {float(step_of.loss)}: use a smaller learning rate")
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return model
