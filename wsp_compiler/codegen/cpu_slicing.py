"""How one call of a CPU layer is cut into slices, and how much scratch memory that takes."""

from __future__ import annotations

from dataclasses import dataclass

from wsp_compiler.codegen.cpu_geometry import Geometry, round_up


@dataclass(frozen=True)
class Slicing:
    """A call's slices and the sizes that follow from them.

    Attributes:
        split: "slices" or "stages", see :mod:`wsp_compiler.codegen.cpu_winograd`.
        images, rows: of a slice; several images only if rows are all tile rows.
        count: number of slices.
        workers: threads that share the work.
        ts: length of a slice's tile line.
        v_part, m_part, scratch_part: float32 elements of V and M of a slice, and of a thread's scratch.
    """

    split: str
    images: int
    rows: int
    count: int
    workers: int
    ts: int
    v_part: int
    m_part: int
    scratch_part: int

    @property
    def parts(self) -> int:
        """Slices whose V and M exist at a time."""
        return self.workers if self.split == "slices" else 1


def slice_shape(images: int, tile_rows: int, fitting_rows: int, threads: int) -> tuple[int, int]:
    """(images, tile rows) of a slice of at most about ``fitting_rows`` tile rows, for an even load of the threads."""
    if fitting_rows >= 2 * tile_rows and images >= 2 * threads:
        rounds = -(-images // (min(fitting_rows // tile_rows, images) * threads))
        return -(-images // (rounds * threads)), tile_rows
    fewest = -(-tile_rows // min(max(fitting_rows, 1), tile_rows))

    def time(cuts: int) -> tuple[int, int]:
        rows = -(-tile_rows // cuts)
        return (-(-images * -(-tile_rows // rows) // threads) * rows, cuts)

    cuts = min(range(fewest, min(fewest + 2 * threads, tile_rows) + 1), key=time)
    return 1, -(-tile_rows // cuts)


def cut(
    geometry: Geometry, images: int, threads: int, v_rows: int, m_rows: int, split: str | None = None
) -> Slicing:
    """Cut ``images`` images for ``threads`` threads.

    Args:
        v_rows, m_rows: rows of V over all positions; rows of M with the row of zeros.
        split: overrides the config's choice.
    """
    config, TH = geometry.config, geometry.spec.tiles[0]
    split = split or config.split
    tiles = max(images, 1) * TH * geometry.row
    if split == "auto":
        # With few tiles, reading all weights in every thread costs more than passing V and M between them.
        few = threads > 1 and tiles <= 16 * config.lanes and v_rows * tiles * 4 <= 4 << 20
        split = "stages" if few else "slices"
    if split == "stages":
        fitting = max(4 * config.slice_bytes * threads // (v_rows * 4 * geometry.row), 1)
        per_image, rows = slice_shape(images, TH, fitting, 1)
    else:
        least = -(-config.lanes // geometry.row)  # whole vectors of tiles come before fitting the cache
        fitting = max(config.slice_bytes // (v_rows * 4 * geometry.row), least)
        per_image, rows = slice_shape(images, TH, fitting, threads)
    ts = geometry.tile_line(per_image, rows)
    count = -(-images // per_image) * -(-TH // rows)
    return Slicing(
        split=split,
        images=per_image,
        rows=rows,
        count=count,
        workers=max(1, min(threads, count) if split == "slices" else threads),
        ts=ts,
        v_part=geometry.v_size(v_rows, ts),
        m_part=round_up(m_rows * ts, 16),
        scratch_part=geometry.scratch(per_image, rows),
    )
