"""What every pruning pattern has in common: which units it removes, and how many it keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Importance = Callable[[Tensor, tuple[int, ...]], Tensor]
"""(U [p*p, n, c] float64, dims of one unit) -> score of every unit, the unit's dims kept with size 1. No dims: every
element is a unit."""

UNIT_DIMS = {"row": (2,), "column": (1,)}
"""Dimensions of U that one unit spans: a row is U_k[f, :], a column is U_k[:, i]."""


class Pattern(Protocol):
    """A pruning pattern. ``uses_direction`` tells whether "row"/"column" means anything to it."""

    @property
    def name(self) -> str: ...
    @property
    def uses_direction(self) -> bool: ...

    def keep(self, U: Tensor, pr: float, direction: str, importance: Importance) -> Tensor:
        """Choose what stays.

        Args:
            U: [p*p, n, c] float64, the unfolded Winograd weights.
            pr: share of the units to remove, in [0, 1).
            direction: "row" or "column".
            importance: scores the units.

        Returns:
            bool, broadcastable to [p*p, n, c], True = kept.
        """
        ...


def over_units(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sums over the dims of a unit, which keep size 1; over none, where torch.sum would sum over all."""
    return values.sum(dim=dims, keepdim=True) if dims else values


def kept_count(units: int, pr: float) -> int:
    """Units kept out of ``units``: n - floor(pr * n + 1e-9), at least one.

    The 1e-9 makes 0.7 * 10 remove seven although 0.7 * 10 is 6.999... in binary.
    """
    return max(1, units - math.floor(pr * units + 1e-9))


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """bool like ``scores`` [..., units]: the ``count`` largest of the last dim; ties to the lower index."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
