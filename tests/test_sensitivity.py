"""sensitivity: changes of outputs in any nesting, gains, and what stands in for unknown ones."""

from __future__ import annotations

import math

import pytest
import torch

from wsp_compiler.sensitivity import LEAST_GAIN, REACH, gain, layer_weights, output_change


def test_change_is_relative_to_the_energy_about_the_mean() -> None:
    before = torch.tensor([[1.0, 3.0], [5.0, 7.0]])  # energy 20 about 4
    assert output_change(before, before + 1) == pytest.approx(4 / 20)
    assert output_change(before, before) == 0.0


def test_changes_of_several_tensors_are_averaged_and_others_skipped() -> None:
    a, b = torch.tensor([0.0, 2.0]), torch.tensor([0.0, 4.0])
    before = {"a": a, "b": [b, torch.tensor([1, 2])], "c": "text"}
    after = {"a": a + 1, "b": [b, torch.tensor([7, 7])], "c": "text"}
    assert output_change(before, after) == pytest.approx((2 / 2 + 0) / 2)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.randn(3), torch.randn(4)),
        (torch.ones(3), torch.zeros(3)),
        (torch.randn(3), torch.full((3,), float("nan"))),
        (torch.ones(1), torch.zeros(1)),
        ((), ()),
    ],
)
def test_what_does_not_compare(before: object, after: object) -> None:
    assert output_change(before, after) is None


def test_gain_relates_the_networks_error_to_the_layers() -> None:
    layer, other = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for scale in (0.1, 10.0):  # the network multiplies by 5: relative errors stay as they are
        pruned = layer + scale * other
        centred = layer - layer.mean((0, 2, 3), keepdim=True)
        expected = float(centred.square().sum() / (layer - layer.mean()).square().sum())
        assert gain(layer, pruned, 5 * layer, 5 * pruned) == pytest.approx(expected, rel=1e-5)
    assert gain(layer, layer, layer, layer) is None
    assert gain(layer, other, torch.ones(4), torch.ones(4)) is None


def test_layers_behind_make_up_for_errors() -> None:
    weights = layer_weights({"a": 2.0, "b": 2.0, "c": 2.0})
    assert list(weights) == ["a", "b", "c"]
    assert weights["c"] == 2.0
    assert weights["b"] == pytest.approx(2 * math.exp(-1 / REACH))
    assert weights["a"] == pytest.approx(2 * math.exp(-2 / REACH))


@pytest.mark.parametrize(
    ("gains", "last"),
    [
        ({"a": 2.0, "b": 4.0, "c": 3.0, "d": None}, 3.0),
        ({"a": 2.0, "b": 2.0, "c": 0.0}, 2.0 * LEAST_GAIN),
        ({"a": None, "b": None}, 1.0),
        ({"a": 0.0}, LEAST_GAIN),
    ],
)
def test_unknown_gains_are_typical_and_none_vanishes(gains: dict[str, float | None], last: float) -> None:
    assert layer_weights(gains)[list(gains)[-1]] == pytest.approx(last)
    assert layer_weights({}) == {}
