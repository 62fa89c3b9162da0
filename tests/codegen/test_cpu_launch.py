"""Launching CPU kernels: views without copies, how work is cut up, which kernels are shared."""

from __future__ import annotations

import gc
import os
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wsp_compiler
from wsp_compiler.codegen import cpu_launch
from wsp_compiler.codegen.cpu_launch import CpuLayer, flat_view
from wsp_compiler.codegen.cpu_winograd import ALL_STAGES


def layer_of(conv: nn.Conv2d, x: Tensor, **options: Any) -> CpuLayer:
    """The kernels of a compiled convolution, after one call."""
    compiled = wsp_compiler.compile(conv.eval(), 0.5, **options)
    compiled(x)
    (layer,) = compiled.layers()
    (cpu,) = layer._state["layers"].values()
    assert isinstance(cpu, CpuLayer)
    return cpu


VIEWS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slice": lambda x: x[1:, 2:, ::2, 1:],
    "expand": lambda x: x[:1].expand(4, -1, -1, -1),
    "transpose": lambda x: x.transpose(1, 3),
    "one": lambda x: x[:1, :1, :1, :1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("view", VIEWS)
def test_flat_views_reach_every_element_without_copying(view: str, dtype: torch.dtype):
    x = VIEWS[view](torch.randn(3, 4, 5, 6).to(dtype))
    flat = flat_view(x)
    assert flat.dim() == 1
    assert flat.is_contiguous()
    assert flat.data_ptr() == x.data_ptr()
    assert flat.dtype == (torch.uint16 if dtype == torch.bfloat16 else dtype)
    assert torch.equal(flat.view(dtype).as_strided(x.shape, x.stride(), flat.storage_offset()), x)
    last = tuple(size - 1 for size in x.shape)
    assert flat[-1].data_ptr() == x[last].data_ptr()


def test_flat_views_of_nothing():
    assert flat_view(torch.empty(0, 3, 4, 5)).shape == (0,)


def test_layers_of_one_kind_share_a_kernel():
    x = torch.randn(1, 16, 6, 6)
    model = nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))).eval()

    def kernels(model: nn.Module, **options: Any) -> set[Any]:
        compiled = wsp_compiler.compile(
            model, 0.5, passes=wsp_compiler.pipeline.without("assign_layout"), **options
        )
        compiled(x)
        layers = [cpu for layer in compiled.layers() for cpu in layer._state["layers"].values()]
        return {kernel.function for cpu in layers for kernel in cpu._used.values()}

    assert len(kernels(model)) == 1
    assert kernels(model) == kernels(model[:1].eval())
    other = "generic" if os.uname().machine == "aarch64" else "x86-64"
    for cpu in (other, f"{other}-v2" if other == "x86-64" else "cortex-a72"):  # of equal vector lanes
        assert not kernels(model) & kernels(model, target={"kind": "llvm", "mcpu": cpu})


def test_a_call_does_not_make_its_kernel_again(monkeypatch: pytest.MonkeyPatch):
    cpu = layer_of(nn.Conv2d(16, 16, 3, padding=1), torch.randn(1, 16, 6, 6))

    def refuse(*args: Any) -> Any:
        raise AssertionError("TensorIR made again")

    monkeypatch.setattr(cpu_launch, "make_cpu_kernel", refuse)
    assert cpu.run(torch.randn(2, 16, 6, 6), None).shape == (2, 16, 6, 6)


def test_stages_by_hand_equal_the_fused_kernel():
    x = torch.randn(3, 16, 13, 20)
    cpu = layer_of(nn.Conv2d(16, 24, 3, padding=1), x)
    fused = cpu.run(x, None)
    V = cpu.input_transform(x)
    torch.set_num_threads(1)  # slices of separate stages do not depend on it
    M = cpu.sparse_bgemm(V, x)
    torch.set_num_threads(2)
    assert torch.equal(cpu.output_transform(M, x, None), fused)
    text = cpu.source()
    assert all(f"{stage}_stage" in text for stage in ALL_STAGES)
    assert "winograd_conv2d" in text


def test_every_element_of_the_output_is_written(monkeypatch: pytest.MonkeyPatch):
    """The output is handed over full of NaN."""
    plain = CpuLayer.empty_output
    monkeypatch.setattr(CpuLayer, "empty_output", lambda self, x: plain(self, x).fill_(torch.nan))
    for last in (False, True):
        for height, width in ((5, 2), (4, 33)):
            x = torch.randn(2, 16, height, width)
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            cpu = layer_of(nn.Conv2d(16, 19, 3, padding=1), x)
            assert bool(torch.isfinite(cpu.run(x, None)).all())


def test_scratch_memory_of_another_layer_does_no_harm():
    """All layers of a thread share scratch buffers: fill them with NaN between calls."""
    from wsp_compiler.codegen.workspace import workspace

    x = torch.randn(2, 16, 9, 9)
    for method, direction in (("wsp", "row"), ("bwsp", "column"), ("dense", "row")):
        cpu = layer_of(nn.Conv2d(16, 32, 3, padding=1), x, method=method, direction=direction)
        expected = cpu.run(x, None)
        workspace.buffer.fill_(torch.nan)
        assert torch.equal(cpu.run(x, None), expected)


def test_threads_of_the_pool_follow_torch(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, int, int]] = []
    monkeypatch.setattr(
        cpu_launch.tvm, "get_global_func", lambda name: lambda *args: asked.append((name, *args))
    )
    monkeypatch.setattr(cpu_launch, "_pool", threading.local())
    monkeypatch.setattr(cpu_launch, "uses_openmp", lambda: False)
    for count in (2, 2, 1, 2):
        cpu_launch._use_threads(count)
    assert asked == [("runtime.config_threadpool", 1, count) for count in (2, 1, 2)]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_calls_leave_the_threads_affinity_alone():
    before = os.sched_getaffinity(0)
    layer_of(nn.Conv2d(16, 16, 3), torch.randn(1, 16, 6, 6))
    assert os.sched_getaffinity(0) == before


def test_packed_weights_go_with_their_layer():
    cpu = layer_of(nn.Conv2d(16, 16, 3), torch.randn(1, 16, 6, 6))
    assert cpu.site in cpu_launch._packed
    held = len(cpu_launch._packed)
    del cpu
    gc.collect()
    assert len(cpu_launch._packed) < held
