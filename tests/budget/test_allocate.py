"""allocate: the least error within the budget, against all assignments."""

from __future__ import annotations

import itertools
import random

import pytest

from wsp_compiler.budget.allocate import allocate, total_cost, total_error

Layers = list[list[tuple[float, float]]]


def best_of_all(layers: Layers, budget: float) -> float:
    """Least error by trying every assignment."""
    errors = [
        total_error(layers, chosen)
        for chosen in itertools.product(*(range(len(choices)) for choices in layers))
        if total_cost(layers, chosen) <= budget
    ]
    return min(errors)


def random_layers(seed: int, count: int = 5, choices: int = 5, whole: bool = False) -> Layers:
    generator = random.Random(seed)
    cost = (lambda: float(generator.randint(1, 30))) if whole else (lambda: generator.uniform(1, 100))
    return [[(cost(), generator.uniform(0, 3)) for _ in range(choices)] for _ in range(count)]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_against_trying_everything(seed: int, whole: bool) -> None:
    """Rounding of costs may lose 1% of what is beyond the least."""
    layers = random_layers(seed, whole=whole)
    least = sum(min(cost for cost, _ in choices) for choices in layers)
    for share in (0.0, 0.1, 0.4, 0.8, 1.0):
        most = sum(max(cost for cost, _ in choices) for choices in layers)
        budget = least + share * (most - least)
        chosen = allocate(layers, budget)
        assert chosen is not None
        assert total_cost(layers, chosen) <= budget + 1e-9
        assert (
            total_error(layers, chosen)
            <= best_of_all(layers, budget + 1e-9 - 0.01 * (budget - least)) + 1e-12
        )


def test_the_limits() -> None:
    layers = [[(1.0, 5.0), (3.0, 0.0)], [(2.0, 4.0), (2.0, 1.0)]]
    assert allocate(layers, 2.9) is None
    assert allocate(layers, 3.0) == [0, 1]
    assert allocate(layers, 4.9) == [0, 1]
    assert allocate(layers, 5.0) == [1, 1]
    assert allocate(layers, 1e9) == [1, 1]
    assert allocate([], 0.0) == []


def test_of_equal_errors_the_cheaper() -> None:
    assert allocate([[(5.0, 1.0), (2.0, 1.0), (3.0, 1.0)]], 10.0) == [1]


def test_many_layers_keep_the_budget() -> None:
    layers = random_layers(1, count=150, choices=12)
    least = sum(min(cost for cost, _ in choices) for choices in layers)
    chosen = allocate(layers, 2 * least)
    assert chosen is not None
    assert 1.97 * least < total_cost(layers, chosen) <= 2 * least
