"""Replace every planned convolution by Winograd's three stages over its kept weights.

rewrite:
    y = conv(x)  ->  V = wsp::input_transform(x, columns, column_offset, padding, tile)
                     M = wsp::sparse_bgemm(V, weight, rows, row_offset, column_offset)
                     y = wsp::output_transform(M, x, rows, row_offset, bias, None, None, padding, tile, ...)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from torch import fx, nn

from wsp_compiler.ops import WinogradSite, is_channels_last
from wsp_compiler.passes.base import (
    INPUT_TRANSFORM,
    OUTPUT_TRANSFORM,
    SPARSE_BGEMM,
    PassBase,
    Rewrites,
    called_module,
    first_input,
    get_buffer,
)
from wsp_compiler.passes.choose_keep import SITE_PLAN, site_module_name
from wsp_compiler.plan import PruningPlan, SitePlan
from wsp_compiler.sites import padding_of
from wsp_compiler.trace import SITE


def _lower_call(gm: fx.GraphModule, node: fx.Node, conv: nn.Conv2d, whole: PruningPlan) -> None:
    plan: SitePlan = node.meta[SITE_PLAN]
    name = site_module_name(gm, plan.path)
    site = gm.get_submodule(name)
    assert isinstance(site, WinogradSite)
    if not hasattr(site, "weight"):
        site.fill(*whole.weights(plan.path, conv))
    buffer = {
        key: get_buffer(gm, node, name, key)
        for key in ("weight", "rows", "row_offset", "columns", "column_offset", "bias")
    }
    x, padding, graph = cast("fx.Node", first_input(node)), list(padding_of(conv)), gm.graph
    with graph.inserting_before(node):
        V = graph.call_function(
            INPUT_TRANSFORM, (x, buffer["columns"], buffer["column_offset"], padding, plan.tile)
        )
        M = graph.call_function(
            SPARSE_BGEMM, (V, buffer["weight"], buffer["rows"], buffer["row_offset"], buffer["column_offset"])
        )
        y = graph.call_function(
            OUTPUT_TRANSFORM,
            (M, x, buffer["rows"], buffer["row_offset"], buffer["bias"], None, None, padding, plan.tile),
            {"activation": "none", "channels_last": is_channels_last(conv.weight)},
        )
    for stage in (V, M, y):
        stage.meta[SITE] = plan.path
    node.replace_all_uses_with(y)
    graph.erase_node(node)


@dataclass(frozen=True)
class LowerWinograd(PassBase):
    """See the module's docstring."""

    name: str = field(default="lower_winograd", init=False)
    requires: tuple[str, ...] = field(default=("keep_chosen",), init=False)
    provides: tuple[str, ...] = field(default=("lowered",), init=False)

    def run(self, gm: fx.GraphModule, plan: PruningPlan) -> Rewrites:
        """Lower every node that carries a SitePlan."""
        count = 0
        for node in list(gm.graph.nodes):
            conv = called_module(gm, node)
            if SITE_PLAN in node.meta and isinstance(conv, nn.Conv2d):
                _lower_call(gm, node, conv, plan)
                count += 1
        return Rewrites(count)
