"""Move bias and ReLU of convolutions that stay with the vendor's library behind max pooling.

rewrite:
    max_pool(relu(conv(x) + b))  ->  relu(max_pool(conv(x)) + b)

relu(x + b) never falls while x grows, rounding included: for the same conv(x) both sides are equal, NaN included, if
every window holds a pixel (a dilated one may hold padding alone). A library that adds b before it rounds to 16 bits
differs by that rounding. Behind the pooling, bias and ReLU touch a quarter of the pixels or fewer. torch.compile would
give them a pass of their own over the output of the convolution, since the pooling's windows read every pixel several
times; where cuDNN applies them while it writes (rest="eager"), there is nothing to gain.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn import functional as F

from wsp_compiler.passes.base import (
    CONV2D,
    PassBase,
    Rewrites,
    altered,
    arguments,
    called_module,
    is_op,
    only_user,
    set_argument,
)
from wsp_compiler.plan import PruningPlan

MAX_POOLS = (F.max_pool2d, torch.max_pool2d)


def _max_pool_behind(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The max pooling without dilation that alone reads ``node`` and returns no indices, or None."""
    user = only_user(node)
    if user is None:
        return None
    module = called_module(gm, user)
    if module is not None:
        plain = type(module) is nn.MaxPool2d and altered(module) is None and not module.return_indices
        return user if plain and module.dilation in (1, (1, 1)) else None
    if user.op != "call_function" or user.target not in MAX_POOLS:
        return None
    dilation = user.args[4] if len(user.args) > 4 else user.kwargs.get("dilation", 1)
    indices = len(user.args) > 6 or bool(user.kwargs.get("return_indices"))
    return user if dilation in (1, (1, 1), [1, 1]) and not indices else None


def _sink(node: fx.Node, pool: fx.Node) -> None:
    """Take bias and ReLU from the convolution and give them to what ``pool`` returns."""
    graph, given, readers, result = node.graph, arguments(node), list(pool.users), pool
    with graph.inserting_before(pool.next):
        if given["bias"] is not None:
            per_channel = graph.call_method("view", (given["bias"], -1, 1, 1))
            result = graph.call_function(torch.add, (result, per_channel))
        if given["activation"] == "relu":
            result = graph.call_function(F.relu, (result,))
    for reader in readers:
        reader.replace_input_with(pool, result)
    set_argument(node, "bias", None)
    set_argument(node, "activation", "none")


@dataclass(frozen=True)
class SinkEpilogue(PassBase):
    """See the module's docstring."""

    name: str = field(default="sink_epilogue", init=False)
    after: tuple[str, ...] = field(default=("fuse_conv_epilogue",), init=False)

    def run(self, gm: fx.GraphModule, plan: PruningPlan) -> Rewrites:
        """Rewrite every ``wsp::conv2d`` without a residual that max pooling alone reads."""
        count = 0
        for node in list(gm.graph.nodes):
            if not is_op(node, CONV2D):
                continue
            given, pool = arguments(node), _max_pool_behind(gm, node)
            epilogue = given["bias"] is not None or given["activation"] == "relu"
            if pool is not None and epilogue and given["residual"] is None:
                _sink(node, pool)
                count += 1
        return Rewrites(count)
