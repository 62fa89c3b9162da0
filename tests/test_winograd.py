"""winograd: the matrices compute convolutions exactly, and the counts count."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from wsp_compiler.winograd import (
    INTERPOLATION_POINTS,
    count_multiplies,
    output_size,
    remember_transforms,
    tile_grid,
    transform,
    transform_weight,
)

TILES = sorted(INTERPOLATION_POINTS)


@pytest.mark.parametrize("tile", TILES)
def test_1d_identity(tile: int) -> None:
    winograd = transform(tile)
    BT, G, AT = (winograd.tensor(name, torch.float64) for name in ("BT", "G", "AT"))
    d, g = torch.randn(50, tile + 2).double(), torch.randn(50, 3).double()
    direct = torch.einsum("bmr,br->bm", d.unfold(1, 3, 1), g)
    torch.testing.assert_close(((d @ BT.T) * (g @ G.T)) @ AT.T, direct, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", TILES)
def test_2d_identity(tile: int) -> None:
    winograd = transform(tile)
    BT, AT = winograd.tensor("BT", torch.float64), winograd.tensor("AT", torch.float64)
    d, g = torch.randn(5, tile + 2, tile + 2).double(), torch.randn(7, 5, 3, 3).double()
    U = transform_weight(g, tile).view(tile + 2, tile + 2, 7, 5)
    V = torch.einsum("ai,cij,bj->abc", BT, d, BT)
    y = torch.einsum("ai,ijn,bj->nab", AT, torch.einsum("ijnc,ijc->ijn", U, V), AT)
    torch.testing.assert_close(y, F.conv2d(d.unsqueeze(0), g)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", TILES)
def test_shapes_and_sizes(tile: int) -> None:
    winograd, p = transform(tile), tile + 2
    assert (winograd.tile, winograd.input_side, winograd.positions) == (tile, p, p * p)
    assert [tuple(winograd.tensor(name, torch.float32).shape) for name in ("BT", "G", "AT")] == [
        (p, p),
        (p, 3),
        (tile, p),
    ]


def test_input_growth_is_reached_and_not_exceeded() -> None:
    assert [transform(tile).input_growth for tile in TILES] == [4.0, 100.0]
    for tile in TILES:
        BT = transform(tile).tensor("BT", torch.float64)
        worst = BT[BT.abs().sum(1).argmax()].sign()
        d = torch.outer(worst, worst)
        assert float((BT @ d @ BT.T).abs().max()) == transform(tile).input_growth


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_are_transformed_in_float64(tile: int, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 3, 3, 3).to(dtype)
    U = transform_weight(weight.requires_grad_(), tile)
    assert U.dtype == torch.float64
    assert not U.requires_grad
    assert U.shape == ((tile + 2) ** 2, 4, 3)
    G = transform(tile).tensor("G", torch.float64)
    expected = G @ weight.detach()[2, 1].double() @ G.T
    torch.testing.assert_close(U[:, 2, 1].view_as(expected), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("size", "padding", "tile", "expected"),
    [
        ((7, 7), (1, 1), 2, (4, 4)),
        ((7, 7), (1, 1), 4, (2, 2)),
        ((13, 20), (1, 1), 4, (4, 5)),
        ((13, 20), (0, 2), 2, (6, 11)),
        ((1, 1), (1, 1), 4, (1, 1)),
        ((3, 3), (0, 0), 2, (1, 1)),
        ((8, 8), (1, 1), 4, (2, 2)),
        ((9, 8), (1, 1), 4, (3, 2)),
    ],
)
def test_tile_grid(
    size: tuple[int, int], padding: tuple[int, int], tile: int, expected: tuple[int, int]
) -> None:
    assert tile_grid(*size, padding, tile) == expected
    image = torch.zeros(1, 1, *size)
    real = F.conv2d(image, torch.zeros(1, 1, 3, 3), padding=padding).shape[2:]
    assert tuple(real) == (output_size(size[0], padding[0]), output_size(size[1], padding[1]))
    for extent, count in zip(real, expected, strict=True):  # covers the output, and not with a tile too many
        assert (count - 1) * tile < extent <= count * tile


def test_multiplies() -> None:
    counted = count_multiplies(2, (6, 5), (7, 9), 2, kept_weights=100)
    assert counted.direct == 2 * 7 * 9 * 6 * 5 * 9
    assert counted.winograd == 2 * (4 * 5) * 16 * 6 * 5
    assert counted.kept == 2 * (4 * 5) * 100
    assert count_multiplies(1, (16, 16), (8, 8), 4, 36 * 256).winograd == 4 * 36 * 256
    assert count_multiplies(0, (16, 16), (8, 8), 4, 36 * 256).direct == 0


def test_dense_winograd_multiplies_less() -> None:
    for tile, saving in ((2, 9 * 4 / 16), (4, 9 * 16 / 36)):
        counted = count_multiplies(1, (64, 64), (8, 8), tile, 0)
        assert counted.direct / counted.winograd == saving


def test_the_last_weight_is_transformed_once_inside_a_plan():
    weight, other = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    assert transform_weight(weight, 2) is not transform_weight(weight, 2)
    with remember_transforms():
        first = transform_weight(weight, 2)
        assert transform_weight(weight, 2) is first
        assert transform_weight(weight, 4).shape == (36, 4, 3)
        assert transform_weight(weight, 2) is first
        expected = transform_weight(other, 2)
        assert not torch.equal(expected, first)
        other.mul_(2)
        assert torch.equal(transform_weight(other, 2), 2 * expected)
        with torch.inference_mode():
            inference = torch.ones(4, 3, 3, 3)
            assert transform_weight(inference, 2) is not transform_weight(inference, 2)
    assert transform_weight(other, 2) is not transform_weight(other, 2)
