"""fpgm: the most replaceable unit has the smallest score, whatever its norm."""

from __future__ import annotations

import pytest
import torch

from wsp_compiler.pruning import PATTERNS
from wsp_compiler.pruning.fpgm import fpgm


@pytest.mark.parametrize(("dims", "shape"), [((2,), (16, 5, 1)), ((1,), (16, 1, 3)), ((0, 2), (1, 5, 1))])
def test_sums_of_distances(dims: tuple[int, ...], shape: tuple[int, ...]) -> None:
    U = torch.randn(16, 5, 3, dtype=torch.float64)
    scores = fpgm(U, dims)
    assert scores.shape == shape
    if dims == (2,):
        expected = sum(float((U[4, 2] - U[4, other]).norm()) for other in range(5))
        assert float(scores[4, 2, 0]) == pytest.approx(expected)
    elif dims == (1,):
        expected = sum(float((U[4, :, 2] - U[4, :, other]).norm()) for other in range(3))
        assert float(scores[4, 0, 2]) == pytest.approx(expected)
    else:
        expected = sum(float((U[:, 2] - U[:, other]).norm()) for other in range(5))
        assert float(scores[0, 2, 0]) == pytest.approx(expected)


def test_a_large_filter_in_the_middle_goes_before_a_small_one_apart() -> None:
    U = torch.ones(16, 5, 2) * torch.tensor([10.0, 11.0, 9.0, 10.0, 1.0]).view(1, 5, 1)
    keep = PATTERNS["fp"].keep(U, 0.4, "row", fpgm)
    assert keep.flatten().tolist() == [False, True, True, False, True]
