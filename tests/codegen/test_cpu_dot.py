"""bfloat16 dot products: the instructions, and the layers that use them where the CPU has them."""

from __future__ import annotations

import dataclasses
import platform
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wsp_compiler
from wsp_compiler import PruneRule
from wsp_compiler.codegen.build import lower
from wsp_compiler.codegen.cpu_configs import cpu_configs, default_config
from wsp_compiler.codegen.cpu_dot import dot, instructions, pair
from wsp_compiler.codegen.cpu_emit import B, load, store, view
from wsp_compiler.codegen.cpu_launch import CpuLayer
from wsp_compiler.codegen.cpu_winograd import make_cpu_kernel
from wsp_compiler.codegen.spec import CpuConfig, KernelSpec
from wsp_compiler.codegen.targets import CodeTarget, cpu_target
from wsp_compiler.codegen.tvm_import import IRBuilder, T
from wsp_compiler.errors import OptionError

from ..reference import TOLERANCE, assert_close, pruned_convolution

needs_dot = pytest.mark.skipif(not cpu_target().dot, reason="needs a CPU with AVX512_BF16")
ZEN4 = CodeTarget(torch.device("cpu"), "znver4", 16, True)
SPEC = KernelSpec(
    filters=40, channels=25, height=14, width=14, padding=(1, 1), tile=2, dtype="float32", precision="bf16",
    input_channels_last=True, output_channels_last=True, columns_pruned=False, rows_pruned=True,
    residual=False, activation="relu",
)  # fmt: skip


def probe() -> Any:
    """words[0:16] = pairs of a and b; sums[0:16] = c + dot(pairs, pairs); the same for half a vector."""
    with IRBuilder() as builder, B.prim_func():
        B.func_name("probe")
        given = [B.arg(name, T.int64()) for name in "acwsh"]
        A, C, words, sums, half = (view(address, align=4) for address in given)
        with instructions():
            both = pair(load(A, 0, 16), load(A, 16, 16))
            store(words, 0, both, 16)
            store(sums, 0, dot(load(C, 0, 16), both, both, 16), 16)
            store(half, 0, dot(load(C, 0, 8), load(words, 0, 8), load(words, 0, 8), 8), 8)
    return builder.get()


@needs_dot
def test_the_instructions_round_and_multiply():
    from wsp_compiler.codegen.build import build

    a, c = torch.randn(2, 16), torch.randn(16)
    a[0, 3], a[1, 4], a[0, 5], a[1, 6], a[0, 7] = torch.nan, torch.inf, -torch.inf, 3e18, 1.00390625
    words, sums, half = torch.empty(16), torch.empty(16), torch.empty(8)
    build(probe, "probe", cpu_target(), ()).function(
        *(tensor.data_ptr() for tensor in (a, c, words, sums, half))
    )
    rounded = a.bfloat16()  # [2, 16]
    made = words.view(torch.bfloat16).view(16, 2).T
    assert torch.equal(made.isnan(), rounded.isnan())
    assert torch.equal(made.nan_to_num(0), rounded.nan_to_num(0))
    expected = c.double() + rounded.double().square().sum(0)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.equal(half.nan_to_num(0), sums[:8].nan_to_num(0))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 code")
def test_weights_are_read_by_the_multiply_and_everything_is_inlined():
    config = default_config(SPEC, 16, [8] * 16, dot=True)
    assert config.dot
    text = lower(make_cpu_kernel(SPEC, config), "probe", ZEN4).host.inspect_source("asm")
    assert len(re.findall(r"vdpbf16ps\s+\S*\(.*\)\{1to16\}", text)) >= config.rows
    assert len(re.findall(r"vcvtne2ps2bf16", text)) >= SPEC.winograd.positions
    assert not re.search(r"call\w*\s+\S*wsp_", text)
    assert "TVMBackendAllocWorkspace" not in text


def test_only_bf16_rows_on_such_a_cpu_use_them():
    kept = [8] * 16
    assert default_config(SPEC, 16, kept, dot=True).dot
    assert not default_config(SPEC, 16, kept).dot
    assert not default_config(dataclasses.replace(SPEC, precision="fp32"), 16, kept, dot=True).dot
    assert not default_config(dataclasses.replace(SPEC, columns_pruned=True), 16, kept, dot=True).dot
    assert all(config.dot for config in cpu_configs(SPEC, 16, kept, dot=True))
    with pytest.raises(OptionError, match="16 lanes"):
        CpuConfig(lanes=8, rows=4, vectors=2, dot=True)


SHAPES = [(33, 17, 13, 20), (24, 32, 7, 7), (16, 3, 9, 6), (1, 16, 5, 4), (16, 1, 3, 2)]  # n, c, h, w


def compiled_layer(conv: nn.Conv2d, x: Tensor, **options: Any) -> tuple[Any, CpuLayer]:
    compiled = wsp_compiler.compile(conv, 0.5, precision="bf16", rules=[PruneRule(".*")], **options)
    compiled(x)
    (layer,) = compiled.layers()
    assert isinstance(layer.last_kernels, CpuLayer)
    return compiled, layer.last_kernels


@needs_dot
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_layers_on_dot_products_are_right(last: bool, tile: int):
    layout = torch.channels_last if last else torch.contiguous_format
    for n, c, height, width in SHAPES:
        conv = nn.Conv2d(c, n, 3, padding=1).eval()
        x = torch.randn(3, c, height, width).contiguous(memory_format=layout)
        compiled, layer = compiled_layer(conv, x, tile=tile)
        assert layer.config.dot
        expected = pruned_convolution(x, conv, compiled.plan[""].keep, tile)
        assert_close(compiled(x), expected, TOLERANCE["bf16", tile])


@needs_dot
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stages_apart_and_threads_change_nothing(dtype: torch.dtype):
    conv = nn.Conv2d(35, 40, 3, padding=1).eval().to(dtype)
    x = torch.randn(2, 35, 19, 22, dtype=dtype)
    compiled, layer = compiled_layer(conv, x)
    assert layer.config.dot
    expected = compiled(x)
    assert expected.dtype == dtype
    V = layer.input_transform(x)
    assert torch.equal(layer.output_transform(layer.sparse_bgemm(V, x), x, None), expected)
    for threads in (1, 4, 2):
        torch.set_num_threads(threads)
        assert torch.equal(compiled(x), expected)


@needs_dot
def test_stale_scratch_memory_beside_an_odd_channel_does_no_harm():
    """The last channel's partner does not exist: whatever lies there must not be multiplied, not even by zero."""
    from wsp_compiler.codegen.workspace import workspace

    for last in (False, True):
        x = torch.randn(1, 33, 9, 9)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        compiled, _ = compiled_layer(nn.Conv2d(33, 16, 3).eval(), x)
        expected = compiled(x)
        workspace.buffer.fill_(torch.nan)
        assert torch.equal(compiled(x), expected)


@needs_dot
def test_without_the_instructions_products_of_rounded_values_are_the_same_to_rounding():
    conv, x = nn.Conv2d(33, 24, 3, padding=1).eval(), torch.randn(2, 33, 12, 11)
    compiled, layer = compiled_layer(conv, x)
    plain = CpuLayer(layer.spec, layer.site, None, dataclasses.replace(layer.target, dot=False))
    assert not plain.config.dot
    y = plain.run(x, None)
    torch.testing.assert_close(y, compiled(x), rtol=1e-4, atol=1e-4)
