"""FP: whole filters, scored over all positions."""

from __future__ import annotations

import pytest
import torch

from wsp_compiler.pruning import IMPORTANCES, PATTERNS
from wsp_compiler.pruning.base import kept_count

FP, L2 = PATTERNS["fp"], IMPORTANCES["l2"]


@pytest.mark.parametrize("pr", [0.0, 0.3, 0.7, 0.8, 0.99])
@pytest.mark.parametrize("positions", [16, 36])
def test_keeps_the_filters_with_the_largest_norm(pr: float, positions: int) -> None:
    U = torch.randn(positions, 10, 6).double()
    keep = FP.keep(U, pr, "row", L2)
    assert keep.dtype == torch.bool
    assert keep.shape == (1, 10, 1)
    norms = [float(U[:, f].norm()) for f in range(10)]
    best = sorted(range(10), key=lambda f: -norms[f])[: kept_count(10, pr)]
    assert keep.flatten().nonzero().flatten().tolist() == sorted(best)


def test_direction_means_nothing() -> None:
    U = torch.randn(16, 9, 4).double()
    assert torch.equal(FP.keep(U, 0.5, "row", L2), FP.keep(U, 0.5, "column", L2))


def test_ties_keep_the_first_filters() -> None:
    keep = FP.keep(torch.ones(16, 8, 4).double(), 0.5, "row", L2)
    assert keep.flatten().tolist() == [True] * 4 + [False] * 4


def test_at_least_one_filter_stays() -> None:
    assert int(FP.keep(torch.randn(16, 3, 4).double(), 0.999, "row", L2).sum()) == 1
