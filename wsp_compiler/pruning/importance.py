"""Criteria that score the units of a pattern. "l2" is the ABWSP paper's."""

from __future__ import annotations

from torch import Tensor

from wsp_compiler.pruning.base import Importance


def l2(U: Tensor, dims: tuple[int, ...]) -> Tensor:
    """L2 norm of every unit that spans ``dims`` of U [p*p, n, c]; those dims keep size 1."""
    return U.square().sum(dim=dims, keepdim=True).sqrt()


IMPORTANCES: dict[str, Importance] = {"l2": l2}
