"""How long the fused CUDA kernel takes with a configuration, estimated: the choice where nothing was measured.

Counts bytes, instructions and matrix instructions of one thread block and turns them into SM cycles. The rates were
fitted to some 700 configurations on an H100 (benchmarks/results/fused_sweep_h100.json): picking by the estimate
costs 6% against picking the best measured one (geomean of 36 layers, worst 1.33x).
"""

from __future__ import annotations

import math

from wsp_compiler.codegen.spec import FusedConfig, KernelSpec

WEIGHT_BYTES_PER_CYCLE = 63.0
PATCH_BYTES_PER_CYCLE = 14.8
INSTRUCTIONS_PER_CYCLE = 0.56
"""Of each of the SM's four schedulers."""
CYCLES_PER_MULTIPLY = 2.5
LOAD_WEIGHT = 3.0
"""Instructions that one load of a fragment counts as."""
ALONE = 0.32
"""Share of the memory time that a block alone on its SM cannot hide."""
INPUT_INSTRUCTIONS, OUTPUT_INSTRUCTIONS = {2: 36, 4: 164}, {2: 90, 4: 300}
"""Of the transforms: per word of channels and tile, and per word of tiles and 32 filters."""


def elements_per_word(spec: KernelSpec) -> int:
    """Elements of the input in 32 bits."""
    return 2 if spec.precision in ("fp16", "bf16") else 1


def estimated_cycles(spec: KernelSpec, config: FusedConfig, tiles: int, multiprocessors: int) -> float:
    """SM cycles of one call of ``tiles`` tiles on a GPU of that many multiprocessors."""
    pack, positions, m = elements_per_word(spec), config.positions, config.tile
    words, parts = spec.channels / pack, 2 if spec.precision == "fp32" else 1
    blocks = -(-tiles // config.tiles) * config.groups
    weights = positions * config.rows * words * 4 * parts
    patches = config.tiles * positions * words * 4
    multiplies = positions * config.rows / 16 * config.tiles / 8 * words / 8 * (3 if parts == 2 else 1)
    loads = positions * words * (config.tiles / 128 + config.rows / 128 * parts)
    items = config.tiles * words / 32
    filters = spec.filters / config.groups / 32
    instructions = (
        items * (INPUT_INSTRUCTIONS[m] + 2 * positions / config.words)
        + config.tiles / pack * filters * OUTPUT_INSTRUCTIONS[m]
        + loads * LOAD_WEIGHT
        + multiplies
    )
    memory = weights / WEIGHT_BYTES_PER_CYCLE + patches / PATCH_BYTES_PER_CYCLE
    issue = instructions / 4 / INSTRUCTIONS_PER_CYCLE
    tensor = multiplies * CYCLES_PER_MULTIPLY
    per_sm = config.blocks_per_sm
    rounds = math.ceil(blocks / (multiprocessors * per_sm))
    together = min(per_sm, math.ceil(blocks / multiprocessors))
    hidden = min(1.0, config.warps * together / 20.7) ** 0.42
    alone = 0.83 * (memory * ALONE + issue + tensor) / hidden
    return rounds * max(alone, max(memory, issue, tensor) * together) + 8000.0
