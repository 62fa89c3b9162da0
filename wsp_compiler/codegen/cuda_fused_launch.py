"""Run the fused CUDA kernel of one layer, where it applies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, cast

import torch
from torch import Tensor

from wsp_compiler.codegen.build import BuiltKernel, build
from wsp_compiler.codegen.cpu_launch import flat_view
from wsp_compiler.codegen.cuda_fused import make_fused
from wsp_compiler.codegen.pack import FusedWeights, pack_fused, rows_per_group
from wsp_compiler.codegen.spec import FusedConfig, KernelSpec
from wsp_compiler.codegen.targets import CodeTarget
from wsp_compiler.ops import WinogradSite


def fused_applies(spec: KernelSpec) -> bool:
    """True if the fused kernel can compute ``spec``."""
    return (
        spec.tile == 2
        and spec.precision == "fp16"
        and spec.dtype == "float16"
        and spec.input_channels_last
        and spec.output_channels_last
        and not spec.columns_pruned
        and spec.channels % 32 == 0
        and spec.filters % 32 == 0
    )


@dataclass(frozen=True)
class DeviceLimits:
    """What bounds a configuration: number of SMs, and shared memory of a block and of an SM in bytes."""

    multiprocessors: int
    shared_per_block: int
    shared_per_sm: int


@cache
def device_limits(index: int) -> DeviceLimits:
    """Limits of a CUDA device."""
    properties = cast("Any", torch.cuda).get_device_properties(index)
    return DeviceLimits(
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
        properties.shared_memory_per_multiprocessor,
    )


def choose_fused_config(
    spec: KernelSpec, site: WinogradSite, tiles: int, limits: DeviceLimits
) -> FusedConfig | None:
    """The configuration for ``tiles`` tiles, or None if none fits.

    From measurements on an H100 (docs/kernel_log.md): 32 tiles per block while that fills the GPU four times over,
    else 16 tiles; filters are divided only while blocks are fewer than two thirds of the SMs, since every group
    transforms the input again.
    """
    fallback: FusedConfig | None = None
    for groups in (1, 2, 4, 8, 16):
        if spec.filters % (groups * 32):
            break
        rows = max(8, -(-rows_per_group(site, groups) // 8) * 8)
        for block_tiles, most_rows, waves in ((32, 56, 4.0), (16, 104, 2 / 3)):
            slice_width = 64 if spec.channels % 64 == 0 else 32
            if rows > most_rows:
                continue
            per_sm = {16: 3, 24: 2, 32: 3 - block_tiles // 16}.get(rows, 1) if rows > 8 else 3
            config = FusedConfig(block_tiles, groups, rows, slice_width, per_sm)
            if config.shared_bytes > limits.shared_per_block - 1024:
                continue
            if config.shared_bytes * per_sm > limits.shared_per_sm - 4096:
                config = replace(config, blocks_per_sm=1)
            fallback = config
            if -(-tiles // block_tiles) * groups >= waves * limits.multiprocessors:
                return config
    return fallback


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
        return pack_fused(self.site, self.spec, self.config)

    @cached_property
    def kernel(self) -> BuiltKernel:
        """The built kernel."""
        return build(lambda: make_fused(self.spec, self.config), "winograd_fused", self.target)

    def run(self, x: Tensor, residual: Tensor | None, y: Tensor) -> None:
        """Write the layer's output into y; all images dense channels_last."""
        w, total = self.weights, x.shape[0] * self.spec.tiles_per_image
        r = y if residual is None else residual.contiguous(memory_format=torch.channels_last)
        with torch.cuda.device(x.device):
            self.kernel.function(
                flat_view(x), w.U, w.slot, w.bias, self.slope, flat_view(r), flat_view(y),
                w.factor, total, -(-total // self.config.tiles),
            )  # fmt: skip
