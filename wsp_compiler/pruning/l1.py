"""L1 norm of a unit's Winograd weights (for filters: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017)."""

from __future__ import annotations

from torch import Tensor

from wsp_compiler.pruning.base import over_units


def l1(U: Tensor, dims: tuple[int, ...]) -> Tensor:
    """L1 norm of every unit that spans ``dims`` of U [p*p, n, c]; those dims keep size 1."""
    return over_units(U.abs(), dims)
