"""Run the fused CUDA kernel of one layer, where it applies."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, cast

import torch
from torch import Tensor

from wsp_compiler.codegen.build import BuiltKernel, build
from wsp_compiler.codegen.cpu_launch import flat_view
from wsp_compiler.codegen.cuda_fused import make_fused
from wsp_compiler.codegen.fused_estimate import elements_per_word, estimated_cycles
from wsp_compiler.codegen.pack_fused import FusedWeights, pack_fused, padded_rows, rows_per_group
from wsp_compiler.codegen.packed import packed
from wsp_compiler.codegen.spec import FusedConfig, KernelSpec
from wsp_compiler.codegen.targets import CodeTarget
from wsp_compiler.errors import OptionError
from wsp_compiler.ops import WinogradSite

PRECISIONS = {("fp16", "float16"), ("bf16", "bfloat16"), ("tf32", "float32"), ("fp32", "float32")}
"""(precision, dtype) that the fused kernel computes."""


def fused_applies(spec: KernelSpec) -> bool:
    """True if the fused kernel can compute ``spec``: 32-bit words of channels in slices of 16, filters by 32."""
    return (
        (spec.precision, spec.dtype) in PRECISIONS
        and spec.input_channels_last
        and spec.output_channels_last
        and not spec.columns_pruned
        and spec.channels % (16 * elements_per_word(spec)) == 0
        and spec.filters % 32 == 0
    )


def loses_precision(spec: KernelSpec, site: WinogradSite) -> bool:
    """True where 16-bit transforms of F(4x4) come near the tolerance: filters that keep every position.

    Their 36 products cancel to an output far smaller than themselves. Measured, 64 channels, float16: relative L2 error
    5.5e-3 with all positions kept (3.2e-3 with float32 transforms), 8e-4 with half of them.
    """
    if spec.tile != 4 or elements_per_word(spec) != 2:
        return False

    def count() -> bool:
        kept = torch.bincount(site.rows.long(), minlength=spec.filters)  # positions of each filter
        whole = int((kept == spec.winograd.positions).sum())
        return whole > 0.1 * int((kept > 0).sum())

    return packed(site, "mostly whole filters", count)  # counting waits for the device


@dataclass(frozen=True)
class DeviceLimits:
    """What bounds a configuration.

    Attributes:
        multiprocessors: number of SMs.
        shared_per_block, shared_per_sm: shared memory in bytes.
        dependent_launch: a kernel may start while the one before drains (compute capability 9.0 and later).
    """

    multiprocessors: int
    shared_per_block: int
    shared_per_sm: int
    dependent_launch: bool = False


@cache
def device_limits(index: int) -> DeviceLimits:
    """Limits of a CUDA device."""
    properties = cast("Any", torch.cuda).get_device_properties(index)
    return DeviceLimits(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        properties.shared_memory_per_multiprocessor,
        properties.major >= 9,
    )


def choose_fused_config(
    spec: KernelSpec, site: WinogradSite, tiles: int, limits: DeviceLimits
) -> FusedConfig | None:
    """The configuration with the shortest estimated time for ``tiles`` tiles, or None if none fits."""
    return min(
        fused_candidates(spec, site, limits, tiles),
        key=lambda config: estimated_cycles(spec, config, tiles, limits.multiprocessors),
        default=None,
    )


def registers_per_thread(config: FusedConfig) -> int:
    """What the launch bounds leave a thread: each of an SM's four partitions has 16384 registers."""
    warps = -(-config.warps * config.blocks_per_sm // 4)
    return min(255, 16384 // (warps * 32) // 8 * 8)


def registers_needed(spec: KernelSpec, config: FusedConfig) -> int:
    """Estimate, good to about 10: accumulators, the patches being transformed, weights on their way, addresses."""
    one_slice = spec.channels == config.slice_words * elements_per_word(spec)
    patches = config.positions * config.words
    weights = config.rows // 16 * 8 * config.prefetch * (2 if spec.precision == "fp32" else 1)
    if one_slice:  # accumulators and patches do not live at the same time
        return max(config.accumulators + weights + 24, patches + 24)
    return config.accumulators + max(patches + 22, weights + 24)


def fused_candidates(
    spec: KernelSpec, site: WinogradSite, limits: DeviceLimits, tiles: int
) -> list[FusedConfig]:
    """Every sensible configuration of the fused kernel that computes ``tiles`` tiles of ``spec`` and fits the device.

    Left out: input that leaves a third of the threads idle, fewer than 8 or more than 24 warps on an SM, fewer blocks
    on an SM than fit, and narrow slices of 16-bit words, which never won.
    """
    if not fused_applies(spec) or loses_precision(spec, site):
        return []
    pack = elements_per_word(spec)
    words = spec.channels // pack
    group_counts = [g for g in range(1, min(16, spec.filters // 32) + 1) if spec.filters % (32 * g) == 0]
    slices = [width for width in (32, 16) if words % width == 0]
    strips = [1, *[strip for strip in (7, 4, 2) if spec.tiles[0] % strip == 0][:1]]
    if spec.tiles[0] < 7:  # vertical neighbours are in one block anyway
        strips = [1]
    warp_counts, word_counts = ((4, 6, 12), (1, 2)) if spec.tile == 4 else ((4, 8, 16), (1, 2, 4))
    found: list[FusedConfig] = []
    for groups in group_counts:
        rows = padded_rows(site, groups)
        for block, width, warps, count in itertools.product(
            (8, 16, 24, 32, 48, 64), slices[:1] if pack == 2 else slices, warp_counts, word_counts
        ):
            items = block * width // count / (32 * warps)  # of input, per thread
            if items < 2 / 3 or (items != int(items) and items < 1.6):
                continue
            config = _densest(spec, limits, (spec.tile, block, groups, rows, width, warps, count))
            if config is not None:
                # Where blocks do not fill the SMs, those of the next kernel would double up on some of them.
                full = -(-tiles // block) * groups >= 0.9 * limits.multiprocessors * config.blocks_per_sm
                config = replace(config, dependent_launch=limits.dependent_launch and full)
                found += [replace(config, strip=strip) for strip in strips]
    return found


def _densest(spec: KernelSpec, limits: DeviceLimits, knobs: tuple[int, ...]) -> FusedConfig | None:
    """The configuration with most blocks per SM that neither registers nor shared memory forbid.

    ``knobs`` are FusedConfig's first seven: tile, tiles, groups, rows, slice_words, warps, words.
    """
    *_, warps, _ = knobs
    for blocks, prefetch in itertools.product((6, 5, 4, 3, 2, 1), (6, 3, 2, 1)):
        if not 8 <= blocks * warps <= 24:
            continue
        try:
            config = FusedConfig(*knobs, prefetch=prefetch, blocks_per_sm=blocks)
        except OptionError:
            continue
        shared = config.shared_bytes(packed=elements_per_word(spec) == 2) + 1024 + 16 * config.tiles
        fits = shared <= limits.shared_per_block and shared * blocks <= limits.shared_per_sm
        enough = registers_needed(spec, config) <= registers_per_thread(config) + 4
        if fits and enough:
            return config
    return None


def fused_accepts(spec: KernelSpec, site: WinogradSite, config: FusedConfig, limits: DeviceLimits) -> bool:
    """True if ``config`` computes ``spec`` with the kept rows of ``site`` and fits the device."""
    if not fused_applies(spec) or config.tile != spec.tile or spec.filters % (32 * config.groups):
        return False
    if loses_precision(spec, site):
        return False
    packed = elements_per_word(spec) == 2
    shared = config.shared_bytes(packed=packed) + 1024 + 16 * config.tiles
    return (
        spec.channels // elements_per_word(spec) % config.slice_words == 0
        and shared <= limits.shared_per_block
        and shared * config.blocks_per_sm <= limits.shared_per_sm
        and rows_per_group(site, config.groups) <= config.rows
        and (limits.dependent_launch or not config.dependent_launch)
        and spec.tiles[0] % config.strip == 0
    )


@dataclass
class FusedLayer:
    """The fused kernel of one layer with one configuration."""

    spec: KernelSpec
    site: WinogradSite
    slope: Tensor
    target: CodeTarget
    config: FusedConfig

    @cached_property
    def weights(self) -> FusedWeights:
        """Packed weights."""
        key = ("fused", self.spec.tile, self.spec.precision, self.config.groups, self.config.rows)
        return packed(self.site, key, lambda: pack_fused(self.site, self.spec, self.config))

    @cached_property
    def kernel(self) -> BuiltKernel:
        """The built kernel."""
        return build(make_fused, "winograd_fused", self.target, (self.spec, self.config))

    def run(self, x: Tensor, residual: Tensor | None, y: Tensor) -> None:
        """Write the layer's output into y; all images dense channels_last."""
        w, total = self.weights, x.shape[0] * self.spec.tiles_per_image
        r = y if residual is None else residual.contiguous(memory_format=torch.channels_last)
        blocks = -(-total // self.config.tiles) * self.config.groups
        with torch.cuda.device(x.device):
            self.kernel.function(
                _words(x),
                w.U,
                w.slot,
                w.bias,
                self.slope,
                _elements(r),
                _elements(y),
                w.factor,
                total,
                blocks,
            )


def _words(x: Tensor) -> Tensor:
    """A dense tensor as its 32-bit words, in memory order; the kernel reads them 4, 8 or 16 bytes at a time."""
    flat = flat_view(x)
    if flat.data_ptr() % 16:
        flat = flat.clone()
    return flat.view(torch.float32)


def _elements(y: Tensor) -> Tensor:
    """A dense tensor's elements in memory order; 16-bit ones as their bits."""
    flat = flat_view(y)
    return flat.view(torch.uint16) if flat.element_size() == 2 else flat
