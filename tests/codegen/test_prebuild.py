"""The kernels that are built ahead are those that the calls then want."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wsp_compiler
from wsp_compiler.codegen import cuda_launch
from wsp_compiler.codegen.candidates import Candidate
from wsp_compiler.codegen.cuda_launch import CudaLayer
from wsp_compiler.codegen.prebuild import prebuild
from wsp_compiler.codegen.spec import KernelSpec
from wsp_compiler.speed import CallFormat

from .emulation import TARGET
from .test_cuda_fused_launch import H100


class Block(nn.Module):
    """Two convolutions and a shortcut; the first is called on two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(32, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv2(torch.relu(self.conv1(x))) + x)
        return self.conv1(nn.functional.max_pool2d(y, 2))


@pytest.mark.parametrize("channels_last", [False, True])
def test_builds_what_the_calls_want(monkeypatch: pytest.MonkeyPatch, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 32, 12, 12).contiguous(memory_format=layout)
    compiled = wsp_compiler.compile(Block().eval(), method="bwsp", keep_slower=True, example_inputs=x)
    wanted: set[KernelSpec] = set()
    for layer in compiled.layers():
        wanted |= {kernels.spec for kernels in layer._state["layers"].values()}
        layer.target, layer.tuner = TARGET, None
    built: list[KernelSpec] = []

    def prepare(layer: CudaLayer, candidate: Candidate) -> None:
        assert candidate == layer.candidates(2 * layer.spec.tiles_per_image)[0]
        built.append(layer.spec)

    monkeypatch.setattr(CudaLayer, "prepare", prepare)
    monkeypatch.setattr(cuda_launch, "device_limits", lambda index: H100)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    sites = wsp_compiler.find_sites(Block().eval(), x)
    prebuild(compiled.layers(), compiled.graph_module, {site.path: site.formats for site in sites})
    assert any(spec.residual for spec in wanted)
    if channels_last:
        assert wanted <= set(built)
    else:  # the layout of what lies between layers is a guess, all else is right

        def plain(spec: KernelSpec) -> KernelSpec:
            return replace(spec, input_channels_last=False, output_channels_last=False)

        assert {plain(spec) for spec in wanted} <= {plain(spec) for spec in built}


def test_on_the_cpu_nothing_is_built_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 32, 8, 8)
    compiled = wsp_compiler.compile(nn.Sequential(nn.Conv2d(32, 32, 3, padding=1)).eval(), keep_slower=True)

    def refuse(*_: Any) -> None:
        raise AssertionError("nothing to gain on the CPU")

    (layer,) = compiled.layers()
    monkeypatch.setattr(type(layer), "prebuild", refuse)
    prebuild(compiled.layers(), compiled.graph_module, {"0": (CallFormat(tuple(x.shape), x.dtype, False),)})
    assert compiled(x).shape == x.shape
