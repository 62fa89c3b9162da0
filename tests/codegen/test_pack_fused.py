"""Weights of the fused kernel: fragments hold the kept rows, slots find them, scales keep float16 finite."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from wsp_compiler.codegen.pack_fused import (
    FusedWeights,
    filter_scales,
    fragments,
    pack_fused,
    padded_rows,
    round_to_tf32,
    rows_per_group,
)
from wsp_compiler.codegen.position_scales import INPUT_GROWTH, OUTPUT_SCALE, POSITION_SCALES, input_scale
from wsp_compiler.codegen.spec import FusedConfig
from wsp_compiler.errors import OptionError

from .emulation import Case, make_case

DTYPE = {"fp16": "float16", "bf16": "bfloat16", "tf32": "float32", "fp32": "float32"}


def packed_case(precision: str, tile: int, groups: int = 1, **options: Any) -> tuple[Case, FusedWeights, int]:
    given = dict(filters=64, channels=32, method="wsp", pr=0.6) | options
    case = make_case(dtype=DTYPE[precision], precision=precision, tile=tile, **given)  # type: ignore[arg-type]
    rows = padded_rows(case.site, groups)
    config = FusedConfig(tile, 8, groups, rows, warps=12 if tile == 4 else 8)
    return case, pack_fused(case.site, case.spec, config), rows


def slots(w: FusedWeights, positions: int) -> Tensor:
    """[p*p, n] rows."""
    pairs = w.slot.view(torch.int32).view(positions // 2, -1)
    return torch.stack([pairs & 0xFFFF, pairs >> 16], 1).view(positions, -1)


def unpacked(w: FusedWeights, precision: str, groups: int, positions: int, rows: int) -> Tensor:
    """[G, p*p, parts, rows, c], by the lanes that PTX gives the elements of A."""
    parts = 2 if precision == "fp32" else 1
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    E = 4 // torch.empty(0, dtype=dtype).element_size()
    U = w.U.view(torch.int32).view(groups, -1, positions, rows // 16, parts, 32, 4)
    eights = U.shape[1]
    out = torch.empty((groups, positions, parts, rows, eights * 8), dtype=torch.int32)
    for lane in range(32):
        for i in range(4):
            row, word = lane // 4 + i % 2 * 8, lane % 4 + i // 2 * 4
            # [G, eights, p*p, rows / 16, parts] -> [G, p*p, parts, rows / 16, eights]
            out[:, :, :, row::16, word::8] = U[..., lane, i].permute(0, 2, 4, 3, 1)
    return out.view(dtype).view(groups, positions, parts, rows, eights * 8 * E)


@pytest.mark.parametrize("precision", DTYPE)
@pytest.mark.parametrize("pr", [0.2, 0.6])
@pytest.mark.parametrize(("tile", "groups"), [(2, 1), (2, 2), (4, 1), (4, 2)])
def test_fragments_hold_the_kept_rows_and_slots_find_them(
    precision: str, tile: int, groups: int, pr: float
) -> None:
    case, w, rows = packed_case(precision, tile, groups, pr=pr)
    positions, n = case.spec.winograd.positions, case.spec.filters
    D = torch.tensor(POSITION_SCALES[tile])
    scales = torch.outer(D, D).flatten()
    weights = 1 / (w.factor * OUTPUT_SCALE[tile] ** 2 * input_scale(tile, precision))
    parts = unpacked(w, precision, groups, positions, rows).double()
    U, slot = parts.sum(2), slots(w, positions)
    bits = {"fp16": 11, "bf16": 8, "tf32": 11, "fp32": 22}[precision]
    kept_elements = 0
    offsets = case.site.row_offset.tolist()
    for k, U_k in enumerate(case.site.position_weights()):
        kept = case.site.rows[offsets[k] : offsets[k + 1]].long()
        pruned = torch.ones(n, dtype=torch.bool)
        pruned[kept] = False
        if rows < n // groups:
            assert bool((slot[k, pruned] == rows).all())  # the zero after the rows
        else:
            assert torch.equal(slot[k], torch.arange(n) % (n // groups))  # every filter in its own row
        for f, expected in zip(kept.tolist(), U_k.double(), strict=True):
            actual = U[f // (n // groups), k, int(slot[k, f])]
            expected = expected * scales[k] * float(weights[f])
            subnormal = 2.0**-24 if precision == "fp16" else 0.0
            assert bool(((actual - expected).abs() <= expected.abs() * 2.0**-bits + subnormal).all())
        kept_elements += kept.numel() * case.spec.channels
    assert int((U != 0).sum()) == kept_elements  # padding is zero
    assert torch.equal(w.bias, case.site.bias)


def test_rows_per_group_counts_the_fullest() -> None:
    case = make_case(filters=64, channels=32, method="wsp", pr=0.6)
    offsets = case.site.row_offset.tolist()
    for groups in (1, 2, 4):
        counts = [
            int((case.site.rows[offsets[k] : offsets[k + 1]] // (64 // groups) == g).sum())
            for k in range(16)
            for g in range(groups)
        ]
        assert rows_per_group(case.site, groups) == max(counts)
        assert max(counts) <= padded_rows(case.site, groups) < max(16, max(counts) + 16)
        assert padded_rows(case.site, groups) % 16 == 0


def test_a_position_without_rows() -> None:
    case, w, rows = packed_case("fp16", 2, method="wsp", pr=0.97)
    counts = case.site.row_offset.diff()
    assert int(counts.min()) == 0
    slot = slots(w, 16)
    assert ((slot != rows).sum(1) == counts).all()


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("size", [1e-6, 1.0, 300.0])
def test_float16_products_are_finite_for_the_worst_input(tile: int, size: float) -> None:
    """Each row meets the V that the largest inputs give at most, signs aligned."""
    case, _, _ = packed_case("fp16", tile, method="dense")
    for weight in case.site.position_weights():
        weight.mul_(size)
    config = FusedConfig(tile, 8, 1, 64, warps=12 if tile == 4 else 8)
    w = pack_fused(case.site, case.spec, config)
    U = unpacked(w, "fp16", 1, (tile + 2) ** 2, 64).double()[0, :, 0]
    growth = torch.tensor(INPUT_GROWTH[tile], dtype=torch.float64)
    V = 65504 * torch.outer(growth, growth).flatten() * input_scale(tile, "fp16")
    M = U.abs().sum(-1) * V[:, None]
    assert bool(torch.isfinite(M.half()).all())
    assert bool((w.factor >= 2).all())  # a scaled output is smaller than the true one
    if size == 300.0:
        assert float(M.amax(0).min()) > 65504 / 2.1  # no filter wastes a bit
    assert torch.equal(w.factor.log2(), w.factor.log2().round())


def test_weights_that_are_zero_or_not_finite_are_not_scaled() -> None:
    U = torch.zeros(16, 4, 32)
    U[3, 2, 1] = math.inf
    assert torch.equal(filter_scales(U, 2, "fp16"), filter_scales(torch.zeros_like(U), 2, "fp16"))
    for precision in ("bf16", "tf32", "fp32"):
        assert torch.equal(filter_scales(torch.full_like(U, 1e6), 2, precision), torch.ones(4))


@pytest.mark.parametrize("tile", [2, 4])
def test_the_factor_is_a_float16_number_for_any_weights(tile: int) -> None:
    case, _, _ = packed_case("fp16", tile, method="dense")
    config = FusedConfig(tile, 8, 1, 64, warps=12 if tile == 4 else 8)
    for exponent in range(-20, 21, 5):
        site = copy.deepcopy(case.site)
        site.weight.mul_(2.0**exponent)
        factor = pack_fused(site, case.spec, config).factor
        assert 2 <= float(factor.min()) <= float(factor.max()) <= 2**15


def test_rounding_to_tf32() -> None:
    values = torch.cat([torch.randn(1000) * 10.0 ** torch.randint(-20, 20, (1000,)), torch.zeros(1)])
    rounded = round_to_tf32(values)
    assert bool((rounded.view(torch.int32) & 0x1FFF == 0).all())
    assert bool(((rounded - values).abs() <= values.abs() * 2.0**-11).all())
    ties = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11])
    assert torch.equal(round_to_tf32(ties), torch.tensor([1.0, 1 + 2 * 2.0**-10]))
    special = torch.tensor([math.inf, -math.inf, math.nan])
    assert torch.equal(round_to_tf32(special).isnan(), special.isnan())
    assert torch.equal(round_to_tf32(special)[:2], special[:2])


def test_two_tf32_parts_hold_float32() -> None:
    U = torch.randn(1, 16, 16, 8)
    w = FusedWeights(fragments(U, "fp32"), torch.empty(0), torch.empty(0), 1.0)
    high, low = unpacked(w, "fp32", 1, 16, 16).double().unbind(2)
    assert float((high + low - U).abs().max() / U.abs().max()) < 2**-22
    assert float(low.abs().max()) < float(high.abs().max()) * 2**-10


def test_packing_does_not_touch_the_site() -> None:
    case, _, _ = packed_case("fp16", 4)
    before = {name: tensor.clone() for name, tensor in case.site.named_buffers()}
    pack_fused(case.site, case.spec, FusedConfig(4, 8, 1, 64, warps=12))
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.site.named_buffers())


@pytest.mark.parametrize("tile", [2, 4])
def test_a_filter_of_large_weights_leaves_the_others_their_precision(tile: int) -> None:
    case, _, _ = packed_case("fp16", tile, method="dense")
    config = FusedConfig(tile, 8, 1, 64, warps=12 if tile == 4 else 8)
    before = pack_fused(case.site, case.spec, config).factor
    for weight in case.site.position_weights():
        weight[5] *= 300.0
    after = pack_fused(case.site, case.spec, config).factor
    others = torch.arange(64) != 5
    assert torch.equal(after[others], before[others])
    assert float(after[5]) > 100 * float(before[5])


def test_too_few_rows_are_refused() -> None:
    case = make_case(filters=64, channels=32, method="wsp", pr=0.2, dtype="float16", precision="fp16")
    with pytest.raises(OptionError, match="kept rows in a group"):
        pack_fused(case.site, case.spec, FusedConfig(2, 8, 1, 16))
