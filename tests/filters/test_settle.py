"""settle: tied filters go together, and what is left of a layer runs the faster way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.filters.nets import Grouped, Residual, convolutions, planned, randomised
from wsp_compiler.filters.coupling import couple
from wsp_compiler.filters.settle import settle_filters, tied_paths
from wsp_compiler.options import CompileOptions, PruneRule
from wsp_compiler.plan import PruningPlan, make_plan
from wsp_compiler.pruning.importance import IMPORTANCES
from wsp_compiler.sites import collect_sites
from wsp_compiler.speed import MEASURED, CallFormat, Timing
from wsp_compiler.trace import trace
from wsp_compiler.winograd import transform_weight


def test_filters_tied_by_additions_are_chosen_together() -> None:
    model = randomised(Residual())
    traced, plan = planned(model)
    (tied,) = tied_paths(couple(traced.units[""]), plan)
    assert tied == ("stem", "b", "c")
    keep = plan["stem"].keep
    assert keep.shape == (1, 10, 1)
    assert int(keep.sum()) == 4  # and the carrier of a constant
    assert torch.equal(plan["b"].keep, keep)
    assert torch.equal(plan["c"].keep, keep)
    totals = torch.zeros(10, dtype=torch.float64)
    for path in tied:
        weight: Any = model.get_submodule(path).weight
        scores = IMPORTANCES["output"](transform_weight(weight, 2), (0, 2)).flatten()
        totals += scores / scores.mean()
    assert set(totals.topk(4).indices.tolist()) == set(keep.flatten().nonzero().flatten().tolist())


def test_the_smallest_ratio_of_tied_layers_counts() -> None:
    _, plan = planned(randomised(Residual()), PruneRule("b", pr=0.2))
    assert int(plan["stem"].keep.sum()) == int(plan["b"].keep.sum()) == 7
    assert plan["stem"].pr == pytest.approx(0.3)


def test_one_unpruned_branch_frees_the_others() -> None:
    """Each is then chosen by its own scores: the channels stay anyway."""
    traced, plan = planned(randomised(Residual()), PruneRule("stem", skip=True))
    assert tied_paths(couple(traced.units[""]), plan) == []
    assert not torch.equal(plan["b"].keep, plan["c"].keep)


def test_filters_read_by_a_grouped_convolution_go_in_step() -> None:
    traced, plan = planned(randomised(Grouped()))
    assert ("b",) in tied_paths(couple(traced.units[""]), plan)
    by_group = plan["b"].keep.view(3, 4)
    assert (by_group == by_group[0]).all()
    assert int(by_group[0].sum()) == 2


@dataclass
class Clock:
    """Times that grow with filters * channels; Winograd kernels take ``factor`` of the dense time."""

    factor: float
    asked: list[tuple[str, str, int, int, tuple[int, ...]]] = field(default_factory=list)

    def pruned(
        self, path: str, conv: nn.Conv2d, keep: Tensor, tile: int, calls: Sequence[CallFormat]
    ) -> Timing | None:
        self.asked.append(("pruned", path, conv.out_channels, conv.in_channels, calls[0].shape))
        return Timing(self.factor * conv.out_channels * conv.in_channels, MEASURED)

    def dense(self, path: str, conv: nn.Conv2d, calls: Sequence[CallFormat]) -> Timing | None:
        self.asked.append(("dense", path, conv.out_channels, conv.in_channels, calls[0].shape))
        return Timing(float(conv.out_channels * conv.in_channels), MEASURED)


def settled(model: nn.Module, clock: Clock, **options: Any) -> PruningPlan:
    traced = trace(model, torch.randn(2, 3, 12, 9))
    sites, found = collect_sites(traced), convolutions(model)  # type: ignore[arg-type]
    chosen = CompileOptions(**{"method": "fp", "pr": 0.5, "channel_threshold": 0, **options})
    plan = make_plan(sites, found, chosen, clock)
    return settle_filters(plan, traced.units, sites, found, chosen, clock)


def test_the_faster_way_for_what_is_left() -> None:
    rules = (PruneRule("stem", skip=True),)
    slow = settled(randomised(Residual()), clock := Clock(1.5), rules=rules)
    assert not slow["a"].winograd
    assert ("pruned", "a", 3, 10, (2, 10, 12, 9)) in clock.asked  # two filters and a carrier
    pruned, dense = slow.times["a"].pruned, slow.times["a"].dense
    assert (pruned and pruned.us, dense and dense.us) == (30.0, 60.0)  # as it runs, and as it was
    fast = settled(randomised(Residual()), Clock(0.5), rules=rules)
    assert fast["a"].winograd
    assert settled(randomised(Residual()), Clock(1.5), rules=rules, keep_slower=True)["a"].winograd


def test_filters_that_stay_in_place_are_held_to_the_rule_of_all_patterns() -> None:
    rules = (PruneRule("stem", skip=True),)
    plan = settled(randomised(Residual()), Clock(1.5), rules=rules)
    assert list(plan) == ["a"]
    why = plan.left_alone["c"]
    assert "dense convolution is faster than pruned filters that stay in place" in why
    assert "tied to those of stem, whose filters are not pruned" in why
    assert "c" not in plan.errors
    kept = settled(randomised(Residual()), Clock(0.5), rules=rules)
    assert {"a", "b", "c"} <= set(kept)


def test_other_methods_are_left_as_they_are() -> None:
    model = randomised(Residual())
    traced = trace(model)
    sites, found = collect_sites(traced), convolutions(model)  # type: ignore[arg-type]
    options = CompileOptions(method="wsp", channel_threshold=0)
    plan = make_plan(sites, found, options)
    assert settle_filters(plan, traced.units, sites, found, options) is plan


def test_calibration_will_need_a_carrier() -> None:
    """Pruned filters will emit means: room is made for one of them, whatever they emit now."""
    model = randomised(Residual())
    with torch.no_grad():
        model.a_norm.bias.fill_(-40.0)  # type: ignore[union-attr, operator]
    traced = trace(model)
    sites, found = collect_sites(traced), convolutions(model)  # type: ignore[arg-type]
    options = CompileOptions(method="fp", pr=0.5, channel_threshold=0)
    plan = make_plan(sites, found, options)
    for calibrated, kept in ((False, 3), (True, 2)):
        result = settle_filters(plan, traced.units, sites, found, options, calibrated=calibrated)
        assert int(result["a"].keep.sum()) == kept


def test_scores_of_ones_own() -> None:
    model = randomised(Residual())
    traced = trace(model)
    sites, found = collect_sites(traced), convolutions(model)  # type: ignore[arg-type]
    options = CompileOptions(method="fp", pr=0.5, channel_threshold=0)
    plan = make_plan(sites, found, options)

    def last_ones(U: Tensor, dims: tuple[int, ...]) -> Tensor:
        assert dims == (0, 2)
        return torch.arange(1.0, U.shape[1] + 1, dtype=torch.float64).view(1, -1, 1)

    result = settle_filters(plan, traced.units, sites, found, options, None, dict.fromkeys(plan, last_ones))
    assert result["a"].keep.flatten().tolist() == [False] * 4 + [True] * 2
    assert result["b"].keep.flatten().tolist() == [False] * 6 + [True] * 4
    with pytest.raises(KeyError):
        result["nowhere"]
