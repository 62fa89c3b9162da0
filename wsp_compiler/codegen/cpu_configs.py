"""Configurations of the CPU kernels: the default for a layer, and the others worth measuring."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from wsp_compiler.codegen.cpu_geometry import round_up
from wsp_compiler.codegen.spec import CpuConfig, KernelSpec


def register_blocks(lanes: int) -> Iterable[tuple[int, int]]:
    """All (rows, vectors) whose accumulators and operands fit the vector registers."""
    registers = 16 if lanes == 8 else 32  # AVX2 has 16; AVX-512 and NEON have 32
    weights = 0 if lanes == 16 else 1  # AVX-512 multiplies by a scalar in memory, the others load it first
    for vectors in range(1, 7):
        for rows in range(1, 29):
            if rows * vectors + vectors + weights <= registers:
                yield rows, vectors


def block_cost(rows: int, vectors: int, kept: Sequence[int]) -> float:
    """Time per tile vector and column, in multiplications: two multiplications or two loads at a time.

    Fewer than eight accumulators leave the multiplier waiting for its own results.
    """
    per_block = max(rows * vectors, rows + vectors, 8) / vectors
    return sum(round_up(count, rows) // rows for count in kept) * per_block


def choose_gap(spec: KernelSpec, lanes: int) -> int:
    """No gap between tile rows where it would cost more than an eighth of the multiplications."""
    (TH, TW), half = spec.tiles, max(lanes // 2, 4)
    return int(round_up(TH * (TW + 1), half) <= 1.125 * round_up(TH * TW, half))


def default_config(spec: KernelSpec, lanes: int, kept: Sequence[int], dot: bool = False) -> CpuConfig:
    """The configuration for positions with ``kept`` rows each, if nothing was measured.

    ``dot``: the CPU has bfloat16 dot products. Pruned columns do not come in pairs and are multiplied one by one.
    """
    rows, vectors = min(
        register_blocks(lanes), key=lambda block: (block_cost(*block, kept), -block[0] * block[1])
    )
    pairs = dot and spec.precision == "bf16" and not spec.columns_pruned
    return CpuConfig(lanes=lanes, rows=rows, vectors=vectors, gap=choose_gap(spec, lanes), dot=pairs)


def cpu_configs(spec: KernelSpec, lanes: int, kept: Sequence[int], dot: bool = False) -> list[CpuConfig]:
    """Configurations worth measuring; the default one first."""
    default = default_config(spec, lanes, kept, dot)
    found = [default]
    blocks = sorted(
        register_blocks(lanes), key=lambda block: (block_cost(*block, kept), -block[0] * block[1])
    )
    best_by_vectors = {vectors: (rows, vectors) for rows, vectors in reversed(blocks)}
    for split in ("slices", "stages"):
        found.append(dataclasses.replace(default, split=split))
    for size in (256 * 1024, 1024 * 1024):
        found.append(dataclasses.replace(default, slice_bytes=size))
    for rows, vectors in best_by_vectors.values():
        if vectors <= 4:
            found.append(dataclasses.replace(default, rows=rows, vectors=vectors))
    found.append(dataclasses.replace(default, gap=1 - default.gap))
    return list(dict.fromkeys(found))
