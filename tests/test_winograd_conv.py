"""winograd_conv: one strided convolution computes what the three Winograd stages compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.reference import pruned_convolution, relative_error
from wsp_compiler.winograd import transform_weight
from wsp_compiler.winograd_conv import tile_combination, tile_filters, winograd_convolution


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("size", [(7, 7), (13, 20), (8, 12), (3, 3)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 1)])
def test_equals_the_pruned_convolution(tile: int, size: tuple[int, int], padding: tuple[int, int]) -> None:
    conv = nn.Conv2d(3, 5, 3, padding=padding).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    U = transform_weight(conv.weight, tile)
    keep = torch.rand(U.shape[0], 5, 1) < 0.5
    W = tile_filters(U * keep, tile)
    assert W.shape == (5 * tile * tile, 3, tile + 2, tile + 2)
    expected = pruned_convolution(x, conv, keep, tile)
    assert conv.bias is not None
    actual = winograd_convolution(x, W, conv.bias, padding, tile)
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) < 1e-12
    one = winograd_convolution(x[0], W, conv.bias, padding, tile)
    assert torch.allclose(one, expected[0])


def test_gradients_reach_weights_and_input() -> None:
    U = torch.randn(16, 2, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def layer(*given: torch.Tensor) -> torch.Tensor:
        return winograd_convolution(given[0], tile_filters(given[1], 2), given[2], (1, 1), 2)

    assert torch.autograd.gradcheck(layer, (x, U, bias))


@pytest.mark.parametrize("tile", [2, 4])
def test_a_kept_combination_is_used(tile: int) -> None:
    U = torch.randn((tile + 2) ** 2, 3, 2, dtype=torch.float64)
    combination = tile_combination(tile, torch.float64)
    assert combination.shape == (tile * tile, (tile + 2) ** 2, (tile + 2) ** 2)
    assert torch.equal(tile_filters(U, tile, combination), tile_filters(U, tile))
    assert torch.allclose(tile_filters(U, tile, 2 * combination), 2 * tile_filters(U, tile))
