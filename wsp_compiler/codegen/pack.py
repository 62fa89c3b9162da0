"""A layer's kept weights in the order its kernels read them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from wsp_compiler.codegen.pack_fused import round_to_tf32
from wsp_compiler.codegen.spec import CpuConfig, KernelSpec
from wsp_compiler.ops import WinogradSite


def _integers(tensor: Tensor) -> list[int]:
    return cast("Any", tensor).tolist()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class CpuWeights:
    """Packed for the CPU kernels.

    Attributes:
        U: float32 [block][column][config.rows]; a block holds kept rows of one position, the last one zero padded.
            With config.dot words of two bfloat16 values, [block][pair of columns][config.rows], zero padded too.
        block_position: int32 [blocks], the position of each block.
        block_start: int64 [blocks], first element (or word) of each block in U.
        column_offset: int32 [p*p + 1], kept columns before each position.
        column_row: int32 [p*p * c], row of V for a position and a channel; pruned ones share a spare row that every
            position has after its kept columns. Unused without column pruning.
        product_row: int32 [n * p*p], row of M for a filter and a position; pruned ones point at the row of zeros
            after the last block.
        bias: float32 [n], zero padded by at least 16.
    """

    U: Tensor
    block_position: Tensor
    block_start: Tensor
    column_offset: Tensor
    column_row: Tensor
    product_row: Tensor
    bias: Tensor

    @property
    def blocks(self) -> int:
        """Blocks of kept rows over all positions."""
        return self.block_position.numel()


def pack_cpu(site: WinogradSite, spec: KernelSpec, config: CpuConfig) -> CpuWeights:
    """Pack a site's weights; see :class:`CpuWeights`."""
    size, positions, n, c = config.rows, spec.winograd.positions, spec.filters, spec.channels
    rows, columns = _integers(site.row_offset), _integers(site.column_offset)
    parts: list[Tensor] = []
    block_position: list[int] = []
    block_start: list[int] = []
    kept_blocks = [-(-(rows[k + 1] - rows[k]) // size) for k in range(positions)]
    product_row = torch.full((n, positions), sum(kept_blocks) * size, dtype=torch.int32)
    column_row = torch.empty((positions, c), dtype=torch.int32)
    start = 0
    for k, U_k in enumerate(site.position_weights()):  # [R_k, C_k]
        kept, depth = U_k.shape
        packed = torch.zeros((kept_blocks[k] * size, depth), dtype=torch.float32)
        packed[:kept] = U_k
        if config.dot:
            packed = torch.nn.functional.pad(packed, (0, depth % 2)).bfloat16().view(torch.float32)
            depth = packed.shape[1]
        elif spec.precision == "bf16":
            packed = packed.bfloat16().float()
        parts.append(packed.view(kept_blocks[k], size, depth).transpose(1, 2).reshape(-1))
        first = len(block_position) * size
        product_row[site.rows[rows[k] : rows[k + 1]].cpu().long(), k] = torch.arange(
            first, first + kept, dtype=torch.int32
        )
        column_row[k] = columns[k + 1] + k  # the spare row
        column_row[k, site.columns[columns[k] : columns[k + 1]].cpu().long()] = torch.arange(
            columns[k] + k, columns[k + 1] + k, dtype=torch.int32
        )
        block_position += [k] * kept_blocks[k]
        block_start += [start + number * size * depth for number in range(kept_blocks[k])]
        start += packed.numel()
    return CpuWeights(
        U=torch.cat(parts).contiguous(),
        block_position=torch.tensor(block_position, dtype=torch.int32),
        block_start=torch.tensor(block_start, dtype=torch.int64),
        column_offset=site.column_offset.cpu().contiguous(),
        column_row=column_row,
        product_row=product_row,
        bias=torch.nn.functional.pad(site.bias, (0, 16)),
    )


@dataclass(frozen=True)
class CudaWeights:
    """Packed for the CUDA kernels, on the device.

    Attributes:
        U: operand type, per position [rows_k, depth_k], depth zero padded to 16 bytes; positions concatenated.
        u_start: int32 [p*p], first element of each position.
        row_offset: int32 [p*p + 1], kept rows before each position.
        m_base: int32 [p*p + 1], the same with rows padded as M stores them.
        depth_base: int32 [p*p + 1], padded depth before each position.
        row_slot: int32 [p*p * n], row of M_k that holds a filter, or -1.
        column_slot: int32 [p*p * slot_channels], column of V_k that a channel goes to, or -1.
        bias: float32 [n].
        factor: what the GEMM's results have to be multiplied by.
        max_rows: the largest number of kept rows of a position.
    """

    U: Tensor
    u_start: Tensor
    row_offset: Tensor
    m_base: Tensor
    depth_base: Tensor
    row_slot: Tensor
    column_slot: Tensor
    bias: Tensor
    factor: float
    max_rows: int


def fp16_weight_scale(largest: float) -> float:
    """A power of two that brings the largest weight near 2^10: neither overflow nor subnormals in float16."""
    if not math.isfinite(largest) or largest == 0:
        return 1.0
    return 2.0 ** (9 - math.frexp(largest)[1])


def _to_operand(U: Tensor, precision: str) -> Tensor:
    if precision == "fp16":
        return U.half()
    if precision == "bf16":
        return U.bfloat16().view(torch.uint16)
    return round_to_tf32(U) if precision == "tf32" else U


def pack_cuda(site: WinogradSite, spec: KernelSpec) -> CudaWeights:
    """Pack a site's weights; see :class:`CudaWeights`."""
    device, positions = site.weight.device, spec.winograd.positions
    rows, columns = _integers(site.row_offset.diff()), _integers(site.column_offset.diff())
    depths = [_round_up(count, spec.depth_alignment) for count in columns]
    largest = float(site.weight.abs().max()) if site.weight.numel() else 0.0
    scale = fp16_weight_scale(largest) if spec.precision == "fp16" else 1.0
    parts = [
        torch.nn.functional.pad(U_k, (0, depth - U_k.shape[1])).reshape(-1) * scale
        for U_k, depth in zip(site.position_weights(), depths, strict=True)
    ]
    row_slot = torch.full((positions, spec.filters), -1, dtype=torch.int32)
    column_slot = torch.full((positions, spec.slot_channels), -1, dtype=torch.int32)
    row_offset, column_offset = _integers(site.row_offset), _integers(site.column_offset)
    for k in range(positions):
        kept = site.rows[row_offset[k] : row_offset[k + 1]].cpu().long()
        row_slot[k, kept] = torch.arange(rows[k], dtype=torch.int32)
        kept = site.columns[column_offset[k] : column_offset[k + 1]].cpu().long()
        column_slot[k, kept] = torch.arange(columns[k], dtype=torch.int32)
        padding = torch.arange(columns[k], depths[k], dtype=torch.int32)
        column_slot[k, spec.channels : spec.channels + len(padding)] = padding
    padded_rows = [_round_up(count, 2) for count in rows]

    def offsets(counts: list[int]) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)

    return CudaWeights(
        U=_to_operand(torch.cat(parts), spec.precision).contiguous(),
        u_start=offsets([r * d for r, d in zip(rows, depths, strict=True)])[:-1].contiguous(),
        row_offset=offsets(rows),
        m_base=offsets(padded_rows),
        depth_base=offsets(depths),
        row_slot=row_slot.reshape(-1).to(device),
        column_slot=column_slot.reshape(-1).to(device),
        bias=site.bias.contiguous(),
        factor=spec.operand_scale / scale,
        max_rows=max(rows),
    )
