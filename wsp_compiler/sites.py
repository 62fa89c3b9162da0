"""TracedModel -> ConvSite for every Conv2d: what it is, and why it cannot be lowered if it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from wsp_compiler.clone import named_modules
from wsp_compiler.speed import CallFormat
from wsp_compiler.trace import SITE, TracedModel, has_hooks, trace
from wsp_compiler.winograd import FILTER_SIDE, output_size

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ConvSite:
    """One Conv2d of a model.

    Attributes:
        path: module path as in ``model.named_modules()``; for a functional convolution ``graph node NAME``.
        filters, channels: n and c.
        kernel, stride, padding: (vertical, horizontal).
        input_shapes: shape of each call's input [N, c, H, W], in call order; empty without example inputs.
        formats: shape, dtype and memory format of the same calls.
        calls: number of calls in the traced graphs.
        reject: None if the convolution is eligible, else why it is not.
    """

    path: str
    filters: int
    channels: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    bias: bool
    calls: int
    input_shapes: tuple[tuple[int, ...], ...] = ()
    reject: str | None = None
    formats: tuple[CallFormat, ...] = ()

    @property
    def output_sizes(self) -> tuple[tuple[int, int, int], ...]:
        """(batch, H_out, W_out) of each recorded call of a 3x3 stride-1 convolution."""
        return tuple(
            (
                shape[0] if len(shape) == 4 else 1,
                output_size(shape[-2], self.padding[0]),
                output_size(shape[-1], self.padding[1]),
            )
            for shape in self.input_shapes
        )


def padding_of(conv: nn.Conv2d) -> tuple[int, int]:
    """(vertical, horizontal) padding on each side; "same" is 1 for a 3x3 filter of dilation 1."""
    if isinstance(conv.padding, str):
        reach = tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        return (reach[0], reach[1]) if conv.padding == "same" else (0, 0)
    return (conv.padding[0], conv.padding[1])


def unsupported(conv: nn.Conv2d) -> str | None:
    """Why Winograd kernels cannot stand in for ``conv``, or None."""
    size = "x".join(map(str, conv.kernel_size))
    stride, dilation = "x".join(map(str, conv.stride)), "x".join(map(str, conv.dilation))
    own_forward = (
        type(conv).forward is not nn.Conv2d.forward
        or type(conv)._conv_forward is not nn.Conv2d._conv_forward  # pyright: ignore[reportPrivateUsage]
        or "forward" in conv.__dict__
    )
    checks: tuple[tuple[bool, str], ...] = (
        (own_forward, f"{type(conv).__name__} has a forward of its own"),
        (has_hooks(conv), "it has forward hooks"),
        (conv.kernel_size != (FILTER_SIDE, FILTER_SIDE), f"kernel {size}, not 3x3"),
        (conv.stride != (1, 1), f"stride {stride}, not 1"),
        (conv.dilation != (1, 1), f"dilation {dilation}, not 1"),
        (conv.groups != 1, f"{conv.groups} groups, not 1"),
        (conv.padding_mode != "zeros", f"padding mode {conv.padding_mode!r}, not zeros"),
        (conv.weight.dtype not in FLOATS, f"dtype {conv.weight.dtype}, not float32, float16 or bfloat16"),
        (conv.weight.is_meta, "weights on the meta device"),
    )
    return next((reason for failed, reason in checks if failed), None)


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    return (values[0], values[1])


def _uncalled(traced: TracedModel, path: str) -> str:
    owner = traced.owner(path)
    return "not called in the traced graph" if owner in traced.units else traced.untraced[owner or ""]


def collect_sites(traced: TracedModel) -> tuple[ConvSite, ...]:
    """Every Conv2d of the traced model in ``named_modules`` order, then functional convolutions."""
    calls: dict[str, int] = {}
    functional: list[ConvSite] = []
    for prefix, graph_module in traced.units.items():
        for node in graph_module.graph.nodes:
            if SITE in node.meta:
                calls[node.meta[SITE]] = calls.get(node.meta[SITE], 0) + 1
            elif node.op == "call_function" and node.target is F.conv2d:
                name = f"graph node {prefix}.{node.name}" if prefix else f"graph node {node.name}"
                reason = "called as a function, not as a Conv2d module"
                functional.append(ConvSite(name, 0, 0, (0, 0), (0, 0), (0, 0), False, 1, reject=reason))
    sites: list[ConvSite] = []
    for path, module in named_modules(traced.model):
        if not isinstance(module, nn.Conv2d):
            continue
        count = calls.get(path, 0)
        sites.append(
            ConvSite(
                path=path,
                filters=module.out_channels,
                channels=module.in_channels,
                kernel=_pair(module.kernel_size),
                stride=_pair(module.stride),
                padding=padding_of(module),
                bias=module.bias is not None,
                calls=count,
                input_shapes=tuple(call.shape for call in traced.calls_seen.get(path, ())),
                formats=traced.calls_seen.get(path, ()),
                reject=unsupported(module) or (None if count else _uncalled(traced, path)),
            )
        )
    return (*sites, *functional)


def find_sites(model: nn.Module, example_inputs: Any = None) -> tuple[ConvSite, ...]:
    """A dry run: one :class:`ConvSite` for every Conv2d of ``model``; ``site.reject`` is None where eligible.

    Args:
        model: module in eval mode; not modified.
        example_inputs: as for :func:`wsp_compiler.compile`; with them the sites know their input shapes.

    Raises:
        ModelError: see :func:`wsp_compiler.trace.trace`.
    """
    return collect_sites(trace(model, example_inputs))
