"""The CPU GEMM stage: every register blocking multiplies the same, tails of the tile line included."""

from __future__ import annotations

import pytest
import torch

from wsp_compiler.codegen.cpu_configs import register_blocks
from wsp_compiler.codegen.spec import CpuConfig
from wsp_compiler.codegen.targets import cpu_target
from wsp_compiler.ops import input_transform, sparse_bgemm

from .test_cpu_input import layer, make_spec

LANES = cpu_target().lanes
BLOCKS = sorted(register_blocks(LANES))[:: max(1, len(list(register_blocks(LANES))) // 8)]


@pytest.mark.parametrize(("rows", "vectors"), BLOCKS)
@pytest.mark.parametrize("size", [4, 9, 24])  # 2x2, 5x5 and 12x12 tiles
def test_products_equal_the_operator(rows: int, vectors: int, size: int):
    spec = make_spec(2, False, size, size)
    cpu = layer(spec, CpuConfig(LANES, rows, vectors))
    x = torch.randn(1, spec.channels, size, size)
    site, weights = cpu.site, cpu.weights
    V = input_transform(x.double(), site.columns, site.column_offset, [1, 1], 2)
    expected = sparse_bgemm(V, site.weight, site.rows, site.row_offset, site.column_offset)  # [R, T]
    M = cpu.sparse_bgemm(cpu.input_transform(x), x)
    ts, (TH, TW), row = cpu._slicing(1, 1, "slices").ts, spec.tiles, cpu._geometry.row
    assert M.shape[0] == 1
    lines = M[0, : weights.blocks * rows * ts].view(-1, ts)[:, : TH * row].reshape(-1, TH, row)[:, :, :TW]
    found = lines[weights.product_row.T.reshape(-1).long()].reshape(-1, TH * TW)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-3)
