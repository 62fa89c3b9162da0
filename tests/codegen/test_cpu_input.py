"""The CPU input stage: V equals B^T d B of every tile, for every layout, gap and vector length."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from wsp_compiler.codegen.candidates import Candidate
from wsp_compiler.codegen.cpu_geometry import POSITION_PADDING
from wsp_compiler.codegen.cpu_launch import CpuLayer
from wsp_compiler.codegen.spec import CpuConfig, KernelSpec
from wsp_compiler.codegen.targets import CodeTarget, cpu_target
from wsp_compiler.ops import WinogradSite, input_transform
from wsp_compiler.winograd import transform_weight


def layer(spec: KernelSpec, config: CpuConfig) -> CpuLayer:
    """A layer with random dense weights."""
    site = WinogradSite(torch.ones(1, 1, 1, dtype=torch.bool))
    weight = torch.randn(spec.filters, spec.channels, 3, 3)
    site.fill(transform_weight(weight, spec.tile), torch.randn(spec.filters))
    target = cpu_target()
    if config.lanes != target.lanes:
        target = CodeTarget(target.device, {8: "x86-64-v3", 4: "x86-64"}[config.lanes], config.lanes)
    made = CpuLayer(spec, site, None, target)
    made.use(Candidate("cpu", config), 1)
    return made


def make_spec(tile: int, last: bool, height: int, width: int, channels: int = 19) -> KernelSpec:
    return KernelSpec(
        filters=5, channels=channels, height=height, width=width, padding=(1, 1), tile=tile, dtype="float32",
        precision="fp32", input_channels_last=last, output_channels_last=last, columns_pruned=False,
        rows_pruned=False, residual=False, activation="none",
    )  # fmt: skip


def tiles_of(V: Tensor, cpu: CpuLayer, images: int) -> Tensor:
    """V of all slices as [p*p * c, T]."""
    spec, row, slices = cpu.spec, cpu._geometry.row, cpu._slicing(images, 1, "slices")
    P, c, (TH, TW) = spec.winograd.positions, spec.channels, spec.tiles
    size, parts = c * slices.ts + POSITION_PADDING, []
    for s in range(slices.count):
        per_image = -(-TH // slices.rows)
        rows = min(slices.rows, TH - s % per_image * slices.rows)
        count = min(slices.images, images - s // per_image * slices.images)
        lines = V[s, : P * size].view(P, size)[:, : c * slices.ts].reshape(P * c, slices.ts)
        parts.append(lines[:, : count * rows * row].reshape(P * c, count * rows, row)[:, :, :TW])
    return torch.cat(parts, dim=1).reshape(P * c, -1)


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("gap", [0, 1])
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("last", [False, True])
def test_v_equals_the_operator(lanes: int, gap: int, tile: int, last: bool):
    if lanes > cpu_target().lanes:
        pytest.skip("this machine has no such vectors")
    for height, width, slice_bytes in ((7, 7, 1 << 20), (13, 41, 1)):
        spec = make_spec(tile, last, height, width)
        cpu = layer(spec, CpuConfig(lanes, 4, 2, gap, slice_bytes))
        x = torch.randn(3, spec.channels, height, width)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        expected = input_transform(x, cpu.site.columns, cpu.site.column_offset, [1, 1], tile)
        found = tiles_of(cpu.input_transform(x), cpu, 3)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_more_channels_than_a_block_with_a_rest():
    spec = make_spec(2, True, 6, 6, channels=16 * 2 + 5)
    cpu = layer(spec, CpuConfig(cpu_target().lanes, 4, 2))
    x = torch.randn(1, spec.channels, 6, 6).contiguous(memory_format=torch.channels_last)
    expected = input_transform(x, cpu.site.columns, cpu.site.column_offset, [1, 1], 2)
    assert torch.allclose(tiles_of(cpu.input_transform(x), cpu, 1), expected, rtol=1e-4, atol=1e-4)
    assert dataclasses.replace(spec, input_channels_last=False) != spec
