"""The estimate of the fused kernel's time: finite, and it grows with the work."""

from __future__ import annotations

import dataclasses

import pytest

from wsp_compiler.codegen.fused_estimate import elements_per_word, estimated_cycles
from wsp_compiler.codegen.spec import FusedConfig

from .emulation import make_case

CONFIG = FusedConfig(2, 32, 1, 32)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32", "fp32"])
def test_more_work_takes_longer(precision: str) -> None:
    spec = make_case(filters=64, channels=64, precision=precision).spec
    base = estimated_cycles(spec, CONFIG, 10**5, 132)
    assert 0 < base < float("inf")
    assert estimated_cycles(spec, CONFIG, 2 * 10**5, 132) > base
    assert estimated_cycles(spec, dataclasses.replace(CONFIG, rows=64), 10**5, 132) > base
    assert estimated_cycles(dataclasses.replace(spec, channels=128), CONFIG, 10**5, 132) > base
    assert estimated_cycles(spec, CONFIG, 10**5, 264) < base
    assert elements_per_word(spec) == (2 if precision in ("fp16", "bf16") else 1)


def test_three_products_take_longer_than_one() -> None:
    spec = make_case(filters=64, channels=64, precision="tf32").spec
    single = estimated_cycles(spec, CONFIG, 10**5, 132)
    assert estimated_cycles(dataclasses.replace(spec, precision="fp32"), CONFIG, 10**5, 132) > single


def test_a_last_wave_of_few_blocks_counts_in_full() -> None:
    spec = make_case(filters=64, channels=64, precision="fp16").spec
    full = 132 * CONFIG.blocks_per_sm * CONFIG.tiles
    one, more = (estimated_cycles(spec, CONFIG, tiles, 132) for tiles in (full, full + 1))
    assert more > one == estimated_cycles(spec, CONFIG, full - 1, 132)
