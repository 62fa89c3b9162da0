"""BWSP: the same number of rows (or columns) in every position."""

from __future__ import annotations

import pytest
import torch

from wsp_compiler.pruning import IMPORTANCES, PATTERNS
from wsp_compiler.pruning.base import kept_count

BWSP, L2 = PATTERNS["bwsp"], IMPORTANCES["l2"]


@pytest.mark.parametrize("pr", [0.0, 0.29, 0.5, 0.8, 0.99])
@pytest.mark.parametrize(("direction", "shape"), [("row", (16, 7, 1)), ("column", (16, 1, 5))])
def test_keeps_the_largest_units_of_each_position(pr: float, direction: str, shape: tuple[int, ...]) -> None:
    U = torch.randn(16, 7, 5).double() * torch.rand(16, 1, 1).double()
    keep = BWSP.keep(U, pr, direction, L2)
    assert keep.dtype == torch.bool
    assert keep.shape == shape
    matrices = U if direction == "row" else U.transpose(1, 2)
    size = max(shape[1:])
    for k in range(16):
        norms = [float(matrices[k, i].norm()) for i in range(size)]
        best = sorted(range(size), key=lambda i: -norms[i])[: kept_count(size, pr)]
        assert keep[k].flatten().nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("direction", ["row", "column"])
def test_ties_keep_the_first_units(direction: str) -> None:
    keep = BWSP.keep(torch.ones(36, 6, 6).double(), 0.5, direction, L2).reshape(36, 6)
    assert keep[:, :3].all()
    assert not keep[:, 3:].any()


def test_at_least_one_unit_of_every_position_stays() -> None:
    keep = BWSP.keep(torch.randn(36, 3, 4).double(), 0.9999, "column", L2)
    assert keep.sum(2).flatten().tolist() == [1] * 36
