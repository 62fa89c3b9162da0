"""The scales of the fused kernel's positions: powers of two, and float16 stays finite."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from wsp_compiler.codegen.position_scales import INPUT_GROWTH, OUTPUT_SCALE, POSITION_SCALES, input_scale
from wsp_compiler.winograd import transform

FLOAT16_MAX = 65504.0


@pytest.mark.parametrize("tile", [2, 4])
def test_growth_is_that_of_the_transform(tile: int) -> None:
    BT = transform(tile).tensor("BT", torch.float64)
    assert BT.abs().sum(1).tolist() == list(INPUT_GROWTH[tile])
    assert max(INPUT_GROWTH[tile]) ** 2 == transform(tile).input_growth


@pytest.mark.parametrize("tile", [2, 4])
def test_scales_are_powers_of_two_one_per_position(tile: int) -> None:
    assert len(POSITION_SCALES[tile]) == tile + 2
    for value in (*POSITION_SCALES[tile], OUTPUT_SCALE[tile], input_scale(tile, "fp16")):
        assert math.frexp(value)[0] == 0.5


@pytest.mark.parametrize("tile", [2, 4])
def test_the_largest_float16_input_stays_finite(tile: int) -> None:
    """And one power of two more would not."""
    growth, scale = max(INPUT_GROWTH[tile]) ** 2, input_scale(tile, "fp16")
    assert (
        FLOAT16_MAX * growth * scale <= FLOAT16_MAX < 2 * FLOAT16_MAX * growth * scale or growth * scale == 1
    )


def test_other_precisions_need_no_scale() -> None:
    for tile, precision in itertools.product((2, 4), ("bf16", "tf32", "fp32")):
        assert input_scale(tile, precision) == 1.0


def test_positions_of_a_random_layer_have_a_similar_range() -> None:
    """Bounds of |D_i D_j U_ij V_ij| over the positions, for weights of variance 1: apart by 5, without D by 76."""
    G = transform(4).tensor("G", torch.float64)
    line = torch.tensor(POSITION_SCALES[4], dtype=torch.float64)
    bound = G.norm(dim=1) * torch.tensor(INPUT_GROWTH[4], dtype=torch.float64)
    plain, scaled = torch.outer(bound, bound), torch.outer(bound * line, bound * line)
    assert float(plain.max() / plain.min()) > 70
    assert float(scaled.max() / scaled.min()) < 5
