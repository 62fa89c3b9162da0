"""Packed weights hold the kept rows and columns, and nothing else: the pruned multiplies are gone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wsp_compiler
from wsp_compiler import PruneRule
from wsp_compiler.codegen.cpu_geometry import POSITION_PADDING
from wsp_compiler.codegen.cpu_launch import CpuLayer
from wsp_compiler.codegen.layer import WinogradLayer
from wsp_compiler.codegen.pack import pack_cpu
from wsp_compiler.codegen.spec import CpuConfig
from wsp_compiler.winograd import transform_weight

from ..reference import assert_close, pruned_convolution

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
    weights, size, positions = cpu.weights, cpu.config.rows, cpu.spec.winograd.positions
    rows, columns = keep.any(2), keep.any(1)  # [p*p, n], [p*p, c]
    if direction == "row":  # the other side is whole, even where a position lost everything
        columns = torch.ones_like(columns)
    else:
        rows = torch.ones_like(rows)
    blocks = torch.bincount(weights.block_position, minlength=positions)
    assert torch.equal(blocks, -(-rows.sum(1) // size))
    assert torch.equal(weights.column_offset.diff(), columns.sum(1).int())
    assert weights.U.numel() == int((blocks * size * columns.sum(1)).sum())
    assert weights.blocks == int(blocks.sum())
    U = transform_weight(convolution.weight, tile)
    block = 0
    for k in range(positions):
        depth, kept = int(columns[k].sum()), int(rows[k].sum())
        packed = torch.zeros(0, depth)
        first = block * size
        for _ in range(int(blocks[k])):
            assert int(weights.block_position[block]) == k
            start = int(weights.block_start[block])
            packed = torch.cat([packed, weights.U[start : start + size * depth].view(depth, size).T])
            block += 1
        assert torch.equal(packed[:kept], U[k][rows[k]][:, columns[k]].float())
        assert not packed[kept:].any()
        place = weights.product_row[:, k]
        assert torch.equal(place[rows[k]], torch.arange(first, first + kept).int())
        assert bool((place[~rows[k]] == weights.blocks * size).all())  # the row of zeros
        spare = int(columns[: k + 1].sum()) + k
        into = weights.column_row[k]
        assert torch.equal(into[columns[k]], torch.arange(spare - depth, spare).int())
        assert bool((into[~columns[k]] == spare).all())


@pytest.mark.parametrize(("method", "direction"), METHODS[2:])
def test_the_gemm_visits_only_kept_rows_and_columns(method: str, direction: str):
    """M of a slice holds kept rows alone: the stage writes exactly those. V of pruned columns is never read."""
    _, cpu, keep = layer_of(method, direction, 0.7)
    x = torch.randn(3, 20, 6, 6)
    weights, size = cpu.weights, cpu.config.rows
    slices = cpu._slicing(3, 1, "slices")
    assert slices.count == 1
    V = cpu.input_transform(x)
    for k, offset in enumerate(weights.column_offset[1:].tolist()):
        if direction == "column":
            spare = (offset + k) * slices.ts + k * POSITION_PADDING
            V[0, spare : spare + slices.ts] = torch.nan
    rows = weights.blocks * size
    M = torch.full((1, (rows + 2) * slices.ts), torch.nan)
    cpu._apart(1, x, None, x, V, M, slices)
    written = M[0, : rows * slices.ts].view(rows, slices.ts)
    assert bool(torch.isfinite(written[:, : 3 * 3 * (3 + cpu.config.gap)]).all())
    assert bool(torch.isnan(M[0, rows * slices.ts :]).all())
    kept_rows = 16 * 40 if direction == "column" else int(keep.any(2).sum())
    assert kept_rows <= rows <= kept_rows + 16 * (size - 1)
    if method == "bwsp":
        kept = 12 if direction == "row" else 40  # of 40 rows at pr=0.7
        assert rows == 16 * math.ceil(kept / size) * size
        assert weights.column_offset.diff().tolist() == [20 if direction == "row" else 6] * 16


def test_a_position_may_lose_all_its_columns():
    convolution = nn.Conv2d(20, 40, 3, padding=1).eval()
    compiled = wsp_compiler.compile(convolution, 0.97, method="wsp", direction="column")
    x = torch.randn(1, 20, 6, 6)
    keep = compiled.plan[""].keep
    assert not bool(keep.any(2).any(1).all())
    assert_close(compiled(x), pruned_convolution(x, convolution, keep, 2), 1e-5)


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
        if cpu.config.dot:  # words of two bfloat16 values
            assert not exact
            words = U.view(torch.bfloat16).view(-1, 16 // 2, cpu.config.rows, 2)  # [block][pair][row][2]
            first = words[0].permute(1, 0, 2).reshape(cpu.config.rows, 16)
            kept = cpu.site.position_weights()[0][: cpu.config.rows]
            assert torch.equal(first[: len(kept)], kept.bfloat16())
            continue
        assert torch.equal(U, U.bfloat16().float()) != exact


def test_packing_does_not_touch_the_site():
    _, cpu, _ = layer_of("wsp", "row", 0.5)
    before = {name: tensor.clone() for name, tensor in cpu.site.named_buffers()}
    packed = pack_cpu(cpu.site, cpu.spec, CpuConfig(lanes=4, rows=5, vectors=2))
    assert packed.U.data_ptr() != cpu.site.weight.data_ptr()
    assert all(torch.equal(tensor, before[name]) for name, tensor in cpu.site.named_buffers())
