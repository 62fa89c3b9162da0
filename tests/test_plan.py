"""plan: what is decided for each convolution, and plans as text."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from wsp_compiler.errors import PlanError, RuleError
from wsp_compiler.options import CompileOptions, PruneRule
from wsp_compiler.plan import PruningPlan, SitePlan, make_plan, plan_times
from wsp_compiler.pruning import PATTERNS
from wsp_compiler.pruning.base import kept_count
from wsp_compiler.sites import find_sites
from wsp_compiler.speed import MEASURED, TABLE, SiteTimes, Timing


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.a = nn.Conv2d(24, 20, 3, padding=1)
        self.b = nn.Conv2d(20, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.thin = nn.Conv2d(16, 15, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.thin(self.down(self.b(self.a(self.stem(x)))))


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}


def plan_of(model: nn.Module, *rules: PruneRule, **options: Any) -> PruningPlan:
    return make_plan(find_sites(model), convolutions(model), CompileOptions(rules=rules, **options))


@pytest.fixture
def net() -> nn.Module:
    return Net().eval()


def test_eligible_and_wide_enough_layers_are_planned(net: nn.Module) -> None:
    plan = plan_of(net)
    assert list(plan) == ["a", "b"]
    assert plan.left_alone == {
        "stem": "3 channels, fewer than 16 (a rule that names it overrides)",
        "down": "stride 2x2, not 1",
        "thin": "15 channels, fewer than 16 (a rule that names it overrides)",
    }


def test_a_rule_that_names_a_thin_layer_overrides_the_threshold(net: nn.Module) -> None:
    plan = plan_of(net, PruneRule("stem", pr=0.0))
    assert list(plan) == ["stem", "a", "b"]
    assert "thin" in plan.left_alone
    assert list(plan_of(net, PruneRule(".*"))) == ["stem", "a", "b", "thin"]
    assert list(plan_of(net, channel_threshold=0)) == ["stem", "a", "b", "thin"]


def test_rules_do_not_make_the_impossible_eligible(net: nn.Module) -> None:
    assert plan_of(net, PruneRule("down")).left_alone["down"] == "stride 2x2, not 1"


def test_rules_inherit_what_they_leave_open(net: nn.Module) -> None:
    plan = plan_of(net, PruneRule("a", tile=4), pr=0.25, method="wsp", direction="column", tile=2)
    a, b = plan["a"], plan["b"]
    assert (a.method, a.direction, a.tile, a.pr) == ("wsp", "column", 4, 0.25)
    assert (b.method, b.direction, b.tile, b.pr) == ("wsp", "column", 2, 0.25)
    plan = plan_of(net, PruneRule("a", method="bwsp", direction="row", pr=0.0), pr=0.25, method="wsp")
    assert (plan["a"].method, plan["a"].direction, plan["a"].pr) == ("bwsp", "row", 0.0)


def test_the_first_rule_wins(net: nn.Module) -> None:
    plan = plan_of(net, PruneRule("a|b", pr=0.1), PruneRule("b", pr=0.2, skip=True))
    assert (plan["a"].pr, plan["b"].pr) == (0.1, 0.1)


def test_skip(net: nn.Module) -> None:
    plan = plan_of(net, PruneRule("[ab]", skip=True))
    assert not plan
    assert plan.left_alone["a"] == "skipped by PruneRule('[ab]')"


def test_a_rule_that_matches_nothing_is_an_error(net: nn.Module) -> None:
    with pytest.raises(RuleError, match="matches no convolution"):
        plan_of(net, PruneRule("a"), PruneRule("c"))


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("method", sorted(PATTERNS))
@pytest.mark.parametrize("direction", ["row", "column"])
def test_keep_and_kept_fraction(net: nn.Module, method: str, direction: str, tile: int) -> None:
    entry = plan_of(net, method=method, direction=direction, tile=tile, pr=0.3)["a"]
    positions, n, c = entry.shape
    assert entry.shape == ((tile + 2) ** 2, 20, 24)
    full = entry.keep.expand(entry.shape)
    assert entry.keep.dtype == torch.bool
    assert entry.kept_weights == int(full.sum())
    assert entry.kept_fraction == int(full.sum()) / full.numel()
    units = {"row": n, "column": c}[direction]
    expected = {
        "dense": 1.0,
        "fp": kept_count(n, 0.3) / n,
        "wwp": kept_count(positions * n * c, 0.3) / (positions * n * c),
        "bwsp": kept_count(units, 0.3) / units,
        "wsp": kept_count(positions * units, 0.3) / (positions * units),
    }
    assert entry.kept_fraction == pytest.approx(expected[method], abs=1e-12)
    assert entry.pr == (0.0 if method == "dense" else 0.3)
    letter = "R" if direction == "row" else "C"
    names = {"dense": "dense", "fp": "FP", "wwp": "WWP", "bwsp": f"BWSP-{letter}", "wsp": f"WSP-{letter}"}
    assert entry.pattern == names[method]


def test_scores_come_from_the_models_own_weights(net: nn.Module) -> None:
    weight = convolutions(net)["a"].weight
    with torch.no_grad():
        weight[7] *= 100
    keep = plan_of(net, method="fp", pr=0.9)["a"].keep
    assert keep.shape == (1, 20, 1)
    assert bool(keep[0, 7, 0])
    assert int(keep.sum()) == 2


def test_looking_up_what_is_not_planned_says_why(net: nn.Module) -> None:
    plan = plan_of(net)
    with pytest.raises(KeyError, match="stride 2x2, not 1"):
        plan["down"]
    with pytest.raises(KeyError, match="no such convolution"):
        plan["nowhere"]
    assert "down" not in plan
    assert plan.get("down") is None


@pytest.mark.parametrize("method", sorted(PATTERNS))
@pytest.mark.parametrize("direction", ["row", "column"])
def test_json_round_trip(net: nn.Module, method: str, direction: str) -> None:
    plan = plan_of(net, PruneRule("b", tile=4, pr=0.123), method=method, direction=direction, pr=0.7)
    copy = PruningPlan.from_json(plan.to_json())
    assert copy == plan
    assert list(copy) == list(plan)
    assert copy.left_alone == plan.left_alone
    for path, entry in plan.items():
        assert torch.equal(copy[path].keep, entry.keep)
        assert copy[path].pr == entry.pr
        assert hash(copy[path]) == hash(entry)
    assert copy.to_json() == plan.to_json()


def test_plans_that_differ_are_not_equal(net: nn.Module) -> None:
    plan = plan_of(net, pr=0.5)
    other = PruningPlan.from_json(plan.to_json())
    keep = other["a"].keep
    keep[3, 0, 0] = ~keep[3, 0, 0]
    assert other != plan
    assert plan_of(net, pr=0.6) != plan
    assert plan["a"] != "a"


def _record(plan: PruningPlan) -> dict[str, Any]:
    return json.loads(plan.to_json())


DAMAGE: dict[str, Any] = {
    "version": lambda record: record.update(version=99),
    "no version": lambda record: record.pop("version"),
    "no sites": lambda record: record.pop("sites"),
    "sites null": lambda record: record.update(sites=None),
    "sites of strings": lambda record: record.update(sites=["a"]),
    "left_alone a list": lambda record: record.update(left_alone=[]),
    "twice": lambda record: record["sites"].append(record["sites"][0]),
    "method": lambda record: record["sites"][0].update(method="magic"),
    "direction": lambda record: record["sites"][0].update(direction="diagonal"),
    "tile": lambda record: record["sites"][0].update(tile=3),
    "other tile": lambda record: record["sites"][0].update(tile=4),
    "pr": lambda record: record["sites"][0].update(pr=1.0),
    "pr nan": lambda record: record["sites"][0].update(pr=math.nan),
    "pr text": lambda record: record["sites"][0].update(pr="much"),
    "shape": lambda record: record["sites"][0].update(shape=[16, 20]),
    "shape zero": lambda record: record["sites"][0].update(
        shape=[16, 0, 24], keep_shape=[1, 1, 1], keep="gA=="
    ),
    "shape infinite": lambda record: record["sites"][0].update(shape=[16, math.inf, 24]),
    "keep_shape": lambda record: record["sites"][0].update(keep_shape=[16, 19, 1]),
    "keep_shape zero": lambda record: record["sites"][0].update(keep_shape=[16, 0, 1], keep=""),
    "keep of elements": lambda record: record["sites"][0].update(
        keep_shape=[16, 20, 24], keep="/" * (16 * 20 * 24 // 6)
    ),
    "keep truncated": lambda record: record["sites"][0].update(keep=record["sites"][0]["keep"][:8]),
    "keep too long": lambda record: record["sites"][0].update(keep="AAAA" + record["sites"][0]["keep"]),
    "keep no base64": lambda record: record["sites"][0].update(keep="!" + record["sites"][0]["keep"][1:]),
    "keep empty": lambda record: record["sites"][0].update(keep="A" * 53 + "A=="),
    "keep missing": lambda record: record["sites"][0].pop("keep"),
}


@pytest.mark.parametrize("kind", sorted(DAMAGE))
def test_a_damaged_plan_is_refused(net: nn.Module, kind: str) -> None:
    record = _record(plan_of(net, pr=0.5))
    DAMAGE[kind](record)
    with pytest.raises(PlanError) as caught:
        PruningPlan.from_json(json.dumps(record))
    assert caught.value.where
    assert caught.value.fix


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", '{"version": 1}', "[" * 100_000])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"PruningPlan\.from_json"):
        PruningPlan.from_json(text)


def test_every_byte_of_a_plan_matters_or_is_refused(net: nn.Module) -> None:
    """Truncated anywhere, a plan is refused."""
    text = plan_of(net, pr=0.5).to_json()
    for end in range(0, len(text) - 1, 97):
        with pytest.raises(PlanError):
            PruningPlan.from_json(text[:end])


@pytest.mark.parametrize(
    ("keep", "word"),
    [
        (torch.ones(16, 20, 24, dtype=torch.bool), "neither whole rows nor whole columns"),
        (torch.ones(1, 1, 1), "not bool"),
        (torch.ones(20, dtype=torch.bool), "broadcastable"),
        (torch.ones(16, 19, 1, dtype=torch.bool), "broadcastable"),
        (torch.zeros(16, 20, 1, dtype=torch.bool), "keeps nothing"),
    ],
)
def test_a_site_plan_checks_its_keep(keep: torch.Tensor, word: str) -> None:
    with pytest.raises(PlanError, match=word) as caught:
        SitePlan("layer", "wsp", "row", 2, 0.5, keep, (16, 20, 24))
    assert caught.value.where == "layer"


def test_a_plan_fits_its_own_model(net: nn.Module) -> None:
    plan_of(net).check_fits(convolutions(net))


@pytest.mark.parametrize(
    ("conv", "word"),
    [
        (None, r"no such convolution \(near names: aa"),
        (nn.Conv2d(24, 21, 3, padding=1), r"\[n, c\] = \[21, 24\]"),
        (nn.Conv2d(24, 20, 3, padding=1, stride=2), "not eligible: stride 2x2"),
        (nn.Conv2d(24, 20, 1), "not eligible: kernel 1x1"),
        (nn.Conv2d(24, 20, 3, padding=1, padding_mode="reflect"), "not eligible: padding mode"),
        (nn.Conv2d(24, 20, 3, padding=1).double(), "not eligible: dtype"),
    ],
)
def test_a_plan_for_another_model_is_refused(net: nn.Module, conv: nn.Conv2d | None, word: str) -> None:
    model = convolutions(net)
    plan = plan_of(net)
    if conv is None:
        model["aa"] = model.pop("a")
    else:
        model["a"] = conv
    with pytest.raises(PlanError, match=word) as caught:
        plan.check_fits(model)
    assert caught.value.where == "a"
    assert "[20, 24]" in caught.value.what
    assert caught.value.fix == "make the plan from this model"


# --- speed --------------------------------------------------------------------------------------------------


class Stopwatch:
    """Pruned convolutions take ``pruned[tile]`` us per call, dense ones 10 us; None is unknown."""

    def __init__(self, pruned: dict[int, float | None], dense: float | None = 10.0) -> None:
        self.times, self.dense_us = pruned, dense
        self.asked: list[tuple[str, int, tuple[int, ...]]] = []

    def pruned(self, path: str, conv: nn.Conv2d, keep: torch.Tensor, tile: int, calls: Any) -> Timing | None:
        assert keep.shape[0] in (1, (tile + 2) ** 2)
        self.asked += [(path, tile, call.shape) for call in calls]
        us = self.times[tile]
        return None if us is None else Timing(us * len(calls), MEASURED, f"kernel F{tile}")

    def dense(self, path: str, conv: nn.Conv2d, calls: Any) -> Timing | None:
        return None if self.dense_us is None else Timing(self.dense_us * len(calls), TABLE)


def timed_plan(net: nn.Module, watch: Stopwatch, *rules: PruneRule, **options: Any) -> PruningPlan:
    sites = find_sites(net, torch.randn(2, 3, 12, 8))
    chosen = CompileOptions(rules=rules, **{"method": "bwsp", **options})
    return make_plan(sites, convolutions(net), chosen, watch)


def test_a_site_stays_dense_where_dense_is_faster(net: nn.Module) -> None:
    plan = timed_plan(net, Stopwatch({2: 12.0}), PruneRule("b", skip=True))
    assert not plan.sites
    assert (
        plan.left_alone["a"] == "the dense convolution is faster: 12 us pruned, 10 us dense (measured, table)"
    )
    assert plan.times["a"].slower
    assert list(plan.times) == ["a"]
    assert list(timed_plan(net, Stopwatch({2: 10.0}))) == []  # a tie gives no accuracy away
    faster = timed_plan(net, Stopwatch({2: 9.0}))
    assert list(faster) == ["a", "b"]
    assert faster.times["a"].pruned == Timing(9.0, MEASURED, "kernel F2")


def test_filters_may_leave_the_network_which_is_decided_later(net: nn.Module) -> None:
    """See tests/filters/test_settle.py."""
    plan = timed_plan(net, Stopwatch({2: 12.0}), method="fp")
    assert list(plan) == ["a", "b"]
    assert plan.times["a"].slower


@pytest.mark.parametrize("method", ["dense", "wwp", "wsp"])
def test_every_method_is_held_to_it(net: nn.Module, method: str) -> None:
    assert not timed_plan(net, Stopwatch({2: 12.0}), method=method, pr=0.0).sites


def test_keep_slower_lowers_everything(net: nn.Module) -> None:
    plan = timed_plan(net, Stopwatch({2: 12.0}), keep_slower=True)
    assert list(plan) == ["a", "b"]
    assert plan.times["a"].slower


@pytest.mark.parametrize("watch", [Stopwatch({2: None}), Stopwatch({2: 99.0}, dense=None)])
def test_what_is_not_known_to_be_slower_is_lowered(net: nn.Module, watch: Stopwatch) -> None:
    assert list(timed_plan(net, watch)) == ["a", "b"]


def test_without_inputs_nobody_is_asked(net: nn.Module) -> None:
    watch = Stopwatch({2: 99.0})
    plan = make_plan(find_sites(net), convolutions(net), CompileOptions(), watch)
    assert list(plan) == ["a", "b"]
    assert not watch.asked


@pytest.mark.parametrize(
    ("times", "tile"),
    [
        ({2: 5.0, 4: 4.0}, 4),
        ({2: 4.0, 4: 5.0}, 2),
        ({2: 4.0, 4: None}, 2),
        ({2: None, 4: None}, 2),
        ({2: 12.0, 4: 9.0}, 4),
    ],
)
def test_the_faster_tile(net: nn.Module, times: dict[int, float | None], tile: int) -> None:
    watch = Stopwatch(times)
    plan = timed_plan(net, watch, PruneRule("b", tile=2, skip=True), tile="auto")
    assert plan["a"].tile == tile
    assert plan["a"].keep.shape[0] == (tile + 2) ** 2
    assert watch.asked == [("a", 2, (2, 24, 12, 8)), ("a", 4, (2, 24, 12, 8))]
    ruled = timed_plan(net, Stopwatch({2: 1.0, 4: 2.0}), PruneRule("b", tile="auto"), tile=4)
    assert (ruled["a"].tile, ruled["b"].tile) == (4, 2)


def test_all_calls_count(net: nn.Module) -> None:
    """A convolution that is called twice is compared on both shapes together."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.conv(x)[:, :, ::2])

    model = Twice().eval()
    watch = Stopwatch({2: 9.0})
    plan = make_plan(
        find_sites(model, torch.randn(1, 16, 8, 8)), convolutions(model), CompileOptions(method="bwsp"), watch
    )
    assert [shape for _, _, shape in watch.asked] == [(1, 16, 8, 8), (1, 16, 4, 8)]
    timing = plan.times["conv"].pruned
    assert timing is not None
    assert timing.us == 18.0


