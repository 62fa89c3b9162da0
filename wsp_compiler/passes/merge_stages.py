"""Merge the three Winograd stages of a layer into one operator, so that its kernels share one launch plan.

rewrite:
    V = wsp::input_transform(x, ...)
    M = wsp::sparse_bgemm(V, ...)          ->  y = wsp::winograd_conv2d(x, ...)
    y = wsp::output_transform(M, x, ...)

The merged call stands where the output transform stood and reads x there, so a chain is left alone if an
in-place operation of the model comes between its stages.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx

from wsp_compiler.passes.base import (
    INPUT_TRANSFORM,
    OUTPUT_TRANSFORM,
    SPARSE_BGEMM,
    WINOGRAD_CONV2D,
    WSP_OPS,
    PassBase,
    Rewrites,
    altered,
    arguments,
    called_module,
    is_op,
)
from wsp_compiler.plan import PruningPlan

IN_PLACE_OPERATORS = frozenset(
    (
        "setitem",
        "delitem",
        "iadd",
        "iand",
        "iconcat",
        "ifloordiv",
        "ilshift",
        "imatmul",
        "imod",
        "imul",
        "ior",
        "ipow",
        "irshift",
        "isub",
        "itruediv",
        "ixor",
    )
)
PURE_MODULES = ("torch", "math", "builtins")
"""Homes of functions whose names and arguments tell whether they write."""


def _writes_by_option(node: fx.Node) -> bool:
    """True for ``inplace=True`` (by name or position) and for a given ``out``."""
    if node.kwargs.get("inplace") or node.kwargs.get("out") is not None:
        return True
    try:
        given = inspect.signature(cast("Any", node.target)).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):  # builtin functions have no signature
        return False
    return bool(given.get("inplace"))


def _may_write(gm: fx.GraphModule, node: fx.Node) -> bool:
    """True if ``node`` may modify a tensor in place; code that is not PyTorch's own may do anything."""
    module = called_module(gm, node)
    if module is not None:
        known = type(module).__module__.split(".")[0] == "torch" and altered(module) is None
        return not known or bool(getattr(module, "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op != "call_function" or node.target in WSP_OPS:
        return False
    target = cast("Any", node.target)
    if isinstance(target, torch._ops.OpOverload):  # pyright: ignore[reportPrivateUsage]
        return bool(cast("Any", target)._schema.is_mutable)
    name, home = getattr(target, "__name__", ""), str(getattr(target, "__module__", ""))
    if home == "_operator":
        return name in IN_PLACE_OPERATORS
    return name.endswith("_") or home.split(".")[0] not in PURE_MODULES or _writes_by_option(node)


def _written_between(gm: fx.GraphModule, first: fx.Node, last: fx.Node) -> str | None:
    """Name of a node strictly between two nodes that may modify a tensor in place, or None."""
    node = first.next
    while node is not last:
        if _may_write(gm, node):
            return node.name
        node = node.next
    return None


def _declines_merging(gm: fx.GraphModule, output: fx.Node) -> str | None:
    """Why the stages that end in ``output`` cannot become one call, or None."""
    M: fx.Node = arguments(output)["M"]
    if not is_op(M, SPARSE_BGEMM) or not is_op(arguments(M)["V"], INPUT_TRANSFORM):
        return "its stages are not directly connected"
    V: fx.Node = arguments(M)["V"]
    if len(M.users) > 1 or len(V.users) > 1:
        return "V or M has other users"
    first, last = arguments(V), arguments(output)
    if any(first[name] != last[name] for name in ("x", "padding", "tile")):
        return "its first and last stage differ in input, padding or tile"
    writer = _written_between(gm, V, output)
    return None if writer is None else f"the in-place operation {writer} comes between its stages"


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
            reason = _declines_merging(gm, output)
            if reason is not None:
                declined.append((output.name, reason))
                continue
            middle = arguments(M)
            first = arguments(middle["V"])
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
