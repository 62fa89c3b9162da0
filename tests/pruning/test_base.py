"""base: how many units are kept, and which."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from wsp_compiler.pruning import PATTERNS
from wsp_compiler.pruning.base import keep_largest, kept_count


@pytest.mark.parametrize("units", [1, 2, 3, 7, 10, 16, 64, 100, 1024])
@pytest.mark.parametrize("percent", [0, 1, 10, 29, 30, 33, 50, 57, 58, 70, 80, 90, 99])
def test_kept_count_is_exact(units: int, percent: int) -> None:
    removed = math.floor(Fraction(percent, 100) * units)  # no binary rounding
    assert kept_count(units, percent / 100) == max(1, units - removed)


def test_at_least_one_unit_is_kept() -> None:
    assert kept_count(4, 0.999999999999) == 1
    assert kept_count(1, 0.5) == 1


def test_binary_fractions_do_not_remove_one_too_few() -> None:
    assert 0.29 * 100 < 29
    assert kept_count(100, 0.29) == 71


def test_keep_largest_keeps_the_largest() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    assert keep_largest(scores, 2).tolist() == [[True, False, True], [False, True, True]]


@pytest.mark.parametrize("size", [5, 33, 1000])  # sorting changes its algorithm with the size
def test_ties_go_to_the_lower_index(size: int) -> None:
    scores = torch.ones(2, size)
    keep = keep_largest(scores, size // 2)
    assert keep[:, : size // 2].all()
    assert not keep[:, size // 2 :].any()


def test_every_pattern_is_registered_under_its_own_name() -> None:
    assert {name: pattern.name for name, pattern in PATTERNS.items()} == {name: name for name in PATTERNS}
    assert {name for name, pattern in PATTERNS.items() if pattern.uses_direction} == {"wsp", "bwsp"}
