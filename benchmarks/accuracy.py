"""Relative L2 errors, and how large one may be before a time stops counting."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

LIMITS: dict[str, float] = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}
"""Largest relative L2 error that rounding explains, F(4x4, 3x3) included, per precision."""


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64 on the CPU."""
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    if a.shape != e.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(e.shape)}")
    return ((a - e).norm() / e.norm().clamp_min(1e-300)).item()


def ends_of_batch(x: Tensor) -> Tensor:
    """The first and the last image: [min(n, 2), c, h, w]."""
    return x if x.shape[0] <= 2 else torch.cat((x[:1], x[-1:]))


def float64_error(compiled: nn.Module, graph_module: nn.Module, x: Tensor) -> float:
    """Relative L2 error of `compiled(x)` against `graph_module`, the same kept weights, in float64.

    The reference runs on the CPU, on the first and the last image of x: [n, c, h, w].
    """
    reference = copy.deepcopy(graph_module).double().cpu()
    with torch.no_grad():
        expected = reference(ends_of_batch(x).double().cpu())
        actual = ends_of_batch(compiled(x))
    return relative_l2(actual, expected)


def check(error: float, precision: str) -> None:
    """ArithmeticError where `error` is NaN or more than rounding explains: a wrong result has no speed."""
    if math.isnan(error) or error > LIMITS[precision]:
        raise ArithmeticError(f"relative error {error:.2e} exceeds {LIMITS[precision]:.0e} for {precision}")
