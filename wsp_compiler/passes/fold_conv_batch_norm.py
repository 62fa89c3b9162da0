"""Fold batch norm into the convolutions that stay with the vendor's library (1x1, strided, grouped, ...).

rewrite:
    z = batch_norm(conv(x))  ->  z = conv'(x)     # conv' is a copy; the user's module is not touched

Without it the untouched half of a network would pay for batch norm that its lowered half does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from wsp_compiler.passes.base import PassBase, Rewrites, called_module
from wsp_compiler.passes.fold_batch_norm import declines_folding
from wsp_compiler.plan import PruningPlan


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
            norm = called_module(gm, node)
            conv = called_module(gm, node.args[0]) if node.args else None
            if not isinstance(norm, nn.BatchNorm2d) or not isinstance(conv, nn.Conv2d):
                continue
            producer = node.args[0]
            assert isinstance(producer, fx.Node)
            reason = declines_folding(norm, producer)
            if reason is None and type(conv) is not nn.Conv2d:
                reason = f"{type(conv).__name__} is not a plain Conv2d"
            if reason is None and (conv._forward_hooks or conv._forward_pre_hooks):  # pyright: ignore[reportPrivateUsage]
                reason = "the convolution has forward hooks"
            if reason is None and sum(other.target == producer.target for other in gm.graph.nodes) > 1:
                reason = "the convolution is called more than once"
            if reason is not None:
                declined.append((str(node.target), reason))
                continue
            fused = fuse_conv_bn_eval(conv, norm)
            parent, _, leaf = str(producer.target).rpartition(".")
            gm.get_submodule(parent).add_module(leaf, fused)
            node.replace_all_uses_with(producer)
            gm.graph.erase_node(node)
            count += 1
        return Rewrites(count, tuple(declined))
