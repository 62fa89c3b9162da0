"""Which layers run fused, with which configuration, and what the kernel is given."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import TWELVE_JOBS
from wsp_compiler.codegen import cuda_fused_launch, cuda_launch
from wsp_compiler.codegen.build import BuiltKernel, lower
from wsp_compiler.codegen.cuda_fused import make_fused
from wsp_compiler.codegen.cuda_fused_launch import (
    DeviceLimits,
    FusedLayer,
    choose_fused_config,
    fused_accepts,
    fused_applies,
    fused_candidates,
    registers_per_thread,
)
from wsp_compiler.codegen.cuda_launch import CudaLayer
from wsp_compiler.codegen.pack_fused import rows_per_group
from wsp_compiler.codegen.spec import FusedConfig

from ..cuda_emulator import emulate, is_available
from .emulation import TARGET, TOLERANCE, Case, assert_close, make_case

needs_emulator = pytest.mark.skipif(not is_available(), reason="the emulator needs g++ on x86-64")
H100 = DeviceLimits(132, 232448, 233472, dependent_launch=True)
RTX3090 = DeviceLimits(82, 101376, 102400)
DTYPE = {"fp16": "float16", "bf16": "bfloat16", "tf32": "float32", "fp32": "float32"}
HALF = dict(dtype="float16", precision="fp16", filters=64, channels=64)


def case_of(**options: Any) -> Case:
    return make_case(**(HALF | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", DTYPE)
@pytest.mark.parametrize("tile", [2, 4])
def test_applies_to_every_precision_and_tile(precision: str, tile: int) -> None:
    layer: dict[str, Any] = dict(precision=precision, dtype=DTYPE[precision], tile=tile)
    assert fused_applies(case_of(**layer).spec)
    step = 32 if precision in ("fp16", "bf16") else 16
    assert fused_applies(case_of(**layer, channels=step).spec)
    assert not fused_applies(case_of(**layer, channels=step + step // 2).spec)


@pytest.mark.parametrize(
    "change",
    [
        dict(input_last=False),
        dict(output_last=False),
        dict(direction="column"),
        dict(channels=48),
        dict(filters=40),
        dict(dtype="float32"),
        dict(dtype="float16", precision="fp32"),
    ],
)
def test_does_not_apply(change: dict[str, Any]) -> None:
    case = case_of(**change)
    assert not fused_applies(case.spec)
    assert fused_candidates(case.spec, case.site, H100, 100) == []
    assert choose_fused_config(case.spec, case.site, 1000, H100) is None


@cache
def pruned_rows(filters: int, tile: int, pr: float, method: str) -> Case:
    """Few channels: the kept rows are what configurations depend on."""
    return make_case(filters=filters, channels=16, tile=tile, pr=pr, method=method)


LAYERS = [  # precision, tile, pr, method
    ("fp16", 2, 0.8, "bwsp"),
    ("fp16", 4, 0.6, "wsp"),
    ("bf16", 4, 0.8, "bwsp"),
    ("tf32", 2, 0.6, "bwsp"),
    ("tf32", 4, 0.8, "bwsp"),
    ("fp32", 2, 0.8, "wsp"),
    ("fp32", 4, 0.6, "bwsp"),
]


@pytest.mark.parametrize("limits", [H100, RTX3090], ids=["H100", "RTX3090"])
@pytest.mark.parametrize(("precision", "tile", "pr", "method"), LAYERS)
def test_candidates_fit_and_the_benchmarks_have_a_default(
    precision: str, tile: int, pr: float, method: str, limits: DeviceLimits
) -> None:
    element = torch.empty(0, dtype=getattr(torch, DTYPE[precision])).element_size()
    start = [layer[:2] for layer in LAYERS].index((precision, tile))
    for job, batch in TWELVE_JOBS[start % 3 :: 3]:  # every number of channels
        base = pruned_rows(job.channels_out, tile, pr, method)
        spec = dataclasses.replace(
            base.spec, channels=job.channels_in, height=job.height, width=job.width,
            dtype=DTYPE[precision], precision=precision,
        )  # fmt: skip
        tiles = batch * spec.tiles_per_image
        candidates = fused_candidates(spec, base.site, limits, tiles)
        assert len(set(candidates)) == len(candidates)
        for config in candidates:
            assert config.tile == tile
            assert spec.filters % (32 * config.groups) == 0
            assert config.rows >= rows_per_group(base.site, config.groups)
            assert spec.channels * element // 4 % config.slice_words == 0
            shared = config.shared_bytes(packed=element == 2) + 16 * config.tiles  # and four tables of tiles
            assert shared <= limits.shared_per_block
            assert (shared + 1024) * config.blocks_per_sm <= limits.shared_per_sm  # 1 KiB is the system's
            registers = registers_per_thread(config)
            assert config.accumulators < registers <= 255
            assert registers * config.threads * config.blocks_per_sm <= 65536
            assert config.threads * config.blocks_per_sm <= 1536
            assert 8 <= config.warps * config.blocks_per_sm <= 24
            assert fused_accepts(spec, base.site, config, limits)
        assert choose_fused_config(spec, base.site, tiles, limits) in candidates


def test_dependent_launch_needs_compute_capability_9_and_enough_blocks() -> None:
    case = case_of(pr=0.8)
    assert not any(c.dependent_launch for c in fused_candidates(case.spec, case.site, RTX3090, 10**6))
    assert not any(c.dependent_launch for c in fused_candidates(case.spec, case.site, H100, 100))
    many = fused_candidates(case.spec, case.site, H100, 10**6)
    assert many
    assert all(config.dependent_launch for config in many)


def test_configurations_of_other_layers_and_devices_are_not_accepted() -> None:
    case = case_of(pr=0.8)
    config = FusedConfig(2, 16, 1, 16)
    assert fused_accepts(case.spec, case.site, config, RTX3090)
    later = dataclasses.replace(config, dependent_launch=True)
    assert fused_accepts(case.spec, case.site, later, H100)
    assert not fused_accepts(case.spec, case.site, later, RTX3090)
    assert not fused_accepts(case.spec, case.site, dataclasses.replace(config, groups=4), H100)
    assert not fused_accepts(case.spec, case.site, FusedConfig(4, 16, 1, 16, warps=12), H100)
    odd = dataclasses.replace(case.spec, channels=96)  # 48 words
    assert not fused_accepts(odd, case.site, config, H100)
    dense = case_of(method="dense")
    assert not fused_accepts(dense.spec, dense.site, config, H100)  # 64 rows
    assert not fused_accepts(case.spec, case.site, dataclasses.replace(config, tiles=56), RTX3090)
    assert not fused_accepts(case_of(channels=40).spec, case.site, config, H100)


def test_few_tiles_divide_the_filters() -> None:
    case = case_of(filters=512, pr=0.8)
    config = choose_fused_config(case.spec, case.site, 512, H100)
    assert config is not None
    assert -(-512 // config.tiles) * config.groups >= 2 / 3 * 132


def test_a_configuration_is_chosen_once_per_number_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choosing reads back from the device: a second call must not, or graph capture would fail."""
    case = case_of(pr=0.8)
    layer = CudaLayer(case.spec, case.site, None, TARGET)
    calls: list[int] = []

    def choose(spec: object, site: object, tiles: int, limits: object) -> FusedConfig:
        calls.append(tiles)
        return FusedConfig(2, 32, 1, 16)

    monkeypatch.setattr(cuda_launch, "device_limits", lambda index: H100)
    monkeypatch.setattr(cuda_launch, "choose_fused_config", choose)
    first = layer.fused_layer(case.x)
    assert first is not None
    assert layer.fused_layer(case.x) is first
    assert layer.fused_layer(case.x[:1]) is first
    assert calls == [2 * case.spec.tiles_per_image, case.spec.tiles_per_image]


