"""seeded: the same numbers for the same purpose, and the generators left as they were."""

from __future__ import annotations

import random

import numpy as np
import torch

from wsp_compiler.abwsp.seeds import seeded


def numbers() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_numbers_depend_on_the_purpose_alone() -> None:
    found: list[tuple[float, float, float]] = []
    for purpose in ((0, "a"), (0, "a"), (0, "b"), (1, "a")):
        numbers()  # whatever came before
        with seeded(*purpose):
            found.append(numbers())
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_the_generators_go_on_as_if_nothing_had_been() -> None:
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        numbers()
        wanted = numbers()
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        numbers()
        with seeded(5, "x"):
            numbers()
        assert numbers() == wanted
