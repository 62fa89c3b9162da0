"""planning: which budget applies, that it is kept, and that it beats even ratios where layers differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wsp_compiler
from tests.reference import assert_untouched, relative_error, snapshot
from tests.test_calibration import images, net
from wsp_compiler import PruneRule
from wsp_compiler.budget.candidates import dense_multiplies, kept_multiplies
from wsp_compiler.errors import BudgetError, EvaluationError, InputError, OptionError
from wsp_compiler.plan import PruningPlan

ONE = torch.ones(1, 3, 17, 17)
SIZES = {"a": [(1, 17, 17)], "b": [(1, 17, 17)], "c": [(1, 6, 6)]}


def achieved(plan: PruningPlan, paths: str = "abc") -> float:
    """1 - kept multiplications / those of unpruned F(2x2, 3x3)."""
    kept = sum(kept_multiplies(plan[path], SIZES[path]) for path in paths)
    return 1 - kept / sum(dense_multiplies(plan[path], SIZES[path]) for path in paths)


def error(model: nn.Module, compiled: Any, x: Tensor) -> float:
    with torch.no_grad():
        return relative_error(compiled.graph_module(x), model(x))


@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("pr", [0.3, 0.5, 0.8])
def test_calibrated_ratios_are_global_and_beat_even_ones(pr: float, branch: bool) -> None:
    model = net(branch)
    before = snapshot(model)
    data, test = images(24), images(16)
    uneven = wsp_compiler.compile(model, pr, calibration=data)
    even = wsp_compiler.compile(model, pr, calibration=data, pr_scope="layer")
    assert {entry.pr for entry in even.plan.values()} == {pr}
    assert len({entry.pr for entry in uneven.plan.values()}) > 1
    assert pr - 0.01 < achieved(uneven.plan) < pr + 0.05
    assert error(model, uneven, test) < error(model, even, test)
    assert_untouched(model, before)


def test_a_ratio_of_zero_prunes_nothing() -> None:
    plan = wsp_compiler.compile(net(), 0.0, calibration=images()).plan
    assert all(entry.kept_fraction == 1 for entry in plan.values())


def test_what_rules_set_does_not_share_the_budget() -> None:
    rules = [PruneRule("c", pr=0.25)]
    plan = wsp_compiler.compile(net(), 0.6, calibration=images(), rules=rules).plan
    assert plan["c"].pr == 0.25
    assert achieved(plan, "ab") == pytest.approx(0.6, abs=0.03)
    plan = wsp_compiler.compile(net(), 0.6, calibration=images(), rules=[PruneRule(".*", pr=0.5)]).plan
    assert {entry.pr for entry in plan.values()} == {0.5}


@pytest.mark.parametrize("method", ["bwsp", "wwp", "wsp"])
@pytest.mark.parametrize("direction", ["row", "column"])
def test_every_pattern_can_be_uneven(method: str, direction: str) -> None:
    plan = wsp_compiler.compile(net(), 0.5, calibration=images(), method=method, direction=direction).plan
    assert {entry.method for entry in plan.values()} == {method}
    assert 0.45 < achieved(plan) < 0.6


def test_larger_tiles_count_with_their_own_multiplications() -> None:
    four = wsp_compiler.compile(net(), 0.6, calibration=images(), tile=4).plan
    assert achieved(four) == pytest.approx(0.6, abs=0.05)
    assert (
        sum(entry.kept_fraction for entry in four.values()) / 3 > 0.45
    )  # F(4x4) has 9/16 of the multiplications
    mixed = wsp_compiler.compile(net(), 0.6, calibration=images(), tile="auto").plan
    assert achieved(mixed) == pytest.approx(0.6, abs=0.05)


def test_filters_are_pruned_evenly() -> None:
    plan = wsp_compiler.compile(net(), 0.5, calibration=images(), method="fp").plan
    assert {entry.pr for entry in plan.values()} == {0.5}


def test_whole_rows_limit_what_can_go() -> None:
    """One row of each position stays, as with even ratios."""
    plan = wsp_compiler.compile(net(), 0.99, calibration=images(), method="bwsp").plan
    assert 0.9 < achieved(plan) < 0.96


def test_without_data_global_needs_sizes() -> None:
    model = net()
    with pytest.raises(BudgetError, match="a: its image size is not known"):
        wsp_compiler.compile(model, 0.5, pr_scope="global")
    plan = wsp_compiler.compile(model, 0.5, pr_scope="global", example_inputs=images(1)).plan
    assert 0.49 < achieved(plan) < 0.55
    assert all(entry.method == "bwsp" for entry in plan.values())
    assert {entry.pr for entry in wsp_compiler.compile(model, 0.5).plan.values()} == {0.5}


def test_plans_are_not_replanned() -> None:
    model = net()
    plan = wsp_compiler.compile(model, 0.5).plan
    again = wsp_compiler.compile(model, plan=plan, calibration=images()).plan
    assert {path: entry.pr for path, entry in again.items()} == dict.fromkeys("abc", 0.5)


class Judge:
    """Minus the relative error of the output against the dense model's."""

    def __init__(self, model: nn.Module) -> None:
        self.x, self.seen = images(16), list[nn.Module]()
        with torch.no_grad():
            self.expected = model(self.x)

    def __call__(self, model: nn.Module) -> float:
        assert not model.training
        self.seen.append(model)
        return -relative_error(model(self.x), self.expected)


