"""Keep values that only lowered layers read in channels_last, and restore the model's format where they leave.

rewrite:
    a = wsp::winograd_conv2d(x)           ->  a = wsp::winograd_conv2d(x, channels_last=True)
    b = wsp::winograd_conv2d(a)               b = wsp::winograd_conv2d(a, like=x)

Stages that are not merged keep the model's format.

Kernels read and write either format, but channels_last is the faster one on both targets. A chain of lowered layers
converts at its entry and its exit, inside the kernels there; the exit's output has the format the model would have
given it, which is that of the value that entered the chain.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from wsp_compiler.passes.base import WINOGRAD_CONV2D, PassBase, Rewrites, arguments, is_op, set_argument
from wsp_compiler.plan import PruningPlan


def _only_lowered_layers_read(node: fx.Node) -> bool:
    return bool(node.users) and all(is_op(user, WINOGRAD_CONV2D) for user in node.users)


@dataclass(frozen=True)
class AssignLayout(PassBase):
    """See the module's docstring."""

    name: str = field(default="assign_layout", init=False)
    after: tuple[str, ...] = field(default=("lowered", "merge_stages"), init=False)

    def run(self, gm: fx.GraphModule, plan: PruningPlan) -> Rewrites:
        """Set ``channels_last`` inside chains and ``like`` at their exits."""
        entry: dict[fx.Node, fx.Node] = {}  # value inside a chain -> the value that entered the chain
        declined: list[tuple[str, str]] = []
        for node in gm.graph.nodes:
            if not is_op(node, WINOGRAD_CONV2D):
                continue
            given = arguments(node)
            if given["channels_last"]:  # the weights ask for it: every output is channels_last already
                continue
            x: fx.Node = given["x"]
            origin = entry.get(x, x)
            if _only_lowered_layers_read(node):
                set_argument(node, "channels_last", True)
                entry[node] = origin
            else:
                declined.append((node.name, "read by an operation that is not lowered"))
                if origin is not x:
                    set_argument(node, "like", origin)
        return Rewrites(len(entry), tuple(declined))
