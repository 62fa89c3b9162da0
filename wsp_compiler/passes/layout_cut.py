"""Which images of a graph should be channels_last: a minimum cut, so that conversions are fewest.

Every image gets one of two layouts: the model's own, which its operations would give it, or channels_last. A cut of
the graph between the two ends costs

- infinity where an operation that shows the format (``view``, an output) would read channels_last, or one that
  keeps it (pooling, activations, adds) would have to undo it;
- one for every image that would be copied: read by a vendor's convolution, or as a residual, in the other layout;
- what an operation loses in the model's layout: kernels of lowered layers are faster in channels_last (on CUDA the
  fused one knows nothing else), vendors' libraries would convert their input and their output in every call.

Lowered layers read and write either layout, so that a conversion at their edges costs nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import networkx as nx
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from wsp_compiler.passes.base import (
    CONV2D,
    WINOGRAD_CONV2D,
    altered,
    arguments,
    called_module,
    get_attribute,
    is_op,
)
from wsp_compiler.vendor_conv import prefers_channels_last

_any_operator: Any = operator
KEEPING_MODULES = (
    nn.AdaptiveAvgPool2d, nn.AvgPool2d, nn.BatchNorm2d, nn.Dropout, nn.Dropout2d, nn.GELU, nn.Hardswish,
    nn.Identity, nn.LeakyReLU, nn.MaxPool2d, nn.PReLU, nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.SiLU, nn.Tanh,
)  # fmt: skip
KEEPING_FUNCTIONS: tuple[Any, ...] = (
    F.adaptive_avg_pool2d, F.avg_pool2d, F.dropout, F.gelu, F.hardswish, F.leaky_relu, F.max_pool2d, F.relu,
    F.relu6, F.silu, operator.add, _any_operator.iadd, operator.mul, torch.add, torch.cat, torch.mul, torch.relu,
    torch.relu_, torch.sigmoid, torch.tanh,
)  # fmt: skip
KEEPING_METHODS = ("add", "add_", "mul", "mul_", "relu", "relu_", "sigmoid", "tanh")

COPY = 1
LOWERED_LOSS = 4
VENDOR_LOSS = 3
_OWN, _LAST = "the model's layout", "channels_last"


@dataclass(frozen=True)
class Layouts:
    """The layouts of a graph's images.

    Attributes:
        channels_last: values that shall be channels_last; all others have the model's own layout.
        copies: (value, reader) where the value is copied into the other layout, if the model's own is not
            channels_last already.
        inside: likewise where a lowered layer reads or writes both layouts, which costs no copy.
    """

    channels_last: frozenset[fx.Node]
    copies: tuple[tuple[fx.Node, fx.Node], ...]
    inside: tuple[tuple[fx.Node, fx.Node], ...]


def prefers(gm: fx.GraphModule, node: fx.Node) -> bool:
    """True for a vendor's convolution that is faster on channels_last images."""
    if not is_op(node, CONV2D):
        return False
    weight = get_attribute(gm, arguments(node)["weight"])
    return isinstance(weight, Tensor) and prefers_channels_last(weight)


def is_free(node: fx.Node) -> bool:
    """True for a lowered layer whose weights do not ask for channels_last outputs already."""
    return is_op(node, WINOGRAD_CONV2D) and not arguments(node)["channels_last"]


def keeps_format(gm: fx.GraphModule, node: fx.Node) -> bool:
    """True if the result has the format of the images given, and its values do not depend on the format."""
    module = called_module(gm, node)
    if module is not None:
        return type(module) in KEEPING_MODULES and altered(module) is None
    return node.target in (KEEPING_METHODS if node.op == "call_method" else KEEPING_FUNCTIONS)


def hides_format(gm: fx.GraphModule, node: fx.Node) -> bool:
    """True if the result does not show the format of the images given."""
    module = called_module(gm, node)
    if module is not None:
        return type(module) is nn.Flatten and altered(module) is None
    return node.target == "flatten" if node.op == "call_method" else node.target is torch.flatten


def _images(node: fx.Node) -> list[fx.Node]:
    """What a node reads, weights and views of weights aside."""
    return [value for value in node.all_input_nodes if not _is_weight(value)]


def _is_weight(node: fx.Node) -> bool:
    read = node.all_input_nodes
    return node.op == "get_attr" or (bool(read) and all(_is_weight(value) for value in read))


def _add_reader(cut: Any, gm: fx.GraphModule, node: fx.Node) -> None:
    """What it costs if ``node`` and the images that it reads have different layouts."""
    given = _images(node)
    if is_op(node, WINOGRAD_CONV2D):
        residual = arguments(node)["residual"]
        if isinstance(residual, fx.Node) and is_free(node):
            cut.add_edge(residual, node, capacity=COPY)
            cut.add_edge(node, residual, capacity=COPY)
    elif prefers(gm, node):
        for value in given:
            cut.add_edge(node, value)  # without a capacity: infinite
            cut.add_edge(value, node, capacity=COPY)
    elif keeps_format(gm, node):
        for number, value in enumerate(given):
            cut.add_edge(node, value)
            if number == 0:  # the result takes the first one's format
                cut.add_edge(value, node)
            else:
                cut.add_edge(value, node, capacity=COPY)
    elif not hides_format(gm, node):
        for value in given:
            cut.add_edge(_OWN, value)


def _conversions(gm: fx.GraphModule, last: frozenset[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node, bool]]:
    """(value, reader, copied) of all that is read in another layout than the reader writes."""
    for node in gm.graph.nodes:
        if is_op(node, WINOGRAD_CONV2D):
            given = arguments(node)
            if is_free(node):
                for name, copied in (("x", False), ("residual", True)):
                    if isinstance(given[name], fx.Node) and (given[name] in last) != (node in last):
                        yield given[name], node, copied
        elif node in last:
            for value in _images(node):
                if value not in last:
                    yield value, node, True


def choose_layouts(gm: fx.GraphModule) -> Layouts:
    """The layouts that take the fewest copies and leave the least speed on the table."""
    cut = cast("Any", nx).DiGraph()
    cut.add_nodes_from((_OWN, _LAST))
    for node in gm.graph.nodes:
        if is_free(node) or prefers(gm, node):
            cut.add_edge(node, _LAST, capacity=LOWERED_LOSS if is_free(node) else VENDOR_LOSS)
        elif not keeps_format(gm, node) or not _images(node):
            cut.add_edge(_OWN, node)
        _add_reader(cut, gm, node)
    _, (_, chosen) = cast("Any", nx).minimum_cut(cut, _OWN, _LAST)
    last = frozenset(node for node in gm.graph.nodes if node in chosen)
    found = list(_conversions(gm, last))
    return Layouts(
        last,
        tuple((value, reader) for value, reader, copied in found if copied),
        tuple((value, reader) for value, reader, copied in found if not copied),
    )
