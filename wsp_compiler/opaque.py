"""``wsp::winograd_layer``: a lowered convolution's launcher as one operator, for compilers of the graph around it.

A launcher is no tensor, so the operator takes its handle, an integer that stays valid while the launcher lives.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from wsp_compiler.errors import CompiledModuleError
from wsp_compiler.ops import suggest_channels_last
from wsp_compiler.winograd import output_size


class Launcher(Protocol):
    """A lowered convolution that can be called; ``codegen.layer.WinogradLayer`` is one."""

    filters: int
    padding: tuple[int, int]
    channels_last: bool

    def __call__(self, x: Tensor, residual: Tensor | None = None, like: Tensor | None = None) -> Any: ...


_handles = itertools.count()
_layers: WeakValueDictionary[int, Launcher] = WeakValueDictionary()


def register(layer: Launcher) -> int:
    """A new handle for ``layer``; it does not keep the layer alive."""
    handle = next(_handles)
    _layers[handle] = layer
    return handle


def _layer_of(handle: int) -> Launcher:
    layer = _layers.get(handle)
    if layer is None:
        raise CompiledModuleError(
            f"there is no kernel launcher {handle}",
            where="wsp::winograd_layer",
            fix="keep the compiled module; graphs that call its launchers do not outlive it",
        )
    return layer


def _winograd_layer(x: Tensor, residual: Tensor | None, like: Tensor | None, handle: int) -> Tensor:
    """The layer behind ``handle`` on x [N, c, H, W] (or [c, H, W]); see ``ops.winograd_conv2d``."""
    return _layer_of(handle)(x, residual, like)


def _fake(x: Tensor, residual: Tensor | None, like: Tensor | None, handle: int) -> Tensor:
    layer = _layer_of(handle)
    size = (output_size(x.shape[-2], layer.padding[0]), output_size(x.shape[-1], layer.padding[1]))
    y = x.new_empty((*x.shape[:-3], layer.filters, *size))
    if residual is not None:
        y = y + residual
    last = y.dim() == 4 and (layer.channels_last or suggest_channels_last(x if like is None else like))
    return torch.empty_like(y, memory_format=torch.channels_last if last else torch.contiguous_format)


# A bare library definition: the wrapper of torch.library.custom_op costs tens of microseconds a call.
_library = torch.library.Library("wsp", "FRAGMENT")
cast("Any", _library).define(
    "winograd_layer(Tensor x, Tensor? residual, Tensor? like, int handle) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
cast("Any", _library).impl("winograd_layer", _winograd_layer, "CompositeExplicitAutograd")
cast("Any", torch.library).register_fake("wsp::winograd_layer", _fake)
WINOGRAD_LAYER: Any = torch.ops.wsp.winograd_layer.default
