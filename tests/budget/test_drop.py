"""drop: bisection along the front finds the cheapest plan within the limit."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.budget.test_front import SIZES, parts
from wsp_compiler.budget.drop import ladder, largest_within
from wsp_compiler.budget.front import Front, Option, multiplies_front
from wsp_compiler.errors import BudgetError
from wsp_compiler.plan import PruningPlan


def front() -> Front:
    return multiplies_front(*parts(), SIZES)


def drop_of(plan: PruningPlan) -> float:
    return plan["0"].pr ** 2 + 100 * plan["1"].pr ** 2


def test_the_ladder_falls_in_cost_and_rises_in_error() -> None:
    found = front()
    rungs = ladder(found)
    costs = [found.cost(rung) for rung in rungs]
    errors = [sum(option.error for option in rung.values()) for rung in rungs]
    assert costs == sorted(costs, reverse=True)
    assert errors == sorted(errors)
    assert errors[0] > 0
    assert costs[-1] == found.least
    assert 20 < len(rungs) <= 48


@pytest.mark.parametrize("most", [0.3, 1.0, 5.0, 30.0, 1000.0])
def test_the_cheapest_within_the_limit(most: float) -> None:
    found = front()
    evaluated: list[PruningPlan] = []

    def measured(plan: PruningPlan) -> float:
        evaluated.append(plan)
        return drop_of(plan)

    plan = largest_within(found, most, found.plan, measured)
    within = [rung for rung in ladder(found) if drop_of(found.plan(rung)) <= most]
    assert drop_of(plan) <= most
    assert {path: plan[path].pr for path in "01"} == {
        path: option.entry.pr for path, option in within[-1].items() if option.entry
    }
    assert len(evaluated) <= 6


def test_a_drop_that_is_not_monotone_still_keeps_the_limit() -> None:
    found = front()
    drops = iter([0.5, 2.0, 0.1, 3.0, 0.2, 5.0, 0.3])
    seen: dict[int, float] = {}

    def measured(plan: PruningPlan) -> float:
        seen[id(plan)] = next(drops)
        return seen[id(plan)]

    kept: list[PruningPlan] = []

    def prepare(chosen: Mapping[str, Option]) -> PruningPlan:
        kept.append(found.plan(chosen))
        return kept[-1]

    assert seen[id(largest_within(found, 1.0, prepare, measured))] <= 1.0


def test_when_none_is_within_the_least_drop_is_named() -> None:
    found = front()
    drops = iter([9.0, 4.0, 2.0, 1.0, 0.75, 0.8])
    with pytest.raises(BudgetError, match=r"max_drop=0\.1: the least drop of eval_fn was 0\.75"):
        largest_within(found, 0.1, found.plan, lambda plan: next(drops))


def test_nothing_to_prune() -> None:
    empty = Front(PruningPlan(), {}, 0.0)
    with pytest.raises(BudgetError, match="nothing can be pruned"):
        largest_within(empty, 1.0, empty.plan, drop_of)
