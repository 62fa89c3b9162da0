"""Run the CPU kernels of one layer on torch tensors."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from wsp_compiler.codegen.build import BuiltKernel, build
from wsp_compiler.codegen.cpu_winograd import ALL_STAGES, make_cpu_kernel
from wsp_compiler.codegen.pack import CpuWeights, choose_cpu_config, pack_cpu
from wsp_compiler.codegen.spec import CpuConfig, KernelSpec
from wsp_compiler.codegen.targets import CodeTarget
from wsp_compiler.codegen.tvm_import import tvm
from wsp_compiler.codegen.workspace import workspace
from wsp_compiler.ops import WinogradSite

_pool = threading.local()
_kernels: dict[tuple[KernelSpec, CpuConfig, tuple[str, ...], CodeTarget], BuiltKernel] = {}
_packed: WeakKeyDictionary[WinogradSite, dict[tuple[CpuConfig, str], CpuWeights]] = WeakKeyDictionary()


def _use_threads(count: int) -> None:
    """Give this Python thread's TVM pool ``count`` workers, torch's intra-op thread count."""
    if getattr(_pool, "count", None) != count:
        tvm.get_global_func("runtime.config_threadpool")(1, count)
        _pool.count = count


def flat_view(tensor: Tensor) -> Tensor:
    """A 1-D window over everything that a strided tensor reaches, without copying."""
    if tensor.numel() == 0:
        return tensor.reshape(-1)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((span,), (1,))
    return flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat


@dataclass(frozen=True)
class Slicing:
    """How a call is cut up: tile rows per slice, number of slices, tiles per slice (padded), workers."""

    rows: int
    count: int
    tiles: int
    workers: int


@dataclass
class CpuLayer:
    """The CPU kernels of one lowered convolution for one :class:`KernelSpec`.

    ``site`` holds the kept weights, ``slope`` the PReLU slope ([1] or [n]) if the activation has one.
    """

    spec: KernelSpec
    site: WinogradSite
    slope: Tensor | None
    target: CodeTarget
    _used: dict[tuple[str, ...], BuiltKernel] = field(
        default_factory=dict[tuple[str, ...], BuiltKernel], init=False
    )

    @cached_property
    def config(self) -> CpuConfig:
        """Register blocking chosen for the layer's kept rows."""
        return choose_cpu_config(self.target.lanes, [int(count) for count in self.site.row_offset.diff()])

    @cached_property
    def weights(self) -> CpuWeights:
        """Packed weights, shared by the layer's kernels for other image sizes and epilogues."""
        packed = _packed.setdefault(self.site, {})
        key = (self.config, self.spec.precision)
        if key not in packed:
            packed[key] = pack_cpu(self.site, self.spec, self.config)
        return packed[key]

    @cached_property
    def _slope(self) -> Tensor:
        slope = torch.zeros_like(self.weights.bias)
        if self.slope is not None:
            slope[: self.spec.filters] = self.slope.float()
        return slope

    def kernel(self, stages: tuple[str, ...] = ALL_STAGES) -> BuiltKernel:
        """The built kernel for ``stages``, shared by equal layers: making its TensorIR takes long."""
        if stages not in self._used:
            key = (self.spec, self.config, stages, self.target)
            if key not in _kernels:
                name = "winograd_conv2d" if stages == ALL_STAGES else f"{stages[0]}_stage"
                _kernels[key] = build(
                    lambda: make_cpu_kernel(self.spec, self.config, stages), name, self.target
                )
            self._used[stages] = _kernels[key]
        return self._used[stages]

    def source(self) -> str:
        """LLVM text of the kernels used so far."""
        return "\n".join(kernel.text() for kernel in self._used.values())

    def _slicing(self, images: int, threads: int) -> Slicing:
        TH, TW = self.spec.tiles
        tile_rows, winograd = max(1, images * TH), self.spec.winograd
        channels = -(-self.spec.channels // self.config.lanes) * self.config.lanes
        fitting = max(self.config.tile_block, self.config.slice_bytes // (winograd.positions * channels * 4))
        rows = max(1, min(fitting // TW, -(-tile_rows // threads)))
        per_thread = -(-tile_rows // (rows * threads))  # slices per thread, then spread the rows evenly
        rows = -(-tile_rows // (per_thread * threads))
        block = self.config.tile_block
        return Slicing(rows, -(-tile_rows // rows), -(-rows * TW // block) * block, threads)

    def _call(
        self,
        stages: tuple[str, ...],
        x: Tensor,
        residual: Tensor | None,
        y: Tensor,
        V: Tensor,
        M: Tensor,
        cut: Slicing,
    ) -> None:
        spec, weights, threads = self.spec, self.weights, torch.get_num_threads()
        _use_threads(threads)
        lanes, winograd, TW = self.config.lanes, spec.winograd, spec.tiles[1]
        c_pad, n_pad = -(-spec.channels // lanes) * lanes, -(-spec.filters // lanes) * lanes
        lines = max(
            winograd.input_side * (TW * spec.tile + 2) * c_pad, spec.tile * TW * spec.tile * n_pad, lanes
        )
        r = y if residual is None else residual
        workers = min(cut.workers, cut.count)
        self.kernel(stages).function(
            flat_view(x), weights.U, weights.start, weights.block_offset, weights.destination,
            weights.columns, weights.column_offset, weights.bias, self._slope, flat_view(r), flat_view(y),
            V, M,
            workspace.take("lines", workers, lines),
            workspace.take("full", workers, winograd.positions * max(c_pad, n_pad) + 1),
            *x.stride(), *r.stride(), *y.stride(), x.shape[0], cut.rows, workers,
        )  # fmt: skip

    def empty_output(self, x: Tensor) -> Tensor:
        """An uninitialised output for input x."""
        last = self.spec.output_channels_last
        layout = torch.channels_last if last else torch.contiguous_format
        shape = (x.shape[0], self.spec.filters, *self.spec.output_size)
        return torch.empty(shape, dtype=x.dtype, memory_format=layout)

    def _scratch_sizes(self, cut: Slicing) -> tuple[int, int]:
        lanes = self.config.lanes
        c_pad = -(-self.spec.channels // lanes) * lanes
        v_size = self.spec.winograd.positions * cut.tiles * c_pad
        return v_size, self.weights.destination.numel() * cut.tiles

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """All three stages in one kernel."""
        y = self.empty_output(x)
        if y.numel() == 0:
            return y
        cut = self._slicing(x.shape[0], torch.get_num_threads())
        v_size, m_size = self._scratch_sizes(cut)
        workers = min(cut.workers, cut.count)
        V, M = workspace.take("V", workers, v_size), workspace.take("M", workers, m_size)
        self._call(ALL_STAGES, x, self._residual(residual), y, V, M, cut)
        return y

    def _residual(self, residual: Tensor | None) -> Tensor | None:
        if residual is not None and self.spec.output_channels_last and residual.stride(1) != 1:
            return residual.contiguous(memory_format=torch.channels_last)
        return residual

    # The stages apart keep V and M of all slices; slicing must not depend on the thread count of the moment.
    def input_transform(self, x: Tensor) -> Tensor:
        """V of every slice, in the kernels' own layout."""
        cut = self._slicing(x.shape[0], 1)
        v_size, _ = self._scratch_sizes(cut)
        V = torch.empty((cut.count, -(-v_size // 16) * 16))
        if x.shape[0]:
            self._call(ALL_STAGES[:1], x, None, x, V, V, self._shared(cut))
        return V

    def sparse_bgemm(self, V: Tensor, x: Tensor) -> Tensor:
        """M of every slice from V of every slice."""
        cut = self._slicing(x.shape[0], 1)
        _, m_size = self._scratch_sizes(cut)
        M = torch.empty((cut.count, -(-m_size // 16) * 16))
        if x.shape[0]:
            self._call(ALL_STAGES[1:2], x, None, x, V, M, self._shared(cut))
        return M

    def output_transform(self, M: Tensor, x: Tensor, residual: Tensor | None) -> Tensor:
        """The layer's output from M of every slice."""
        y = self.empty_output(x)
        if y.numel():
            cut = self._shared(self._slicing(x.shape[0], 1))
            self._call(ALL_STAGES[2:], x, self._residual(residual), y, M, M, cut)
        return y

    @staticmethod
    def _shared(cut: Slicing) -> Slicing:
        return Slicing(cut.rows, cut.count, cut.tiles, torch.get_num_threads())
