"""Fold batch norm into the convolutions that stay with the vendor's library (1x1, strided, grouped, ...).

rewrite:
    z = batch_norm(conv(x))  ->  z = conv'(x)     # conv' is a copy; the user's module is not touched

Without it the untouched half of a network would pay for batch norm that its lowered half does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx, nn

from wsp_compiler.clone import clone_module
from wsp_compiler.passes.base import PassBase, Rewrites, altered, called_module, first_input
from wsp_compiler.passes.fold_batch_norm import batch_norm_scale_and_shift, declines_folding
from wsp_compiler.plan import PruningPlan


def _declines_convolution(gm: fx.GraphModule, conv: nn.Conv2d, call: fx.Node) -> str | None:
    """Why ``conv`` cannot take a batch norm, or None."""
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is not a plain Conv2d"
    if (reason := altered(conv)) is not None:
        return f"of the convolution: {reason}"
    if sum(called_module(gm, other) is conv for other in gm.graph.nodes) > 1:
        return "the convolution is called more than once"
    return None


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d | None:
    """A copy of ``conv`` followed by ``norm``; None if its dtype cannot hold some filter's scaled weights."""
    scale, shift = batch_norm_scale_and_shift(norm)
    exact = conv.weight.detach().double() * scale.view(-1, 1, 1, 1)  # [n, c, kh, kw]
    weight = exact.to(conv.weight.dtype)
    error, size = ((part.flatten(1) ** 2).sum(1).sqrt() for part in (exact - weight.double(), exact))  # [n]
    # Float16 overflows, and loses bits of weights below 6e-5: batch norm's scale may bring them there.
    if not bool((error <= torch.finfo(weight.dtype).eps * size).all()):
        return None
    bias = shift if conv.bias is None else conv.bias.detach().double() * scale + shift
    folded = clone_module(conv)
    for name, value in (("weight", weight), ("bias", bias.to(weight.dtype))):
        folded.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return folded


@dataclass(frozen=True)
class FoldConvBatchNorm(PassBase):
    """See the module's docstring."""

    name: str = field(default="fold_conv_batch_norm", init=False)
    after: tuple[str, ...] = field(default=("lowered", "fold_batch_norm"), init=False)

    def run(self, gm: fx.GraphModule, plan: PruningPlan) -> Rewrites:
        """Fold every BatchNorm2d that directly follows a plain nn.Conv2d."""
        count = 0
        declined: list[tuple[str, str]] = []
        for node in list(gm.graph.nodes):
            norm, producer = called_module(gm, node), first_input(node)
            conv = called_module(gm, producer)
            if not isinstance(norm, nn.BatchNorm2d) or not isinstance(conv, nn.Conv2d):
                continue
            assert isinstance(producer, fx.Node)
            reason = declines_folding(norm, producer) or _declines_convolution(gm, conv, producer)
            folded = _fold(conv, norm) if reason is None else None
            if folded is None:
                declined.append(
                    (str(node.target), reason or f"the folded weights do not fit {conv.weight.dtype}")
                )
                continue
            parent, _, leaf = str(producer.target).rpartition(".")
            gm.get_submodule(parent).add_module(leaf, folded)
            node.replace_all_uses_with(producer)
            gm.graph.erase_node(node)
            count += 1
        return Rewrites(count, tuple(declined))
