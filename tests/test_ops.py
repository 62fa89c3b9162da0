"""ops: the eager meaning of every operator, against float64 convolutions computed in other ways."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.layers import PRUNED, WSP, Layer, assert_near, masked_convolution
from wsp_compiler import ops
from wsp_compiler.winograd import tile_grid, transform, transform_weight

SHAPES = [  # batch, c, n, (H, W), padding
    (2, 5, 6, (7, 7), (1, 1)),
    (1, 3, 4, (13, 20), (1, 1)),
    (3, 4, 1, (9, 5), (0, 2)),
    (1, 1, 3, (1, 1), (1, 1)),
    (0, 4, 4, (8, 8), (1, 1)),
    (1, 4, 5, (3, 3), (0, 0)),
    (1, 2, 2, (4, 6), (3, 4)),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Threads that wait for each other make small operations slow on a busy machine; undone in conftest."""
    torch.set_num_threads(1)


@pytest.mark.parametrize(("batch", "c", "n", "size", "padding"), SHAPES)
@pytest.mark.parametrize("tile", [2, 4])
def test_dense_equals_conv2d(
    batch: int, c: int, n: int, size: tuple[int, int], padding: tuple[int, int], tile: int
) -> None:
    layer = Layer(c, n, padding, tile, "dense")
    x = torch.randn(batch, c, *size).double()
    expected = F.conv2d(x, layer.conv.weight.double(), layer.conv.bias.double(), padding=padding)
    assert_near(layer.run(x), expected)
    assert_near(layer.run(x, merged=True), expected)


@pytest.mark.parametrize(("method", "direction"), PRUNED)
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize(("batch", "c", "n", "size", "padding"), SHAPES[:5])
def test_pruned_equals_masked_matrices(
    batch: int,
    c: int,
    n: int,
    size: tuple[int, int],
    padding: tuple[int, int],
    tile: int,
    method: str,
    direction: str,
) -> None:
    layer = Layer(c, n, padding, tile, method, direction)
    x = torch.randn(batch, c, *size).double()
    expected = masked_convolution(x, layer.conv, layer.site.keep, tile)
    assert_near(layer.run(x), expected)
    assert_near(layer.run(x, merged=True), expected)


def test_pruning_changes_the_result() -> None:
    """Without this, the tests above would pass on operators that ignore ``keep``."""
    for method, direction in PRUNED:
        layer = Layer(6, 6, (1, 1), 2, method, direction)
        x = torch.randn(1, 6, 8, 8)
        assert float((layer.run(x) - layer.conv(x)).norm()) > 0.05 * float(layer.conv(x).norm())


