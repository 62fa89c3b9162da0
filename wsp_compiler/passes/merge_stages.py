"""Merge the three Winograd stages of a layer into one operator, so that its kernels share one launch plan.

rewrite:
    V = wsp::input_transform(x, ...)
    M = wsp::sparse_bgemm(V, ...)          ->  y = wsp::winograd_conv2d(x, ...)
    y = wsp::output_transform(M, x, ...)

The merged call stands where the output transform stood and reads x there, so a chain is left alone if an
in-place operation of the model comes between its stages.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from wsp_compiler.passes.base import (
    INPUT_TRANSFORM,
    OUTPUT_TRANSFORM,
    SPARSE_BGEMM,
    WINOGRAD_CONV2D,
    WSP_OPS,
    PassBase,
    Rewrites,
    arguments,
    is_op,
)
from wsp_compiler.plan import PruningPlan


def _may_write(gm: fx.GraphModule, node: fx.Node) -> bool:
    """True if ``node`` may modify a tensor in place."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return bool(getattr(module, "inplace", False)) or type(module).__module__.split(".")[0] != "torch"
    if node.op not in ("call_function", "call_method") or node.target in WSP_OPS:
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "_")
    is_in_place_operator = getattr(node.target, "__module__", "") == "_operator" and name.startswith("i")
    return name.endswith("_") or is_in_place_operator or name in ("setitem",) or bool(node.kwargs.get("inplace"))


def _written_between(gm: fx.GraphModule, first: fx.Node, last: fx.Node) -> str | None:
    """Name of a node strictly between two nodes that may modify a tensor in place, or None."""
    node = first.next
    while node is not last:
        if _may_write(gm, node):
            return node.name
        node = node.next
    return None


@dataclass(frozen=True)
class MergeStages(PassBase):
    """See the module's docstring."""

    name: str = field(default="merge_stages", init=False)
    requires: tuple[str, ...] = field(default=("lowered",), init=False)
    provides: tuple[str, ...] = field(default=("merged",), init=False)
    after: tuple[str, ...] = field(default=("fold_batch_norm", "fuse_epilogue"), init=False)

    def run(self, gm: fx.GraphModule, plan: PruningPlan) -> Rewrites:
        """Merge every chain whose intermediate values nobody else reads."""
        count = 0
        declined: list[tuple[str, str]] = []
        for output in list(gm.graph.nodes):
            if not is_op(output, OUTPUT_TRANSFORM):
                continue
            last = arguments(output)
            M: fx.Node = last.pop("M")
            middle = arguments(M) if is_op(M, SPARSE_BGEMM) else {}
            V: fx.Node | None = middle.get("V")
            if V is None or not is_op(V, INPUT_TRANSFORM):
                declined.append((output.name, "its stages are not directly connected"))
                continue
            if len(M.users) > 1 or len(V.users) > 1:
                declined.append((output.name, "V or M has other users"))
                continue
            writer = _written_between(gm, V, output)
            if writer is not None:
                declined.append((output.name, f"the in-place operation {writer} comes between its stages"))
                continue
            first = arguments(V)
            with gm.graph.inserting_before(output):
                merged = gm.graph.call_function(
                    WINOGRAD_CONV2D,
                    kwargs={
                        **last,
                        "weight": middle["weight"],
                        "columns": first["columns"],
                        "column_offset": first["column_offset"],
                    },
                )
            merged.meta.update(output.meta)
            output.replace_all_uses_with(merged)
            gm.graph.erase_node(output)
            count += 1
        return Rewrites(count, tuple(declined))
