"""max_drop: the least cost at which eval_fn has lost no more than the user allows, by bisection.

Candidates are the plans of least predicted error for a ladder of costs, each calibrated and evaluated when it is its
turn. The drop is taken to grow as the cost falls; of all plans evaluated the cheapest within the limit is returned,
so that where it does not, the result still keeps the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from wsp_compiler.budget.front import Front, Option
from wsp_compiler.errors import BudgetError
from wsp_compiler.plan import PruningPlan

LEVELS = 48
"""Rungs of the ladder between nothing pruned and the least cost; six evaluations tell them apart."""


class Prepare(Protocol):
    """Makes a finished (calibrated) plan of chosen options."""

    def __call__(self, chosen: Mapping[str, Option]) -> PruningPlan: ...


def ladder(front: Front, levels: int = LEVELS) -> list[dict[str, Option]]:
    """Choices of least error for falling costs, without repetitions; the first prune least, but something."""
    unpruned = sum(_cost_unpruned(found) for found in front.options.values())
    rungs: list[dict[str, Option]] = []
    for level in range(1, levels + 1):
        chosen = front.chosen(unpruned + (front.least - unpruned) * level / levels)
        if chosen is None:  # rounding at the last
            chosen = front.chosen(front.least)
        assert chosen is not None
        prunes = any(
            option.entry is not None and option.entry.kept_fraction < 1 for option in chosen.values()
        )
        if prunes and (not rungs or any(chosen[path] is not rungs[-1][path] for path in chosen)):
            rungs.append(chosen)
    return rungs


def _cost_unpruned(options: Sequence[Option]) -> float:
    whole = [option.cost for option in options if option.entry is None or option.entry.kept_fraction == 1]
    return min(whole, default=options[0].cost)


def largest_within(
    front: Front, most: float, prepare: Prepare, drop_of: Callable[[PruningPlan], float]
) -> PruningPlan:
    """The cheapest plan found whose drop is at most ``most``.

    Args:
        front: what each layer can become.
        most: the largest drop, in eval_fn's own unit.
        prepare: calibrates what was chosen.
        drop_of: the measured drop under a plan.

    Raises:
        BudgetError: even the plan that prunes least drops more.
    """
    rungs = ladder(front)
    if not rungs:
        raise BudgetError(
            "nothing can be pruned", where="max_drop", fix="see the report of pr=0.8 for the reasons"
        )
    best: PruningPlan | None = None
    low, high, least = 0, len(rungs), float("inf")  # below low all are within, from high on none
    while low < high:
        middle = (low + high) // 2
        plan = prepare(rungs[middle])
        drop = drop_of(plan)
        least = min(least, drop)
        if drop <= most:
            best, low = plan, middle + 1
        else:
            high = middle
    if best is None:
        raise BudgetError(
            f"the least drop of eval_fn was {least:.6g}, when next to nothing was pruned",
            where=f"max_drop={most:g}",
            fix="allow more, calibrate on more or better data, or fine-tune (wsp_compiler.prune)",
        )
    return best
