"""Streaming stores: which kernels have them, when they run, and that results are the same."""

from __future__ import annotations

import dataclasses
import platform
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wsp_compiler
from wsp_compiler.codegen import cpu_launch
from wsp_compiler.codegen.build import lower
from wsp_compiler.codegen.cpu_launch import CpuLayer
from wsp_compiler.codegen.cpu_stream import can_stream
from wsp_compiler.codegen.cpu_winograd import make_cpu_kernel
from wsp_compiler.codegen.spec import CpuConfig, KernelSpec
from wsp_compiler.codegen.targets import CodeTarget, cpu_target

SPEC = KernelSpec(
    filters=32, channels=16, height=200, width=204, padding=(1, 1), tile=2, dtype="float32", precision="fp32",
    input_channels_last=True, output_channels_last=True, columns_pruned=False, rows_pruned=True,
    residual=True, activation="relu",
)  # fmt: skip
CONFIG = CpuConfig(lanes=16, rows=4, vectors=2)
needs_lines = pytest.mark.skipif(cpu_target().lanes != 16, reason="needs vectors of a whole cache line")


def test_whole_lines_of_large_images_only():
    assert can_stream(SPEC, CONFIG)
    assert not can_stream(SPEC, dataclasses.replace(CONFIG, lanes=8))
    for change in (
        {"filters": 40}, {"output_channels_last": False}, {"dtype": "bfloat16"}, {"height": 20}
    ):  # fmt: skip
        assert not can_stream(dataclasses.replace(SPEC, **change), CONFIG)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 code")
def test_the_kernel_has_both_kinds_of_stores():
    target = CodeTarget(torch.device("cpu"), "x86-64-v4", 16)
    text = lower(make_cpu_kernel(SPEC, CONFIG), "probe", target).host.inspect_source("asm")
    assert len(re.findall(r"vmovntps\s+%zmm", text)) >= 16
    assert "sfence" in text
    assert not re.search(r"call\w*\s+\S*wsp_", text)
    small = lower(make_cpu_kernel(dataclasses.replace(SPEC, height=20), CONFIG), "probe", target)
    assert "vmovnt" not in small.host.inspect_source("asm")


class Layers(nn.Module):
    """Two large layers, the second with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return torch.relu(self.b(y) + y)


@needs_lines
@pytest.mark.parametrize("tile", [2, 4])
def test_streamed_outputs_are_the_same(tile: int, monkeypatch: pytest.MonkeyPatch):
    model = Layers().eval()
    x = torch.randn(2, 16, 199, 203).contiguous(memory_format=torch.channels_last)
    empty = CpuLayer.empty_output
    monkeypatch.setattr(CpuLayer, "empty_output", lambda self, x: empty(self, x).fill_(torch.nan))
    compiled = wsp_compiler.compile(model, 0.5, tile=tile, example_inputs=x)
    outputs: list[Tensor] = []
    for last_cache in (1 << 40, 1 << 20):
        monkeypatch.setattr(cpu_launch, "cache_sizes", lambda size=last_cache: (size,))
        for layer in compiled.layers():
            assert isinstance(layer.last_kernels, CpuLayer)
            layer.last_kernels._calls.clear()
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            outputs.append(compiled(x))
        streamed: list[Any] = [layer.last_kernels._prepared(2, 1).sizes[-1] for layer in compiled.layers()]
        assert streamed == [int(last_cache == 1 << 20)] * 2
    assert bool(torch.isfinite(outputs[0]).all())
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_outputs_that_fit_the_last_cache_stay_there(monkeypatch: pytest.MonkeyPatch):
    site = wsp_compiler.ops.WinogradSite(torch.ones(1, 1, 1, dtype=torch.bool))
    site.fill(torch.zeros(16, 32, 16, dtype=torch.float64), None)
    layer = CpuLayer(SPEC, site, None, cpu_target())
    one = 4 * 32 * 200 * 204
    monkeypatch.setattr(cpu_launch, "cache_sizes", lambda: (1 << 15, 3 * one))
    assert [layer._streams(images) for images in (1, 3, 4)] == [False, False, True]
    monkeypatch.setattr(cpu_launch, "cache_sizes", lambda: ())
    assert [layer._streams(images) for images in (1, 8)] == [False, True]
