"""What the channels of pruned filters emit: the filter's bias, a constant, until something changes it by place.

Activations, batch norm, pooling, additions and unpadded depthwise convolutions turn constants into constants. Zero
padding does not, unless the constant is zero.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from wsp_compiler.filters.coupling import Coupling
from wsp_compiler.filters.operations import Operation
from wsp_compiler.trace import SITE

UNKNOWN = float("nan")


def constants_of(
    coupling: Coupling, biases: Mapping[str, Tensor], numbers: frozenset[int]
) -> dict[fx.Node, Tensor]:
    """The constant of every channel, float64 [C] on the CPU; NaN where it is none or not asked for.

    Args:
        coupling: of the graph.
        biases: module path of a convolution -> what each of its filters adds [n].
        numbers: of the filters whose other weights are zero.
    """
    found: dict[fx.Node, Tensor] = {}
    for node, channels in coupling.values.items():
        operation = coupling.operations[node]
        given = [found[x] for x in operation.inputs if x in found]
        if operation.kind in ("conv", "grouped"):
            bias = biases.get(str(node.meta.get(SITE, node.target)))
            value = torch.full((len(channels),), UNKNOWN, dtype=torch.float64)
            if bias is not None:
                wanted = torch.tensor([number in numbers for number in cast("Any", channels).tolist()])
                value[wanted] = bias.detach().double().cpu()[wanted]
        elif len(channels):
            value = _image(operation, node, given)
        else:
            continue
        found[node] = torch.where(value.isfinite(), value, UNKNOWN)
    return found


def pads_constants(conv: nn.Conv2d) -> bool:
    """True if a constant input other than zero meets zeros at the border of ``conv``'s input."""
    if conv.padding_mode != "zeros" or conv.padding == "valid":
        return False
    return (conv.padding == "same" and conv.kernel_size != (1, 1)) or conv.padding not in ("same", (0, 0))


def answer(conv: nn.Conv2d, weight: Tensor, constant: Tensor) -> Tensor:
    """What an unpadded convolution with ``weight`` [n, c / groups, kh, kw] adds for constant channels [c]: [n]."""
    taps = weight.detach().double().sum((2, 3))  # [n, c / groups]
    by_group = constant.to(taps).view(conv.groups, 1, -1)
    return (taps.view(conv.groups, -1, taps.shape[1]) * by_group).sum(2).flatten()


def _image(operation: Operation, node: fx.Node, given: list[Tensor]) -> Tensor:
    kind, module = operation.kind, operation.module
    first = given[0]
    if kind == "cat":
        return torch.cat(given)
    if kind == "depthwise" and isinstance(module, nn.Conv2d):
        multiplier = module.out_channels // module.groups
        value = answer(module, module.weight, first).cpu()
        if module.bias is not None:
            value = value + module.bias.detach().double().cpu()
        loud = (first != 0).repeat_interleave(multiplier)
        return torch.where(loud, UNKNOWN, value) if pads_constants(module) else value
    if kind in ("pool", "flatten"):
        return torch.where(first != 0, UNKNOWN, first) if _averages_padding(operation, node) else first
    image = [value.view(1, -1, 1, 1).clone() for value in given]
    with torch.no_grad():
        result = _apply(operation, node, image).flatten()
    unknown = torch.stack([value.isnan() for value in given]).any(0)
    return torch.where(unknown, UNKNOWN, result)


def _averages_padding(operation: Operation, node: fx.Node) -> bool:
    """True if the mean of a constant may be another value."""
    module = operation.module
    if isinstance(module, nn.AvgPool2d):
        return module.padding not in (0, (0, 0)) or module.divisor_override is not None
    if node.target is F.avg_pool2d:
        return len(node.args) > 3 or bool(set(node.kwargs) - {"kernel_size", "stride"})
    return False


def _apply(operation: Operation, node: fx.Node, images: list[Tensor]) -> Tensor:
    """The node's operation on constant images [1, C, 1, 1]."""
    module: Any = operation.module
    if module is not None:
        if any(True for _ in module.buffers()) or any(True for _ in module.parameters()):
            module = copy.deepcopy(module).cpu().double()
        return module(images[0])
    by_node = dict(zip(operation.inputs, images, strict=True))
    args = [by_node[value] if isinstance(value, fx.Node) else value for value in node.args]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **node.kwargs)
    return cast("Any", node.target)(*args, **node.kwargs)
