"""target_latency: the plan of least error whose whole-network time, measured, stays within the target.

The time of a network is that of its planned layers, each known alone, plus a rest: other operators, launches, what
layers disturb in one another's caches. The rest is what a measured network takes beyond its layers' sum. It is taken
first of the fastest plan, which also says what is reachable, and again of every plan tried.
"""

from __future__ import annotations

from collections.abc import Callable

from wsp_compiler.budget.front import Front, Option
from wsp_compiler.errors import BudgetError
from wsp_compiler.plan import PruningPlan

TRIES = 4
"""Plans that are compiled and measured, besides the fastest."""
SLACK = 1.01
"""What a measurement may exceed the target by: about its noise."""
ENOUGH = 0.97
"""A plan that takes at least this share of the target is not improved further."""


def fit_latency(front: Front, target: float, measure: Callable[[PruningPlan], float]) -> PruningPlan:
    """The plan of least predicted error among those measured within ``target``.

    Args:
        front: options with their microseconds.
        target: milliseconds of the whole network.
        measure: milliseconds of the whole network under a plan.

    Raises:
        BudgetError: the fastest plan takes longer.
    """
    fastest = front.chosen(front.least)
    assert fastest is not None
    taken = measure(front.plan(fastest))
    if taken > target * SLACK:
        raise BudgetError(
            f"the best reachable is {taken:.4g} ms, of which {front.cost(fastest) / 1000:.4g} ms are convolutions "
            "that can be pruned",
            where=f"target_latency={target:g}",
            fix=f"give {taken:.4g} or more, or allow more (tile='auto', rest='inductor', cuda_graph=True)",
        )
    best, best_error, rest = fastest, front.error(fastest), taken - front.cost(fastest) / 1000
    tried = {_key(fastest)}
    for _ in range(TRIES):
        chosen = front.chosen(1000 * (target - rest))
        if chosen is None or _key(chosen) in tried:
            break
        tried.add(_key(chosen))
        taken = measure(front.plan(chosen))
        rest = taken - front.cost(chosen) / 1000
        if taken <= target * SLACK and front.error(chosen) < best_error:
            best, best_error = chosen, front.error(chosen)
            if taken >= ENOUGH * target:
                break
    return front.plan(best)


def _key(chosen: dict[str, Option]) -> tuple[int, ...]:
    return tuple(id(option) for option in chosen.values())
