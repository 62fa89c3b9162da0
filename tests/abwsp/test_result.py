"""Spearman's rank correlation against known values, and the table of candidates."""

from __future__ import annotations

import math

import pytest
from torch import nn

from wsp_compiler.abwsp.choices import LayerPair
from wsp_compiler.abwsp.result import Candidate, SearchResult, spearman
from wsp_compiler.plan import PruningPlan


def test_spearman() -> None:
    assert spearman([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert spearman([1, 2, 3], [5, 4, -1]) == pytest.approx(-1)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) without ties: d = 1, 1, 1, 1, 0
    assert spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / 120)
    # ties share their mean rank: ranks 1, 2.5, 2.5, 4 beside 1, 2, 3, 4
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_spearman_is_undefined_for_constants_and_single_pairs() -> None:
    for left, right in (([], []), ([1.0], [2.0]), ([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [3.0, 3.0])):
        assert math.isnan(spearman(left, right))
    with pytest.raises(ValueError, match="2 values beside 1"):
        spearman([1, 2], [1])


def result(times: dict[str, LayerPair]) -> SearchResult:
    best = Candidate({"a": "wsp", "b": "bwsp"}, 0.6, 1.25, 0, 1, 0.75)
    other = Candidate({"a": "bwsp", "b": "bwsp"}, 0.5, 1.5, 0, 0, 0.7)
    lost = Candidate({"a": "wsp", "b": "wsp"}, 0.7, 1.0, 1)
    return SearchResult(PruningPlan(), nn.Identity(), best, (lost, best, other), 0.9, times)


def test_winners_and_correlation() -> None:
    found = result({})
    assert [entry.won for entry in found.winners] == [0, 1]
    assert found.rank_correlation == pytest.approx(1)


def test_report() -> None:
    report = result({"a": LayerPair(2, 1)}).report()
    lines = report.splitlines()
    assert lines[2].split() == ["0.7", "1.000", "round", "2", "WW"]
    assert lines[3].split() == ["round", "2", "0.75", "0.6", "1.250", "round", "1", "WB"]
    assert "dense accuracy 0.9" in report
    assert "best accuracy 0.75, BS 1.250" in report
    assert "winners: 1.00" in report
    assert "no layer's time" not in report
    assert lines[-1] == "balance gains 2.000x over all of these layers"
    even = result({"a": LayerPair(10, 9.9), "b": LayerPair(5, 5.1)}).report()
    assert "balance gains 1.000x over all of these layers: next to nothing" in even
    assert "no layer's time is known" in result({}).report()
