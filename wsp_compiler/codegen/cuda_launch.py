"""Run the CUDA kernels of one layer on torch tensors, on torch's current stream."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from wsp_compiler.codegen.build import BuiltKernel, build
from wsp_compiler.codegen.candidates import Candidate, three_kernels_candidates
from wsp_compiler.codegen.cpu_launch import flat_view
from wsp_compiler.codegen.cuda_fused_launch import (
    FusedLayer,
    choose_fused_config,
    device_limits,
    fused_accepts,
    fused_applies,
    fused_candidates,
)
from wsp_compiler.codegen.cuda_gemm_ffma import make_gemm_ffma
from wsp_compiler.codegen.cuda_gemm_mma import make_gemm_mma
from wsp_compiler.codegen.cuda_input_transform import input_blocks, make_input_transform
from wsp_compiler.codegen.cuda_output_transform import make_output_transform, output_blocks
from wsp_compiler.codegen.fused_estimate import estimated_cycles
from wsp_compiler.codegen.pack import CudaWeights, pack_cuda
from wsp_compiler.codegen.packed import packed
from wsp_compiler.codegen.spec import OPERAND_STORAGE, CudaConfig, FusedConfig, KernelSpec, ThreeKernelsConfig
from wsp_compiler.codegen.targets import CodeTarget
from wsp_compiler.errors import OptionError
from wsp_compiler.ops import WinogradSite

TORCH_STORAGE = {"float16": torch.float16, "uint16": torch.uint16, "float32": torch.float32}
SLICE_ELEMENTS = 1 << 25
"""Elements of V per slice of tiles: bounds the workspace, and 32-bit indices inside the kernels."""
INDEX_LIMIT = 2**31 - 1


def choose_cuda_config(max_rows: int) -> CudaConfig:
    """Block shape for positions with up to ``max_rows`` kept rows."""
    if max_rows <= 16:
        return CudaConfig(block_filters=16)
    if max_rows <= 32:
        return CudaConfig(block_filters=32)
    return CudaConfig(block_filters=64, warps_filters=2)


def input_lanes(spec: KernelSpec) -> int:
    """Channels per thread of the input transform.

    Rounding to bfloat16 and tf32 selects per element, which TVM's CUDA code generator cannot do on vectors.
    """
    paired = spec.input_channels_last and spec.channels % 2 == 0 and not spec.columns_pruned
    return 2 if paired and spec.precision in ("fp16", "fp32") else 1


@dataclass
class CudaLayer:
    """The CUDA kernels of one lowered convolution for one :class:`KernelSpec`.

    ``site`` holds the kept weights, ``slope`` the PReLU slope ([1] or [n]) if the activation has one.
    """

    spec: KernelSpec
    site: WinogradSite
    slope: Tensor | None
    target: CodeTarget

    @cached_property
    def weights(self) -> CudaWeights:
        """Packed weights."""
        key = ("three kernels", self.spec.tile, self.spec.precision)
        return packed(self.site, key, lambda: pack_cuda(self.site, self.spec))

    @cached_property
    def config(self) -> CudaConfig:
        """Block shape of the batched GEMM."""
        return choose_cuda_config(self.weights.max_rows)

    @cached_property
    def _slope(self) -> Tensor:
        slope = torch.zeros_like(self.weights.bias)
        if self.slope is not None:
            slope[:] = self.slope.float()
        return slope

    @cached_property
    def transforms(self) -> tuple[BuiltKernel, BuiltKernel]:
        """Input and output transform of the three kernels."""
        lanes = input_lanes(self.spec)
        return (
            build(make_input_transform, "input_transform", self.target, (self.spec, lanes)),
            build(make_output_transform, "output_transform", self.target, (self.spec,)),
        )

    @cached_property
    def _gemms(self) -> dict[CudaConfig, BuiltKernel]:
        return {}

    def gemm(self, config: CudaConfig) -> BuiltKernel:
        """The batched GEMM of the three kernels."""
        if config not in self._gemms:
            make = make_gemm_ffma if self.spec.precision == "fp32" else make_gemm_mma
            self._gemms[config] = build(make, "sparse_bgemm", self.target, (self.spec, config))
        return self._gemms[config]

    def source(self) -> str:
        """CUDA C of the kernels built so far."""
        texts = [layer.kernel.text() for layer in self._fused.values()]
        if self._gemms or not texts:
            gemms = list(self._gemms.values()) or [self.gemm(self.config)]
            texts += [kernel.text() for kernel in (self.transforms[0], *gemms, self.transforms[1])]
        return "\n".join(texts)

    def empty_output(self, x: Tensor) -> Tensor:
        """An uninitialised output for input x."""
        layout = torch.channels_last if self.spec.output_channels_last else torch.contiguous_format
        shape = (x.shape[0], self.spec.filters, *self.spec.output_size)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)

    @cached_property
    def _depth(self) -> int:
        return int(self.weights.depth_base[-1])

    @cached_property
    def _m_rows(self) -> int:
        return int(self.weights.m_base[-1])

    def _input(self, x: Tensor, V: Tensor, first: int, count: int) -> None:
        w, total = self.weights, x.shape[0] * self.spec.tiles_per_image
        blocks = input_blocks(self.spec, input_lanes(self.spec), count)
        self.transforms[0].function(
            flat_view(x), V, w.column_slot, w.depth_base, *x.stride(), first, count, total, blocks
        )

    def _gemm(self, V: Tensor, M: Tensor, count: int, config: CudaConfig) -> None:
        w = self.weights
        self.gemm(config).function(
            V, w.U, w.row_offset, w.m_base, w.depth_base, w.u_start, M, w.max_rows, count
        )

    def _output(
        self, M: Tensor, x: Tensor, residual: Tensor | None, y: Tensor, first: int, count: int
    ) -> None:
        w, total = self.weights, x.shape[0] * self.spec.tiles_per_image
        r = y if residual is None else residual
        self.transforms[1].function(
            M, w.row_slot, w.m_base, w.bias, self._slope, flat_view(r), flat_view(y), *r.stride(), *y.stride(),
            w.factor, first, count, total, output_blocks(self.spec, count),
        )  # fmt: skip

    def _workspace(self, tiles: int, device: torch.device) -> tuple[Tensor, Tensor]:
        storage = TORCH_STORAGE[OPERAND_STORAGE[self.spec.precision]]
        V = torch.empty(tiles * self._depth, dtype=storage, device=device)
        return V, torch.empty(tiles * self._m_rows, dtype=torch.float32, device=device)

    @cached_property
    def _fused(self) -> dict[FusedConfig, FusedLayer]:
        return {}

    @cached_property
    def _config_for(self) -> dict[int, FusedConfig | None]:
        """Number of tiles -> configuration. Choosing one reads back from the device, so it is done once."""
        return {}

    @cached_property
    def _three_for(self) -> dict[int, ThreeKernelsConfig]:
        """Number of tiles -> configuration of the three kernels, where it is not the default."""
        return {}

    def candidates(self, tiles: int) -> list[Candidate]:
        """Every way to run ``tiles`` tiles of dense channels_last input: the default, then the most promising."""
        limits = device_limits(self.target.device.index)
        fused = sorted(
            fused_candidates(self.spec, self.site, limits, tiles),
            key=lambda config: estimated_cycles(self.spec, config, tiles, limits.multiprocessors),
        )
        three = three_kernels_candidates(int(self.site.row_offset.diff().max()), self.spec.precision)
        default = choose_fused_config(self.spec, self.site, tiles, limits) if fused else None
        first = Candidate("three_kernels", three[0]) if default is None else Candidate("fused", default)
        others = [Candidate("fused", c) for c in fused] + [Candidate("three_kernels", c) for c in three]
        return [first, *(other for other in others if other != first)]

    def accepts(self, candidate: Candidate) -> bool:
        """True if the candidate, perhaps of another layer of equal shape, runs this one on this device."""
        if isinstance(candidate.config, FusedConfig):
            return fused_accepts(
                self.spec, self.site, candidate.config, device_limits(self.target.device.index)
            )
        return candidate.kind == "three_kernels"

    def prepare(self, candidate: Candidate) -> None:
        """Build the candidate's kernels into the cache; needs no GPU."""
        config = candidate.config
        if isinstance(config, FusedConfig):
            _ = FusedLayer(self.spec, self.site, torch.zeros(self.spec.filters), self.target, config).kernel
        elif isinstance(config, ThreeKernelsConfig):
            _ = self.transforms, self.gemm(config.gemm)

    def use(self, candidate: Candidate, tiles: int) -> None:
        """Run calls of ``tiles`` tiles this way from now on; others stay as they are."""
        if isinstance(candidate.config, FusedConfig):
            self._config_for[tiles] = candidate.config
        elif isinstance(candidate.config, ThreeKernelsConfig):
            self._config_for[tiles] = None
            self._three_for[tiles] = candidate.config
        else:
            raise OptionError(
                f"{candidate.label} does not run on CUDA", where="CudaLayer", fix="ask candidates()"
            )

    def fused_layer(self, x: Tensor) -> FusedLayer | None:
        """The fused kernel for input x, or None where three kernels have to do.

        Its configuration depends on the number of tiles, so batch sizes fall into a few buckets.
        """
        if not fused_applies(self.spec) or not x.is_contiguous(memory_format=torch.channels_last):
            return None
        tiles = x.shape[0] * self.spec.tiles_per_image
        if tiles not in self._config_for:
            limits = device_limits(x.device.index)
            self._config_for[tiles] = choose_fused_config(self.spec, self.site, tiles, limits)
        config = self._config_for[tiles]
        if config is None:
            return None
        if config not in self._fused:
            self._fused[config] = FusedLayer(self.spec, self.site, self._slope, self.target, config)
        return self._fused[config]

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The whole layer: fused in one kernel if possible, else three kernels, a slice of tiles at a time."""
        y = self.empty_output(x)
        images = self._images_per_call(x, y)
        fused = self.fused_layer(x) if y.numel() and images >= x.shape[0] else None
        if fused is not None:
            fused.run(x, residual, y)
            return y
        for start in range(0, x.shape[0] if y.numel() else 0, images):
            part = slice(start, start + images)
            self._run_images(x[part], None if residual is None else residual[part], y[part])
        return y

    def _images_per_call(self, x: Tensor, y: Tensor) -> int:
        """Images whose elements 32-bit indices reach, at least one."""
        per_image = max(
            [
                1,
                *(
                    (
                        1
                        + sum(
                            (size - 1) * stride
                            for size, stride in zip(t.shape[1:], t.stride()[1:], strict=True)
                        )
                    )
                    for t in (x, y)
                ),
            ]
        )
        strides = max(x.stride(0), y.stride(0), per_image)
        return (
            max(1, INDEX_LIMIT // strides - 1) if x.shape[0] * strides > INDEX_LIMIT else max(1, x.shape[0])
        )

    def _run_images(self, x: Tensor, residual: Tensor | None, y: Tensor) -> None:
        total = x.shape[0] * self.spec.tiles_per_image
        widest = max(self._depth, self._m_rows, 1)
        config = self._three_for.get(total, ThreeKernelsConfig(self.config))
        limit = max(1024, (config.slice_elements or SLICE_ELEMENTS) // widest // 128 * 128)
        slices = -(-total // limit)
        count = -(-total // (slices * 32)) * 32
        with torch.cuda.device(x.device):
            V, M = self._workspace(count, x.device)
            for first in range(0, total, count):
                self._input(x, V, first, count)
                self._gemm(V, M, count, config.gemm)
                self._output(M, x, residual, y, first, count)

    # The stages apart hold V and M of all tiles.
    def _tiles(self, x: Tensor) -> int:
        total = x.shape[0] * self.spec.tiles_per_image
        return -(-total // 32) * 32

    def input_transform(self, x: Tensor) -> Tensor:
        """V of all tiles, in the kernels' own layout."""
        with torch.cuda.device(x.device):
            V, _ = self._workspace(self._tiles(x), x.device)
            if x.shape[0]:
                self._input(x, V, 0, self._tiles(x))
        return V

    def sparse_bgemm(self, V: Tensor, x: Tensor) -> Tensor:
        """M of all tiles from V."""
        with torch.cuda.device(x.device):
            _, M = self._workspace(self._tiles(x), x.device)
            if x.shape[0]:
                self._gemm(V, M, self._tiles(x), self.config)
        return M

    def output_transform(self, M: Tensor, x: Tensor, residual: Tensor | None) -> Tensor:
        """The layer's output from M."""
        y = self.empty_output(x)
        if y.numel():
            with torch.cuda.device(x.device):
                self._output(M, x, residual, y, 0, self._tiles(x))
        return y
