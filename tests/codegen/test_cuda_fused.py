"""The fused CUDA kernel against float64 on the emulator."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from wsp_compiler.codegen.build import lower
from wsp_compiler.codegen.cpu_launch import flat_view
from wsp_compiler.codegen.cuda_compiler import compile_cuda
from wsp_compiler.codegen.cuda_fused import make_fused
from wsp_compiler.codegen.pack_fused import pack_fused, padded_rows
from wsp_compiler.codegen.spec import FusedConfig, KernelSpec
from wsp_compiler.winograd import transform, transform_weight

from ..cuda_emulator import emulate, is_available
from .emulation import TARGET, TOLERANCE, Case, assert_close, make_case
from .test_cuda_compiler import has

needs_emulator = pytest.mark.skipif(not is_available(), reason="the emulator needs g++ on x86-64")
DTYPE = {"fp16": "float16", "bf16": "bfloat16", "tf32": "float32", "fp32": "float32"}
BARRIER = "tvm_builtin_cuda_cta_sync();"


def fused_case(precision: str, tile: int, **options: Any) -> Case:
    given = dict(filters=32, channels=32, pr=0.8, batch=1, height=6, width=6) | options
    return make_case(dtype=DTYPE[precision], precision=precision, tile=tile, **given)  # type: ignore[arg-type]


def configuration(case: Case, tiles: int = 8, groups: int = 1, **knobs: Any) -> FusedConfig:
    rows = padded_rows(case.site, groups)
    knobs = {"slice_words": 16, "warps": 12 if case.spec.tile == 4 else 8} | knobs
    return FusedConfig(case.spec.tile, tiles, groups, rows, **knobs)


@cache
def cuda_text(spec: KernelSpec, config: FusedConfig) -> str:
    return lower(make_fused(spec, config), "winograd_fused", TARGET).cuda_text


def _words(x: Tensor) -> Tensor:
    return flat_view(x).view(torch.float32)


def _elements(y: Tensor) -> Tensor:
    flat = flat_view(y)
    return flat.view(torch.uint16) if flat.element_size() == 2 else flat


def emulate_fused(
    case: Case,
    config: FusedConfig,
    order: str = "forward",
    edit: Callable[[str], str] = str,
    more_blocks: int = 0,
) -> Tensor:
    """y as the kernel computes it; unwritten elements are NaN.

    ``edit(text) -> text`` may damage the text, for negative controls; ``more_blocks`` have no tiles to compute.
    """
    spec, w = case.spec, pack_fused(case.site, case.spec, config)
    text = edit(cuda_text(spec, config))
    y = torch.full((case.x.shape[0], spec.filters, *spec.output_size), float("nan"), dtype=case.x.dtype)
    y = y.contiguous(memory_format=torch.channels_last)
    r = y if case.residual is None else case.residual.contiguous(memory_format=torch.channels_last)
    total = case.x.shape[0] * spec.tiles_per_image
    blocks = -(-total // config.tiles) * config.groups + more_blocks
    values = dict(
        X_ptr=_words(case.x), U_ptr=w.U, SLOT_ptr=w.slot, BIAS_ptr=w.bias, SLOPE_ptr=case.slope,
        R_ptr=_elements(r), Y_ptr=_elements(y), FACTOR_ptr=w.factor, total=total, blocks=blocks,
    )  # fmt: skip
    kernel = emulate(text, "winograd_fused_kernel", order=order)
    kernel(
        *[values[name] for name in kernel.args],
        grid=(blocks, 1, 1),
        block=(config.threads, 1, 1),
        dynamic_shared_bytes=config.shared_bytes(packed=case.x.element_size() == 2),
    )
    return y


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())


CASES: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {  # precision, tile, layer, knobs
    "one slice, relu": ("fp16", 2, dict(activation="relu"), dict(words=4)),
    "two slices, residual, prelu": (
        "fp16", 4, dict(channels=64, residual=True, activation="prelu"), dict(words=1, prefetch=1),
    ),
    "slices of 32 words, two groups": (
        "fp16", 2, dict(filters=64, channels=64, residual=True), dict(slice_words=32, groups=2, prefetch=3),
    ),
    "two slices of 32 words, dependent launch": (
        "fp16", 4, dict(channels=128), dict(slice_words=32, words=1, prefetch=6, dependent_launch=True),
    ),
    "24 tiles, ragged 13x20": (
        "fp16", 4, dict(height=13, width=20, activation="relu6"), dict(tiles=24, blocks_per_sm=1),
    ),
    "three 32-filter blocks on eight warps": (
        "fp16", 2, dict(filters=96, height=7, width=7, batch=2), dict(tiles=16, words=1),
    ),
    "nine 32-filter blocks on eight warps": ("fp16", 2, dict(filters=288, height=4, width=4), dict(warps=8)),
    "unbalanced rows, four groups": (
        "fp16", 2, dict(filters=128, method="wsp", pr=0.6, residual=True), dict(groups=4, warps=16),
    ),
    "filters pruned, one pixel": (
        "fp16", 4, dict(method="fp", height=1, width=1, batch=3), dict(warps=4, prefetch=2),
    ),
    "dense, wide padding": (
        "fp16", 4, dict(method="dense", padding=(0, 2), height=7, width=7), dict(warps=6),
    ),
    "64 tiles": ("fp16", 2, dict(height=13, width=20), dict(tiles=64, warps=4)),
    "bfloat16, residual, relu": ("bf16", 2, dict(residual=True, activation="relu"), dict(words=2)),
    "bfloat16, prelu, dependent launch": (
        "bf16", 4, dict(channels=64, activation="prelu", height=7, width=7), dict(words=1, dependent_launch=True),
    ),
    "bfloat16, relu6, two images": (
        "bf16", 4, dict(residual=True, activation="relu6", batch=2, height=5), dict(warps=6, tiles=16),
    ),
    "bfloat16, unbalanced, no padding": (
        "bf16", 2, dict(method="wsp", padding=(0, 0), height=7, width=7, filters=64), dict(groups=2, words=4),
    ),
    "tf32, residual, relu": (
        "tf32", 2, dict(residual=True, activation="relu", height=7, width=7), dict(words=4, prefetch=3),
    ),
    "tf32, two slices": (
        "tf32", 4, dict(activation="prelu", height=5, width=9), dict(words=1, dependent_launch=True),
    ),
    "tf32, slices of 32 words": ("tf32", 4, dict(height=13, width=20), dict(slice_words=32, tiles=24)),
    "tf32, one pixel, relu6": (
        "tf32", 2, dict(channels=16, activation="relu6", height=1, width=1, batch=2), dict(words=1),
    ),
    "fp32, residual, prelu": (
        "fp32", 2, dict(residual=True, activation="prelu", height=7, width=7), dict(words=2, prefetch=6),
    ),
    "fp32, two groups, relu6": (
        "fp32", 4, dict(filters=64, channels=16, activation="relu6", residual=True), dict(groups=2, prefetch=1),
    ),
    "fp32, wsp, relu": (
        "fp32", 4, dict(activation="relu", method="wsp"), dict(words=1, dependent_launch=True, prefetch=12),
    ),
    "fp32, dense, slices of 32 words": (
        "fp32", 2, dict(method="dense", padding=(2, 0)), dict(slice_words=32, words=4, warps=16),
    ),
}  # fmt: skip


@needs_emulator
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name: str) -> None:
    precision, tile, options, knobs = CASES[name]
    case = fused_case(precision, tile, **options)
    y, expected = emulate_fused(case, configuration(case, **knobs)), case.truth("output")
    assert_close(y, expected, TOLERANCE[precision, tile])
    if precision == "fp32":  # three tf32 products: as good as float32
        assert relative_error(y, expected) < 2**-20


def test_the_cases_use_every_knob() -> None:
    seen = {
        "words": {1, 2, 4},
        "slice_words": {16, 32},
        "warps": {4, 6, 8, 12, 16},
        "prefetch": {1, 2, 3, 6, 12},
        "dependent_launch": {False, True},
        "groups": {1, 2, 4},
        "tiles": {8, 16, 24, 64},
    }
    found: dict[str, set[Any]] = {name: set() for name in seen}
    for precision, tile, options, knobs in CASES.values():
        config = configuration(fused_case(precision, tile, **options), **knobs)
        for name in seen:
            found[name].add(getattr(config, name))
    assert found == seen
    layers = [(precision, tile, options) for precision, tile, options, _ in CASES.values()]
    for precision in DTYPE:
        assert {tile for p, tile, _ in layers if p == precision} == {2, 4}
        options = [o for p, _, o in layers if p == precision]
        assert any("residual" in o for o in options)
        assert {o.get("activation", "none") for o in options} >= {"none", "relu", "relu6", "prelu"} - {"none"}


@needs_emulator
@pytest.mark.parametrize(("precision", "tile"), [("fp16", 2), ("tf32", 4)])
def test_blocks_without_tiles_write_nothing(precision: str, tile: int) -> None:
    case = fused_case(precision, tile, filters=64, height=7, width=7)
    config = configuration(case, groups=2)
    y = emulate_fused(case, config)
    assert_close(y, case.truth("output"), TOLERANCE[precision, tile])
    assert torch.equal(y, emulate_fused(case, config, more_blocks=4))


CONTROL = ("fp16", 2, dict(filters=64, channels=64, residual=True), dict(groups=2))


def control() -> tuple[Case, FusedConfig]:
    precision, tile, options, knobs = CONTROL
    case = fused_case(precision, tile, **options)
    return case, configuration(case, **knobs)


@needs_emulator
def test_order_of_threads_does_not_matter() -> None:
    case, config = control()
    assert torch.equal(emulate_fused(case, config), emulate_fused(case, config, order="reverse"))


@needs_emulator
@pytest.mark.parametrize("barrier", range(4))
def test_every_barrier_is_needed(barrier: int) -> None:
    """Without one of them the result is wrong, or an address is, in at least one order of the threads."""
    case, config = control()

    def remove(text: str) -> str:
        parts = text.split(BARRIER)
        assert len(parts) == 5
        return BARRIER.join(parts[: barrier + 1]) + ";" + BARRIER.join(parts[barrier + 1 :])

    def wrong(order: str) -> bool:
        try:
            return not torch.equal(emulate_fused(case, config, order=order, edit=remove), expected)
        except RuntimeError:  # an address of the patch table before it is written
            return True

    expected = emulate_fused(case, config)
    assert wrong("forward") or wrong("reverse")


@needs_emulator
@pytest.mark.parametrize("tile", [2, 4])
def test_finite_for_the_largest_float16_inputs(tile: int) -> None:
    case = fused_case("fp16", tile, method="dense", height=8, width=8)
    case.x.fill_(60000.0)
    case.x[:, :, ::2, ::3] *= -1
    case.site.weight.mul_(1e-2)
    y = emulate_fused(case, configuration(case))
    assert torch.isfinite(y).all()
    assert_close(y, case.truth("output"), TOLERANCE["fp16", tile])


@needs_emulator
@pytest.mark.parametrize("tile", [2, 4])
def test_finite_where_the_output_is_close_to_the_largest_float16(tile: int) -> None:
    """Every product of the convolution has the same sign and their sum is 60000: more than any M."""
    side = tile + 2
    case = fused_case("fp16", tile, method="dense", height=side, width=side, padding=(0, 0))
    line = torch.tensor([1.0, 1.0, -1.0])
    kernel = torch.outer(line, line)
    weight = kernel.expand(32, 32, 3, 3) / (9 * 32)
    case.site.fill(transform_weight(weight, tile), torch.zeros(32))
    x = torch.full((1, 32, side, side), -60000.0)
    x[:, :, :3, :3] = 60000 * kernel
    case.x = x.half().contiguous(memory_format=torch.channels_last)
    y, expected = emulate_fused(case, configuration(case)), case.truth("output")
    assert float(expected.abs().max()) > 59000
    assert_close(y, expected, TOLERANCE["fp16", tile])


@needs_emulator
def test_large_float16_weights_with_small_inputs() -> None:
    case = fused_case("fp16", 4)
    case.site.weight.mul_(3000.0)
    case.x.mul_(0.1)
    assert_close(emulate_fused(case, configuration(case)), case.truth("output"), TOLERANCE["fp16", 4])


@needs_emulator
@pytest.mark.parametrize(("precision", "tile"), [("fp16", 2), ("bf16", 4), ("fp32", 4)])
def test_nan_reaches_the_outputs_that_read_it_and_no_others(precision: str, tile: int) -> None:
    """relu keeps NaN, and pixels outside of a tile's patch do not touch it."""
    case = fused_case(precision, tile, method="dense", height=11, width=11, activation="relu")
    row, column = 5, 4
    case.x[0, 3, row, column] = float("nan")
    matrices = transform(tile)
    AT, BT = matrices.tensor("AT", torch.float64), matrices.tensor("BT", torch.float64)
    reads = (AT != 0).double() @ (BT != 0).double() > 0  # [output of a tile, pixel of its patch]

    def affected(pixel: int) -> Tensor:
        along = torch.zeros(12, dtype=torch.bool)
        for start in range(0, 11, tile):
            inside = pixel + 1 - start  # padding 1
            if 0 <= inside < tile + 2:
                along[start : start + tile] |= reads[:, inside]
        return along[:11]

    expected = torch.outer(affected(row), affected(column))
    y = emulate_fused(case, configuration(case, tiles=16))
    assert torch.equal(torch.isnan(y), expected.expand_as(y))
    assert 0 < int(expected.sum()) < 121


