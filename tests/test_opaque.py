"""wsp::winograd_layer: the launcher behind a handle, and what tracers are told about it."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import wsp_compiler
from wsp_compiler import opaque
from wsp_compiler.codegen.layer import WinogradLayer
from wsp_compiler.errors import WspError


def layer() -> WinogradLayer:
    compiled = wsp_compiler.compile(nn.Conv2d(16, 24, 3, padding=(1, 0)).eval(), 0.5)
    return next(iter(compiled.layers()))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_fake_results_have_the_real_shapes_and_strides(last: bool, residual: bool) -> None:
    launcher = layer()
    handle = opaque.register(launcher)
    formats = (torch.channels_last, torch.contiguous_format)
    x = torch.randn(2, 16, 9, 8).contiguous(memory_format=formats[not last])
    r = torch.randn(2, 24, 9, 6) if residual else None
    for like in (None, torch.randn(1, 3, 4, 4).contiguous(memory_format=formats[last])):
        real = opaque.WINOGRAD_LAYER(x, r, like, handle)
        assert torch.equal(real, launcher(x, r, like))
        with FakeTensorMode() as mode:
            faked = [None if t is None else mode.from_tensor(t) for t in (x, r, like)]
            fake = opaque.WINOGRAD_LAYER(*faked, handle)
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_the_operator_passes_pytorchs_own_checks() -> None:
    launcher = layer()
    x = torch.randn(1, 16, 6, 6)
    torch.library.opcheck(
        opaque.WINOGRAD_LAYER, (x, None, None, opaque.register(launcher)),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_a_handle_does_not_outlive_its_launcher() -> None:
    launcher = layer()
    handle = opaque.register(launcher)
    del launcher
    gc.collect()
    with pytest.raises(WspError, match="no kernel launcher"):
        opaque.WINOGRAD_LAYER(torch.randn(1, 16, 6, 6), None, None, handle)
