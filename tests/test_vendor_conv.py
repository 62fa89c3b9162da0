"""wsp::conv2d and its launcher against PyTorch's own calls."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from wsp_compiler import vendor_conv
from wsp_compiler.passes.base import CONV2D
from wsp_compiler.vendor_conv import VendorConv, fuses, prefers_channels_last

CASES = {
    "7x7": dict(c=3, n=16, side=7, stride=2, padding=3),
    "1x1": dict(c=16, n=24, side=1, stride=1, padding=0),
    "strided": dict(c=8, n=16, side=3, stride=2, padding=1),
    "grouped": dict(c=8, n=16, side=3, stride=1, padding=2, dilation=2, groups=4),
}


def vendor(activation: str = "relu", channels_last: bool = False, bias: bool = True, **o: Any) -> VendorConv:
    groups = o.get("groups", 1)
    weight = torch.randn(o["n"], o["c"] // groups, o["side"], o["side"])
    how = [[o["stride"]] * 2, [o["padding"]] * 2, [o.get("dilation", 1)] * 2]
    return VendorConv(weight, torch.randn(o["n"]) if bias else None, *how, groups, activation, channels_last)


def truth(conv: VendorConv, x: Tensor, residual: Tensor | None) -> Tensor:
    bias = None if conv.bias is None else conv.bias.double()
    how = (conv.stride, conv.padding, conv.dilation, conv.groups)
    y = F.conv2d(x.double(), conv.weight.double(), bias, *how)
    y = y if residual is None else y + residual.double()
    return F.relu(y) if conv.activation == "relu" else y


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("name", CASES)
def test_the_launcher_and_the_operator_compute_the_convolution(
    name: str, activation: str, channels_last: bool
) -> None:
    conv = vendor(activation, channels_last, bias=name != "1x1", **CASES[name])
    x = torch.randn(2, CASES[name]["c"], 13, 10)
    window = (conv.stride, conv.padding, conv.dilation, conv.groups)
    residual = torch.randn_like(F.conv2d(x, conv.weight, None, *window))
    for given in (None, residual, residual[:, :1]):  # the last one broadcasts
        expected = truth(conv, x, given)
        operator = CONV2D(x, conv.weight, conv.bias, given, *window, activation, channels_last)
        for actual in (conv(x, given), operator):
            torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)
            if channels_last:
                assert actual.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(copy.deepcopy(conv)(x), conv(x))


def test_unbatched_empty_and_nan_inputs() -> None:
    conv = vendor(channels_last=True, **CASES["strided"])
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(conv(x[0]), conv(x)[0])
    assert conv(x[:0]).shape == (0, 16, 5, 5)
    x[0, 0, 4, 4] = math.nan
    assert torch.equal(conv(x).isnan(), F.relu(F.conv2d(x, conv.weight, conv.bias, 2, 1)).isnan())


def test_the_callers_residual_is_not_written() -> None:
    conv = vendor(channels_last=True, **CASES["1x1"])
    x, residual = torch.randn(1, 16, 5, 5), torch.randn(1, 24, 5, 5)
    before = residual.clone()
    conv(x, residual)
    assert torch.equal(residual, before)


def test_fake_results_have_the_real_shapes_and_strides() -> None:
    from torch._subclasses import FakeTensorMode

    conv = vendor(channels_last=True, **CASES["strided"])
    x = torch.randn(2, 8, 9, 9)
    args = (None, [2, 2], [1, 1], [1, 1], 1, "relu", True)
    real = CONV2D(x, conv.weight, conv.bias, *args)
    with FakeTensorMode() as mode:
        fake = CONV2D(*(mode.from_tensor(t) for t in (x, conv.weight, conv.bias)), *args)
    assert (fake.shape, fake.stride()) == (real.shape, real.stride())


def test_autocast_is_followed() -> None:
    conv = vendor(**CASES["1x1"])
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(torch.randn(1, 16, 5, 5)).dtype == torch.bfloat16


def test_which_weights_are_fused() -> None:
    weight = torch.randn(4, 4, 1, 1)
    assert fuses(weight)
    assert prefers_channels_last(weight)
    assert not fuses(weight.double())
    assert not fuses(weight.half())


def test_on_cuda_the_faster_call_is_chosen_once_per_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decision, with CPU tensors and given times."""
    conv = vendor(**CASES["strided"])
    x, calls, times = torch.randn(1, 8, 9, 9), [], [[1.0, 2.0]]

    def fused(self: VendorConv, x: Tensor, residual: Tensor | None) -> Tensor:
        calls.append("fused")
        return conv._separate(x, residual)

    monkeypatch.setattr(VendorConv, "_fused", fused)
    monkeypatch.setattr(vendor_conv, "fastest_cuda", lambda candidates: times[-1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    expected = truth(conv, x, None)
    for count in (2, 3):  # tried once, then called
        torch.testing.assert_close(conv._cuda(x, None).double(), expected, rtol=1e-4, atol=1e-4)
        assert len(calls) == count
    times.append([2.0, 1.0])
    conv._cuda(x.repeat(2, 1, 1, 1), None)
    conv._cuda(x.repeat(2, 1, 1, 1), None)
    assert len(calls) == 4  # slower: tried once, never again
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    conv._cuda(x.repeat(3, 1, 1, 1), None)
    assert len(calls) == 4
    assert len(conv._state["fused"]) == 2  # nothing is decided inside a capture


def test_without_an_engine_the_separate_calls_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: VendorConv, x: Tensor, residual: Tensor | None) -> Tensor:
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    monkeypatch.setattr(VendorConv, "_fused", refuse)
    assert not vendor(**CASES["strided"])._fused_is_faster(torch.randn(1, 8, 9, 9), None)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_cuda(name: str, dtype: torch.dtype) -> None:
    conv = vendor(channels_last=True, **CASES[name]).cuda().to(dtype)
    x = torch.randn(2, CASES[name]["c"], 28, 28, device="cuda", dtype=dtype)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-3}[dtype]
    plain = truth(conv, x, None)
    for residual in (None, torch.randn_like(plain).to(dtype)):
        expected = truth(conv, x, residual)
        for actual in (
            conv(x, residual),
            conv._fused(x, residual) if conv._state["fused"] else conv(x, residual),
        ):
            assert float((actual.double() - expected).norm() / expected.norm()) < tolerance
            assert actual.is_contiguous(memory_format=torch.channels_last)
