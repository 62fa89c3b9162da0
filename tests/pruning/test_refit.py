"""refit: least squares against torch.linalg.lstsq on the written-out system, damping, and what stays pruned."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.pruning.test_moments import moments
from wsp_compiler.pruning.refit import _System, refit
from wsp_compiler.winograd import transform, transform_weight
from wsp_compiler.winograd_conv import tile_filters, winograd_convolution

Layer = tuple[nn.Conv2d, Tensor, Tensor, Tensor]


def layer(tile: int, c: int = 4, n: int = 5, images: int = 6) -> Layer:
    """(conv, input, wanted output, U); the input is smooth, as activations are."""
    conv = nn.Conv2d(c, n, 3, padding=1).double()
    x = F.avg_pool2d(torch.randn(images, c, 11, 13, dtype=torch.float64).relu(), 3, 1, 1)
    return conv, x, conv(x).detach(), transform_weight(conv.weight, tile)


def output(x: Tensor, U: Tensor, bias: Tensor, tile: int) -> Tensor:
    return winograd_convolution(x, tile_filters(U.double(), tile), bias.double(), (1, 1), tile)


def best_outputs(x: Tensor, y: Tensor, keep: Tensor, tile: int) -> Tensor:
    """What unconstrained least squares with a bias reaches, per filter, from the design matrix itself."""
    positions, (n, c) = transform(tile).positions, (y.shape[1], x.shape[1])
    columns: list[Tensor] = []
    for k in range(positions):
        for i in range(c):
            unit = torch.zeros(positions, 1, c, dtype=torch.float64)
            unit[k, 0, i] = 1
            columns.append(winograd_convolution(x, tile_filters(unit, tile), None, (1, 1), tile).flatten())
    design = torch.stack(columns, 1)
    ones = torch.ones(len(design), 1, dtype=torch.float64)
    fitted: list[Tensor] = []
    for f in range(n):
        kept = keep.expand(positions, n, c)[:, f].flatten()
        system = torch.cat([design[:, kept], ones], 1)
        solved = torch.linalg.lstsq(system, y[:, f].flatten().unsqueeze(1), driver="gelsd").solution
        fitted.append((system @ solved).view(y[:, f].shape))
    return torch.stack(fitted, 1)


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("direction", ["row", "column", "element"])
def test_reaches_the_least_squares_error(tile: int, direction: str) -> None:
    _, x, y, U = layer(tile)
    shape = {"row": (len(U), 5, 1), "column": (len(U), 1, 4), "element": tuple(U.shape)}[direction]
    keep = torch.rand(shape) < 0.4
    found = refit(moments(x, y, tile), U, keep, damping=1e-7, match=False)
    assert not bool(found.U[~keep.expand(U.shape)].any())
    best = float((best_outputs(x, y, keep, tile) - y).norm())
    reached = float((output(x, found.U, found.bias, tile) - y).norm())
    assert reached <= 1.01 * best
    centred = y - y.mean((0, 2, 3), keepdim=True)
    assert found.error == pytest.approx(reached / float(centred.norm()), rel=1e-3)


def test_nothing_pruned_changes_nothing() -> None:
    _, x, y, U = layer(2)
    found = refit(moments(x, y, 2), U, torch.ones(1, 1, 1, dtype=torch.bool))
    assert float((found.U - U).norm() / U.norm()) < 1e-5
    assert found.error < 1e-5


def test_refitting_beats_cutting() -> None:
    _, x, y, U = layer(2)
    keep = torch.rand(16, 5, 1) < 0.5
    found = refit(moments(x, y, 2), U, keep, match=False)
    cut = output(x, U * keep, torch.zeros(5), 2)
    cut_error = (cut - y - (cut - y).mean((0, 2, 3), keepdim=True)).norm()
    assert float((output(x, found.U, found.bias, 2) - y).norm()) < 0.9 * float(cut_error)


def test_match_keeps_mean_and_variance() -> None:
    _, x, y, U = layer(2)
    found = refit(moments(x, y, 2), U, torch.rand(16, 5, 1) < 0.4)
    z = output(x, found.U, found.bias, 2)
    assert torch.allclose(z.mean((0, 2, 3)), y.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(z.var((0, 2, 3)), y.var((0, 2, 3)), rtol=1e-3)


def test_few_samples_are_regularised() -> None:
    """One 6x6 image has 36 outputs for about as many unknowns: other images must not suffer for it."""
    conv, x, y, U = layer(2)
    few = x[:1, :, :6, :6]
    keep = torch.rand(16, 5, 1) < 0.5
    seen = moments(few, conv(few).detach(), 2)

    def held_out(U: Tensor, bias: Tensor) -> float:
        return float((output(x[1:], U, bias, 2) - y[1:]).norm() / y[1:].norm())

    damped, plain = refit(seen, U, keep), refit(seen, U, keep, damping=1e-6)
    assert held_out(damped.U, damped.bias) < 0.9 * held_out(plain.U, plain.bias)


def test_an_input_of_zeros_and_an_unused_filter() -> None:
    _, x, y, U = layer(2)
    found = refit(moments(x * 0, y, 2), U, torch.rand(16, 5, 1) < 0.5)
    assert bool(found.U.isfinite().all())
    assert torch.allclose(found.bias.double(), y.mean((0, 2, 3)))
    keep = torch.rand(16, 5, 1) < 0.5
    keep[:, 2] = False  # this filter keeps nothing: its bias is its mean
    found = refit(moments(x, y, 2), U, keep)
    assert not bool(found.U[:, 2].any())
    assert float(found.bias[2]) == pytest.approx(float(y[:, 2].mean()), rel=1e-5)


class Blocks:
    """Moments of a layer of which the solver's preconditioner needs the positions' own blocks alone."""

    tile = 2

    def __init__(self, blocks: Tensor) -> None:
        self.gram, self.blocks = blocks[0], blocks

    def position_grams(self) -> Tensor:
        return self.blocks


def test_many_channels_are_preconditioned_on_several_threads() -> None:
    """PyTorch's batched LU decomposition fails here; see _System."""
    sample = torch.randn(16, 256, 300)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        kept = torch.ones(3, 16, 256, dtype=torch.bool)
        system = _System(cast("Any", Blocks(sample @ sample.mT)), kept, 1e-3)
    finally:
        torch.set_num_threads(before)
    damped = sample @ sample.mT + system.white.diagonal().view(-1, 1, 1) * torch.eye(256)
    assert torch.allclose(damped @ system.inverse, torch.eye(256).expand(16, -1, -1), atol=1e-2)


def test_a_block_that_is_not_positive_definite_is_preconditioned_by_its_diagonal() -> None:
    blocks = torch.eye(4).repeat(16, 1, 1)
    blocks[3] = -5 * torch.eye(4)
    system = _System(cast("Any", Blocks(blocks)), torch.ones(5, 16, 4, dtype=torch.bool), 1e-3)
    assert torch.allclose(system.inverse, torch.diag_embed(1 / system.diagonal.view(16, 4)))
    assert bool((system.inverse[3].diagonal() < 0).all())
