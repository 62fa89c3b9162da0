"""Fuse a residual add and an activation into the output transform.

rewrite:
    y = wsp::output_transform(M, ..., None, None, ..., "none")
    s = y + r                              ->  z = wsp::output_transform(M, ..., r, slope, ..., activation)
    z = activation(s)

Either step may be missing. The bias is in the output transform already. ReLU, ReLU6, LeakyReLU and PReLU are
fused, as modules or functions; the fused call stands where the add stood, so that it reads the same residual.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from wsp_compiler.passes.base import (
    OUTPUT_TRANSFORM,
    WSP_OPS,
    PassBase,
    Rewrites,
    altered,
    arguments,
    called_module,
    first_input,
    get_attribute,
    is_op,
    set_argument,
    site_of,
)
from wsp_compiler.plan import PruningPlan

IADD: Any = cast("Any", operator).iadd
ADDS: tuple[Any, ...] = (operator.add, IADD, torch.add)
RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
PRELUS = (F.prelu, torch.prelu)
LEAKY_RELUS = (F.leaky_relu, cast("Any", F).leaky_relu_)
NUMBER_METHODS = frozenset(
    (
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "item",
        "tolist",
        "stride",
        "storage_offset",
        "__len__",
    )
)
Activation = tuple[str, Tensor | float | None]
"""(name in ops.ACTIVATIONS, slope)."""


def _activation_of_module(module: nn.Module) -> Activation | str | None:
    kind = type(module)
    if kind not in (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU):
        return None
    if (reason := altered(module)) is not None:
        return f"of the activation: {reason}"
    if isinstance(module, nn.LeakyReLU):
        return ("prelu", module.negative_slope)
    if isinstance(module, nn.PReLU):
        return ("prelu", module.weight)
    return ("relu" if kind is nn.ReLU else "relu6", None)


def activation_of(gm: fx.GraphModule, node: fx.Node) -> Activation | str | None:
    """The activation that ``node`` applies; a string says why it cannot be fused; None: it is none."""
    module = called_module(gm, node)
    if module is not None:
        return _activation_of_module(module)
    if node.target in (("relu", "relu_") if node.op == "call_method" else RELUS):
        return ("relu", None)
    second = node.args[1] if len(node.args) > 1 else None
    if node.target in (("prelu",) if node.op == "call_method" else PRELUS):
        weight = get_attribute(gm, node.kwargs.get("weight", second))
        return (
            ("prelu", weight) if isinstance(weight, Tensor) else "the slope is not a parameter of the model"
        )
    if node.op == "call_function" and node.target is F.relu6:
        return ("relu6", None)
    if node.op == "call_function" and node.target in LEAKY_RELUS:
        slope = node.kwargs.get("negative_slope", 0.01 if second is None else second)
        return ("prelu", slope) if isinstance(slope, (int, float)) else "the slope is not a constant"
    return None


def _is_tensor(gm: fx.GraphModule, value: object) -> bool:
    """True if ``value`` is known to be a tensor at run time; a number cannot be an operator's residual."""
    if not isinstance(value, fx.Node):
        return False
    if any(user.op == "call_module" or user.target in WSP_OPS for user in value.users):  # others know it
        return True
    if value.op in ("get_attr", "call_module"):  # a module may give a tuple, but nobody can add that
        return value.op == "call_module" or isinstance(get_attribute(gm, value), Tensor)
    if value.op == "placeholder":
        return False
    if value.op == "call_method":
        return value.target not in NUMBER_METHODS
    if value.target is getattr:
        return value.args[1] in ("T", "mT", "data", "real")
    if value.target is operator.getitem:
        return _is_tensor(gm, value.args[0])
    if getattr(value.target, "__module__", None) == "_operator":
        return any(_is_tensor(gm, operand) for operand in value.args)
    return (
        str(getattr(value.target, "__module__", "")).startswith("torch") and value.target is not torch.numel
    )


def residual_of(gm: fx.GraphModule, node: fx.Node, output: fx.Node) -> fx.Node | str | None:
    """The other operand if ``node`` adds to ``output``; a string says why it can't be fused; None: no add."""
    is_method = node.op == "call_method" and node.target in ("add", "add_")
    if not is_method and not (node.op == "call_function" and node.target in ADDS):
        return None
    if len(node.args) != 2 or node.kwargs:
        return "the add has keyword arguments"
    left, right = node.args
    other = right if left is output else left
    if not isinstance(other, fx.Node) or other is output or not _is_tensor(gm, other):
        return "the other operand is not known to be a second tensor"
    if node.target in (IADD, "add_") and left is not output:
        return "the add writes into the other operand"
    return other


def _set_slope(gm: fx.GraphModule, node: fx.Node, slope: Tensor | float) -> None:
    """Store the slope as a buffer of the node's site and pass it to ``node``."""
    name, site = site_of(gm, node)
    value = torch.as_tensor(slope, dtype=torch.float32, device=site.bias.device).detach().reshape(-1)
    index = 0
    while hasattr(site, f"slope{index or ''}"):
        index += 1
    buffer = f"slope{index or ''}"
    site.register_buffer(buffer, value.clone())
    with gm.graph.inserting_before(node):
        set_argument(node, "slope", gm.graph.get_attr(f"{name}.{buffer}"))


@dataclass(frozen=True)
class FuseEpilogue(PassBase):
    """See the module's docstring."""

    name: str = field(default="fuse_epilogue", init=False)
    requires: tuple[str, ...] = field(default=("lowered",), init=False)
    after: tuple[str, ...] = field(default=("fold_batch_norm",), init=False)

    def run(self, gm: fx.GraphModule, plan: PruningPlan) -> Rewrites:
        """Fuse what follows every output transform."""
        count = 0
        declined: list[tuple[str, str]] = []
        for output in list(gm.graph.nodes):
            if not is_op(output, OUTPUT_TRANSFORM):
                continue
            while arguments(output)["activation"] == "none":
                fused = self._fuse_user(gm, output)
                if isinstance(fused, str):
                    declined.append((output.name, fused))
                    break
                output, count = fused, count + 1
        return Rewrites(count, tuple(declined))

    def _fuse_user(self, gm: fx.GraphModule, output: fx.Node) -> fx.Node | str:
        """Fuse the single user of ``output``: the new output transform, or why not."""
        if len(output.users) != 1:
            return f"{len(output.users)} users"
        user = next(iter(output.users))
        fused = arguments(output)
        residual = residual_of(gm, user, output)
        if isinstance(residual, str):
            return residual
        if residual is not None and fused["residual"] is not None:
            return "a residual is fused already"
        activation = None
        if residual is None:
            activation = activation_of(gm, user) if first_input(user) is output else None
            if activation is None or isinstance(activation, str):
                return activation or f"{user.name} is no add or activation that can be fused"
        # An add reads its other operand where it stood; an activation reads nothing else, so it stays put.
        with gm.graph.inserting_before(user if residual is not None else output):
            moved = gm.graph.call_function(OUTPUT_TRANSFORM, kwargs=fused)
        moved.meta.update(output.meta)
        if residual is not None:
            set_argument(moved, "residual", residual)
        if activation is not None:
            set_argument(moved, "activation", activation[0])
            if activation[1] is not None:
                _set_slope(gm, moved, activation[1])
        user.replace_all_uses_with(moved)
        gm.graph.erase_node(user)
        gm.graph.erase_node(output)
        return moved
