"""A row-pruned layer's kept weights in the order the fused CUDA kernel reads them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wsp_compiler.codegen.packed import packed
from wsp_compiler.codegen.position_scales import INPUT_GROWTH, OUTPUT_SCALE, POSITION_SCALES, input_scale
from wsp_compiler.codegen.spec import FusedConfig, KernelSpec
from wsp_compiler.errors import OptionError
from wsp_compiler.ops import WinogradSite

ROUNDING = 1 + 2.0**-9
"""What rounding U and V to float16 can add to a product, with room to spare."""


@dataclass(frozen=True)
class FusedWeights:
    """Packed for the fused CUDA kernel.

    Attributes:
        U: uint32 words in mma fragment order [group][words / 8][position][rows / 16][high, low][lane][4]; "low" (what
            tf32 left over) exists in fp32 only.
        slot: uint32 [p*p / 2, n], for positions 2i (lower half) and 2i + 1 the row of M_k within its group that
            holds a filter; pruned: a row of zeros, the one at ``rows`` or its own.
        bias: float32 [n].
        factor: float32 [n], what the output transform's results have to be multiplied by.
    """

    U: Tensor
    slot: Tensor
    bias: Tensor
    factor: Tensor


def rows_per_group(site: WinogradSite, groups: int) -> int:
    """The largest number of kept rows of any (position, filter group)."""

    def count() -> int:
        positions, n = site.row_offset.numel() - 1, site.bias.numel()
        position = torch.repeat_interleave(site.row_offset.diff().long())
        block = position * groups + site.rows.long() // (n // groups)
        return int(torch.bincount(block, minlength=positions * groups).max())

    return packed(site, ("rows per group", groups), count)  # counting waits for the device


def padded_rows(site: WinogradSite, groups: int) -> int:
    """Rows that the kernel computes for every (position, filter group): whole mma tiles of 16."""
    return max(16, -(-rows_per_group(site, groups) // 16) * 16)


def fit_rows(config: FusedConfig, site: WinogradSite) -> FusedConfig:
    """``config`` with as many padded rows as ``site`` needs.

    Raises:
        OptionError: the registers do not hold them.
    """
    return replace(config, rows=padded_rows(site, config.groups))


def filter_scales(U: Tensor, m: int, precision: str) -> Tensor:
    """Powers of two that filters' weights are multiplied by, so that a float16 M is finite for every finite input.

    |M_k| <= sum_c |U_k| max |V_k|, and max |V_k| is 65504 times the growth of position k times the input's scale. One
    scale per filter: folded batch norms leave filters of very different size.

    Args:
        U: [p*p, n, c] float32, kept weights (0 where pruned) scaled by position.
        m: output tile side.
        precision: arithmetic of the matrix products; all but "fp16" have exponents to spare.

    Returns:
        [n] float32.
    """
    if precision != "fp16":
        return torch.ones(U.shape[1], device=U.device)
    line = torch.tensor(INPUT_GROWTH[m], device=U.device)
    growth = torch.outer(line, line).view(-1, 1) * input_scale(m, precision)  # [p*p, 1]
    bound = (U.abs().sum(-1) * growth).amax(0)  # [n]
    bound = torch.where(torch.isfinite(bound) & (bound > 0), bound, torch.ones_like(bound))
    # With a factor of at least 2 the scaled outputs, and most sums on the way, are finite wherever the true ones are.
    most = 1 / (2 * OUTPUT_SCALE[m] ** 2 * input_scale(m, precision))
    least = most / 2**14  # a factor of 2^15: one of 2^16 is no float16 number
    return torch.exp2(-torch.ceil(torch.log2(bound * ROUNDING))).clamp(least, most)


def pack_fused(site: WinogradSite, spec: KernelSpec, config: FusedConfig) -> FusedWeights:
    """Pack a row-pruned site's weights, on its device; see :class:`FusedWeights`.

    Raises:
        OptionError: some (position, group) keeps more rows than ``config`` has room for.
    """
    device, positions, m = site.weight.device, spec.winograd.positions, spec.tile
    n, c, G, rows = spec.filters, spec.channels, config.groups, config.rows
    line = torch.tensor(POSITION_SCALES[m], device=device)
    scales = torch.outer(line, line).flatten()  # [p*p]
    kept = site.rows.to(device).long()  # filter of every kept row, ascending within its position
    counts = site.row_offset.to(device).diff().long()
    position = torch.repeat_interleave(torch.arange(positions, device=device), counts)
    weights = torch.cat(list(site.position_weights())).float() * scales[position, None]  # [kept rows, c]
    U = torch.zeros((positions, n, c), device=device)
    U[position, kept] = weights
    scale = filter_scales(U, m, spec.precision)
    group = kept // (n // G)
    block = position * G + group
    start = torch.bincount(block, minlength=positions * G).cumsum(0).roll(1)
    start[0] = 0
    rank = torch.arange(len(kept), device=device) - start[block]  # among its (position, group)'s rows
    if len(kept) and int(rank.max()) >= rows:
        raise OptionError(
            f"{int(rank.max()) + 1} kept rows in a group, but {config}",
            where="pack_fused",
            fix="give more rows, or more groups",
        )
    slot = torch.full((positions, n), rows, dtype=torch.int64, device=device)
    if rows >= n // G:
        # Room for all: in their own order, pruned ones as zeros, M is read without bank conflicts.
        rank = kept % (n // G)
        slot[:] = torch.arange(n, device=device) % (n // G)
    slot[position, kept] = rank
    padded = torch.zeros((G, positions, rows, c), device=device)
    padded[group, position, rank] = weights * scale[kept, None]
    halves = slot.view(positions // 2, 2, n)
    packed_slot = (halves[:, 0] | halves[:, 1] << 16).to(torch.int32)
    return FusedWeights(
        U=fragments(padded, spec.precision),
        slot=packed_slot.view(torch.uint32).reshape(-1),
        bias=site.bias.float().contiguous(),
        factor=1 / (OUTPUT_SCALE[m] ** 2 * input_scale(m, spec.precision) * scale),
    )


def fragments(U: Tensor, precision: str) -> Tensor:
    """[G, p*p, rows, c] float32 -> words of A fragments; see :class:`FusedWeights`.

    Lane l holds, of 16 rows x 8 words, (row l / 4, word l % 4), (row + 8, word), (row, word + 4), (row + 8, word + 4).
    """
    if precision == "fp16":
        parts = [U.half().view(torch.int32)]  # [G, p*p, rows, words]
    elif precision == "bf16":
        parts = [U.bfloat16().view(torch.int32)]
    else:
        high = round_to_tf32(U)
        parts = [high.view(torch.int32)]
        if precision == "fp32":
            parts.append(round_to_tf32(U - high).view(torch.int32))
    words = torch.stack(parts, dim=2)  # [G, p*p, parts, rows, words]
    G, positions, count, rows, width = words.shape
    # [G, p*p, part, rows / 16, half of rows, row, words / 8, half of words, word]
    split = words.view(G, positions, count, rows // 16, 2, 8, width // 8, 2, 4)
    ordered = split.permute(0, 6, 1, 3, 2, 5, 8, 7, 4)
    return ordered.reshape(-1).view(torch.uint32)


def round_to_tf32(values: Tensor) -> Tensor:
    """float32 rounded to nearest even at tf32's 10 mantissa bits; Inf and NaN stay as they are."""
    bits = values.contiguous().view(torch.int32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return torch.where(torch.isfinite(values), rounded.view(torch.float32), values)
