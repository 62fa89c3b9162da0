"""compile() with measured times: what stays dense, which kernels run, and what the report says."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wsp_compiler
from wsp_compiler import PruningPlan
from wsp_compiler.codegen import measure
from wsp_compiler.codegen.cpu_launch import CpuLayer

from .reference import pruned_convolution, relative_error


class Clock:
    """In place of measuring: microseconds by number of filters; the candidate at ``best`` is the fastest."""

    def __init__(self, ours: dict[int, float], dense: dict[int, float]) -> None:
        self.ours, self.dense, self.best = ours, dense, 2
        self.calls: list[list[str]] = []

    def __call__(self, calls: Mapping[str, Any], inputs: Mapping[str, Sequence[Tensor]]) -> Any:
        self.calls.append(list(calls))
        filters = int(next(iter(calls.values()))(next(iter(inputs.values()))[0]).shape[1])
        if all("cpu" not in label for label in calls):
            return dict.fromkeys(calls, self.dense[filters]), {}
        best = min(self.best, len(calls) - 1)
        return {label: self.ours[filters] * (1 if i == best else 2) for i, label in enumerate(calls)}, {}


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, padding=1), nn.Conv2d(48, 4, 1)
    ).eval()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    made = Clock({32: 5.0, 48: 20.0}, {32: 10.0, 48: 12.0})
    monkeypatch.setattr(measure, "measure", made)
    monkeypatch.setenv("WSP_CACHE_DIR", str(tmp_path))
    return made


def compiled_with(model: nn.Module, x: Tensor, **options: Any) -> Any:
    return wsp_compiler.compile(model, 0.5, method="bwsp", example_inputs=x, **options)


def test_slower_layers_stay_dense_and_the_report_says_so(clock: Clock, model: nn.Sequential) -> None:
    x = torch.randn(2, 16, 9, 11)
    compiled = compiled_with(model, x, tune="fast")
    assert list(compiled.plan) == ["0"]
    why = "the dense convolution is faster: 20 us pruned, 12 us dense (measured)"
    assert compiled.plan.left_alone["2"] == why
    report = compiled.report()
    assert why in report
    assert "in us: 4 measured" in report
    assert "speed not checked" not in report
    (layer,) = compiled.layers()
    with torch.no_grad():
        expected = model[3](
            model[2](torch.relu(pruned_convolution(x, model[0], compiled.plan["0"].keep, 2)).float())
        )
    assert relative_error(compiled(x), expected) < 1e-5
    assert f"kernel of 0: {layer.choices[-1].candidate.label}" in report


def test_the_fastest_candidate_runs(clock: Clock, model: nn.Sequential) -> None:
    x = torch.randn(2, 16, 9, 11)
    (layer,) = compiled_with(model, x, tune="full").layers()
    kernels = layer.last_kernels
    assert isinstance(kernels, CpuLayer)
    candidates = kernels.candidates(1)
    assert kernels.config == candidates[2].config != candidates[0].config
    assert layer.choices[-1].timing.us == 5.0


def test_times_are_kept_for_the_next_compilation(clock: Clock, model: nn.Sequential) -> None:
    x = torch.randn(2, 16, 9, 11)
    first = compiled_with(model, x, tune="fast")
    measured = len(clock.calls)
    assert measured > 0
    for options in ({}, {"tune": "fast"}):
        again = compiled_with(model, x, **options)
        assert again.plan == first.plan
        assert "in us: 4 measured" in again.report()
    assert len(clock.calls) == measured
    assert list(compiled_with(model, x, keep_slower=True).plan) == ["0", "2"]


def test_a_given_plan_is_not_changed_but_the_report_warns(clock: Clock, model: nn.Sequential) -> None:
    x = torch.randn(2, 16, 9, 11)
    plan = wsp_compiler.compile(model, 0.5, method="bwsp").plan
    before = copy.deepcopy(plan.to_json())
    compiled = wsp_compiler.compile(model, example_inputs=x, plan=plan, tune="fast")
    assert list(compiled.plan) == ["0", "2"]
    assert compiled.plan is plan
    assert plan.to_json() == before
    assert not any(times.pruned for times in plan.times.values())
    assert "the dense convolution would be faster: 20 us pruned, 12 us dense (measured)" in compiled.report()
    assert relative_error(compiled(x), wsp_compiler.compile(model, plan=plan)(x)) < 1e-5


def test_the_faster_tile_is_planned(
    clock: Clock, model: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsp_compiler.codegen import tuner

    original = tuner.Tuner.measure_candidates

    def by_tile(self: Any, layer: Any, key: Any, candidates: Any) -> Any:
        clock.ours = {32: 4.0, 48: 4.0} if key.tile == 4 else {32: 5.0, 48: 3.0}
        return original(self, layer, key, candidates)

    monkeypatch.setattr(tuner.Tuner, "measure_candidates", by_tile)
    plan: PruningPlan = compiled_with(model, torch.randn(2, 16, 9, 11), tune="fast", tile="auto").plan
    assert {path: entry.tile for path, entry in plan.items()} == {"0": 4, "2": 2}


def test_without_times_all_is_lowered_and_not_checked(model: nn.Sequential) -> None:
    compiled = compiled_with(model, torch.randn(2, 16, 9, 11))
    assert list(compiled.plan) == ["0", "2"]
    assert "speed not checked for 2 layers" in compiled.report()
    without = wsp_compiler.compile(model, 0.5, method="bwsp")
    assert "speed not checked for 2 layers" in without.report()


def test_threads_meet_a_layer_that_is_ready(clock: Clock, model: nn.Sequential) -> None:
    """First calls from several threads at once: one chooses, all get its result."""
    plan = wsp_compiler.compile(model, 0.5, method="bwsp").plan
    compiled = wsp_compiler.compile(model, plan=plan, tune="fast")
    inputs = [torch.randn(1 + i % 2, 16, 9, 11) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(compiled, inputs))
    quiet = wsp_compiler.compile(model, plan=plan)
    for x, y in zip(inputs, outputs, strict=True):
        assert relative_error(y, quiet(x)) < 1e-5
