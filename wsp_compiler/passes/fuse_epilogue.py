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
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from wsp_compiler.passes.base import (
    OUTPUT_TRANSFORM,
    PassBase,
    Rewrites,
    arguments,
    called_module,
    is_op,
    set_argument,
    site_of,
)
from wsp_compiler.plan import PruningPlan

ADDS = (operator.add, operator.iadd, torch.add)
RELUS = (F.relu, F.relu_, torch.relu, torch.relu_)
Activation = tuple[str, Tensor | float | None]
"""(name in ops.ACTIVATIONS, slope)."""


def _activation_of_module(module: nn.Module) -> Activation | None:
    if type(module) is nn.ReLU:
        return ("relu", None)
    if type(module) is nn.ReLU6:
        return ("relu6", None)
    if type(module) is nn.LeakyReLU:
        return ("prelu", module.negative_slope)
    if type(module) is nn.PReLU:
        return ("prelu", module.weight)
    return None


def _activation(gm: fx.GraphModule, node: fx.Node) -> Activation | None:
    """The activation that ``node`` applies to its first argument, or None."""
    module = called_module(gm, node)
    if module is not None:
        if module._forward_hooks or module._forward_pre_hooks:  # pyright: ignore[reportPrivateUsage]
            return None
        return _activation_of_module(module)
    if (node.op == "call_function" and node.target in RELUS) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    ):
        return ("relu", None)
    if node.op == "call_function" and node.target is F.relu6:
        return ("relu6", None)
    if node.op == "call_function" and node.target is F.leaky_relu:
        slope: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        return ("prelu", slope) if isinstance(slope, (int, float)) else None
    return None


def _residual(node: fx.Node, output: fx.Node) -> fx.Node | str | None:
    """The other operand if ``node`` adds to ``output``; a string says why it cannot be fused; None: no add."""
    is_method = node.op == "call_method" and node.target in ("add", "add_")
    if not is_method and not (node.op == "call_function" and node.target in ADDS):
        return None
    if len(node.args) != 2 or node.kwargs:
        return "the add has a scale or an out argument"
    left, right = node.args
    other = right if left is output else left
    in_place = node.target in (operator.iadd, "add_")
    if not isinstance(other, fx.Node) or other is output:
        return "the other operand is not a second tensor"
    if in_place and left is not output:
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
            for _ in ("add", "activation"):
                fused, reason = self._fuse_user(gm, output)
                if reason is not None:
                    declined.append((output.name, reason))
                if fused is None:
                    break
                output, count = fused, count + 1
        return Rewrites(count, tuple(declined))

    def _fuse_user(self, gm: fx.GraphModule, output: fx.Node) -> tuple[fx.Node | None, str | None]:
        """Fuse the single user of ``output``; (new output, None), or (None, why not)."""
        if len(output.users) != 1:
            return None, f"{len(output.users)} users"
        user = next(iter(output.users))
        fused = arguments(output)
        if fused["activation"] != "none":
            return None, None
        residual = _residual(user, output)
        if isinstance(residual, str):
            return None, residual
        if residual is not None and fused["residual"] is not None:
            return None, "a residual is fused already"
        activation = None if residual is not None else _activation(gm, user)
        if residual is None and activation is None:
            return None, None
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
        return moved, None