def test_max_drop_is_kept_and_used() -> None:
    model = net()
    before, judge = snapshot(model), Judge(model)
    compiled = wsp_compiler.compile(model, calibration=images(24), max_drop=0.3, eval_fn=judge)
    found = relative_error(compiled.graph_module(judge.x), judge.expected)
    assert 0.1 < found <= 0.3 + 1e-4
    assert compiled.plan.refits
    assert len(judge.seen) <= 8
    assert type(judge.seen[0]) is type(model)
    assert judge.seen[0] is not model
    assert_untouched(model, before)
    looser = wsp_compiler.compile(model, calibration=images(24), max_drop=0.6, eval_fn=judge)
    assert achieved(looser.plan) > achieved(compiled.plan)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"max_drop": -0.1, "eval_fn": float}, OptionError, "max_drop=-0.1 is not a number of at least 0"),
        ({"max_drop": float("nan"), "eval_fn": float}, OptionError, "max_drop=nan"),
        ({"max_drop": True, "eval_fn": float}, OptionError, "max_drop=True"),
        (
            {"max_drop": 1.0, "eval_fn": lambda model: float("nan"), "example_inputs": ONE},
            EvaluationError,
            "returned nan on the dense",
        ),
        (
            {"max_drop": 1.0, "eval_fn": lambda model: 1 / 0, "example_inputs": ONE},
            EvaluationError,
            "raised ZeroDivisionError",
        ),
        ({"max_drop": 1.0, "eval_fn": float}, BudgetError, "a: its image size is not known"),
        ({"target_latency": -1.0}, OptionError, "target_latency=-1.0 is not a positive number"),
        ({"target_latency": 0}, OptionError, "target_latency=0"),
        ({"target_latency": "5"}, OptionError, "target_latency='5'"),
        (
            {"target_latency": 5.0, "example_inputs": ONE},
            BudgetError,
            "times of some layers",
        ),
        (
            {"target_latency": 5.0, "max_drop": 0.1, "eval_fn": float},
            OptionError,
            "target_latency and max_drop both",
        ),
        ({"pr_scope": "layer", "target_latency": 5.0}, OptionError, "pr_scope='layer'"),
        ({"pr_scope": "golbal"}, OptionError, "did you mean 'global'"),
        ({"pr_scope": "global", "method": "fp"}, OptionError, "pr_scope does not go with method='fp'"),
        ({"max_drop": 1, "eval_fn": float, "method": "dense"}, OptionError, "max_drop does not go with"),
        ({"calibration": torch.zeros(0, 3, 17, 17), "pr_scope": "global"}, InputError, "no batch"),
        ({"calibration": [], "max_drop": 0.1, "eval_fn": float}, InputError, "no batch"),
    ],
)
def test_bad_input(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        wsp_compiler.compile(net(), 0.5, **options)


def test_an_eval_fn_that_fails_on_a_pruned_model_is_named() -> None:
    model, calls = net(), list[nn.Module]()

    def broken(other: nn.Module) -> float:
        calls.append(other)
        return float("nan") if len(calls) > 1 else 0.5

    with pytest.raises(EvaluationError, match="returned nan on the pruned model"):
        wsp_compiler.compile(model, max_drop=0.1, eval_fn=broken, calibration=images())


def test_when_the_least_drop_is_too_much() -> None:
    def harsh(model: nn.Module) -> float:
        return -float(any("Winograd" in type(part).__name__ for part in model.modules()))

    with pytest.raises(BudgetError, match="the least drop of eval_fn was 1"):
        wsp_compiler.compile(net(), max_drop=0.5, eval_fn=harsh, calibration=images())


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Times without measuring: 10 ms for each kept share, balanced rows by a factor; 8 ms dense; 5 ms the rest."""
    from wsp_compiler import api
    from wsp_compiler.codegen.plan_speed import PlanSpeed
    from wsp_compiler.speed import MEASURED, Timing

    factors = {"balanced": 1.0}

    def milliseconds(keep: Tensor) -> float:
        counts = keep.sum((1, 2))
        return 10 * float(keep.float().mean()) * (factors["balanced"] if len(counts.unique()) == 1 else 1.0)

    def pruned(self: PlanSpeed, path: str, conv: nn.Conv2d, keep: Tensor, *rest: object) -> Timing:
        return Timing(1000 * milliseconds(keep), MEASURED)

    def dense(self: PlanSpeed, *rest: object) -> Timing:
        return Timing(8000.0, MEASURED)

    def network(compiled: Any, example_inputs: object) -> float:
        return 5 + sum(
            milliseconds(compiled.plan[path].keep) if path in compiled.plan else 8.0 for path in "abc"
        )

    monkeypatch.setattr(PlanSpeed, "pruned", pruned)
    monkeypatch.setattr(PlanSpeed, "dense", dense)
    monkeypatch.setattr(api, "network_milliseconds", network)
    return factors


@pytest.mark.parametrize("calibrated", [False, True])
def test_target_latency_is_kept_and_used(times: dict[str, float], calibrated: bool) -> None:
    model, data = net(), images() if calibrated else None
    compiled = wsp_compiler.compile(model, target_latency=17.0, example_inputs=ONE, calibration=data)
    taken = 5 + sum(
        10 * compiled.plan[path].kept_fraction if path in compiled.plan else 8.0 for path in "abc"
    )
    assert 15 < taken <= 17 * 1.01
    assert bool(compiled.plan.refits) == calibrated
    assert " measured" in compiled.report()
    slow = wsp_compiler.compile(model, target_latency=40.0, example_inputs=ONE)
    assert len(slow.plan) == 0
    assert "fast enough for the target latency" in slow.report()


def test_target_latency_below_what_is_reachable(times: dict[str, float]) -> None:
    with pytest.raises(
        BudgetError, match=r"target_latency=6: the best reachable is 6\.\d+ ms, of which 1\.\d+ ms"
    ):
        wsp_compiler.compile(net(), target_latency=6.0, example_inputs=ONE)


def test_max_drop_takes_the_fastest_where_times_are_known(times: dict[str, float]) -> None:
    model = net()
    judge = Judge(model)
    compiled = wsp_compiler.compile(
        model, calibration=images(24), max_drop=0.3, eval_fn=judge, example_inputs=ONE
    )
    assert relative_error(compiled.graph_module(judge.x), judge.expected) <= 0.3 + 1e-4
    assert any(entry.kept_fraction < 1 for entry in compiled.plan.values())


def test_adaptive_patterns(times: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    from wsp_compiler import adaptive

    model, data = net(), images(24)
    options: dict[str, Any] = {"calibration": data, "example_inputs": ONE, "keep_slower": True}

    def methods(**more: Any) -> set[str]:
        plan = wsp_compiler.compile(model, 0.6, **options, **more).plan
        return {entry.method for entry in plan.values() if entry.kept_fraction < 1}

    assert methods() == {"wsp"}  # balance gains no time
    times["balanced"] = 0.5
    assert methods(method="wsp") == {"wsp"}
    monkeypatch.setattr(adaptive.choose_patterns, "__defaults__", (1e9,))  # whatever it costs
    assert methods() == methods(pr_scope="layer") == {"bwsp"}
    monkeypatch.setattr(adaptive.choose_patterns, "__defaults__", (0.0,))
    assert methods() == {"wsp"}


def test_without_data_balance_unless_it_gains_nothing(times: dict[str, float]) -> None:
    model = net()
    options: dict[str, Any] = {"example_inputs": ONE, "keep_slower": True}
    times["balanced"] = 0.9
    plan = wsp_compiler.compile(model, 0.6, **options).plan
    assert {entry.method for entry in plan.values()} == {"bwsp"}
    times["balanced"] = 1.0
    plan = wsp_compiler.compile(model, 0.6, **options).plan
    assert {entry.method for entry in plan.values()} == {"wsp"}
