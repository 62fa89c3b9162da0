"""KernelSpec: what a layer's kernels compute. CpuConfig and CudaConfig: every knob of how they do it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wsp_compiler.errors import OptionError
from wsp_compiler.winograd import WinogradTransform, output_size, tile_grid, transform

OPERAND_STORAGE = {"fp16": "float16", "bf16": "uint16", "tf32": "float32", "fp32": "float32"}
"""Element type of U and V on CUDA for each precision; bfloat16 travels as its bits."""


@dataclass(frozen=True)
class KernelSpec:
    """One layer's computation, apart from its weights and the batch size. Hashable: part of the cache key.

    Attributes:
        filters, channels: n and c.
        height, width: of one input image.
        padding: (vertical, horizontal).
        tile: output tile side m.
        dtype: element type of input, residual and output: "float32", "float16" or "bfloat16".
        precision: arithmetic of the matrix products: "fp32", "tf32", "fp16" or "bf16".
        input_channels_last, output_channels_last: element order of the images.
        columns_pruned: the layer keeps columns; otherwise every position has all c columns.
        rows_pruned: some rows are missing; otherwise every position has all n rows.
        residual: a tensor is added before the activation.
        activation: one of ops.ACTIVATIONS.
    """

    filters: int
    channels: int
    height: int
    width: int
    padding: tuple[int, int]
    tile: int
    dtype: str
    precision: str
    input_channels_last: bool
    output_channels_last: bool
    columns_pruned: bool
    rows_pruned: bool
    residual: bool
    activation: str

    @property
    def winograd(self) -> WinogradTransform:
        """The transform's matrices."""
        return transform(self.tile)

    @property
    def output_size(self) -> tuple[int, int]:
        """(H_out, W_out)."""
        return (output_size(self.height, self.padding[0]), output_size(self.width, self.padding[1]))

    @property
    def tiles(self) -> tuple[int, int]:
        """Tile rows and tile columns of one image."""
        return tile_grid(self.height, self.width, self.padding, self.tile)

    @property
    def tiles_per_image(self) -> int:
        """Tiles of one image."""
        return self.tiles[0] * self.tiles[1]

    # What follows describes the operands of the batched GEMM on CUDA.

    @property
    def operand_scale(self) -> float:
        """Divisor of V: float16 operands must hold the input's largest values times the transform's growth.

        A power of two, so that the division is exact; the GEMM's float32 results are multiplied back.
        """
        return 2.0 ** math.ceil(math.log2(self.winograd.input_growth)) if self.precision == "fp16" else 1.0

    @property
    def depth_alignment(self) -> int:
        """Elements of 16 bytes: every position's depth is padded to a multiple of it."""
        return 4 if OPERAND_STORAGE[self.precision] == "float32" else 8

    @property
    def slot_channels(self) -> int:
        """Channels that the input transform walks through: c and the virtual ones of the zero padding."""
        if self.columns_pruned:
            return self.channels + self.depth_alignment - 1
        return -(-self.channels // self.depth_alignment) * self.depth_alignment


@dataclass(frozen=True)
class CpuConfig:
    """Knobs of the CPU kernels.

    Attributes:
        lanes: float32 values per vector (16 for AVX-512, 8 for AVX2, 4 for NEON).
        vectors: vectors of filters in one register block.
        tile_block: tiles in one register block; tile_block * vectors accumulators live in registers.
        slice_bytes: transformed input that one thread works on at a time, to stay in its L2 cache.
    """

    lanes: int
    vectors: int
    tile_block: int
    slice_bytes: int = 512 * 1024

    def __post_init__(self) -> None:
        if self.lanes not in (4, 8, 16) or not 1 <= self.vectors <= 8 or not 1 <= self.tile_block <= 32:
            raise OptionError(
                f"{self} is out of range", where="CpuConfig", fix="lanes 4, 8 or 16; vectors 1-8"
            )

    @property
    def row_block(self) -> int:
        """Filters of one register block."""
        return self.lanes * self.vectors


@dataclass(frozen=True)
class CudaConfig:
    """Knobs of the batched GEMM on CUDA. Tiles are the rows of a block, filters its columns.

    Attributes:
        block_tiles, block_filters: output block of one thread block.
        warps_tiles, warps_filters: how the warps divide it.
        stages: shared-memory stages of the asynchronous copy ring.
        chunks: 16-byte chunks of the reduction dimension per stage (4 or 8).
    """

    block_tiles: int = 128
    block_filters: int = 32
    warps_tiles: int = 4
    warps_filters: int = 1
    stages: int = 3
    chunks: int = 4

    def __post_init__(self) -> None:
        warp_tiles, rest_tiles = divmod(self.block_tiles, self.warps_tiles * 16)
        warp_filters, rest_filters = divmod(self.block_filters, self.warps_filters * 16)
        if rest_tiles or rest_filters or not warp_tiles or not warp_filters:
            raise OptionError(
                f"{self}: a warp's block must be a multiple of 16 x 16",
                where="CudaConfig",
                fix="change the block",
            )
        if self.chunks not in (4, 8) or self.stages < 2 or self.shared_bytes > 227 * 1024:
            raise OptionError(
                f"{self}: stages >= 2, chunks 4 or 8, at most 227 KiB",
                where="CudaConfig",
                fix="use fewer stages",
            )

    @property
    def threads(self) -> int:
        """Threads of one block."""
        return 32 * self.warps_tiles * self.warps_filters

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of one block."""
        return self.stages * (self.block_tiles + self.block_filters) * self.chunks * 16


@dataclass(frozen=True)
class FusedConfig:
    """Knobs of the fused CUDA kernel. Eight warps, two of the 16 positions each.

    Attributes:
        tiles: tiles of one thread block (a multiple of 16).
        groups: how the filters are divided between blocks; a group is a multiple of 32 filters.
        rows: kept rows per (position, group), padded to a multiple of 8; tiles * rows bounds the accumulators.
        channel_slice: input channels per step, 32 or 64.
        blocks_per_sm: thread blocks that registers are limited for.
    """

    tiles: int
    groups: int
    rows: int
    channel_slice: int = 64
    blocks_per_sm: int = 2

    def __post_init__(self) -> None:
        accumulators = 2 * self.tiles // 16 * self.rows // 8 * 4
        if self.tiles % 16 or self.rows % 8 or self.channel_slice not in (32, 64) or accumulators > 128:
            raise OptionError(
                f"{self}: tiles % 16, rows % 8, tiles * rows <= 2048, channel_slice 32 or 64",
                where="FusedConfig",
                fix="use fewer tiles or more groups",
            )
        if self.shared_bytes > 227 * 1024:
            raise OptionError(f"{self}: more than 227 KiB", where="FusedConfig", fix="use fewer tiles")

    @property
    def threads(self) -> int:
        """Threads of one block."""
        return 256

    @property
    def row_stride(self) -> int:
        """Floats between tiles in M: an odd multiple of 8, so that fragments store without bank conflicts."""
        return self.rows + (8 if (self.rows + 8) % 16 else 16)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of one block: V of a slice, later M."""
        return max(16 * self.tiles * self.channel_slice * 2, 16 * self.tiles * self.row_stride * 4)