def test_times_of_a_finished_plan(net: nn.Module) -> None:
    sites = find_sites(net, torch.randn(2, 3, 12, 8))
    plan = make_plan(sites, convolutions(net), CompileOptions(rules=(PruneRule("b", skip=True),)))
    times = plan_times(plan, sites, convolutions(net), Stopwatch({2: 12.0}))
    assert list(times) == ["a"]
    assert times["a"].slower
    assert list(plan) == ["a"]
    assert plan.times["a"] == SiteTimes(None, None)


def test_times_are_no_part_of_a_plan(net: nn.Module) -> None:
    plan = timed_plan(net, Stopwatch({2: 9.0}))
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert not again.times


# --- blocks -------------------------------------------------------------------------------------------------


def test_blocks_are_chosen_named_and_saved(net: nn.Module) -> None:
    plan = plan_of(net, PruneRule("b", block=8), pr=0.5)
    assert (plan["a"].block, plan["a"].pattern) == (None, "BWSP-R")
    assert (plan["b"].block, plan["b"].pattern) == (8, "BWSP-R/8")
    groups = plan["b"].keep.view(16, 2, 8).sum(2)
    assert (groups == kept_count(8, 0.5)).all()
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert again["b"].block == 8
    assert plan_of(net, block=10)["a"].block == 10  # of 20 filters
    assert plan_of(net, block=64)["a"].block is None
    for options in ({"method": "wsp"}, {"direction": "column"}, {"method": "fp"}):
        assert plan_of(net, block=4, **options)["a"].block is None


def test_wide_layers_are_balanced_in_blocks_that_fit_the_kernels() -> None:
    model = nn.Sequential(nn.Conv2d(16, 512, 3)).eval()
    entry = plan_of(model, method="bwsp", pr=0.8)["0"]
    assert entry.pattern == "BWSP-R/128"
    assert (entry.keep.view(16, 4, 128).sum(2) == 26).all()
    assert abs(1 - entry.kept_fraction - 0.8) < 0.005


def test_plans_from_before_blocks_are_read(net: nn.Module) -> None:
    record = json.loads(plan_of(net).to_json())
    for entry in record["sites"]:
        assert entry.pop("block") is None
    assert PruningPlan.from_json(json.dumps(record)) == plan_of(net)
    record["sites"][0]["block"] = 3
    with pytest.raises(PlanError, match="do not divide"):
        PruningPlan.from_json(json.dumps(record))
