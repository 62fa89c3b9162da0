"""refit_filters: the best 3x3 filters for the wanted outputs."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from wsp_compiler.filters.shrink import spatial_filters
from wsp_compiler.pruning.moments import Moments, MomentsBuilder
from wsp_compiler.pruning.refit import refit
from wsp_compiler.pruning.refit_filters import refit_filters
from wsp_compiler.winograd import transform_weight


def moments_of(x: torch.Tensor, y: torch.Tensor, tile: int) -> Moments:
    builder = MomentsBuilder(x.shape[1], y.shape[1], tile, (1, 1), dtype=torch.float64)
    builder.add(x, y)
    return builder.build()


@pytest.mark.parametrize("tile", [2, 4])
def test_finds_the_filters_that_made_the_output(tile: int) -> None:
    weight, bias = torch.randn(6, 4, 3, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    x = torch.randn(8, 4, 13, 10, dtype=torch.float64) + 0.5
    y = F.conv2d(x, weight, bias, padding=1)
    keep = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool).view(1, 6, 1)
    start = transform_weight(torch.randn_like(weight), tile)
    fitted = refit_filters(moments_of(x, y, tile), start, keep, damping=1e-12)
    kept = keep.flatten()
    torch.testing.assert_close(spatial_filters(fitted.U, tile)[kept], weight[kept], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fitted.bias[kept].double(), bias[kept], rtol=1e-4, atol=1e-4)
    assert not fitted.U[:, ~kept].any()
    torch.testing.assert_close(fitted.bias[~kept].double(), y.mean((0, 2, 3))[~kept], rtol=1e-4, atol=1e-4)
    lost = (y - y.mean((0, 2, 3), keepdim=True))[:, ~kept].square().sum()
    whole = (y - y.mean((0, 2, 3), keepdim=True)).square().sum()
    assert fitted.error == pytest.approx(float((lost / whole).sqrt()), rel=1e-3)


@pytest.mark.parametrize("tile", [2, 4])
def test_makes_up_for_a_lost_input_channel(tile: int) -> None:
    """Channels are correlated, so the others can stand in; Winograd weights, which are more, can do it better."""
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    mix = torch.eye(4, dtype=torch.float64) + 0.6
    x = torch.einsum("ij,njhw->nihw", mix, torch.randn(16, 4, 16, 16, dtype=torch.float64))
    y = F.conv2d(x, weight, padding=1)
    pruned = x.clone()
    pruned[:, 2] = 0.0
    moments, U = moments_of(pruned, y, tile), transform_weight(weight, tile)
    keep = torch.ones((1, 5, 1), dtype=torch.bool)
    fitted = refit_filters(moments, U, keep)
    before = F.conv2d(pruned, weight, padding=1)

    def error(output: torch.Tensor) -> float:
        centred = y - y.mean((0, 2, 3), keepdim=True)
        return float((output - y).norm() / centred.norm())

    after = F.conv2d(pruned, spatial_filters(fitted.U, tile), fitted.bias.double(), padding=1)
    assert error(after) < 0.8 * error(before)
    assert fitted.error == pytest.approx(error(after), rel=0.02)
    assert refit(moments, U, keep).error < 1.02 * fitted.error
