"""A small network, data and a quality, for the tests of searches: an evaluation takes milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference import randomise
from wsp_compiler.clone import named_modules
from wsp_compiler.options import CompileOptions
from wsp_compiler.plan import PruningPlan, make_plan
from wsp_compiler.sites import collect_sites
from wsp_compiler.speedup import BalancedSpeedup
from wsp_compiler.trace import trace

PR = 0.6
PATHS = ("conv1", "conv2", "conv3", "conv4")
"""Convolutions with a choice; the stem has too few channels."""


class Net(nn.Module):
    """Five convolutions with batch norm, one of them in a residual block, and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 16, 16, 24, 24)
        for i in range(5):
            name = f"conv{i}" if i else "stem"
            setattr(self, name, nn.Conv2d(widths[i], widths[i + 1], 3, padding=1, bias=False))
            setattr(self, f"norm{i}", nn.BatchNorm2d(widths[i + 1]))
        self.classifier = nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        y = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(y)) + x)
        x = F.max_pool2d(F.relu(self.norm3(self.conv3(x))), 2)
        x = F.relu(self.norm4(self.conv4(x)))
        return self.classifier(x.mean((2, 3)))


def images(count: int, seed: int) -> Tensor:
    """Smooth pictures [count, 3, 16, 16], the same for the same seed."""
    noise = torch.randn(count, 3, 20, 20, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(noise, 5, 1) * 4


def net() -> nn.Module:
    """The same network every time, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return randomise(Net(), images(64, 0))


def plans(**options: Any) -> tuple[PruningPlan, PruningPlan]:
    """WSP everywhere, and BWSP everywhere, not calibrated."""
    model = net()
    convolutions = {path: conv for path, conv in named_modules(model) if isinstance(conv, nn.Conv2d)}
    sites = collect_sites(trace(model))
    wsp, bwsp = (
        make_plan(sites, convolutions, CompileOptions(PR, method, **options)) for method in ("wsp", "bwsp")
    )
    return wsp, bwsp


def batches(count: int = 2, seed: int = 1) -> list[Tensor]:
    """Calibration data."""
    return list(images(16 * count, seed).split(16))


class Fidelity:
    """eval_fn: decibels of the dense network's output over the difference from it, on images of its own."""

    def __init__(self, dense: nn.Module) -> None:
        self.x = images(48, 2)
        self.calls = 0
        with torch.no_grad():
            self.wanted = dense(self.x)

    def __call__(self, model: nn.Module) -> float:
        assert not model.training
        self.calls += 1
        with torch.no_grad():
            error = (model(self.x) - self.wanted).square().mean() / self.wanted.square().mean()
        return float(-10 * torch.log10(error.clamp_min(1e-9)))


def labelled(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Batches with the dense network's labels."""
    dense = net()
    with torch.no_grad():
        return [(x, dense(x).argmax(1)) for x in images(16 * count, 3).split(16)]


def times() -> dict[str, BalancedSpeedup]:
    """Times of every layer, as of a GPU on which balance pays differently everywhere."""
    pairs = {"conv1": (10.0, 8.0), "conv2": (10.0, 9.5), "conv3": (14.0, 9.0), "conv4": (20.0, 12.0)}
    return {path: BalancedSpeedup(wsp_us=a, bwsp_us=b, ratio=a / b) for path, (a, b) in pairs.items()}


def options(**changes: Any) -> dict[str, Any]:
    """Arguments of a search that measures nothing."""
    return {"samples": 5, "beta": 2, "times": times(), "tune": "off", **changes}
