"""Slices cover every tile row, load the threads evenly, and fit the cache where they can."""

from __future__ import annotations

import dataclasses

import pytest

from wsp_compiler.codegen.cpu_geometry import Geometry
from wsp_compiler.codegen.cpu_slicing import cut, slice_shape
from wsp_compiler.codegen.spec import CpuConfig

from .test_cpu_configs import spec


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize(("images", "size"), [(1, 6), (3, 40), (1, 130), (50, 6), (8, 14)])
@pytest.mark.parametrize("split", ["slices", "stages", "auto"])
def test_slices_cover_every_tile_row(images: int, size: int, threads: int, split: str):
    geometry = Geometry(spec(size, size), CpuConfig(16, 13, 2))
    slices = cut(geometry, images, threads, 16 * 64, 16 * 13 + 1, split)
    TH = geometry.spec.tiles[0]
    assert slices.images == 1 or slices.rows == TH
    assert slices.count == -(-images // slices.images) * -(-TH // slices.rows)
    assert slices.ts == geometry.tile_line(slices.images, slices.rows)
    assert slices.v_part >= 16 * 64 * slices.ts
    assert slices.m_part >= (16 * 13 + 1) * slices.ts
    if slices.split == "slices":
        assert slices.workers == min(threads, slices.count) == slices.parts
        if images * TH >= threads:
            assert slices.count >= min(threads, images * TH) // 2
        held = 16 * 64 * 4 * slices.images * slices.rows * geometry.row
        assert slices.rows * geometry.row < 16 + geometry.row or held <= geometry.config.slice_bytes
    else:
        assert slices.parts == 1
        assert slices.workers == threads


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize(
    ("images", "tile_rows", "fitting"), [(1, 28, 4), (1, 7, 5), (8, 4, 20), (32, 7, 30), (1, 1, 9), (3, 5, 1)]
)
def test_threads_are_loaded_evenly(images: int, tile_rows: int, fitting: int, threads: int):
    per_image, rows = slice_shape(images, tile_rows, fitting, threads)
    count = -(-images // per_image) * -(-tile_rows // rows)
    longest = -(-count // threads) * per_image * rows
    assert longest <= max(1.5 * images * tile_rows / threads + 1, 1 if images > 1 else rows)


def test_one_slice_of_a_small_image_is_shared_between_threads():
    geometry = Geometry(spec(7, 7), CpuConfig(16, 13, 2, gap=0))
    rows = 16 * 512, 16 * 103 + 1
    assert cut(geometry, 1, 2, *rows).split == "stages"
    assert cut(geometry, 1, 1, *rows).split == "slices"
    assert cut(geometry, 64, 2, *rows).split == "slices"
    config = dataclasses.replace(geometry.config, split="slices")
    assert cut(Geometry(geometry.spec, config), 1, 2, *rows).split == "slices"
