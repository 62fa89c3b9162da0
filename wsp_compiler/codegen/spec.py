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
    """Knobs of the CPU kernels, whose vectors run over neighbouring tiles.

    Attributes:
        lanes: float32 values per vector (16 for AVX-512, 8 for AVX2, 4 for NEON).
        rows: kept rows in one register block.
        vectors: vectors of tiles in one register block; rows * vectors accumulators live in registers.
        gap: unused tiles after each tile row (0 or 1). With one, neighbouring tiles share the staged columns of
            the input; without, they are staged twice and no multiplication is spent on unused tiles.
        slice_bytes: transformed input that one thread works on at a time, to stay in its L2 cache.
        split: what threads divide between them: "slices" of tiles, "stages" (channels, rows, filters of one
            slice), or "auto", which decides by the number of tiles.
        dot: U and V are words of two bfloat16 channels, for dot-product instructions; 16 lanes only.
    """

    lanes: int
    rows: int
    vectors: int
    gap: int = 1
    slice_bytes: int = 512 * 1024
    split: str = "auto"
    dot: bool = False

    def __post_init__(self) -> None:
        if self.lanes not in (4, 8, 16) or not 1 <= self.vectors <= 8 or not 1 <= self.rows <= 32:
            raise OptionError(
                f"{self} is out of range",
                where="CpuConfig",
                fix="lanes 4, 8 or 16; vectors 1 to 8; rows 1 to 32",
            )
        if self.gap not in (0, 1) or self.split not in ("auto", "slices", "stages") or self.slice_bytes < 1:
            raise OptionError(
                f"{self} is out of range", where="CpuConfig", fix="gap 0 or 1; split auto, slices or stages"
            )
        if self.dot and self.lanes != 16:
            raise OptionError(f"{self} is out of range", where="CpuConfig", fix="dot with 16 lanes only")


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
class ThreeKernelsConfig:
    """Knobs of the path of three kernels on CUDA.

    Attributes:
        gemm: of the batched GEMM.
        slice_elements: elements of V or M, whichever is larger, per slice of tiles; 0 is the launcher's default.
            A slice whose V stays in the L2 cache is not written to memory.
    """

    gemm: CudaConfig = CudaConfig()
    slice_elements: int = 0

    def __post_init__(self) -> None:
        if self.slice_elements < 0:
            raise OptionError(
                f"{self} is out of range", where="ThreeKernelsConfig", fix="slice_elements >= 0"
            )


@dataclass(frozen=True)
class FusedConfig:
    """Knobs of the fused CUDA kernel. A word is 32 bits: two channels of a 16-bit type, or one of float32.

    Attributes:
        tile: output tile side m, 2 or 4.
        tiles: tiles of one thread block, a multiple of 8.
        groups: how the filters are divided between blocks; a group is a multiple of 32 filters.
        rows: kept rows per (position, group), padded to a multiple of 16.
        slice_words: words of channels per step, 16 or 32.
        warps: of a block; a divisor of the positions, since each warp multiplies whole positions.
        words: words of channels that a thread transforms at a time: 1, 2 or 4.
        prefetch: steps between the load of weights and their use.
        blocks_per_sm: thread blocks that registers are limited for.
        dependent_launch: start while the kernel before drains (programmatic dependent launch; sm_90 and later).
        strip: tile rows that neighbouring tiles of a block walk through together, column by column; divides the
            tile rows of an image.
    """

    tile: int
    tiles: int
    groups: int
    rows: int
    slice_words: int = 32
    warps: int = 8
    words: int = 2
    prefetch: int = 2
    blocks_per_sm: int = 1
    dependent_launch: bool = False
    strip: int = 1

    def __post_init__(self) -> None:
        bad = self._fault()
        if bad is not None:
            raise OptionError(f"{self}: {bad}", where="FusedConfig", fix="see the attributes of FusedConfig")

    def _fault(self) -> str | None:
        if self.tile not in (2, 4) or self.tiles % 8 or self.rows % 16:
            return "tile 2 or 4, tiles % 8, rows % 16"
        if min(self.tiles, self.groups, self.rows, self.warps, self.blocks_per_sm) < 1 or self.warps > 32:
            return "every number at least 1, warps at most 32"
        if self.slice_words not in (16, 32) or self.words not in (1, 2, 4) or self.positions % self.warps:
            return "slice_words 16 or 32, words 1, 2 or 4, warps a divisor of the positions"
        if not 1 <= self.prefetch <= 12 or self.strip < 1:
            return "prefetch 1 to 12, strip at least 1"
        if self.accumulators > 168 or self.threads * self.blocks_per_sm * (self.accumulators + 28) > 65536:
            return f"{self.accumulators} accumulators per thread do not fit the registers"
        if self.shared_bytes(packed=True) > 226 * 1024:
            return "more than 226 KiB of shared memory"
        return None

    @property
    def positions(self) -> int:
        """p * p."""
        return (self.tile + 2) ** 2

    @property
    def threads(self) -> int:
        """Threads of one block."""
        return 32 * self.warps

    @property
    def accumulators(self) -> int:
        """float32 accumulators of one thread."""
        return self.positions // self.warps * self.rows // 16 * self.tiles // 8 * 4

    def row_stride(self, *, packed: bool) -> int:
        """Words between (pairs of) tiles in M, so that fragments store without bank conflicts."""
        return self.rows + (8 if packed else 4)

    def shared_bytes(self, *, packed: bool) -> int:
        """Dynamic shared memory of one block: V of a slice, later M."""
        lines = self.tiles // 2 if packed else self.tiles
        words = max(self.tiles * self.slice_words, lines * self.row_stride(packed=packed))
        return 4 * self.positions * words
