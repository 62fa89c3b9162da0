"""What a node of a traced graph does to the channels of images, as far as filter pruning has to know.

Everything that is not listed here is "opaque": what it reads keeps its channels.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from wsp_compiler.trace import has_hooks

_operator: Any = operator
_functional: Any = F
ELEMENTWISE_MODULES = (
    nn.Dropout, nn.Dropout2d, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU,
    nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh,
)  # fmt: skip
ELEMENTWISE_FUNCTIONS: tuple[Any, ...] = (
    F.elu, F.gelu, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu, F.mish, F.relu, F.relu_, F.relu6, F.silu,
    F.softplus, torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.neg, operator.neg,
)  # fmt: skip
ELEMENTWISE_METHODS = ("relu", "relu_", "sigmoid", "tanh", "contiguous", "clone", "detach")
POOL_MODULES = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d, nn.Upsample)
POOL_FUNCTIONS: tuple[Any, ...] = (
    F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.avg_pool2d, F.max_pool2d, F.interpolate,
)  # fmt: skip
BINARY_FUNCTIONS: tuple[Any, ...] = (
    operator.add, operator.sub, operator.mul, _operator.iadd, _operator.isub, _operator.imul,
    torch.add, torch.sub, torch.mul,
)  # fmt: skip
BINARY_METHODS = ("add", "add_", "sub", "sub_", "mul", "mul_")
WRITING_FUNCTIONS: tuple[Any, ...] = (
    F.relu_, torch.relu_, _operator.iadd, _operator.isub, _operator.imul,
)  # fmt: skip
SPATIAL_DIMS = ({2, 3}, {-1, -2})


@dataclass(frozen=True)
class Operation:
    """One node.

    Attributes:
        kind: "conv", "depthwise", "grouped", "linear", "norm", "elementwise", "pool", "binary", "cat", "flatten",
            "size" (reads sizes other than that of the channels) or "opaque".
        inputs: the images it reads, in order.
        module: what a call_module node calls.
        writes: it modifies its first input.
    """

    kind: str
    inputs: tuple[fx.Node, ...]
    module: nn.Module | None = None
    writes: bool = False


def operation_of(gm: fx.GraphModule, node: fx.Node) -> Operation:
    """What ``node`` does."""
    opaque = Operation("opaque", tuple(node.all_input_nodes))
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        given = node.args[0] if node.args else node.kwargs.get("input")
        plain = len(node.args) + len(node.kwargs) == 1 and isinstance(given, fx.Node)
        kind = _kind_of_module(module) if plain else None
        if kind is None or not isinstance(given, fx.Node):
            return opaque
        return Operation(kind, (given,), module, bool(getattr(module, "inplace", False)))
    kind = {"call_function": _kind_of_function, "call_method": _kind_of_method}.get(node.op, _no_kind)(node)
    if kind is None:
        return opaque
    writes = (
        node.target in WRITING_FUNCTIONS if node.op == "call_function" else str(node.target).endswith("_")
    )
    return Operation(kind, opaque.inputs, None, writes or bool(node.kwargs.get("inplace")))


def _kind_of_module(module: nn.Module) -> str | None:
    if has_hooks(module) or "forward" in module.__dict__:
        return None
    kind = type(module)
    if kind is nn.Conv2d and isinstance(module, nn.Conv2d):
        if module.groups == 1:
            return "conv"
        return "depthwise" if module.groups == module.in_channels else "grouped"
    if kind is nn.BatchNorm2d and isinstance(module, nn.BatchNorm2d):
        return "norm" if module.running_var is not None and not module.training else None
    if kind is nn.Flatten and isinstance(module, nn.Flatten):
        return "flatten" if (module.start_dim, module.end_dim) == (1, -1) else None
    if kind in POOL_MODULES:
        return None if getattr(module, "return_indices", False) else "pool"
    if kind in ELEMENTWISE_MODULES:
        return None if module.training and kind in (nn.Dropout, nn.Dropout2d) else "elementwise"
    return "linear" if kind is nn.Linear else None


def _no_kind(node: fx.Node) -> str | None:
    return None


def _kind_of_function(node: fx.Node) -> str | None:
    target, kwargs = node.target, node.kwargs
    if target in (torch.cat, torch.concat):
        dim = kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        listed = node.args[0] if node.args and isinstance(node.args[0], (list, tuple)) else ()
        whole = bool(listed) and all(isinstance(value, fx.Node) for value in listed)
        return "cat" if dim == 1 and whole and len(listed) == len(node.all_input_nodes) else None
    if target in BINARY_FUNCTIONS:
        return _kind_of_binary(node)
    if not node.args or not isinstance(node.args[0], fx.Node) or len(node.all_input_nodes) != 1:
        return _size_reader(node) if target in (operator.getitem, getattr) else None
    if target in ELEMENTWISE_FUNCTIONS:
        return "elementwise"
    if target is F.dropout:
        training = kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        return None if training else "elementwise"
    if target in POOL_FUNCTIONS:
        return None if kwargs.get("return_indices") else "pool"
    if target is torch.flatten:
        return _flattens(node)
    if target is torch.mean:
        return _averages(node)
    return _size_reader(node)


def _kind_of_method(node: fx.Node) -> str | None:
    name = str(node.target)
    if name in BINARY_METHODS:
        return _kind_of_binary(node)
    if name in ("view", "reshape"):
        return _keeps_the_batch(node)
    if len(node.all_input_nodes) != 1:
        return None
    if name in ELEMENTWISE_METHODS:
        return "elementwise"
    if name == "flatten":
        return _flattens(node)
    if name == "mean":
        return _averages(node)
    return _size_reader(node)


def _kind_of_binary(node: fx.Node) -> str | None:
    if len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if isinstance(left, fx.Node) and isinstance(right, fx.Node):
        return "binary"
    return "elementwise" if isinstance(left if isinstance(right, fx.Node) else right, (int, float)) else None


def _flattens(node: fx.Node) -> str | None:
    given = (*node.args[1:], *node.kwargs.values())
    named = {"start_dim": 1, **({"end_dim": -1} if len(given) > 1 else {})}
    positional = tuple(named.values())[: len(node.args) - 1]
    right = tuple(node.args[1:]) == positional and all(named.get(k) == v for k, v in node.kwargs.items())
    return "flatten" if given and right else None


def _averages(node: fx.Node) -> str | None:
    """The mean over height and width, which leaves one value per channel."""
    kwargs: Mapping[str, Any] = node.kwargs
    dims: Any = node.args[1] if len(node.args) > 1 else kwargs.get("dim")
    keepdim = node.args[2] if len(node.args) > 2 else kwargs.get("keepdim", False)
    spatial = isinstance(dims, (tuple, list)) and set(cast("list[Any]", dims)) in SPATIAL_DIMS
    known = len(cast("tuple[Any, ...]", dims)) == 2 if spatial else False
    if not known or set(kwargs) - {"dim", "keepdim"}:
        return None
    return "pool" if keepdim else "flatten"


def _keeps_the_batch(node: fx.Node) -> str | None:
    """view(x.size(0), -1) and the like."""
    if len(node.args) != 3 or node.kwargs or node.args[2] != -1:
        return None
    x, batch = node.args[0], node.args[1]
    if not isinstance(batch, fx.Node) or not isinstance(x, fx.Node):
        return None
    by_method = batch.op == "call_method" and batch.target == "size" and batch.args == (x, 0)
    shape = batch.args[0] if batch.target is operator.getitem and batch.args[1:] == (0,) else None
    by_shape = isinstance(shape, fx.Node) and shape.target is getattr and shape.args == (x, "shape")
    return "flatten" if by_method or by_shape else None


def _size_reader(node: fx.Node) -> str | None:
    """ "size" if ``node`` asks for sizes of an image, and not for the number of channels."""
    if node.op == "call_method":
        if node.target in ("dim", "ndimension"):
            return "size"
        harmless = len(node.args) == 2 and node.args[1] in (0, 2, 3, -1, -2)
        return "size" if node.target == "size" and harmless and not node.kwargs else None
    if node.target is getattr and node.args[1] == "shape":
        return "size" if all(map(_takes_other_sizes, node.users)) else None
    if node.target is getattr and node.args[1] in ("dtype", "device"):
        return "size"
    return None


def _takes_other_sizes(user: fx.Node) -> bool:
    if user.target is not operator.getitem or user.op != "call_function":
        return False
    index = user.args[1]
    if isinstance(index, slice):
        return index.start in (2, -2) and index.step is None
    return index in (0, 2, 3, -1, -2)
