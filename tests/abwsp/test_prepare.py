"""Preparation: both plans, fitted if asked for, and times of both patterns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor, nn

from tests.abwsp.problem import PATHS, PR, batches, net
from wsp_compiler import PruneRule, speedup
from wsp_compiler.abwsp.choices import Choices, LayerPair
from wsp_compiler.abwsp.prepare import Preparation
from wsp_compiler.abwsp.ranks import Ranks
from wsp_compiler.batches import calibration_calls
from wsp_compiler.options import CompileOptions
from wsp_compiler.speed import MEASURED, CallFormat, Timing


class Rows:
    """1 us for every row of the fullest position; ``dense_us`` for the dense convolution."""

    def __init__(self, dense_us: float = 1000.0) -> None:
        self.dense_us = dense_us
        self.shapes: dict[str, tuple[int, ...]] = {}

    def pruned(
        self, path: str, conv: nn.Conv2d, keep: Tensor, tile: int, calls: Sequence[CallFormat]
    ) -> Timing:
        self.shapes[path] = calls[0].shape
        return Timing(float(keep.sum(1).max()), MEASURED)

    def dense(self, path: str, conv: nn.Conv2d, calls: Sequence[CallFormat]) -> Timing:
        return Timing(self.dense_us, MEASURED)


def choices(**changes: Any) -> Choices:
    model = net()
    data = batches()
    given: dict[str, Any] = {
        "options": CompileOptions(PR, "wsp", importance="l2"), "example_inputs": data[0], "refit": False,
        "calls": calibration_calls(data, model), "target": None,
    }  # fmt: skip
    return Preparation(model, **{**given, **changes}).choices(Ranks())


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Rows:
    source = Rows()
    monkeypatch.setattr(speedup, "speed_sources", lambda *args: (source, Rows()))
    return source


def test_times_are_of_the_layers_with_a_choice(rows: Rows) -> None:
    found = choices()
    assert found.layers == tuple(found.times) == PATHS
    for path, pair in found.times.items():
        assert pair.wsp_us == float(found.wsp[path].keep.sum(1).max())
        assert pair.bwsp_us == float(found.bwsp[path].keep.sum(1).max())
        assert pair.wsp_us >= pair.bwsp_us
        assert rows.shapes[path][:2] == (16, 16 if path != "conv4" else 24)


def test_what_is_slower_than_dense_stays_dense(rows: Rows) -> None:
    everything = choices()
    rows.dense_us = everything.times["conv3"].wsp_us  # not faster
    found = choices()
    slower = [path for path, pair in everything.times.items() if pair.wsp_us >= rows.dense_us]
    assert slower
    assert set(found.wsp) == set(PATHS) - set(slower)
    assert all("the dense convolution is faster" in found.wsp.left_alone[path] for path in slower)
    kept = choices(options=CompileOptions(PR, "wsp", importance="l2", keep_slower=True))
    assert tuple(kept.wsp) == PATHS


def test_without_known_times_there_are_none() -> None:
    assert choices().times == {}


def test_given_times_are_used() -> None:
    given = {"conv2": LayerPair(3.0, 2.0)}
    assert choices(given_times=given).times == given


def test_a_refit_is_of_both_plans(rows: Rows) -> None:
    found = choices(refit=True, options=CompileOptions(PR, "wsp"))
    for plan in (found.wsp, found.bwsp):
        assert tuple(plan.refits) == PATHS
    assert {entry.method for entry in found.bwsp.values()} == {"bwsp"}


def test_nothing_to_prune() -> None:
    found = choices(options=CompileOptions(PR, "wsp", rules=(PruneRule("conv.", skip=True),)))
    assert found.layers == ()
    assert "3 channels" in found.wsp.left_alone["stem"]
    assert found.plan("").left_alone == found.wsp.left_alone
