"""interpolation: between known points, and constant beyond them."""

from __future__ import annotations

import pytest

from wsp_compiler.budget.interpolation import linear


@pytest.mark.parametrize(
    ("x", "expected"), [(-1.0, 5.0), (0.0, 5.0), (0.5, 6.0), (1.0, 7.0), (2.0, 4.0), (3.0, 1.0), (9.0, 1.0)]
)
def test_linear(x: float, expected: float) -> None:
    assert linear([(0.0, 5.0), (1.0, 7.0), (3.0, 1.0)], x) == pytest.approx(expected)


def test_one_point_and_equal_points() -> None:
    assert linear([(1.0, 2.0)], 0.3) == 2.0
    assert linear([(0.0, 1.0), (1.0, 2.0), (1.0, 4.0), (2.0, 5.0)], 1.0) == 2.0
