"""Default configurations fit the registers, waste few rows, and lead the list of those worth measuring."""

from __future__ import annotations

import pytest

from wsp_compiler.codegen.cpu_configs import (
    block_cost,
    choose_gap,
    cpu_configs,
    default_config,
    register_blocks,
)
from wsp_compiler.codegen.spec import KernelSpec


def spec(height: int, width: int, tile: int = 2) -> KernelSpec:
    return KernelSpec(
        filters=64, channels=64, height=height, width=width, padding=(1, 1), tile=tile, dtype="float32",
        precision="fp32", input_channels_last=True, output_channels_last=True, columns_pruned=False,
        rows_pruned=True, residual=False, activation="relu",
    )  # fmt: skip


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_accumulators_and_operands_fit_the_registers(lanes: int):
    blocks = list(register_blocks(lanes))
    assert len(blocks) == len(set(blocks)) > 10
    for rows, vectors in blocks:
        assert rows * vectors + vectors + (lanes != 16) <= (16 if lanes == 8 else 32)


@pytest.mark.parametrize("kept", [13, 26, 52, 103, 64, 1])
def test_the_default_block_wastes_few_rows(kept: int):
    config = default_config(spec(56, 56), 16, [kept] * 16)
    padded = -(-kept // config.rows) * config.rows
    assert padded <= 1.1 * kept
    assert config.rows * config.vectors >= min(kept, 8)


def test_cost_counts_padded_rows():
    assert block_cost(13, 2, [13]) == 13
    assert block_cost(12, 2, [13]) == 24
    assert block_cost(1, 1, [1]) == 8  # latency
    assert block_cost(13, 2, [13, 0, 26]) == 39


def test_gaps_are_left_out_where_they_cost_much():
    assert choose_gap(spec(56, 56), 16) == 1
    assert choose_gap(spec(14, 14), 16) == 1  # 7 rows of 7 tiles or of 8: seven half vectors either way
    assert choose_gap(spec(7, 7), 16) == 0


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_the_default_comes_first_and_all_differ(lanes: int):
    configs = cpu_configs(spec(28, 28), lanes, [26] * 16)
    assert configs[0] == default_config(spec(28, 28), lanes, [26] * 16)
    assert len(configs) == len(set(configs)) >= 6
    assert {config.split for config in configs} == {"auto", "slices", "stages"}
    assert all(config.lanes == lanes for config in configs)
