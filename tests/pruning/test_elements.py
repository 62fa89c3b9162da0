"""WWP: single weights, one threshold for the layer."""

from __future__ import annotations

import pytest
import torch

from wsp_compiler.pruning import IMPORTANCES, PATTERNS
from wsp_compiler.pruning.base import kept_count

WWP = PATTERNS["wwp"]


@pytest.mark.parametrize("pr", [0.0, 0.3, 0.8, 0.999999])
def test_keeps_the_largest_elements(pr: float) -> None:
    U = torch.randn(16, 5, 7, dtype=torch.float64)
    keep = WWP.keep(U, pr, "row", IMPORTANCES["l2"])
    assert keep.shape == U.shape
    assert int(keep.sum()) == kept_count(U.numel(), pr)
    dropped = U[~keep].abs()
    assert not len(dropped) or float(dropped.max()) <= float(U[keep].abs().min())


def test_direction_means_nothing() -> None:
    U = torch.randn(36, 3, 4, dtype=torch.float64)
    assert torch.equal(
        WWP.keep(U, 0.5, "row", IMPORTANCES["l1"]), WWP.keep(U, 0.5, "column", IMPORTANCES["l1"])
    )


@pytest.mark.parametrize("name", ["output", "l2", "l1", "fpgm"])
def test_every_criterion_scores_elements(name: str) -> None:
    U = torch.randn(16, 5, 7, dtype=torch.float64)
    scores = IMPORTANCES[name](U, ())
    assert scores.shape == U.shape
    assert len(scores.unique()) > U.numel() / 2
    if name in ("l2", "l1"):
        torch.testing.assert_close(scores, U.abs())
    if name == "fpgm":
        expected = (U[3].flatten() - U[3, 2, 4]).abs().sum()
        torch.testing.assert_close(scores[3, 2, 4], expected)
