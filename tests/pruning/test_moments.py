"""moments: the quadratic form is the squared error of real outputs, border tiles and batches included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from wsp_compiler.pruning.moments import Moments, MomentsBuilder, white_gram
from wsp_compiler.winograd import transform, transform_weight
from wsp_compiler.winograd_conv import tile_filters, winograd_convolution


def moments(x: Tensor, y: Tensor, tile: int, padding: tuple[int, int] = (1, 1), parts: int = 1) -> Moments:
    builder = MomentsBuilder(x.shape[1], y.shape[1], tile, padding, dtype=torch.float64)
    for some_x, some_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
        builder.add(some_x, some_y)
    return builder.build()


def quadratic_error(found: Moments, U: Tensor) -> Tensor:
    """Variance of (wanted - output of U) of every filter, from the moments alone."""
    flat = U.permute(1, 0, 2).reshape(U.shape[1], -1)
    return found.variance - 2 * (flat * found.cross).sum(1) + ((flat @ found.gram) * flat).sum(1)


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (3, 5), (13, 4)])
@pytest.mark.parametrize("padding", [(1, 1), (0, 2)])
def test_error_of_any_weights_is_that_of_the_layer(
    tile: int, size: tuple[int, int], padding: tuple[int, int]
) -> None:
    conv = nn.Conv2d(3, 4, 3, padding=padding).double()
    x = torch.randn(3, 3, *size, dtype=torch.float64) + 0.7
    y = conv(x).detach()
    U = torch.randn(transform(tile).positions, 4, 3, dtype=torch.float64)
    found = moments(x, y, tile, padding)
    output = winograd_convolution(x, tile_filters(U, tile), None, padding, tile)
    expected = (y - output).transpose(0, 1).flatten(1).var(1, unbiased=False)
    assert torch.allclose(quadratic_error(found, U), expected, rtol=1e-9)
    assert found.samples == y[:, 0].numel()
    flat = U.permute(1, 0, 2).reshape(4, -1)
    assert torch.allclose(flat @ found.reach, output.mean((0, 2, 3)), rtol=1e-9)
    assert torch.allclose(found.mean, y.mean((0, 2, 3)))
    exact = quadratic_error(found, transform_weight(conv.weight, tile))
    assert float(exact.abs().max()) < 1e-10 * float(found.variance.max())


def test_batches_add_up() -> None:
    x, y = torch.randn(4, 2, 6, 5, dtype=torch.float64), torch.randn(4, 3, 6, 5, dtype=torch.float64)
    whole, parts = moments(x, y, 2), moments(x, y, 2, parts=4)
    for name in ("gram", "cross", "variance", "reach", "mean"):
        assert torch.allclose(getattr(whole, name), getattr(parts, name)), name


def test_memory_does_not_grow_with_the_samples() -> None:
    builder = MomentsBuilder(2, 3, 2, (1, 1))
    held = [t.numel() for t in vars(builder).values() if isinstance(t, Tensor)]
    for _ in range(3):
        builder.add(torch.randn(5, 2, 9, 9), torch.randn(5, 3, 9, 9))
    assert [t.numel() for t in vars(builder).values() if isinstance(t, Tensor)] == held


@pytest.mark.parametrize("tile", [2, 4])
def test_white_gram_is_what_noise_gives(tile: int) -> None:
    side = 40 * tile
    x = torch.randn(20, 1, side, side, dtype=torch.float64)
    found = moments(x, x[:, :, 2:, 2:], tile, (0, 0))
    expected = white_gram(tile)
    assert float((found.gram - expected).norm() / expected.norm()) < 0.05
