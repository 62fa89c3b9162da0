"""How the CPU kernels lay out tiles, transformed inputs and products in memory. Shared by generators and launcher.

A slice is what one thread works on at a time: tile rows of one image, or several whole images. Its tiles lie in one
line, tile row after tile row, each row followed by ``gap`` unused tiles; vectors run along that line, over row ends.

====== ========================= ============================================================================
S      [m][planes][channel][..]  input pixels of a channel block, planar: pixel (m*a + i, m*b + j - padding) of
                                 plane (i, j) at a * row + b; zeros outside the image
V      [position][channel][ts]   transformed input; ts is the padded length of the tile line; with dot products
                                 [position][pair of channels][ts], words of two bfloat16 values
M      [kept row][ts]            products; one more row, of zeros, stands for all pruned rows
====== ========================= ============================================================================

With a gap of one tile, m column planes suffice: column j + m of a tile is column j of the next one. Without a gap
all p columns have planes of their own, so that next tiles in the line need not be neighbours in the image.
"""

from __future__ import annotations

from dataclasses import dataclass

from wsp_compiler.codegen.spec import CpuConfig, KernelSpec

POSITION_PADDING = 80
"""Elements between the positions of V: without them their lines would compete for the same cache sets."""


def round_up(value: int, multiple: int) -> int:
    """The least multiple that is not smaller."""
    return -(-value // multiple) * multiple


def odd_vectors(length: int, lanes: int) -> int:
    """``length`` rounded up to an odd number of vectors: rows that far apart spread over all cache sets."""
    vectors = -(-length // lanes)
    return (vectors + (vectors % 2 == 0)) * lanes


@dataclass(frozen=True)
class Geometry:
    """Sizes that follow from a spec and a config; those in the batch size and the slices are functions."""

    spec: KernelSpec
    config: CpuConfig

    @property
    def row(self) -> int:
        """Tiles from one tile row to the next in a slice's line."""
        return self.spec.tiles[1] + self.config.gap

    @property
    def planes(self) -> int:
        """Column planes of S."""
        return self.spec.tile if self.config.gap else self.spec.winograd.input_side

    @property
    def word(self) -> int:
        """Channels in one 32-bit word of U and V."""
        return 2 if self.config.dot else 1

    @property
    def depth(self) -> int:
        """Rows of V in each position, unless columns are pruned."""
        return -(-self.spec.channels // self.word)

    @property
    def channel_block(self) -> int:
        """Channels that are staged together."""
        return self.config.lanes if self.spec.input_channels_last else self.word

    @property
    def channel_blocks(self) -> int:
        """Blocks of staged channels."""
        return -(-self.spec.channels // self.channel_block)

    @property
    def filter_blocks(self) -> int:
        """Blocks of filters in the output stage."""
        return (
            -(-self.spec.filters // self.config.lanes)
            if self.spec.output_channels_last
            else self.spec.filters
        )

    @property
    def line(self) -> int:
        """Elements of the buffer for one padded input line."""
        lanes, m = self.config.lanes, self.spec.tile
        widest = m * round_up(self.row, lanes) + self.spec.winograd.input_side
        return round_up(max(widest, self.spec.width + 2 * self.spec.padding[1]), 16)

    def tile_line(self, images: int, rows: int) -> int:
        """ts: length of a slice's tile line in V and M."""
        return odd_vectors(images * rows * self.row + self.config.lanes, self.config.lanes)

    def plane(self, rows: int) -> int:
        """Elements of one channel in one plane of S."""
        return odd_vectors((rows + 1) * self.row + self.config.lanes + 1, self.config.lanes)

    def scratch(self, images: int, rows: int) -> int:
        """Elements of one thread's scratch: a line, then S, and later the outputs before they are reordered."""
        m, lanes = self.spec.tile, self.config.lanes
        staged = m * self.planes * self.channel_block * self.plane(rows)
        vectors = lanes if self.spec.output_channels_last else -(-self.tile_line(images, rows) // lanes)
        outputs = m * m * lanes * vectors
        return round_up(self.line + max(staged, outputs) + lanes, 16)

    def v_size(self, v_rows: int, ts: int) -> int:
        """Elements of V for ``v_rows`` rows over all positions."""
        return round_up(v_rows * ts + self.spec.winograd.positions * POSITION_PADDING, 16)
