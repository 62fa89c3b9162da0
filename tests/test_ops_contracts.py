"""ops: memory formats, shapes that are refused, and what torch.library asks of operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.layers import WSP, Layer
from wsp_compiler import ops
from wsp_compiler.errors import InputError


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Threads that wait for each other make small operations slow on a busy machine; undone in conftest."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("input_last", [False, True])
@pytest.mark.parametrize("weight_last", [False, True])
@pytest.mark.parametrize("c", [1, 3, 16])
@pytest.mark.parametrize("n", [1, 16])
def test_memory_format_is_conv2ds(input_last: bool, weight_last: bool, c: int, n: int) -> None:
    layer = Layer(c, n, (1, 1), 2, "dense")
    formats = {True: torch.channels_last, False: torch.contiguous_format}
    layer.conv.weight.data = layer.conv.weight.data.contiguous(memory_format=formats[weight_last])
    x = torch.randn(2, c, 7, 5).contiguous(memory_format=formats[input_last])
    last = ops.is_channels_last(layer.conv.weight)
    for merged in (False, True):
        y = layer.run(x, channels_last=last, merged=merged)
        assert y.stride() == layer.conv(x).stride()


def test_like_decides_the_memory_format() -> None:
    layer = Layer(3, 4, (1, 1), 2, "dense")
    x = torch.randn(1, 3, 6, 6)
    site, last = layer.site, x.contiguous(memory_format=torch.channels_last)
    for given, like, expected in ((x, last, True), (last, x, False)):
        y = WSP.winograd_conv2d(
            given, site.weight, site.rows, site.row_offset, site.columns, site.column_offset,
            site.bias, None, None, [1, 1], 2, "none", False, like,
        )  # fmt: skip
        assert ops.suggest_channels_last(y) is expected
        torch.testing.assert_close(y, layer.conv(x), rtol=1e-4, atol=1e-5)


def test_strided_and_broadcast_inputs() -> None:
    layer = Layer(4, 5, (1, 1), 4, "bwsp")
    x = torch.randn(2, 8, 14, 20)[:, ::2, ::2, 1::2]
    torch.testing.assert_close(layer.run(x), layer.run(x.contiguous()))
    x = torch.randn(1, 4, 1, 1).expand(2, 4, 9, 9)
    torch.testing.assert_close(layer.run(x), layer.run(x.contiguous()))


@pytest.mark.parametrize("merged", [False, True])
def test_one_image_without_a_batch(merged: bool) -> None:
    layer = Layer(4, 5, (1, 1), 2, "dense")
    x, residual = torch.randn(4, 7, 7), torch.randn(5, 7, 7)
    torch.testing.assert_close(
        layer.run(x, residual, torch.tensor([0.1]), "prelu", merged=merged),
        F.prelu(layer.conv(x) + residual, torch.tensor([0.1])),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(("shape", "word"), [((1, 3, 2, 9), "smaller than"), ((3,), "expected an input")])
def test_impossible_inputs_are_explained(shape: tuple[int, ...], word: str) -> None:
    layer = Layer(3, 4, (0, 0), 2, "dense")
    with pytest.raises(InputError, match=word) as caught:
        layer.run(torch.randn(shape))
    assert caught.value.fix


def _operator_calls(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    layer = Layer(3, 4, (1, 2), 2, "wsp")
    site = layer.site
    x, residual, slope = torch.randn(2, 3, 6, 7).to(dtype), torch.randn(2, 4, 6, 9).to(dtype), torch.rand(4)
    V = ops.input_transform(x, site.columns, site.column_offset, [1, 2], 2)
    M = ops.sparse_bgemm(V, site.weight, site.rows, site.row_offset, site.column_offset)
    tail = (site.bias, residual, slope, [1, 2], 2, "prelu", True)
    index = (site.rows, site.row_offset, site.columns, site.column_offset)
    return {
        "input_transform": (x, site.columns, site.column_offset, [1, 2], 2),
        "sparse_bgemm": (V, site.weight, site.rows, site.row_offset, site.column_offset),
        "output_transform": (M, x, site.rows, site.row_offset, *tail),
        "winograd_conv2d": (x, site.weight, *index, *tail, residual),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["input_transform", "sparse_bgemm", "output_transform", "winograd_conv2d"])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(getattr(WSP, name).default, _operator_calls(dtype)[name])


@pytest.mark.parametrize("shape", [(2, 4, 6, 6), (6, 6), (3, 2, 4, 6, 6), ()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_fake_and_real_agree_on_residuals(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = Layer(3, 4, (1, 1), 2, "dense")
    site = layer.site
    index = (site.rows, site.row_offset, site.columns, site.column_offset)
    arguments = (
        torch.randn(2, 3, 6, 6).half(), site.weight, *index, site.bias, torch.randn(shape).to(dtype), None,
        [1, 1], 2, "relu", True,
    )  # fmt: skip
    torch.library.opcheck(
        WSP.winograd_conv2d.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
