"""Max pooling before bias and ReLU, in graphs whose rest torch.compile fuses.

relu(x + b) never falls while x grows, rounding included, so max_pool(relu(x + b)) = relu(max_pool(x) + b) exactly,
NaN included. Behind the pooling both touch a quarter of the pixels or fewer, and need no pass of their own over the
convolution's output: torch.compile does not fuse them into a window that reads every pixel several times.
"""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn import functional as F

from wsp_compiler.passes.base import altered, called_module, first_input

MAX_POOLS = (F.max_pool2d, torch.max_pool2d)


def max_pool_behind(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The max pooling that alone reads ``node`` and returns no indices, or None."""
    if len(node.users) != 1:
        return None
    user = next(iter(node.users))
    if first_input(user) is not node:
        return None
    module = called_module(gm, user)
    if module is not None:
        plain = type(module) is nn.MaxPool2d and altered(module) is None and not module.return_indices
        return user if plain else None
    indices = len(user.args) > 6 or bool(user.kwargs.get("return_indices"))
    return user if user.op == "call_function" and user.target in MAX_POOLS and not indices else None


def epilogue_behind(pool: fx.Node, bias: str | None, relu: bool) -> None:
    """Add a bias (path of [n], or None) and ReLU to what ``pool`` returns before anybody reads it."""
    graph, readers, result = pool.graph, list(pool.users), pool
    with graph.inserting_before(pool.next):
        if bias is not None:
            per_channel = graph.call_method("view", (graph.get_attr(bias), -1, 1, 1))
            result = graph.call_function(torch.add, (result, per_channel))
        if relu:
            result = graph.call_function(F.relu, (result,))
    for reader in readers:
        reader.replace_input_with(pool, result)
