"""l1: sums of absolute values."""

from __future__ import annotations

import torch

from wsp_compiler.pruning.importance import IMPORTANCES, l2
from wsp_compiler.pruning.l1 import l1


def test_sums_of_absolute_values() -> None:
    U = torch.tensor([[[1.0, -2.0], [3.0, 0.0]], [[0.0, 0.0], [-1.0, -1.0]]])
    assert l1(U, (2,)).flatten().tolist() == [3, 3, 0, 2]
    assert l1(U, (1,)).flatten().tolist() == [4, 2, 1, 1]
    assert l1(U, (0, 2)).flatten().tolist() == [3, 5]
    assert l1(U, (2,)).shape == l2(U, (2,)).shape == (2, 2, 1)
    assert IMPORTANCES["l1"] is l1
