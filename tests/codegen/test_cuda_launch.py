"""Decisions of the CUDA launcher that need no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from wsp_compiler.codegen import cuda_launch
from wsp_compiler.codegen.candidates import Candidate
from wsp_compiler.codegen.cuda_fused_launch import DeviceLimits
from wsp_compiler.codegen.cuda_launch import CudaLayer, choose_cuda_config, input_lanes
from wsp_compiler.codegen.spec import CpuConfig, CudaConfig, ThreeKernelsConfig
from wsp_compiler.errors import OptionError

from .emulation import TARGET, make_case


@pytest.mark.parametrize(("rows", "filters"), [(1, 16), (16, 16), (17, 32), (33, 64), (512, 64)])
def test_block_follows_kept_rows(rows: int, filters: int) -> None:
    assert choose_cuda_config(rows).block_filters == filters


def test_pairs_of_channels_only_where_the_code_generator_can() -> None:
    assert input_lanes(make_case(precision="fp16", dtype="float16").spec) == 2
    assert input_lanes(make_case(precision="tf32").spec) == 1
    assert input_lanes(make_case(channels=7).spec) == 1
    assert input_lanes(make_case(input_last=False).spec) == 1


def test_calls_are_split_so_that_32_bit_indices_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(batch=5)
    layer = CudaLayer(case.spec, case.site, None, TARGET)
    x = case.x
    y = torch.empty(5, case.spec.filters, *case.spec.output_size)
    assert layer._images_per_call(x, y) == 5
    monkeypatch.setattr(cuda_launch, "INDEX_LIMIT", 3 * max(x.stride(0), y.stride(0)))
    assert layer._images_per_call(x, y) == 2
    assert layer._images_per_call(x[:1], y[:1]) == 1


def test_slices_cover_every_tile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(batch=3, height=64, width=64)
    layer = CudaLayer(case.spec, case.site, None, TARGET)
    ranges: list[tuple[int, int]] = []
    monkeypatch.setattr(cuda_launch, "SLICE_ELEMENTS", 1)
    monkeypatch.setattr(torch.cuda, "device", torch.device)
    monkeypatch.setattr(CudaLayer, "_input", lambda self, x, V, first, count: ranges.append((first, count)))
    monkeypatch.setattr(CudaLayer, "_gemm", lambda self, V, M, count, config: None)
    monkeypatch.setattr(CudaLayer, "_output", lambda self, M, x, residual, y, first, count: None)
    layer.run(case.x, None)
    total = 3 * case.spec.tiles_per_image
    assert len(ranges) == 3
    assert [first for first, _ in ranges] == [i * ranges[0][1] for i in range(3)]
    assert ranges[-1][0] < total <= ranges[-1][0] + ranges[-1][1]


H100 = DeviceLimits(132, 232448, 233472)


def test_candidates_are_distinct_and_the_default_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_launch, "device_limits", lambda index: H100)
    case = make_case(filters=40, channels=24, pr=0.5)  # no fused kernel for 40 filters
    layer = CudaLayer(case.spec, case.site, None, TARGET)
    found = layer.candidates(100)
    assert {candidate.kind for candidate in found} == {"three_kernels"}
    assert len(set(found)) == len(found)
    assert found[0] == Candidate("three_kernels", ThreeKernelsConfig(layer.config))


def test_a_chosen_candidate_runs_for_its_number_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(batch=3, height=64, width=64, pr=0.5)
    layer = CudaLayer(case.spec, case.site, None, TARGET)
    used: list[tuple[int, CudaConfig]] = []
    monkeypatch.setattr(torch.cuda, "device", torch.device)
    monkeypatch.setattr(CudaLayer, "_input", lambda self, x, V, first, count: None)
    monkeypatch.setattr(CudaLayer, "_gemm", lambda self, V, M, count, config: used.append((count, config)))
    monkeypatch.setattr(CudaLayer, "_output", lambda self, M, x, residual, y, first, count: None)
    gemm = CudaConfig(block_filters=16, stages=4)
    tiles = case.spec.tiles_per_image
    layer.use(Candidate("three_kernels", ThreeKernelsConfig(gemm, 1)), 3 * tiles)
    layer.run(case.x, None)
    assert len(used) == 3  # slices of at least 1024 tiles
    assert {config for _, config in used} == {gemm}
    used.clear()
    layer.run(case.x[:1], None)
    assert used == [(1024, layer.config)]
    with pytest.raises(OptionError, match="does not run on CUDA"):
        layer.use(Candidate("cpu", CpuConfig(16, 4, 2)), 1)


@pytest.mark.parametrize("tile", [2, 4])
def test_what_is_accepted(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    """All of its own candidates, and of another layer's those with room for its rows."""
    monkeypatch.setattr(cuda_launch, "device_limits", lambda index: H100)
    options: dict[str, Any] = dict(filters=64, channels=64, tile=tile, dtype="float16", precision="fp16")
    case, fuller = make_case(**options, pr=0.8), make_case(**options, pr=0.5)
    layer, full = (CudaLayer(c.spec, c.site, None, TARGET) for c in (case, fuller))
    own = layer.candidates(100)
    assert {candidate.kind for candidate in own} == {"fused", "three_kernels"}
    assert len(set(own)) == len(own)
    assert all(layer.accepts(candidate) for candidate in own)
    assert any(not full.accepts(candidate) for candidate in own)
    assert not layer.accepts(Candidate("cpu", CpuConfig(16, 4, 2)))
    other = CudaLayer(make_case(**{**options, "tile": 6 - tile}).spec, case.site, None, TARGET)
    assert not any(other.accepts(candidate) for candidate in own if candidate.kind == "fused")
    monkeypatch.setattr(cuda_launch, "device_limits", lambda index: DeviceLimits(132, 4096, 8192))
    assert not any(layer.accepts(candidate) for candidate in own if candidate.kind == "fused")
