"""front: costs in multiplications and in time, and the plans that choices become."""

from __future__ import annotations

import pytest
from torch import nn

from wsp_compiler.budget.candidates import dense_multiplies, grid_candidates, kept_multiplies
from wsp_compiler.budget.front import multiplies_front, time_front
from wsp_compiler.budget.predict import Prediction
from wsp_compiler.options import CompileOptions, PruneRule
from wsp_compiler.plan import PruningPlan, make_plan
from wsp_compiler.sites import find_sites

SIZES = {"0": [(1, 8, 8)], "1": [(1, 6, 6)]}


def parts() -> tuple[PruningPlan, dict[str, Prediction]]:
    model = nn.Sequential(*(nn.Conv2d(16, 16, 3) for _ in range(3))).eval()
    convolutions = {path: conv for path, conv in model.named_modules() if isinstance(conv, nn.Conv2d)}
    options = CompileOptions(0.5, "wsp", rules=(PruneRule("2", pr=0.25),))
    base = make_plan(find_sites(model), convolutions, options)
    predictions: dict[str, Prediction] = {}
    for path, weight in (("0", 1.0), ("1", 100.0)):
        entries = grid_candidates(path, convolutions[path], options, ("wsp",))
        errors = tuple(weight * entry.pr**2 for entry in entries)
        predictions[path] = Prediction(tuple(entries), errors)
    return base, predictions


def test_the_layer_that_matters_keeps_more() -> None:
    base, predictions = parts()
    front = multiplies_front(base, predictions, SIZES)
    assert front.whole == 16 * 16 * 16 * (16 + 9)
    chosen = front.chosen(0.5 * front.whole)
    assert chosen is not None
    plan = front.plan(chosen)
    assert list(plan) == ["0", "1", "2"]
    assert plan["0"].pr > 0.5 > plan["1"].pr
    assert plan["2"] == base["2"]
    assert plan.errors["0"] == pytest.approx(plan["0"].pr)
    assert front.cost(chosen) <= 0.5 * front.whole
    kept = sum(kept_multiplies(plan[path], SIZES[path]) for path in SIZES)
    assert kept == front.cost(chosen)
    assert front.whole == sum(dense_multiplies(plan[path], SIZES[path]) for path in SIZES)
    assert base["0"].pr == 0.5


def test_below_the_least_cost_there_is_nothing() -> None:
    front = multiplies_front(*parts(), SIZES)
    assert front.chosen(0.99 * front.least) is None
    least = front.chosen(front.least)
    assert least is not None
    assert {option.entry.pr for option in least.values() if option.entry} == {0.95}
    whole = front.chosen(front.whole)
    assert whole is not None
    assert sum(option.error for option in whole.values()) == 0


def test_in_time_the_dense_convolution_is_an_option() -> None:
    base, predictions = parts()
    us = [10.0 * (1 - entry.pr) + 1 for entry in predictions["0"].entries]
    front = time_front(base, predictions, {"0": (us, 9.0), "1": (us, 9.0)})
    assert front is not None
    assert front.whole == 18.0
    chosen = front.chosen(18.0)
    assert chosen is not None
    plan = front.plan(chosen)
    assert list(plan) == ["2"]
    assert "fast enough" in plan.left_alone["0"]
    assert set(plan.errors) == {"2"}
    chosen = front.chosen(14.0)
    assert chosen is not None
    assert list(front.plan(chosen)) == ["0", "2"]


@pytest.mark.parametrize("missing", [(None, 9.0), ([1.0] * 15, None)])
def test_unknown_times_make_no_front(missing: tuple[list[float] | None, float | None]) -> None:
    base, predictions = parts()
    assert time_front(base, predictions, {"0": ([1.0] * 15, 9.0), "1": missing}) is None
