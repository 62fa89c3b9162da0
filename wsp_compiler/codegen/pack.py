"""A layer's kept weights in the order its kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wsp_compiler.codegen.spec import CpuConfig, KernelSpec
from wsp_compiler.ops import WinogradSite


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
    offsets: list[int] = site.row_offset.tolist()
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
