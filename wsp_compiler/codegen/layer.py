"""WinogradLayer: the launcher of one lowered convolution. Picks, builds and caches kernels per input kind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wsp_compiler.codegen.cpu_launch import CpuLayer
from wsp_compiler.codegen.cuda_launch import CudaLayer
from wsp_compiler.codegen.spec import KernelSpec
from wsp_compiler.codegen.targets import CodeTarget
from wsp_compiler.codegen.tuner import Choice, Tuner
from wsp_compiler.errors import InputError
from wsp_compiler.ops import WinogradSite, apply_activation, suggest_channels_last
from wsp_compiler.speed import CallFormat

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_choosing = threading.RLock()
on_build: list[Callable[[], None]] = []
"""Called whenever a layer has prepared kernels for a new kind of input (progress displays)."""


def effective_precision(option: str | None, dtype: torch.dtype, target: CodeTarget) -> str:
    """Arithmetic of the matrix products for input ``dtype``.

    None follows the dtype; float32 on CUDA follows ``torch.backends.cudnn.allow_tf32``; float16 on the CPU is
    computed in fp32.
    """
    if option is not None:
        return option
    if dtype == torch.bfloat16:
        return "bf16"
    if not target.is_cuda:
        return "fp32"
    if dtype == torch.float16:
        return "fp16"
    return "tf32" if torch.backends.cudnn.allow_tf32 else "fp32"


def make_layer(
    spec: KernelSpec, site: WinogradSite, slope: Tensor | None, target: CodeTarget
) -> CpuLayer | CudaLayer:
    """The kernels of one layer on ``target``; ``slope`` is the PReLU slope if the activation has one."""
    kind = CudaLayer if target.is_cuda else CpuLayer
    return kind(spec, site, slope, target)


class WinogradLayer(nn.Module):
    """Runs one lowered convolution with the generated kernels.

    Kernels are specialised on height, width, dtype, memory format and epilogue on first use; the batch size
    stays symbolic.

    Args:
        path: module path of the convolution.
        site: its kept weights.
        slope: PReLU slope, if the activation has one.
        padding, tile, activation, channels_last: see wsp_compiler.ops.
        precision: the user's choice of arithmetic, or None.
        target: where the kernels run.
        dtype: of the convolution's weight; inputs must have it outside autocast. None accepts any.

    Attributes:
        tuner: chooses among the kernels of equal meaning; without one the launchers' own rules do.
    """

    def __init__(
        self,
        path: str,
        site: WinogradSite,
        slope: Tensor | None,
        padding: tuple[int, int],
        tile: int,
        activation: str,
        channels_last: bool,
        precision: str | None,
        target: CodeTarget,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.path = path
        self.site = site
        self.slope = slope
        self.padding, self.tile, self.activation = padding, tile, activation
        self.channels_last, self.precision, self.target, self.dtype = channels_last, precision, target, dtype
        positions = site.row_offset.numel() - 1
        self.filters: int = site.bias.numel()
        full_rows = site.rows.numel() == positions * self.filters
        self.channels: int = site.keep.shape[2] if site.keep.shape[2] > 1 else int(site.columns.max()) + 1
        self.rows_pruned = not full_rows
        self.columns_pruned = site.columns.numel() != positions * self.channels
        self.notes: list[str] = []
        self.tuner: Tuner | None = None
        self._state: dict[str, Any] = {"shape": None, "layers": {}, "chosen": {}}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_state": {"shape": self.last_shape, "layers": {}, "chosen": {}}}

    @property
    def last_shape(self) -> tuple[int, ...] | None:
        """Shape of the input of the last call."""
        return self._state["shape"]

    @property
    def last_kernels(self) -> CpuLayer | CudaLayer | None:
        """The kernels of the last call."""
        return self._state["layers"].get(self._state.get("key"))

    def sources(self) -> list[str]:
        """Text of the kernels built so far."""
        return [layer.source() for layer in self._state["layers"].values()]

    def _where(self) -> str:
        return f"convolution {self.path}" if self.path else "the convolution"

    def _prepare(
        self, x: Tensor, residual: bool, plain: bool = False, like: Tensor | None = None
    ) -> tuple[Tensor, CpuLayer | CudaLayer]:
        """The input as the kernels take it, and the kernels for it; ``plain`` leaves out the epilogue."""
        if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(
                f"expected a tensor, got {type(x).__name__}", where=self._where(), fix="convert it"
            )
        if x.device != self.target.device:
            raise InputError(
                f"expected a tensor on {self.target.device}, got one on {x.device}",
                where=self._where(),
                fix="move the input, or compile the model for that device",
            )
        expected = self.dtype
        if torch.is_autocast_enabled(x.device.type) and x.dtype in DTYPES:
            expected = torch.get_autocast_dtype(x.device.type)
            x = x.to(expected)
        if x.dtype not in DTYPES or expected not in (None, x.dtype):
            raise InputError(
                f"expected an input of {expected or 'float32, float16 or bfloat16'}, got {x.dtype}",
                where=self._where(),
                fix="convert the input, or compile model.to(that dtype)",
            )
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise InputError(
                f"expected an input [N, {self.channels}, H, W], got {list(x.shape)}",
                where=self._where(),
                fix=f"give it {self.channels} channels",
            )
        self._state["shape"] = tuple(x.shape)
        self._state["key"] = key = (
            DTYPES[x.dtype],
            x.shape[2],
            x.shape[3],
            x.stride(1) == 1,
            self.channels_last or suggest_channels_last(x if like is None else like),
            residual,
            "none" if plain else self.activation,
            effective_precision(self.precision, x.dtype, self.target),
        )
        layers: dict[Any, CpuLayer | CudaLayer] = self._state["layers"]
        if key not in layers or (self.target.is_cuda and (key, x.shape[0]) not in self._state["chosen"]):
            with _choosing:  # a layer is published when it is ready to run
                layer = layers.get(key) or self._build(*key)
                if key not in layers or self.target.is_cuda:  # on the CPU one choice serves all batch sizes
                    self._choose(key, layer, x.shape[0])
                if key not in layers:
                    layers[key] = layer
                    for callback in on_build:
                        callback()
        return x, layers[key]

    def _choose(self, key: Any, layer: CpuLayer | CudaLayer, batch: int) -> None:
        """Let ``layer`` run the way that is known to be fastest for ``batch`` images; once for every batch."""
        chosen: dict[Any, Choice | None] = self._state["chosen"]
        if (key, batch) in chosen:
            return
        chosen[key, batch] = None
        if self.tuner is not None and batch > 0:
            choice = self.tuner.choose(layer, batch)
            if choice.timing is not None:
                layer.use(choice.candidate, batch * layer.spec.tiles_per_image)
            chosen[key, batch] = choice

    def prebuild(self, call: CallFormat, residual: bool) -> None:
        """Build the kernel that an input like that of ``call`` will want; nothing is run."""
        batch, height, width = (call.shape[0] if len(call.shape) == 4 else 1), *call.shape[-2:]
        last = self.channels_last or call.channels_last
        precision = effective_precision(self.precision, call.dtype, self.target)
        layer = self._build(
            DTYPES[call.dtype], height, width, last, last, residual, self.activation, precision
        )
        assert isinstance(layer, CudaLayer)
        if self.tuner is None:
            layer.prepare(layer.candidates(batch * layer.spec.tiles_per_image)[0])
        elif self.tuner.level == "off":  # else measuring builds what it needs
            layer.prepare(self.tuner.choose(layer, batch).candidate)

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What was chosen for each kind and number of images so far."""
        return tuple(choice for choice in self._state["chosen"].values() if choice is not None)

    def _build(
        self,
        dtype: str,
        height: int,
        width: int,
        input_last: bool,
        output_last: bool,
        residual: bool,
        activation: str,
        precision: str,
    ) -> CpuLayer | CudaLayer:
        spec = KernelSpec(
            filters=self.filters,
            channels=self.channels,
            height=height,
            width=width,
            padding=self.padding,
            tile=self.tile,
            dtype=dtype,
            precision=precision,
            input_channels_last=input_last,
            output_channels_last=output_last,
            columns_pruned=self.columns_pruned,
            rows_pruned=self.rows_pruned,
            residual=residual,
            activation=activation,
        )
        if min(spec.output_size) < 1:
            raise InputError(
                f"a {height}x{width} input is smaller than the 3x3 filter",
                where=self._where(),
                fix="give a larger image",
            )
        return make_layer(spec, self.site, self.slope, self.target)

    def forward(self, x: Tensor, residual: Tensor | None = None, like: Tensor | None = None) -> Tensor:
        """The convolution with its epilogue: [N, c, H, W] (or [c, H, W]) -> [N, n, H_out, W_out].

        The output has the memory format of ``like``, by default of x.
        """
        if type(x) is Tensor and residual is None and like is None and not self.target.is_cuda:
            key = (x.shape, x.stride(), x.dtype, x.device, torch.is_autocast_enabled("cpu"))
            recent = self._state.get("recent")
            if recent is not None and recent[0] == key:  # all that follows was found by an earlier call
                self._state["shape"], self._state["key"] = recent[2:]
                return recent[1].run(x, None)
            if x.dim() == 4:
                given, layer = self._prepare(x, False)
                if given is x:
                    self._state["recent"] = (key, layer, self._state["shape"], self._state["key"])
                return layer.run(given, None)
        if _unbatched(x):
            return self.forward(x.unsqueeze(0), _batched(residual)).squeeze(0)
        x, layer = self._prepare(x, residual is not None, like=like)
        if residual is None or _fits(residual, x, layer.spec):
            return layer.run(x, residual)
        x, layer = self._prepare(x, False, plain=True, like=like)
        return self._add(layer.run(x, None), residual)

    def _add(self, y: Tensor, residual: Tensor) -> Tensor:
        """A residual that broadcasts or promotes the dtype is added by PyTorch."""
        return apply_activation(y + residual, self.activation, self.slope)

    def input_transform(self, x: Tensor) -> Tensor:
        """V of x, in the kernels' own layout."""
        x, layer = self._prepare(x.unsqueeze(0) if _unbatched(x) else x, False, plain=True)
        return layer.input_transform(x)

    def sparse_bgemm(self, V: Tensor, x: Tensor) -> Tensor:
        """M from V, both in the kernels' own layout."""
        x, layer = self._prepare(x.unsqueeze(0) if _unbatched(x) else x, False, plain=True)
        return layer.sparse_bgemm(V, x)

    def output_transform(self, M: Tensor, x: Tensor, residual: Tensor | None) -> Tensor:
        """The layer's output from M."""
        if _unbatched(x):
            return self.output_transform(M, x.unsqueeze(0), _batched(residual)).squeeze(0)
        x, layer = self._prepare(x, residual is not None)
        if residual is None or _fits(residual, x, layer.spec):
            return layer.output_transform(M, x, residual)
        x, layer = self._prepare(x, False, plain=True)
        return self._add(layer.output_transform(M, x, None), residual)


def _unbatched(x: Tensor) -> bool:
    return isinstance(x, Tensor) and x.dim() == 3  # pyright: ignore[reportUnnecessaryIsInstance]


def _batched(residual: Tensor | None) -> Tensor | None:
    """The residual of an unbatched call; one with fewer dimensions broadcasts as it is."""
    return residual.unsqueeze(0) if residual is not None and residual.dim() == 3 else residual


def _fits(residual: Tensor, x: Tensor, spec: KernelSpec) -> bool:
    """True if the residual can be added inside the kernel."""
    return (
        tuple(residual.shape) == (x.shape[0], spec.filters, *spec.output_size)
        and residual.dtype == x.dtype
        and residual.device == x.device
    )
