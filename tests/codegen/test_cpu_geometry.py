"""Sizes of the CPU kernels' buffers: everything that is read or written lies inside."""

from __future__ import annotations

import dataclasses

import pytest

from wsp_compiler.codegen.cpu_geometry import Geometry, odd_vectors, round_up
from wsp_compiler.codegen.spec import CpuConfig

from .test_cpu_configs import spec


def test_rounding():
    assert [round_up(value, 8) for value in (0, 1, 8, 9)] == [0, 8, 8, 16]
    assert [odd_vectors(value, 16) for value in (1, 16, 17, 48, 49)] == [16, 16, 48, 48, 80]


@pytest.mark.parametrize("gap", [0, 1])
@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("height", "width", "rows", "images"), [(56, 56, 3, 1), (7, 7, 4, 5), (1, 200, 1, 1)]
)
def test_buffers_hold_what_the_stages_touch(
    gap: int, lanes: int, tile: int, last: bool, height: int, width: int, rows: int, images: int
):
    shape = dataclasses.replace(
        spec(height, width, tile), input_channels_last=last, output_channels_last=last
    )
    geometry = Geometry(shape, CpuConfig(lanes, 4, 2, gap))
    rows = min(rows, shape.tiles[0])
    line = geometry.tile_line(images, rows)
    tiles = rows * geometry.row
    assert line % lanes == 0
    assert line >= (images - 1) * tiles + round_up(tiles, lanes)  # whole vectors of the last image
    plane = geometry.plane(rows)
    last_read = round_up(tiles, lanes) - 1 + geometry.row * ((tile + 1) // tile) + gap
    last_written = rows * geometry.row + round_up(geometry.row, lanes) - 1
    assert max(last_read, last_written) < plane
    assert (plane // lanes) % 2 == 1
    staged = tile * geometry.planes * geometry.channel_block * plane
    outputs = tile * tile * lanes * (lanes if last else 1)
    assert geometry.scratch(images, rows) >= geometry.line + max(staged, outputs)
    assert geometry.line >= width + 2 * shape.padding[1]
    assert geometry.line % 16 == 0
