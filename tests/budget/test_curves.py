"""curves: predicted errors against the errors that pruning and refitting really leave."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsp_compiler.budget.candidates import grid_candidates
from wsp_compiler.budget.curves import LayerErrors, keep_of, sample_filters
from wsp_compiler.options import CompileOptions
from wsp_compiler.plan import choose_keep
from wsp_compiler.pruning.moments import Moments, MomentsBuilder
from wsp_compiler.pruning.output_aware import MeasuredEnergy
from wsp_compiler.pruning.refit import refit
from wsp_compiler.site_plan import SitePlan
from wsp_compiler.winograd import transform_weight
from wsp_compiler.winograd_conv import tile_filters, winograd_convolution


def layer(filters: int = 24, tile: int = 2) -> tuple[nn.Conv2d, Tensor, Moments]:
    conv = nn.Conv2d(16, filters, 3, padding=1).requires_grad_(False)
    x = F.avg_pool2d(torch.randn(6, 16, 23, 22), 3, 1).relu()
    builder = MomentsBuilder(16, filters, tile, (1, 1))
    builder.add(x, conv(x))
    return conv, x, builder.build()


def candidates(conv: nn.Conv2d, moments: Moments, method: str, tile: int = 2) -> list[SitePlan]:
    U = transform_weight(conv.weight, tile).float()
    entries = grid_candidates("", conv, CompileOptions(tile=tile), (method,))
    return [choose_keep(entry, U, MeasuredEnergy(moments)) for entry in entries]


def share(difference: Tensor, y: Tensor) -> float:
    """Squared error relative to the variance over samples, with the mean refitted by the bias."""
    difference = difference - difference.mean((0, 2, 3), keepdim=True)
    return float(difference.square().sum() / (y - y.mean((0, 2, 3), keepdim=True)).square().sum())


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("method", ["wsp", "bwsp", "fp"])
def test_what_removing_weights_costs(method: str, tile: int) -> None:
    conv, x, moments = layer(tile=tile)
    U, y = transform_weight(conv.weight, tile), conv(x)
    errors = LayerErrors(moments, U, 0.5)
    for entry in candidates(conv, moments, method, tile)[1::4]:
        W = tile_filters((U * entry.keep).float(), tile)
        actual = share(winograd_convolution(x, W, conv.bias, (1, 1), tile) - y, y)
        assert errors.without_refit(entry) == pytest.approx(actual, rel=1e-3)


@pytest.mark.parametrize("typical", [0.7, 0.5, 0.2])
@pytest.mark.parametrize("method", ["wsp", "bwsp"])
def test_predictions_are_near_the_refitted_errors(method: str, typical: float) -> None:
    conv, _, moments = layer()
    U = transform_weight(conv.weight, 2)
    entries = candidates(conv, moments, method)
    predicted = LayerErrors(moments, U, typical).predict(entries)
    assert predicted[0] < 1e-4
    assert predicted[3:] == sorted(predicted[3:])
    for entry, error in list(zip(entries, predicted, strict=True))[1:]:
        if typical / 2 <= entry.kept_fraction <= (1 + typical) / 2:
            assert error == pytest.approx(refit(moments, U, entry.keep).error ** 2, rel=0.25)
        else:
            assert 0.4 < error / refit(moments, U, entry.keep).error ** 2 < 2.5


def test_what_comes_in_may_be_damaged_already() -> None:
    """Unpruned layers are not refitted and pass errors on; refitted ones make up for a part of them."""
    conv, x, _ = layer()
    noisy = x + 0.3 * torch.randn(x.shape)
    builder = MomentsBuilder(16, 24, 2, (1, 1))
    builder.add(noisy, conv(x))
    moments = builder.build()
    entries = candidates(conv, moments, "wsp")
    errors = LayerErrors(moments, transform_weight(conv.weight, 2), 0.8).predict(entries)
    y = conv(x)
    assert errors[0] == pytest.approx(share(conv(noisy) - y, y), rel=1e-3)
    assert errors[1] < errors[0]


def test_a_sample_of_the_filters_stands_for_all() -> None:
    conv, _, moments = layer(filters=160)
    U = transform_weight(conv.weight, 2)
    entries = candidates(conv, moments, "wsp")
    errors = LayerErrors(moments, U, 0.5)
    assert len(errors.filters) == 64
    assert bool((errors.filters.diff() > 0).all())
    predicted = errors.predict(entries)
    for index in (3, 5, 10):
        whole = refit(moments, U, entries[index].keep).error ** 2
        assert predicted[index] == pytest.approx(whole, rel=0.25)


def test_the_sample_spans_the_variances() -> None:
    _, _, moments = layer(filters=100)
    order = torch.argsort(moments.variance)
    chosen = sample_filters(moments, 10)
    assert {int(order[0]), int(order[-1])} <= set(chosen.tolist())
    assert sample_filters(moments, 100).tolist() == list(range(100))


def test_keep_of_columns_belongs_to_all_filters() -> None:
    conv, _, _ = layer()
    (entry,) = grid_candidates("", conv, CompileOptions(direction="column"), ("wsp",))[7:8]
    assert keep_of(entry, torch.tensor([1, 3])).shape == (16, 1, 16)
    (entry,) = grid_candidates("", conv, CompileOptions(), ("wsp",))[7:8]
    assert torch.equal(keep_of(entry, torch.tensor([1, 3])), entry.keep[:, [1, 3]])


def test_a_dead_layer_has_no_error() -> None:
    conv = nn.Conv2d(16, 16, 3).requires_grad_(False)
    nn.init.zeros_(conv.weight)
    x = torch.randn(2, 16, 9, 9)
    builder = MomentsBuilder(16, 16, 2, (0, 0))
    builder.add(x, conv(x))
    moments = builder.build()
    errors = LayerErrors(moments, transform_weight(conv.weight, 2), 0.5)
    assert errors.predict(candidates(conv, moments, "wsp")) == [0.0] * 15
