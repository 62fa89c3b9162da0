"""importance: the L2 norm of every unit."""

from __future__ import annotations

import math

import pytest
import torch

from wsp_compiler.options import IMPORTANCES as OPTION_IMPORTANCES
from wsp_compiler.pruning.importance import IMPORTANCES, l2


@pytest.mark.parametrize(("dims", "shape"), [((2,), (16, 5, 1)), ((1,), (16, 1, 7)), ((0, 2), (1, 5, 1))])
def test_l2_is_the_norm_over_the_units_dims(dims: tuple[int, ...], shape: tuple[int, ...]) -> None:
    U = torch.randn(16, 5, 7).double()
    scores = l2(U, dims)
    assert scores.shape == shape
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, torch.linalg.vector_norm(U, dim=dims, keepdim=True))


def test_l2_by_hand() -> None:
    U = torch.tensor([[[3.0, 4.0], [1.0, -2.0]]]).double()  # [1, 2, 2]
    assert l2(U, (2,)).flatten().tolist() == [5.0, math.sqrt(5)]
    assert l2(U, (1,)).flatten().tolist() == [math.sqrt(10), math.sqrt(20)]


def test_the_names_are_those_of_the_options() -> None:
    assert tuple(IMPORTANCES) == OPTION_IMPORTANCES
