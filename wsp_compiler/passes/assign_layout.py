"""Keep images in channels_last wherever nobody minds, and restore the model's format where they leave.

rewrite:
    a = wsp::winograd_conv2d(x)           ->  a = wsp::winograd_conv2d(x, channels_last=True)
    b = wsp::conv2d(a, ...)                   b = wsp::conv2d(a, ..., channels_last=True)
    c = wsp::winograd_conv2d(max_pool(b))     c = wsp::winograd_conv2d(max_pool(b), like=x)

Stages that are not merged keep the model's format.

Kernels and vendors' libraries read and write either format, but channels_last is the faster one. A value may have
it if all its readers are lowered layers, operations whose result does not show the format (flatten), or operations
that keep it (pooling, activations, adds) and whose own results may have it. The exit of such a region has
the format that the model would have given it, which is that of the value that entered the region.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from wsp_compiler.passes.base import (
    CONV2D,
    WINOGRAD_CONV2D,
    PassBase,
    Rewrites,
    altered,
    arguments,
    called_module,
    get_attribute,
    is_op,
    set_argument,
)
from wsp_compiler.plan import PruningPlan
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


@dataclass(frozen=True)
class AssignLayout(PassBase):
    """See the module's docstring."""

    name: str = field(default="assign_layout", init=False)
    after: tuple[str, ...] = field(default=("lowered", "merge_stages", "fuse_conv_epilogue"), init=False)

    def run(self, gm: fx.GraphModule, plan: PruningPlan) -> Rewrites:
        """Set ``channels_last`` inside regions and ``like`` at their exits."""
        free = _free_values(gm)
        entry: dict[fx.Node, fx.Node] = {}  # value inside a region -> the value that entered the region
        declined: list[tuple[str, str]] = []
        count = 0
        for node in gm.graph.nodes:
            lowered = is_op(node, WINOGRAD_CONV2D)
            if not lowered and not is_op(node, CONV2D):
                inside = [value for value in node.all_input_nodes if value in entry]
                if inside and _keeps_format(gm, node):
                    entry[node] = entry[inside[0]]
                continue
            given = arguments(node)
            if (
                lowered and given["channels_last"]
            ):  # the weights ask for it: every output is channels_last already
                continue
            x: fx.Node = given["x"]
            origin = entry.get(x, x)
            if node in free:
                if lowered or _prefers(gm, node):
                    set_argument(node, "channels_last", True)
                    entry[node] = origin
                    count += 1
            else:
                declined.append((node.name, "read by an operation that needs the model's format"))
                if lowered and origin is not x:
                    set_argument(node, "like", origin)
        return Rewrites(count, tuple(declined))


def _prefers(gm: fx.GraphModule, node: fx.Node) -> bool:
    weight = get_attribute(gm, arguments(node)["weight"])
    return isinstance(weight, Tensor) and prefers_channels_last(weight)


def _keeps_format(gm: fx.GraphModule, node: fx.Node) -> bool:
    """True if the result has the format of the images given, and its values do not depend on the format."""
    module = called_module(gm, node)
    if module is not None:
        return type(module) in KEEPING_MODULES and altered(module) is None
    return node.target in (KEEPING_METHODS if node.op == "call_method" else KEEPING_FUNCTIONS)


def _hides_format(gm: fx.GraphModule, node: fx.Node) -> bool:
    """True if the result does not show the format of the images given."""
    module = called_module(gm, node)
    if module is not None:
        return type(module) is nn.Flatten and altered(module) is None
    return node.target == "flatten" if node.op == "call_method" else node.target is torch.flatten


def _free_values(gm: fx.GraphModule) -> set[fx.Node]:
    """Values whose readers do not mind the format."""
    free: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        users = list(node.users)
        if users and all(
            is_op(user, WINOGRAD_CONV2D)
            or _hides_format(gm, user)
            or (user in free and (_keeps_format(gm, user) or (is_op(user, CONV2D) and _prefers(gm, user))))
            for user in users
        ):
            free.add(node)
    return free
