"""sparse_layer: the library's sparse product computes the pruned convolution."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference import assert_close, pruned_convolution
from wsp_compiler.errors import InputError
from wsp_compiler.ops import WinogradSite
from wsp_compiler.sparse_layer import SparseLayer, block_diagonal
from wsp_compiler.winograd import transform_weight

TOLERANCE = {2: 1e-5, 4: 1e-4}


def layer_of(conv: nn.Conv2d, keep: Tensor, tile: int, **options: Any) -> SparseLayer:
    site = WinogradSite(keep)
    site.fill(transform_weight(conv.weight, tile), conv.bias)
    assert site.by_element
    defaults: dict[str, Any] = {"slope": None, "activation": "none", "channels_last": False}
    return SparseLayer("a", site, padding=conv.padding, tile=tile, **{**defaults, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("shape", [(2, 5, 7, 7), (1, 5, 13, 20), (0, 5, 8, 8), (3, 5, 4, 3)])
@pytest.mark.parametrize("padding", [(1, 1), (0, 2)])
def test_against_float64(tile: int, shape: tuple[int, ...], padding: tuple[int, int]) -> None:
    conv = nn.Conv2d(5, 6, 3, padding=padding).requires_grad_(False)
    keep = torch.rand((tile + 2) ** 2, 6, 5) < 0.3
    keep[3] = False  # a position without weights
    x = torch.randn(shape)
    y = layer_of(conv, keep, tile)(x)
    assert_close(y, pruned_convolution(x, conv, keep, tile), TOLERANCE[tile])


def test_the_matrix_holds_what_is_kept() -> None:
    conv = nn.Conv2d(3, 4, 3).requires_grad_(False)
    keep = torch.rand(16, 4, 3) < 0.2
    matrix = block_diagonal(layer_of(conv, keep, 2).site)
    assert matrix.layout == torch.sparse_csr
    assert matrix.values().numel() == int(keep.sum())
    assert matrix.crow_indices().dtype == torch.int32
    dense = matrix.to_dense().view(16, 4, 16, 3)
    blocks = torch.stack([dense[k, :, k] for k in range(16)])
    torch.testing.assert_close(blocks, (transform_weight(conv.weight, 2) * keep).float())
    assert int((dense != 0).sum()) == int(keep.sum())


@pytest.mark.parametrize("last", [False, True])
def test_epilogue_formats_and_dtypes(last: bool) -> None:
    conv = nn.Conv2d(5, 6, 3, padding=1).requires_grad_(False)
    keep = torch.rand(16, 6, 5) < 0.5
    x, residual, slope = torch.randn(2, 5, 6, 9), torch.randn(2, 6, 6, 9), torch.rand(6)
    expected = pruned_convolution(x, conv, keep, 2) + residual.double()
    expected = torch.where(expected < 0, expected * slope.double().view(-1, 1, 1), expected)
    layer = layer_of(conv, keep, 2, activation="prelu", slope=slope, channels_last=last)
    y = layer(x, residual)
    assert_close(y, expected, 1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    like = x.contiguous(memory_format=torch.channels_last)
    assert layer(x, residual, like).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(copy.deepcopy(layer)(x, residual), y)
    half = layer_of(conv, keep, 2)(x.half())
    assert half.dtype == torch.float16
    assert_close(half, pruned_convolution(x.half(), conv, keep, 2), 2e-3)
    one = layer_of(conv, keep, 2)(x[0])
    assert_close(one, pruned_convolution(x[:1], conv, keep, 2)[0], 1e-5)
    assert layer.label == "csr-mkl"
    assert layer.last_shape == (2, 5, 6, 9)


@pytest.mark.parametrize(
    ("x", "word"),
    [
        (torch.zeros(1, 4, 8, 8), r"expected an input \[N, 5, H, W\]"),
        (torch.zeros(5), r"expected an input \[N, 5, H, W\]"),
        (torch.zeros(1, 5, 2, 8), "smaller than the 3x3 filter"),
        (torch.zeros(1, 5, 8, 8).half(), "torch.float16"),
        (torch.zeros(1, 5, 8, 8, device="meta"), "on meta"),
    ],
)
def test_what_does_not_fit_is_an_error(x: Tensor, word: str) -> None:
    layer = layer_of(nn.Conv2d(5, 6, 3), torch.rand(16, 6, 5) < 0.5, 2, dtype=torch.float32)
    with pytest.raises(InputError, match=word) as caught:
        layer(x)
    assert caught.value.fix


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tile", [2, 4])
def test_on_cuda(tile: int, dtype: torch.dtype) -> None:
    """cuSPARSE, also captured in a CUDA graph."""
    conv = nn.Conv2d(24, 40, 3, padding=1).requires_grad_(False)
    keep = torch.rand((tile + 2) ** 2, 40, 24) < 0.2
    x = torch.randn(2, 24, 13, 20).to(dtype)
    expected = pruned_convolution(x, conv, keep, tile)
    layer = layer_of(conv.cuda(), keep.cuda(), tile)
    tolerance = TOLERANCE[tile] if dtype == torch.float32 else 2e-3
    y = layer(x.cuda())
    assert_close(y.cpu(), expected, tolerance)
    assert layer.label == "csr-cusparse"
    assert y.dtype == dtype
    given = x.cuda()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(given)
    given.copy_(2 * x.cuda())
    graph.replay()
    bias = layer.site.bias.cpu().double().view(-1, 1, 1)
    assert_close(captured.cpu(), 2 * (expected - bias) + bias, tolerance)
