"""Packed weights hold the kept rows and columns, and nothing else: the pruned multiplies are gone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wsp_compiler
from wsp_compiler import PruneRule
from wsp_compiler.codegen.cpu_launch import CpuLayer
from wsp_compiler.codegen.cpu_winograd import ALL_STAGES
from wsp_compiler.codegen.layer import WinogradLayer
from wsp_compiler.codegen.pack import choose_cpu_config, pack_cpu
from wsp_compiler.codegen.spec import CpuConfig
from wsp_compiler.winograd import transform_weight

METHODS = [
    ("dense", "row"),
    ("fp", "row"),
    ("wsp", "row"),
    ("bwsp", "row"),
    ("wsp", "column"),
    ("bwsp", "column"),
]


def layer_of(method: str, direction: str, pr: float, tile: int = 2) -> tuple[nn.Conv2d, CpuLayer, Tensor]:
    """A convolution with 20 channels and 40 filters, its CPU layer, and `keep` as [p*p, n, c]."""
    convolution = nn.Conv2d(20, 40, 3, padding=1).eval()
    options: dict[str, Any] = {"method": method, "direction": direction, "tile": tile}
    compiled = wsp_compiler.compile(convolution, pr, rules=[PruneRule(".*")], **options)
    compiled(torch.randn(1, 20, 6, 6))
    (layer,) = compiled.layers()
    assert isinstance(layer, WinogradLayer)
    (cpu,) = layer._state["layers"].values()
    site = compiled.plan[""]
    return convolution, cpu, site.keep.expand(site.shape)


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("pr", [0.5, 0.9])
@pytest.mark.parametrize(("method", "direction"), METHODS)
def test_only_kept_weights_are_packed(method: str, direction: str, pr: float, tile: int):
    convolution, cpu, keep = layer_of(method, direction, pr, tile)
    weights, block, positions = cpu.weights, cpu.config.row_block, cpu.spec.winograd.positions
    rows, columns = keep.any(2), keep.any(1)  # [p*p, n], [p*p, c]
    if direction == "row":  # the other side is whole, even where a position lost everything
        columns = torch.ones_like(columns)
    else:
        rows = torch.ones_like(rows)
    blocks = weights.block_offset.diff()
    assert torch.equal(blocks, -(-rows.sum(1) // block).int())
    assert torch.equal(weights.column_offset.diff(), columns.sum(1).int())
    assert weights.U.numel() == int((blocks * block * columns.sum(1)).sum())
    assert weights.destination.numel() == int(blocks.sum()) * block
    U = transform_weight(convolution.weight, tile)
    n_pad = -(-40 // cpu.config.lanes) * cpu.config.lanes
    for k in range(positions):
        start, depth = int(weights.start[k]), int(columns[k].sum())
        padded = int(blocks[k]) * block
        packed = weights.U[start : start + padded * depth].view(int(blocks[k]), depth, block).transpose(1, 2)
        packed = packed.reshape(padded, depth)
        kept = int(rows[k].sum())
        expected = U[k][rows[k]][:, columns[k]].float()
        assert torch.equal(packed[:kept], expected)
        assert not packed[kept:].any()
        first = int(weights.block_offset[k]) * block
        place = weights.destination[first : first + padded]
        assert torch.equal(place[:kept], (k * n_pad + rows[k].nonzero()[:, 0]).int())
        assert bool((place[kept:] == positions * n_pad).all())


@pytest.mark.parametrize(("method", "direction"), METHODS[2:])
def test_the_gemm_visits_only_kept_rows_and_columns(method: str, direction: str):
    """M of a slice holds kept rows alone: the stage writes exactly those. V of pruned columns is never read."""
    _, cpu, keep = layer_of(method, direction, 0.7)
    x = torch.randn(3, 20, 6, 6)
    weights, config = cpu.weights, cpu.config
    cut = cpu._slicing(3, 1)
    V = cpu.input_transform(x)
    c_pad = -(-20 // config.lanes) * config.lanes
    slices = V[:, : 16 * cut.tiles * c_pad].view(cut.count, 16, cut.tiles, c_pad)
    for k, kept in enumerate(weights.column_offset.diff().tolist()):
        slices[:, k, :, kept:] = torch.nan
    rows, tiles = weights.destination.numel(), 3 * 3 * 3
    assert cut.count == 1
    M = torch.full((1, 2 * rows * cut.tiles), torch.nan)
    cpu._call(ALL_STAGES[1:2], x, None, x, V, M, cpu._shared(cut))
    written = M[0, : rows * cut.tiles].view(-1, cut.tiles, config.row_block)
    assert bool(torch.isfinite(written[:, :tiles]).all())
    assert bool(torch.isnan(M[0, rows * cut.tiles :]).all())
    kept_rows = 16 * 40 if direction == "column" else int(keep.any(2).sum())
    assert kept_rows <= rows <= kept_rows + 16 * (config.row_block - 1)
    if method == "bwsp":
        kept = 12 if direction == "row" else 40  # of 40 rows at pr=0.7
        assert rows == 16 * math.ceil(kept / config.row_block) * config.row_block
        assert weights.column_offset.diff().tolist() == [20 if direction == "row" else 6] * 16


def test_a_balanced_layer_multiplies_in_proportion():
    sizes = {pr: layer_of("bwsp", "column", pr)[1].weights.U.numel() for pr in (0.0, 0.5, 0.8)}
    assert sizes[0.5] == sizes[0.0] // 2
    assert sizes[0.8] == sizes[0.0] // 5


def test_bfloat16_products_have_rounded_weights():
    convolution = nn.Conv2d(16, 16, 3).eval()
    for precision, exact in (("fp32", True), ("bf16", False)):
        compiled = wsp_compiler.compile(convolution, 0, precision=precision)
        compiled(torch.randn(1, 16, 6, 6))
        (layer,) = compiled.layers()
        (cpu,) = layer._state["layers"].values()
        U = cpu.weights.U
        assert torch.equal(U, U.bfloat16().float()) != exact


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_register_blocking(lanes: int):
    registers = 16 if lanes == 8 else 32
    for rows in ([12] * 16, [64] * 16, [33] * 16, [1] * 36, [5, 40, 17, 0], [200] * 36):
        config = choose_cpu_config(lanes, rows)
        assert config.lanes == lanes
        assert config.vectors * config.tile_block + config.vectors + 1 <= registers
        waste = sum(-(-count // config.row_block) * config.row_block - count for count in rows)
        assert waste <= sum(-(-count // lanes) * lanes - count for count in rows)
    assert choose_cpu_config(16, [64] * 16).vectors == 4
    assert choose_cpu_config(16, [16] * 16).vectors == 1


def test_packing_does_not_touch_the_site():
    _, cpu, _ = layer_of("wsp", "row", 0.5)
    before = {name: tensor.clone() for name, tensor in cpu.site.named_buffers()}
    packed = pack_cpu(cpu.site, cpu.spec, CpuConfig(lanes=4, vectors=2, tile_block=4))
    assert packed.U.data_ptr() != cpu.site.weight.data_ptr()
    assert all(torch.equal(tensor, before[name]) for name, tensor in cpu.site.named_buffers())
