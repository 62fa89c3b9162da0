"""The dynamic program: one choice for every layer, least total error, total cost within a budget.

best[l][b] = min over the choices k of layer l with cost c_k <= b of best[l - 1][b - c_k] + e_k

Costs are counted in so many steps of the budget and rounded up, so that the budget is never exceeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

STEPS = 2048
"""Steps of the budget, at least; more for many layers, so that rounding loses less than 1% of it."""
STEPS_PER_LAYER = 128

Choice = tuple[float, float]
"""(cost, error) of one choice of a layer, both >= 0."""


def allocate(layers: Sequence[Sequence[Choice]], budget: float) -> list[int] | None:
    """The index of a choice for every layer.

    Args:
        layers: the choices of each layer, at least one.
        budget: most total cost, in the costs' unit.

    Returns:
        The choices with the least total error; of equal errors, cheaper ones. None if the budget is below the sum of
        the least costs.
    """
    least = [min(cost for cost, _ in choices) for choices in layers]
    slack = budget - sum(least)
    if slack < -1e-9 * max(abs(budget), 1.0):
        return None
    steps = max(STEPS, STEPS_PER_LAYER * len(layers))
    step = max(slack, 0.0) / steps
    chosen_at: list[Any] = []
    best: Any = np.zeros(steps + 1)  # over how much of the slack is spent at most
    for choices, lowest in zip(layers, least, strict=True):
        totals: Any = np.full(steps + 1, np.inf)
        picked: Any = np.zeros(steps + 1, dtype=np.int64)
        for index, (cost, error) in sorted(enumerate(choices), key=lambda item: item[1]):
            spent = _steps(cost - lowest, step, steps)
            if spent is None:
                continue
            candidate = best[: steps + 1 - spent] + error
            better = candidate < totals[spent:]
            totals[spent:][better] = candidate[better]
            picked[spent:][better] = index
        chosen_at.append(picked)
        best = totals
    left = steps
    chosen: list[int] = []
    for choices, lowest, picked in reversed(list(zip(layers, least, chosen_at, strict=True))):
        index = int(picked[left])
        chosen.append(index)
        spent = _steps(choices[index][0] - lowest, step, steps)
        assert spent is not None
        left -= spent
    return _spend_rest(layers, chosen[::-1], budget)


def _steps(extra: float, step: float, most: int) -> int | None:
    """How many steps ``extra`` takes, rounded up; None if more than ``most``."""
    if extra <= 0:
        return 0
    if step <= 0 or extra > step * most * (1 + 1e-12):
        return None
    return min(most, int(np.ceil(extra / step - 1e-9)))


def _spend_rest(layers: Sequence[Sequence[Choice]], chosen: list[int], budget: float) -> list[int]:
    """What rounding has left over, spent on the single changes that gain most."""
    total = sum(choices[index][0] for choices, index in zip(layers, chosen, strict=True))
    while True:
        best: tuple[float, int, int] | None = None
        for layer, (choices, index) in enumerate(zip(layers, chosen, strict=True)):
            cost, error = choices[index]
            for other, (other_cost, other_error) in enumerate(choices):
                gain = error - other_error
                if gain > (best[0] if best else 0.0) and total - cost + other_cost <= budget:
                    best = (gain, layer, other)
        if best is None:
            return chosen
        _, layer, other = best
        total += layers[layer][other][0] - layers[layer][chosen[layer]][0]
        chosen[layer] = other


def total_cost(layers: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> float:
    """Sum of the costs of the chosen."""
    return sum(choices[index][0] for choices, index in zip(layers, chosen, strict=True))


def total_error(layers: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> float:
    """Sum of the errors of the chosen."""
    return sum(choices[index][1] for choices, index in zip(layers, chosen, strict=True))
