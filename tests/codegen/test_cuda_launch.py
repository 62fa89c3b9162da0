"""Decisions of the CUDA launcher that need no GPU."""

from __future__ import annotations

import pytest
import torch

from wsp_compiler.codegen import cuda_launch
from wsp_compiler.codegen.cuda_launch import CudaLayer, choose_cuda_config, input_lanes

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
    monkeypatch.setattr(CudaLayer, "_gemm", lambda self, V, M, count: None)
    monkeypatch.setattr(CudaLayer, "_output", lambda self, M, x, residual, y, first, count: None)
    layer.run(case.x, None)
    total = 3 * case.spec.tiles_per_image
    assert len(ranges) == 3
    assert [first for first, _ in ranges] == [i * ranges[0][1] for i in range(3)]
    assert ranges[-1][0] < total <= ranges[-1][0] + ranges[-1][1]
