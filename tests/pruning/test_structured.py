"""WSP: one threshold for the rows (or columns) of all positions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wsp_compiler.pruning import IMPORTANCES, PATTERNS
from wsp_compiler.pruning.base import kept_count

WSP, L2 = PATTERNS["wsp"], IMPORTANCES["l2"]


def units(U: Tensor, direction: str) -> list[tuple[float, int, int]]:
    """(norm, position, index) of every row or column."""
    matrices = U if direction == "row" else U.transpose(1, 2)
    return [(float(matrices[k, i].norm()), k, i) for k in range(U.shape[0]) for i in range(matrices.shape[1])]


@pytest.mark.parametrize("pr", [0.0, 0.29, 0.5, 0.8, 0.99])
@pytest.mark.parametrize(("direction", "shape"), [("row", (16, 7, 1)), ("column", (16, 1, 5))])
def test_keeps_the_largest_units_of_the_layer(pr: float, direction: str, shape: tuple[int, ...]) -> None:
    U = torch.randn(16, 7, 5).double() * torch.rand(16, 1, 1).double()  # positions of unequal size
    keep = WSP.keep(U, pr, direction, L2)
    assert keep.dtype == torch.bool
    assert keep.shape == shape
    every = units(U, direction)
    best = sorted(every, reverse=True)[: kept_count(len(every), pr)]
    expected = torch.zeros(16, max(shape[1:]), dtype=torch.bool)
    for _, k, i in best:
        expected[k, i] = True
    assert torch.equal(keep.reshape(16, -1), expected)


def test_positions_may_lose_everything() -> None:
    U = torch.ones(16, 4, 4).double()
    U[0] = 100.0
    keep = WSP.keep(U, 1 - 4 / 64, "row", L2)
    assert keep[0].all()
    assert not keep[1:].any()


@pytest.mark.parametrize("direction", ["row", "column"])
def test_ties_keep_the_first_positions(direction: str) -> None:
    keep = WSP.keep(torch.ones(16, 6, 6).double(), 0.5, direction, L2).reshape(16, 6)
    assert keep[:8].all()
    assert not keep[8:].any()


def test_at_least_one_unit_of_the_layer_stays() -> None:
    keep = WSP.keep(torch.randn(36, 2, 3).double(), 0.9999, "row", L2)
    assert int(keep.sum()) == 1
