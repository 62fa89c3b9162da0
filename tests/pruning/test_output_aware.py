"""output_aware: scores are energies in the layer's output."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.pruning.test_moments import moments
from wsp_compiler.pruning.base import UNIT_DIMS
from wsp_compiler.pruning.moments import white_gram
from wsp_compiler.pruning.output_aware import MeasuredEnergy, output_energy, relative_error
from wsp_compiler.winograd import transform_weight
from wsp_compiler.winograd_conv import tile_filters, winograd_convolution


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("direction", ["row", "column"])
def test_measured_energy_is_the_variance_that_a_unit_adds(tile: int, direction: str) -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64).relu()
    U = transform_weight(conv.weight, tile)
    scores = MeasuredEnergy(moments(x, conv(x).detach(), tile))(U, UNIT_DIMS[direction])
    assert scores.shape == ((len(U), 4, 1) if direction == "row" else (len(U), 1, 3))
    for k, unit in ((0, 0), (5, 2), (len(U) - 1, 1)):
        alone = torch.zeros_like(U)
        index = (k, unit) if direction == "row" else (k, slice(None), unit)
        alone[index] = U[index]
        y = winograd_convolution(x, tile_filters(alone, tile), None, (1, 1), tile)
        energy = float(y.var((0, 2, 3), unbiased=False).sum())
        assert float(scores.flatten(1)[k, unit]) == pytest.approx(energy, rel=1e-6)


@pytest.mark.parametrize("tile", [2, 4])
def test_without_data_the_input_is_white_noise(tile: int) -> None:
    U = transform_weight(torch.randn(4, 3, 3, 3), tile)
    keep = torch.rand(len(U), 4, 1) < 0.5
    x = torch.randn(200, 3, 2 * tile + 2, 2 * tile + 2, dtype=torch.float64)
    outputs = [
        winograd_convolution(x, tile_filters(value, tile), None, (0, 0), tile) for value in (U * ~keep, U)
    ]
    measured = float(outputs[0].norm() / outputs[1].norm())
    assert relative_error(U, keep, tile) == pytest.approx(measured, rel=0.05)
    lone = torch.zeros_like(U)
    lone[3, 1] = U[3, 1]
    y = winograd_convolution(x, tile_filters(lone, tile), None, (0, 0), tile)
    energy = float(y[:, 1].square().mean())
    assert float(output_energy(U, (2,))[3, 1, 0]) == pytest.approx(energy, rel=0.1)


def test_positions_are_not_alike() -> None:
    """Equal weights at every position do not reach the output equally; L2 would not tell them apart."""
    scores = output_energy(torch.ones(16, 2, 3, dtype=torch.float64), (2,))[:, 0, 0].view(4, 4)
    assert len(scores.unique()) > 1
    assert float(scores.max() / scores.min()) > 3
    assert relative_error(torch.ones(16, 2, 3), torch.ones(1, 1, 1, dtype=torch.bool), 2) == 0


def test_many_filters_are_measured_in_parts_and_stay_as_they_are() -> None:
    U = transform_weight(torch.randn(75, 5, 3, 3), 2)
    keep, before = torch.rand(16, 75, 1) < 0.5, U.clone()
    lost, whole = ((U * ~keep).flatten(1), U.flatten(1))
    gram = white_gram(2, U.device)
    expected = (((lost @ lost.T) * gram).sum() / ((whole @ whole.T) * gram).sum()) ** 0.5
    assert relative_error(U, keep, 2) == pytest.approx(float(expected), rel=1e-9)
    assert torch.equal(U, before)
