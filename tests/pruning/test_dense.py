"""dense: nothing is pruned, whatever pr says."""

from __future__ import annotations

import pytest
import torch

from wsp_compiler.pruning import IMPORTANCES, PATTERNS


@pytest.mark.parametrize("pr", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("direction", ["row", "column"])
def test_keeps_everything(pr: float, direction: str) -> None:
    keep = PATTERNS["dense"].keep(torch.randn(16, 6, 5).double(), pr, direction, IMPORTANCES["l2"])
    assert keep.dtype == torch.bool
    assert keep.shape == (1, 1, 1)
    assert keep.all()
