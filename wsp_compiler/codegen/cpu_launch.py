"""Run the CPU kernels of one layer on torch tensors."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from wsp_compiler.codegen.build import BuiltKernel, build
from wsp_compiler.codegen.candidates import Candidate, cpu_candidates
from wsp_compiler.codegen.cpu_configs import default_config
from wsp_compiler.codegen.cpu_geometry import Geometry
from wsp_compiler.codegen.cpu_memory import empty
from wsp_compiler.codegen.cpu_slicing import Slicing, cut
from wsp_compiler.codegen.cpu_threads import uses_openmp
from wsp_compiler.codegen.cpu_winograd import ALL_STAGES, make_cpu_kernel
from wsp_compiler.codegen.pack import CpuWeights, pack_cpu
from wsp_compiler.codegen.schedule_keys import cache_sizes
from wsp_compiler.codegen.spec import CpuConfig, KernelSpec
from wsp_compiler.codegen.targets import CodeTarget
from wsp_compiler.codegen.tvm_import import tvm
from wsp_compiler.codegen.workspace import workspace
from wsp_compiler.errors import OptionError
from wsp_compiler.ops import WinogradSite

STREAM_BYTES = 32 << 20
"""Size of the last cache where the system does not say."""
_pool = threading.local()
_packed: WeakKeyDictionary[WinogradSite, dict[tuple[int, str, bool], CpuWeights]] = WeakKeyDictionary()


def _use_threads(count: int) -> None:
    """Give this Python thread's TVM pool ``count`` workers; PyTorch's OpenMP threads need no such care."""
    if not uses_openmp() and getattr(_pool, "count", None) != count:
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
class PreparedCall:
    """What all calls with a number of images and of threads share.

    ``elements`` of scratch memory begin with V; M and the threads' scratch follow ``to_m`` and ``to_scratch`` bytes
    later. ``sizes`` are the kernel's last arguments.
    """

    function: Callable[..., None]
    elements: int
    to_m: int
    to_scratch: int
    sizes: tuple[int, ...]


@dataclass
class CpuLayer:
    """The CPU kernels of one lowered convolution for one :class:`KernelSpec`.

    ``site`` holds the kept weights, ``slope`` the PReLU slope ([1] or [n]) if the activation has one.
    """

    spec: KernelSpec
    site: WinogradSite
    slope: Tensor | None
    target: CodeTarget
    _used: dict[tuple[tuple[str, ...], str], BuiltKernel] = field(
        default_factory=dict[tuple[tuple[str, ...], str], BuiltKernel], init=False
    )
    _calls: dict[tuple[int, int], PreparedCall] = field(
        default_factory=dict[tuple[int, int], PreparedCall], init=False
    )

    @cached_property
    def config(self) -> CpuConfig:
        """Register blocking chosen for the layer's kept rows."""
        kept = [int(count) for count in self.site.row_offset.diff()]
        return default_config(self.spec, self.target.lanes, kept, self.target.dot)

    def candidates(self, tiles: int) -> list[Candidate]:
        """Every way to run the layer, whatever the number of tiles; the default first."""
        configs = cpu_candidates(self.spec, self.site, self.target.lanes, self.target.dot)
        return [Candidate("cpu", config) for config in configs]

    def accepts(self, candidate: Candidate) -> bool:
        """True if the candidate, perhaps of another layer of equal shape, runs this one."""
        config = candidate.config
        if not isinstance(config, CpuConfig):
            return False
        return (config.lanes, config.dot) == (self.target.lanes, self.config.dot)

    def use(self, candidate: Candidate, tiles: int) -> None:
        """Run this way. Only before the first call: threads may be running the layer after it."""
        if not isinstance(candidate.config, CpuConfig) or self._used:
            raise OptionError(
                f"{candidate.label} cannot be used {'any more' if self._used else 'on the CPU'}",
                where="CpuLayer",
                fix="choose one of candidates() before the first call",
            )
        self.__dict__["config"] = candidate.config  # what the cached property would have chosen

    @cached_property
    def weights(self) -> CpuWeights:
        """Packed weights, shared by the layer's kernels for other image sizes and epilogues."""
        packed = _packed.setdefault(self.site, {})
        key = (self.config.rows, self.spec.precision, self.config.dot)
        if key not in packed:
            packed[key] = pack_cpu(self.site, self.spec, self.config)
        return packed[key]

    @cached_property
    def _slope(self) -> Tensor:
        slope = torch.zeros_like(self.weights.bias)
        if self.slope is not None:
            slope[: self.spec.filters] = self.slope.float()
        return slope

    @cached_property
    def _output_size(self) -> tuple[int, int]:
        return self.spec.output_size

    @cached_property
    def _output_format(self) -> torch.memory_format:
        return torch.channels_last if self.spec.output_channels_last else torch.contiguous_format

    @cached_property
    def _geometry(self) -> Geometry:
        return Geometry(self.spec, self.config)

    @cached_property
    def _addresses(self) -> tuple[int, ...]:
        """Of everything that is the same in all calls."""
        w = self.weights
        tensors = (
            w.U, w.block_position, w.block_start, w.column_offset, w.column_row, w.product_row, w.bias, self._slope
        )  # fmt: skip
        return tuple(tensor.data_ptr() for tensor in tensors)

    def kernel(self, stages: tuple[str, ...] = ALL_STAGES, split: str = "slices") -> BuiltKernel:
        """The built kernel for ``stages``, shared by equal layers: making its TensorIR takes long."""
        if (stages, split) not in self._used:
            name = "winograd_conv2d" if stages == ALL_STAGES else f"{stages[0]}_stage"
            # The same code serves all slice sizes.
            config = dataclasses.replace(self.config, slice_bytes=1, split=split)
            self._used[stages, split] = build(
                make_cpu_kernel, name, self.target, (self.spec, config, stages, split)
            )
        return self._used[stages, split]

    def source(self) -> str:
        """LLVM text of the kernels used so far."""
        return "\n".join(kernel.text() for kernel in self._used.values())

    def _slicing(self, images: int, threads: int, split: str | None = None) -> Slicing:
        positions = self.spec.winograd.positions
        columns = positions * self._geometry.depth
        if self.spec.columns_pruned:
            columns = int(self.weights.column_offset[-1]) + positions
        products = self.weights.blocks * self.config.rows + 1
        return cut(self._geometry, images, threads, columns, products, split)

    def _call(
        self,
        stages: tuple[str, ...],
        x: Tensor,
        residual: Tensor | None,
        y: Tensor,
        v: int,
        m: int,
        scratch: int,
        slices: Slicing,
    ) -> None:
        r = y if residual is None else residual
        self.kernel(stages, slices.split).function(
            x.data_ptr(), *self._addresses, r.data_ptr(), y.data_ptr(), v, m, scratch,
            *x.stride(), *r.stride(), *y.stride(),
            *self._sizes(x.shape[0], slices),
        )  # fmt: skip

    def empty_output(self, x: Tensor) -> Tensor:
        """An uninitialised output for input x."""
        shape = (x.shape[0], self.spec.filters, *self._output_size)
        return empty(shape, x.dtype, self._output_format)

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """All three stages in one kernel."""
        y = self.empty_output(x)
        if y.numel() == 0:
            return y
        threads = torch.get_num_threads()
        key = (x.shape[0], threads)
        call = self._calls.get(key)
        if call is None:
            call = self._calls[key] = self._prepared(*key)
        _use_threads(threads)
        r = y if residual is None else self._residual(residual)
        v = workspace.address(call.elements)
        call.function(
            x.data_ptr(), *self._addresses, r.data_ptr(), y.data_ptr(), v, v + call.to_m, v + call.to_scratch,
            *x.stride(), *r.stride(), *y.stride(), *call.sizes,
        )  # fmt: skip
        return y

    def _prepared(self, images: int, threads: int) -> PreparedCall:
        slices = self._slicing(images, threads)
        v, m = slices.parts * slices.v_part, slices.parts * slices.m_part
        return PreparedCall(
            function=self.kernel(ALL_STAGES, slices.split).function,
            elements=v + m + slices.workers * slices.scratch_part,
            to_m=4 * v,
            to_scratch=4 * (v + m),
            sizes=self._sizes(images, slices),
        )

    def _sizes(self, images: int, slices: Slicing) -> tuple[int, ...]:
        parts = (slices.v_part, slices.m_part, slices.scratch_part)
        shape = (slices.images, slices.rows, slices.ts)
        return (*parts, images, *shape, self.weights.blocks, slices.workers, int(self._streams(images)))

    def _streams(self, images: int) -> bool:
        """True if the outputs of ``images`` images do not fit the last cache."""
        height, width = self._output_size
        last = max(cache_sizes(), default=STREAM_BYTES)
        return 4 * images * self.spec.filters * height * width > last

    def _residual(self, residual: Tensor) -> Tensor:
        last = self.spec.output_channels_last
        if residual.stride(1 if last else 3) == 1:
            return residual
        return residual.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    # The stages apart keep V and M of all slices; slicing must not depend on the thread count of the moment.

    def _apart(
        self, stage: int, x: Tensor, residual: Tensor | None, y: Tensor, V: Tensor, M: Tensor, slices: Slicing
    ) -> None:
        threads = torch.get_num_threads()
        _use_threads(threads)
        slices = dataclasses.replace(slices, workers=min(threads, slices.count))
        scratch = workspace.address(slices.workers * slices.scratch_part)
        stages = ALL_STAGES[stage : stage + 1]
        self._call(stages, x, residual, y, V.data_ptr(), M.data_ptr(), scratch, slices)

    def input_transform(self, x: Tensor) -> Tensor:
        """V of every slice, in the kernels' own layout."""
        slices = self._slicing(x.shape[0], 1, "slices")
        V = torch.empty((slices.count, slices.v_part))
        if x.shape[0]:
            self._apart(0, x, None, x, V, V, slices)
        return V

    def sparse_bgemm(self, V: Tensor, x: Tensor) -> Tensor:
        """M of every slice from V of every slice."""
        slices = self._slicing(x.shape[0], 1, "slices")
        M = torch.empty((slices.count, slices.m_part))
        if x.shape[0]:
            self._apart(1, x, None, x, V, M, slices)
        return M

    def output_transform(self, M: Tensor, x: Tensor, residual: Tensor | None) -> Tensor:
        """The layer's output from M of every slice."""
        y = self.empty_output(x)
        if y.numel():
            slices = self._slicing(x.shape[0], 1, "slices")
            residual = residual if residual is None else self._residual(residual)
            self._apart(2, x, residual, y, M, M, slices)
        return y
