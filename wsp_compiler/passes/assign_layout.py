"""Keep images in channels_last wherever nobody minds, and restore the model's format where they leave.

rewrite:
    a = wsp::winograd_conv2d(x)           ->  a = wsp::winograd_conv2d(x, channels_last=True)
    b = wsp::conv2d(a, ...)                   b = wsp::conv2d(a, ..., channels_last=True)
    c = wsp::winograd_conv2d(max_pool(b))     c = wsp::winograd_conv2d(max_pool(b), like=x)

Stages that are not merged keep the model's format.

Kernels and vendors' libraries read and write either format, but channels_last is the faster one. Which values get it
is a minimum cut (:mod:`wsp_compiler.passes.layout_cut`); the report counts the conversions that are left. The exit of
a channels_last region has the format that the model would have given it, which is that of the value that entered the
region.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from wsp_compiler.passes.base import (
    CONV2D,
    WINOGRAD_CONV2D,
    PassBase,
    Rewrites,
    arguments,
    is_op,
    set_argument,
)
from wsp_compiler.passes.layout_cut import Layouts, choose_layouts, is_free, prefers
from wsp_compiler.plan import PruningPlan
from wsp_compiler.trace import SITE


@dataclass(frozen=True)
class AssignLayout(PassBase):
    """See the module's docstring."""

    name: str = field(default="assign_layout", init=False)
    after: tuple[str, ...] = field(default=("lowered", "merge_stages", "fuse_conv_epilogue"), init=False)

    def run(self, gm: fx.GraphModule, plan: PruningPlan) -> Rewrites:
        """Set ``channels_last`` inside regions and ``like`` at their exits."""
        layouts = choose_layouts(gm)
        entry: dict[fx.Node, fx.Node] = {}  # value inside a region -> the value that entered the region
        declined: list[tuple[str, str]] = []
        count = 0
        for node in gm.graph.nodes:
            inside = node in layouts.channels_last
            if is_free(node) or prefers(gm, node):
                x: fx.Node = arguments(node)["x"]
                origin = entry.get(x, x)
                if inside:
                    set_argument(node, "channels_last", True)
                    entry[node] = origin
                    count += 1
                    continue
                declined.append((node.name, "read by an operation that needs the model's format"))
                if is_op(node, WINOGRAD_CONV2D) and origin is not x:
                    set_argument(node, "like", origin)
            elif is_op(node, CONV2D):
                declined.append((node.name, "the vendor's library is as fast in the model's format"))
            elif inside:
                entry[node] = next(entry[value] for value in node.all_input_nodes if value in entry)
        return Rewrites(count, tuple(declined), _notes(layouts))


def _name(node: fx.Node) -> str:
    """A convolution's module path, of anything else the node's name."""
    return str(node.meta.get(SITE, node.name))


def _notes(layouts: Layouts) -> tuple[str, ...]:
    """How many conversions are left, and where."""
    if not layouts.channels_last:
        return ()
    copies = ", ".join(f"{_name(value)} for {_name(reader)}" for value, reader in layouts.copies)
    return (
        f"images converted between layouts, unless the model is channels_last: {len(layouts.copies)} copied"
        + (f" ({copies})" if copies else ""),
        f"{len(layouts.inside)} inside kernels",
    )
