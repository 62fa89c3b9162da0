"""latency: the least error within a measured target, whatever the rest of the network takes."""

from __future__ import annotations

import pytest

from tests.budget.test_front import parts
from wsp_compiler.budget.front import Front, time_front
from wsp_compiler.budget.latency import TRIES, fit_latency
from wsp_compiler.errors import BudgetError
from wsp_compiler.plan import PruningPlan


def front() -> Front:
    base, predictions = parts()
    us = [1000 * (10.0 * (1 - entry.pr) + 1) for entry in predictions["0"].entries]
    found = time_front(base, predictions, {"0": (us, 12e3), "1": (us, 12e3)})
    assert found is not None
    return found


class Network:
    """Takes ``rest`` ms besides its layers, whose times are off by a factor."""

    def __init__(self, rest: float, factor: float = 1.0) -> None:
        self.rest, self.factor, self.measured = rest, factor, 0

    def __call__(self, plan: PruningPlan) -> float:
        self.measured += 1
        times = [10.0 * (1 - plan[path].pr) + 1 if path in plan else 12.0 for path in "01"]
        return self.rest + self.factor * sum(times)


@pytest.mark.parametrize("factor", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("target", [12.0, 16.0, 24.0])
def test_the_target_is_kept_and_used(target: float, factor: float) -> None:
    network = Network(5.0, factor)
    plan = fit_latency(front(), target, network)
    taken = network(plan)
    assert taken <= 1.01 * target
    assert taken >= 0.8 * target
    assert plan["0"].pr >= plan["1"].pr
    assert network.measured <= TRIES + 2


def test_a_generous_target_prunes_nothing() -> None:
    plan = fit_latency(front(), 100.0, Network(5.0))
    assert all(plan[path].pr == 0 for path in "01" if path in plan)


def test_below_what_is_reachable_the_error_names_it() -> None:
    with pytest.raises(BudgetError, match=r"target_latency=7: the best reachable is 8 ms, of which 3 ms"):
        fit_latency(front(), 7.0, Network(5.0))


def test_where_times_mislead_the_fastest_is_left() -> None:
    """Every other plan measures too slow."""
    fastest: list[PruningPlan] = []

    def measure(plan: PruningPlan) -> float:
        fastest.append(plan)
        return 8.0 if len(fastest) == 1 else 50.0

    plan = fit_latency(front(), 10.0, measure)
    assert {plan[path].pr for path in "01"} == {0.95}
    assert len(fastest) <= TRIES + 1
