"""Pruned networks by name: how much is kept, and where."""

from __future__ import annotations

import pytest
import torch

from benchmarks.accuracy.methods import (
    METHODS,
    Variant,
    kept_share,
    pruned,
    random_assignment,
    ratio_for_multiplies,
    winograd_layers,
)
from benchmarks.accuracy.models import make

CALIBRATION = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("method", METHODS)
def test_methods_prune_as_much_as_asked(method: str) -> None:
    dense = make("resnet20", 10)
    model = pruned(dense, Variant(method), 0.75, CALIBRATION)
    assert kept_share(model) == pytest.approx(0.25, abs=1e-3)
    layers = winograd_layers(model)
    assert len(layers) == 16
    for layer in layers.values():
        kept = layer.winograd_weight() != 0
        by_row = kept.any(2)
        if method != "wwp":
            assert torch.equal(kept.all(2), by_row)
        if method == "bwsp":
            assert len(set(by_row.sum(1).tolist())) == 1
        if method == "fp":
            assert torch.equal(by_row.any(0), by_row.all(0))
    assert model(CALIBRATION[0]).isfinite().all()


def test_calibration_comes_closer_than_the_norm() -> None:
    dense = make("resnet20", 10)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        errors = [
            float((pruned(dense, variant, 0.5, CALIBRATION)(x) - dense(x)).norm())
            for variant in (Variant(), Variant("wsp", "output", True))
        ]
    assert errors[1] < errors[0]


def test_random_assignments_repeat_and_differ() -> None:
    dense = make("resnet20", 10)
    rules = random_assignment(dense, 0.8, 3)
    assert rules == random_assignment(dense, 0.8, 3) != random_assignment(dense, 0.8, 4)
    assert {rule.method for rule in rules} == {"wsp", "bwsp"}
    assert {rule.pr for rule in rules} == {1 - (1 - 0.8)}
    model = pruned(dense, Variant(), 0.8, [], rules)
    balanced = {
        path
        for path, layer in winograd_layers(model).items()
        if len(set(layer.keep.sum(1).flatten().tolist())) == 1
    }
    named = {rule.match.replace("\\", "") for rule in rules if rule.method == "bwsp"}
    assert named <= balanced
    uneven = random_assignment(dense, 0.8, 3, uneven=True)
    ratios = [rule.pr for rule in uneven]
    assert min(ratios) < 0.7 < 0.9 < max(ratios) < 1


def test_equal_multiplies() -> None:
    assert ratio_for_multiplies(0.125, 2) == pytest.approx(0.71875)
    assert ratio_for_multiplies(0.125, 4) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"0\.250"):
        ratio_for_multiplies(0.3, 4)