@pytest.fixture
def on_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are emulated instead of built; arguments go by position, as to the built kernel."""
    order = (
        "X_ptr",
        "U_ptr",
        "SLOT_ptr",
        "BIAS_ptr",
        "SLOPE_ptr",
        "R_ptr",
        "Y_ptr",
        "FACTOR_ptr",
        "total",
        "blocks",
    )

    def build(make: Any, name: str, target: Any, arguments: tuple[Any, ...]) -> BuiltKernel:
        text = lower(make_fused(*arguments), name, target).cuda_text
        kernel, config = emulate(text, f"{name}_kernel"), arguments[1]

        def function(*values: Tensor | float) -> None:
            given = dict(zip(order, values, strict=True))
            kernel(
                *[given[name] for name in kernel.args],
                grid=(int(given["blocks"]), 1, 1),
                block=(config.threads, 1, 1),
            )

        return BuiltKernel(function, lambda: text)

    monkeypatch.setattr(cuda_fused_launch, "build", build)
    monkeypatch.setattr(torch.cuda, "device", torch.device)
    monkeypatch.setattr(cuda_launch, "device_limits", lambda index: H100)


def misaligned(x: Tensor) -> Tensor:
    """The same values, dense channels_last, four bytes after a multiple of 16."""
    memory = torch.empty(x.numel() + 16, dtype=x.dtype)
    first = next(i for i in range(16) if memory[i:].data_ptr() % 16 == 4)
    moved = memory[first : first + x.numel()].as_strided(x.shape, x.stride())
    return moved.copy_(x)


@needs_emulator
@pytest.mark.usefixtures("on_the_emulator")
@pytest.mark.parametrize(("precision", "tile"), [("fp16", 4), ("bf16", 2), ("fp32", 2)])
def test_a_layer_runs_fused(precision: str, tile: int) -> None:
    """Any residual and any alignment of the input; the second batch size has another number of blocks."""
    case = make_case(
        filters=32, channels=32, pr=0.8, height=5, width=6, residual=True, activation="prelu", tile=tile,
        dtype=DTYPE[precision], precision=precision,
    )  # fmt: skip
    layer = CudaLayer(case.spec, case.site, case.slope, TARGET)
    expected = case.truth("output")
    assert case.residual is not None
    assert not case.residual.is_contiguous(memory_format=torch.channels_last)
    y = layer.run(case.x, case.residual)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, expected, TOLERANCE[precision, tile])
    assert "winograd_fused" in layer.source()
    moved = misaligned(case.x)
    assert moved.data_ptr() % 16 == 4
    assert torch.equal(layer.run(moved, case.residual), y)
    assert torch.equal(layer.run(case.x[1:], case.residual[1:]), y[1:])
    empty = layer.run(case.x[:0], case.residual[:0])
    assert empty.shape == (0, *y.shape[1:])


@needs_emulator
@pytest.mark.usefixtures("on_the_emulator")
def test_configurations_share_packed_weights_only_with_themselves() -> None:
    case = case_of(filters=32, channels=32, pr=0.8, height=4, width=4)
    config = FusedConfig(2, 8, 1, 16, slice_words=16)
    layers = [
        FusedLayer(case.spec, case.site, torch.zeros(32), TARGET, c)
        for c in (config, config, dataclasses.replace(config, rows=32))
    ]
    assert layers[0].weights.U is layers[1].weights.U
    assert layers[2].weights.U.numel() == 2 * layers[0].weights.U.numel()
    results: list[Tensor] = []
    for layer in layers:
        y = torch.full((2, 32, 4, 4), float("nan"), dtype=torch.float16)
        results.append(y.contiguous(memory_format=torch.channels_last))
        layer.run(case.x, None, results[-1])
    assert torch.equal(results[0], results[2])
    assert_close(results[0], case.truth("output"), 2e-3)


@pytest.mark.parametrize(
    ("method", "precision", "tile", "fused"),
    [
        ("fp", "fp16", 4, False),
        ("fp", "bf16", 4, False),
        ("dense", "fp16", 4, False),
        ("fp", "fp16", 2, True),
        ("fp", "fp32", 4, True),
        ("bwsp", "fp16", 4, True),
        ("wsp", "bf16", 4, True),
    ],
)
def test_filters_with_all_positions_are_not_transformed_in_16_bits(
    method: str, precision: str, tile: int, fused: bool
) -> None:
    dtype = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[precision]
    case = make_case(
        method=method, precision=precision, dtype=dtype, tile=tile, filters=64, channels=64, pr=0.7
    )
    config = FusedConfig(tile, 8, 1, 64, warps=12 if tile == 4 else 8)
    assert bool(fused_candidates(case.spec, case.site, H100, 100)) == fused
    assert fused_accepts(case.spec, case.site, config, H100) == fused


def test_kernels_overlap_only_where_blocks_fill_the_multiprocessors() -> None:
    case = make_case(**HALF, pr=0.8)  # type: ignore[arg-type]
    older = dataclasses.replace(H100, dependent_launch=False)
    assert not any(c.dependent_launch for c in fused_candidates(case.spec, case.site, H100, 64))
    assert all(c.dependent_launch for c in fused_candidates(case.spec, case.site, H100, 10**6))
    assert not any(c.dependent_launch for c in fused_candidates(case.spec, case.site, older, 10**6))
    config = fused_candidates(case.spec, case.site, H100, 10**6)[0]
    assert not fused_accepts(case.spec, case.site, config, older)


def test_three_groups_of_filters() -> None:
    case = make_case(**{**HALF, "filters": 96}, pr=0.8)  # type: ignore[arg-type]
    assert {config.groups for config in fused_candidates(case.spec, case.site, H100, 10**6)} == {1, 3}


@pytest.mark.parametrize("dependent", [False, True])
def test_the_launch_is_marked_as_dependent(dependent: bool) -> None:
    case = make_case(**HALF, pr=0.8)  # type: ignore[arg-type]
    config = FusedConfig(2, 16, 1, 16, dependent_launch=dependent)
    launch = json.loads(lower(make_fused(case.spec, config), "winograd_fused", TARGET).launch)
    (info,) = launch["func_info"].values()
    tags = info["launch_param_tags"]
    assert tags[-1] == "tirx.use_dyn_shared_memory"
    assert ("tirx.use_programtic_dependent_launch" in tags) == dependent
