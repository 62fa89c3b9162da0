"""Errors against float64, and how large one may be before a time stops counting."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LIMITS: dict[tuple[str, int], float] = {
    ("fp32", 2): 1e-5, ("fp32", 4): 1e-4, ("tf32", 2): 2e-3, ("tf32", 4): 1e-2,
    ("fp16", 2): 2e-3, ("fp16", 4): 1e-2, ("bf16", 2): 2e-2, ("bf16", 4): 1e-1,
}  # fmt: skip
"""(precision, output tile side) -> largest relative L2 error that rounding explains."""
MOST_OVER_LIMIT = 8.0
"""No single element may be off by more than this times the limit times the rms of the result."""
CHUNK_ELEMENTS = 1 << 27  # of the float64 reference's largest intermediate result


@dataclass(frozen=True)
class Errors:
    """Relative L2 error, and the largest absolute error over the rms of the exact result."""

    relative_l2: float
    largest_over_rms: float


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||, in float64 on the CPU."""
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    if a.shape != e.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(e.shape)}")
    return ((a - e).norm() / e.norm().clamp_min(1e-300)).item()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """PyTorch fills newly allocated tensors with NaN: what a kernel forgets to write is seen."""
    settings: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        settings.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = before[2]


def float64_errors(compiled: nn.Module, graph_module: nn.Module, x: Tensor) -> Errors:
    """Errors of `compiled(x)`, x: [n, c, h, w], against `graph_module` (the same kept weights) in float64.

    Over all images; the reference runs where `graph_module` is, a few images at a time.
    """
    reference = copy.deepcopy(graph_module).double()
    tensor = next(itertools.chain(reference.parameters(), reference.buffers()), x)
    with torch.no_grad(), poisoned_memory():
        actual = compiled(x).to(tensor.device)
    per_image = 16 * max(x.shape[1], actual.shape[1]) * x.shape[2] * x.shape[3]
    images = max(1, CHUNK_ELEMENTS // per_image)
    squares, largest, total = 0.0, 0.0, 0.0
    with torch.no_grad():
        for first in range(0, x.shape[0], images):
            part = slice(first, first + images)
            expected = reference(x[part].to(tensor.device).double())
            if expected.shape != actual[part].shape:
                raise ValueError(f"shapes differ: {tuple(actual.shape)}, exact {tuple(expected.shape)}")
            difference = (actual[part].double() - expected).abs()
            squares += float(difference.square().sum())
            total += float(expected.square().sum())
            peak = float(difference.max())
            largest = peak if math.isnan(peak) else max(largest, peak)
            if math.isnan(largest):
                break
    rms = math.sqrt(total / actual.numel())
    return Errors(math.sqrt(squares / max(total, 1e-300)), largest / max(rms, 1e-300))


def check(errors: Errors, precision: str, tile: int) -> None:
    """ArithmeticError where an error is NaN or more than rounding explains: a wrong result has no speed."""
    limit = LIMITS[precision, tile]
    if not errors.relative_l2 <= limit:
        raise ArithmeticError(
            f"relative error {errors.relative_l2:.2e} exceeds {limit:.0e} for {precision}, tile {tile}"
        )
    if not errors.largest_over_rms <= MOST_OVER_LIMIT * limit:
        raise ArithmeticError(
            f"an element is off by {errors.largest_over_rms:.2e} of the rms, more than "
            f"{MOST_OVER_LIMIT:g} * {limit:.0e}"
        )
