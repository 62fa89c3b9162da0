"""A layer's kept weights in the order its kernels read them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from wsp_compiler.codegen.spec import CpuConfig, FusedConfig, KernelSpec
from wsp_compiler.ops import WinogradSite


def _integers(tensor: Tensor) -> list[int]:
    return cast("Any", tensor).tolist()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def choose_cpu_config(lanes: int, rows: list[int]) -> CpuConfig:
    """Register blocking for positions with ``rows`` kept rows each.

    Of the vector counts that fit the register file, the one that wastes the fewest padded rows; wider blocks
    win ties since they load fewer transformed inputs per multiply.
    """
    registers = 32 if lanes != 8 else 16
    best = min(
        range(1, 5),
        key=lambda vectors: (sum(_round_up(count, lanes * vectors) for count in rows), -vectors),
    )
    block = (registers - best - 1) // best
    return CpuConfig(lanes=lanes, vectors=best, tile_block=min(block, 24))


@dataclass(frozen=True)
class CpuWeights:
    """Packed for the CPU kernels.

    Attributes:
        U: float32, per position [block][column][row_block], positions concatenated.
        start: int64 [p*p], first element of each position in U.
        block_offset: int32 [p*p + 1], row blocks before each position.
        destination: int32 [blocks * row_block], k * n_pad + filter of every packed row; padding rows point at the
            spare element p*p * n_pad.
        columns, column_offset: int32, see wsp_compiler.ops.
        bias: float32 [n_pad].
    """

    U: Tensor
    start: Tensor
    block_offset: Tensor
    destination: Tensor
    columns: Tensor
    column_offset: Tensor
    bias: Tensor


def pack_cpu(site: WinogradSite, spec: KernelSpec, config: CpuConfig) -> CpuWeights:
    """Pack a site's weights; see :class:`CpuWeights`."""
    block, positions = config.row_block, spec.winograd.positions
    n_pad = _round_up(spec.filters, config.lanes)
    offsets = _integers(site.row_offset)
    parts: list[Tensor] = []
    targets: list[Tensor] = []
    blocks, starts = [0], [0]
    for k, U_k in enumerate(site.position_weights()):  # [R_k, C_k]
        kept, columns = U_k.shape
        padded = _round_up(kept, block)
        packed = torch.zeros((padded, columns), dtype=torch.float32)
        packed[:kept] = U_k
        if spec.precision == "bf16":
            packed = packed.bfloat16().float()
        parts.append(packed.view(padded // block, block, columns).transpose(1, 2).reshape(-1))
        target = torch.full((padded,), positions * n_pad, dtype=torch.int32)
        target[:kept] = k * n_pad + site.rows[offsets[k] : offsets[k + 1]].cpu()
        targets.append(target)
        blocks.append(blocks[-1] + padded // block)
        starts.append(starts[-1] + padded * columns)
    bias = torch.zeros(n_pad, dtype=torch.float32)
    bias[: spec.filters] = site.bias
    return CpuWeights(
        U=torch.cat(parts).contiguous(),
        start=torch.tensor(starts[:-1], dtype=torch.int64),
        block_offset=torch.tensor(blocks, dtype=torch.int32),
        destination=torch.cat(targets),
        columns=site.columns.contiguous(),
        column_offset=site.column_offset.contiguous(),
        bias=bias,
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
    if precision == "tf32":  # round to nearest even at 10 mantissa bits
        bits = U.contiguous().view(torch.int32)
        rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
        return torch.where(torch.isfinite(U), rounded.view(torch.float32), U)
    return U


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


@dataclass(frozen=True)
class FusedWeights:
    """Packed for the fused CUDA kernel.

    Attributes:
        U: float16 in mma fragment order [group][c / 32][position][rows / 8][lane][8].
        slot: int32 [p*p * n], the row of M_k within its group that holds a filter; pruned: the zero at ``rows``.
        bias: float32 [n].
        factor: what the GEMM's results have to be multiplied by.
    """

    U: Tensor
    slot: Tensor
    bias: Tensor
    factor: float


def rows_per_group(site: WinogradSite, groups: int) -> int:
    """The largest number of kept rows of any (position, filter group)."""
    positions, n = site.row_offset.numel() - 1, site.bias.numel()
    position = torch.repeat_interleave(site.row_offset.diff().long())
    block = position * groups + site.rows.long() // (n // groups)
    return int(torch.bincount(block, minlength=positions * groups).max())


def pack_fused(site: WinogradSite, spec: KernelSpec, config: FusedConfig) -> FusedWeights:
    """Pack a row-pruned site's weights; see :class:`FusedWeights`."""
    device, positions = site.weight.device, spec.winograd.positions
    n, c, G, rows = spec.filters, spec.channels, config.groups, config.rows
    per_group = n // G
    scale = fp16_weight_scale(float(site.weight.abs().max()))
    padded = torch.zeros((G, positions, rows, c), dtype=torch.float32)
    slot = torch.full((positions, n), rows, dtype=torch.int32)
    offsets = _integers(site.row_offset)
    for k, U_k in enumerate(site.position_weights()):
        filters = site.rows[offsets[k] : offsets[k + 1]].cpu().long()
        for g in range(G):
            own = (filters // per_group == g).nonzero()[:, 0]
            padded[g, k, : own.numel()] = U_k.cpu()[own] * scale
            slot[k, filters[own]] = torch.arange(own.numel(), dtype=torch.int32)
    # [group, position, row / 8, row % 8, c / 32, step, half, pair, element] -> lane = (row % 8) * 4 + pair
    fragments = padded.view(G, positions, rows // 8, 8, c // 32, 2, 2, 4, 2).permute(
        0, 4, 1, 2, 3, 7, 5, 6, 8
    )
    return FusedWeights(
        U=fragments.reshape(-1).half().to(device),
        slot=slot.reshape(-1).to(device),
        bias=site.bias.contiguous(),
        factor=spec.operand_scale / scale,
    )
