"""Give convolutions that stay with the vendor's library their residual add and ReLU.

rewrite:
    y = conv(x)
    s = y + r                ->  z = wsp::conv2d(x, weight, bias, r, ..., "relu")
    z = relu(s)

Add and ReLU may be missing; an add is fused only together with a ReLU, which is what cuDNN has. Every plain
convolution becomes the operator, so that its launcher may pack its weights and choose its memory format.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from wsp_compiler.passes.base import (
    CONV2D,
    PassBase,
    Rewrites,
    altered,
    arguments,
    called_module,
    first_input,
    is_op,
    only_user,
    set_argument,
)
from wsp_compiler.passes.fuse_epilogue import activation_of, residual_of
from wsp_compiler.plan import PruningPlan
from wsp_compiler.vendor_conv import fuses


def _declines(conv: nn.Conv2d) -> str | None:
    """Why ``conv`` stays a module, or None."""
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is not a plain Conv2d"
    if (reason := altered(conv)) is not None:
        return f"of the convolution: {reason}"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding {conv.padding!r}, {conv.padding_mode}"
    if not fuses(conv.weight):
        return f"no fused convolutions for {conv.weight.dtype} on {conv.weight.device.type}"
    return None


def _lower_call(gm: fx.GraphModule, node: fx.Node, conv: nn.Conv2d) -> fx.Node:
    graph = gm.graph
    with graph.inserting_before(node):
        weight = graph.get_attr(f"{node.target}.weight")
        bias = None if conv.bias is None else graph.get_attr(f"{node.target}.bias")
        images, window = (first_input(node), weight, bias), (conv.stride, conv.padding, conv.dilation)
        args: tuple[Any, ...] = (*images, None, *map(list, window), conv.groups, "none", False)
        lowered = graph.call_function(CONV2D, args)
    lowered.meta.update(node.meta)
    node.replace_all_uses_with(lowered)
    graph.erase_node(node)
    return lowered


def _is_relu(gm: fx.GraphModule, user: fx.Node | None, node: fx.Node) -> bool:
    return user is not None and first_input(user) is node and activation_of(gm, user) == ("relu", None)


@dataclass(frozen=True)
class FuseConvEpilogue(PassBase):
    """See the module's docstring."""

    name: str = field(default="fuse_conv_epilogue", init=False)
    after: tuple[str, ...] = field(
        default=("lowered", "fold_conv_batch_norm", "fuse_epilogue", "merge_stages"), init=False
    )

    def run(self, gm: fx.GraphModule, plan: PruningPlan) -> Rewrites:
        """Lower and fuse every plain convolution that is still a module."""
        count = 0
        declined: list[tuple[str, str]] = []
        for node in list(gm.graph.nodes):
            conv = called_module(gm, node)
            if not isinstance(conv, nn.Conv2d):
                continue
            if (reason := _declines(conv)) is not None:
                declined.append((str(node.target), reason))
                continue
            _lower_call(gm, node, conv)
            count += 1
        for node in list(gm.graph.nodes):
            if is_op(node, CONV2D):
                self._fuse(gm, node)
        return Rewrites(count, tuple(declined))

    def _fuse(self, gm: fx.GraphModule, node: fx.Node) -> None:
        user = only_user(node)
        if user is None:
            return
        residual = residual_of(gm, user, node)
        add = user if isinstance(residual, fx.Node) else None
        if isinstance(residual, fx.Node) and not arguments(node)["residual"]:
            user = only_user(user)
        relu = user if _is_relu(gm, user, add or node) else None
        if relu is None:
            return
        # An add reads its other operand where it stood; a ReLU reads nothing else, so it stays put.
        with gm.graph.inserting_before(add or node):
            moved = gm.graph.call_function(CONV2D, kwargs=arguments(node))
        moved.meta.update(node.meta)
        set_argument(moved, "activation", "relu")
        if add is not None:
            set_argument(moved, "residual", residual)
        relu.replace_all_uses_with(moved)
        for old in (relu, add, node):
            if old is not None:
                gm.graph.erase_node(old)