@needs_emulator
@pytest.mark.parametrize(
    ("precision", "activation"), [("fp16", "relu6"), ("bf16", "prelu"), ("fp32", "prelu")]
)
def test_other_activations_keep_nan(precision: str, activation: str) -> None:
    case = fused_case(precision, 2, method="dense", height=4, width=4, activation=activation)
    case.x.fill_(float("nan"))
    assert bool(torch.isnan(emulate_fused(case, configuration(case))).all())


@needs_emulator
@pytest.mark.parametrize(("precision", "tile"), [("fp16", 2), ("fp16", 4)])
def test_small_inputs(precision: str, tile: int) -> None:
    """float16 has few exponents below 1. The output without its bias, which would hide the error."""
    case = fused_case(precision, tile, channels=64, height=8, width=8)
    case.site.bias.zero_()
    x = case.x
    for rms in (1e-2, 1e-3):
        case.x = x * rms
        y, expected = emulate_fused(case, configuration(case)), case.truth("output")
        assert relative_error(y, expected) < TOLERANCE[precision, tile]


@pytest.mark.skipif(not has("nvrtc"), reason="nvrtc is not installed")
@pytest.mark.parametrize("precision", DTYPE)
def test_compiles_with_tensor_cores(precision: str) -> None:
    case = fused_case(precision, 4)
    text = cuda_text(case.spec, configuration(case))
    assert f"mma.sync.aligned.m16n8k{16 if precision in ('fp16', 'bf16') else 8}" in text
    for arch in ("sm_80", "sm_90"):
        assert compile_cuda(text, arch, "nvrtc").startswith(b"\x7fELF")


@pytest.mark.skipif(not has("nvrtc"), reason="nvrtc is not installed")
def test_dependent_launch_waits_before_anything_of_other_kernels() -> None:
    case = fused_case("fp16", 2)
    text = cuda_text(case.spec, configuration(case, dependent_launch=True))
    body = text[text.index('extern "C" __global__') :].partition("{")[2]
    calls = re.findall(r"griddep\w*(?:launch_dependents|wait)|X_ptr|U_ptr|R_ptr|Y_ptr|mma", body)
    assert ["launch_dependents" in calls[0], "wait" in calls[1]] == [True, True]
    assert set(calls[2:]) >= {"X_ptr", "U_ptr", "Y_ptr"}
    assert compile_cuda(text, "sm_90", "nvrtc").startswith(b"\x7fELF")
    assert "griddepcontrol" not in cuda_text(case.spec, configuration(case))