@pytest.mark.parametrize("tile", [2, 4])
def test_stages_by_definition(tile: int) -> None:
    """V, M of one tile in the middle of the image."""
    layer, winograd = Layer(3, 4, (1, 1), tile, "bwsp", "column"), transform(tile)
    site, p = layer.site, tile + 2
    x = torch.randn(2, 3, 3 * tile, 4 * tile).double()
    rows, columns = tile_grid(x.shape[2], x.shape[3], (1, 1), tile)
    V = ops.input_transform(x, site.columns, site.column_offset, [1, 1], tile)
    M = ops.sparse_bgemm(V, site.weight, site.rows, site.row_offset, site.column_offset)
    t = 1 * rows * columns + 1 * columns + 2  # image 1, tile row 1, tile column 2
    d = x[1, :, tile - 1 : tile - 1 + p, 2 * tile - 1 : 2 * tile - 1 + p]
    BT = winograd.tensor("BT", torch.float64)
    expected = (BT @ d @ BT.T).reshape(3, p * p)  # [c, p*p]
    for k, U_k in enumerate(site.position_weights()):
        kept = site.keep[k, 0].nonzero().flatten()
        start, end = site.column_offset[k], site.column_offset[k + 1]
        torch.testing.assert_close(V[start:end, t], expected[kept, k])
        torch.testing.assert_close(
            M[site.row_offset[k] : site.row_offset[k + 1], t], U_k.double() @ expected[kept, k]
        )
        torch.testing.assert_close(U_k, transform_weight(layer.conv.weight, tile)[k][:, kept].float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_output_has_the_inputs_dtype_and_arithmetic_is_at_least_float32(dtype: torch.dtype) -> None:
    layer = Layer(16, 16, (1, 1), 4, "bwsp")
    x = torch.randn(2, 16, 9, 9).to(dtype)
    exact = masked_convolution(x.double(), layer.conv, layer.site.keep, 4)
    for merged in (False, True):
        y = layer.run(x, merged=merged)
        assert y.dtype == dtype
        # only the last rounding, to dtype, may cost more than float32 does
        assert_near(y.double(), exact, max(2e-6, torch.finfo(dtype).eps))
    V = ops.input_transform(x, layer.site.columns, layer.site.column_offset, [1, 1], 4)
    assert V.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("tile", [2, 4])
def test_winograd_grows_float16_inputs_without_overflow(tile: int) -> None:
    layer = Layer(16, 16, (1, 1), tile, "dense")
    x = (torch.randn(1, 16, 8, 8).sign() * 60000).half()
    y = layer.run(x)
    exact = F.conv2d(x.double(), layer.conv.weight.double(), layer.conv.bias.double(), padding=1)
    fits = exact.abs() < 65000
    assert fits.any()
    assert bool(torch.isfinite(y[fits]).all())


@pytest.mark.parametrize(
    "shape", [(2, 6, 7, 9), (1, 6, 7, 9), (2, 1, 7, 9), (6, 1, 1), (7, 9), (1,), (), (3, 2, 6, 7, 9)]
)
def test_residuals_broadcast(shape: tuple[int, ...]) -> None:
    layer = Layer(4, 6, (1, 1), 2, "bwsp")
    x, residual = torch.randn(2, 4, 7, 9).double(), torch.randn(shape).double()
    expected = torch.relu(layer.run(x) + residual)
    torch.testing.assert_close(layer.run(x, residual, activation="relu"), expected)
    torch.testing.assert_close(layer.run(x, residual, activation="relu", merged=True), expected)


def test_one_channel_grows_to_the_residuals_channels() -> None:
    layer = Layer(4, 1, (1, 1), 2, "dense")
    x, residual = torch.randn(2, 4, 6, 6), torch.randn(2, 5, 6, 6)
    slope = torch.rand(5)
    expected = F.prelu(layer.run(x) + residual, slope)
    torch.testing.assert_close(layer.run(x, residual, slope, "prelu"), expected)


@pytest.mark.parametrize("residual_dtype", [torch.float16, torch.float32, torch.float64, torch.int32])
@pytest.mark.parametrize("shape", [(1, 6, 5, 5), ()])
def test_residuals_promote_as_an_add_does(residual_dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    layer = Layer(4, 6, (1, 1), 2, "dense")
    x, residual = torch.randn(1, 4, 5, 5).half(), torch.ones(shape).to(residual_dtype)
    expected = (layer.run(x) + residual).dtype
    assert layer.run(x, residual).dtype == expected
    assert layer.run(x, residual, merged=True).dtype == expected


def test_the_residual_is_added_before_rounding() -> None:
    layer = Layer(4, 4, (1, 1), 2, "dense")
    x = torch.randn(1, 4, 5, 5)
    half = layer.run(x.half(), -layer.run(x.half()))
    assert half.dtype == torch.float16
    assert 0 < float(half.abs().max()) < 1e-3  # what rounding lost


@pytest.mark.parametrize("slopes", [1, 6])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activations(activation: str, slopes: int) -> None:
    layer = Layer(4, 6, (1, 1), 2, "bwsp")
    slope = torch.randn(slopes).double() if activation == "prelu" else None
    x = torch.randn(1, 4, 7, 7).double() * 20
    plain = layer.run(x)
    functions = {
        "none": lambda y: y,
        "relu": torch.relu,
        "relu6": F.relu6,
        "prelu": lambda y: F.prelu(y, slope),
    }
    expected = functions[activation](plain)
    assert (expected != plain).any() or activation == "none"
    torch.testing.assert_close(layer.run(x, None, slope, activation), expected)
    torch.testing.assert_close(layer.run(x, None, slope, activation, merged=True), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_nan_and_infinity_propagate(value: float, activation: str) -> None:
    layer = Layer(2, 3, (1, 1), 2, "dense")
    slope = torch.tensor([0.5])
    x = torch.randn(1, 2, 12, 12)
    x[0, 1, 6, 6] = value
    direct = torch.isfinite(layer.conv(x))
    y = layer.run(x, None, slope if activation == "prelu" else None, activation)
    assert not torch.isfinite(layer.run(x))[~direct].any()
    if math.isnan(value):
        assert torch.isnan(y)[~direct].all()
    assert torch.isfinite(y[:, :, :4]).all()  # other tiles are untouched


def test_nan_in_the_residual_passes_every_activation() -> None:
    layer = Layer(2, 3, (1, 1), 2, "dense")
    x, residual = torch.randn(1, 2, 6, 6), torch.zeros(1, 3, 6, 6)
    residual[0, 1, 2, 3] = math.nan
    for activation in ops.ACTIVATIONS:
        y = layer.run(x, residual, torch.tensor([0.5]) if activation == "prelu" else None, activation)
        assert torch.equal(torch.isnan(y), torch.isnan(residual))


@pytest.mark.parametrize(("method", "direction"), [*PRUNED, ("dense", "row")])
@pytest.mark.parametrize("tile", [2, 4])
def test_pruned_weights_are_neither_stored_nor_multiplied(method: str, direction: str, tile: int) -> None:
    layer = Layer(10, 12, (1, 1), tile, method, direction)
    site, x = layer.site, torch.randn(2, 10, 9, 13)
    kept = int(site.keep.expand((tile + 2) ** 2, 12, 10).sum())
    assert kept < (tile + 2) ** 2 * 120 or method == "dense"
    assert site.weight.numel() == kept
    V = ops.input_transform(x, site.columns, site.column_offset, [1, 1], tile)
    assert V.shape[0] == site.columns.numel()
    tiles = V.shape[1]
    rows, columns = tile_grid(9, 13, (1, 1), tile)
    assert tiles == 2 * rows * columns
    with FlopCounterMode(display=False) as counter:
        # an operator is opaque to the counter, the function behind it is not
        ops.sparse_bgemm._init_fn(V, site.weight, site.rows, site.row_offset, site.column_offset)
    assert counter.get_total_flops() == 2 * kept * tiles


def test_a_position_may_keep_nothing() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
    for keep in (torch.zeros(16, 4, 1, dtype=torch.bool), torch.zeros(16, 1, 3, dtype=torch.bool)):
        keep[5, 0, 0] = True
        site = ops.WinogradSite(keep)
        site.fill(transform_weight(conv.weight, 2), conv.bias)
        assert site.weight.numel() == (3 if keep.shape[1] == 4 else 4)
        x = torch.randn(1, 3, 6, 6).double()
        index = (site.rows, site.row_offset, site.columns, site.column_offset)
        y = WSP.winograd_conv2d(x, site.weight, *index, site.bias, None, None, [1, 1], 2, "none", False)
        assert_near(y, masked_convolution(x, conv, keep, 2))


def test_a_pruned_filter_outputs_its_bias() -> None:
    conv = nn.Conv2d(3, 2, 3, padding=1).requires_grad_(False)
    site = ops.WinogradSite(torch.tensor([True, False]).view(1, 2, 1))
    site.fill(transform_weight(conv.weight, 2), conv.bias)
    index = (site.rows, site.row_offset, site.columns, site.column_offset)
    x = torch.randn(1, 3, 6, 6)
    y = WSP.winograd_conv2d(x, site.weight, *index, site.bias, None, None, [1, 1], 2, "none", False)
    assert torch.equal(y[:, 1], conv.bias[1].expand(1, 6, 6))


def test_a_site_owns_its_tensors() -> None:
    layer = Layer(3, 4, (1, 1), 2, "dense")
    bias = layer.site.bias.clone()
    layer.conv.bias.data.zero_()
    assert torch.equal(layer.site.bias, bias)
    site = ops.WinogradSite(layer.site.keep)
    site.fill(transform_weight(layer.conv.weight, 2), None)
    assert torch.equal(site.bias, torch.zeros(4))
    assert {name for name, _ in site.named_buffers()} == {
        "keep", "weight", "rows", "row_offset", "columns", "column_offset", "bias",
    }  # fmt: skip


@pytest.mark.parametrize("tile", [2, 4])
def test_single_weights_are_stored_in_full_with_zeros(tile: int) -> None:
    layer = Layer(5, 6, (1, 0), tile, "wwp")
    site = layer.site
    assert site.by_element
    assert site.rows.numel() == 6 * (tile + 2) ** 2
    assert site.columns.numel() == 5 * (tile + 2) ** 2
    assert int((site.weight != 0).sum()) == int(site.keep.sum())
    assert not Layer(5, 6, (1, 0), tile, "wsp").site.by_element
    x = torch.randn(2, 5, 9, 7).double()
    assert_near(layer.run(x), masked_convolution(x, layer.conv, site.keep, tile))
    assert_near(layer.run(x, merged=True), masked_convolution(x, layer.conv, site.keep, tile))
