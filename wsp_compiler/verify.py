"""check=True: after every pass the graph must compute, in float64, what the plan says."""

from __future__ import annotations

import copy
from typing import Any, Protocol

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from wsp_compiler import ops
from wsp_compiler.errors import PassError
from wsp_compiler.plan import PruningPlan, SitePlan
from wsp_compiler.sites import padding_of
from wsp_compiler.trace import SITE, relative_error, run_apart
from wsp_compiler.winograd import transform_weight

TOLERANCE = 1e-5
"""Relative L2; the folded weights are stored in float32."""


def pruned_convolution(
    x: Tensor, conv: nn.Conv2d, plan: SitePlan, weights: tuple[Tensor, Tensor | None] | None = None
) -> Tensor:
    """The planned convolution computed from its kept Winograd weights, in x's dtype.

    ``weights`` are (U [p*p, n, c], bias) where they are not those of ``conv``.
    """
    site = ops.WinogradSite(plan.keep.to(x.device))
    site.fill(*(weights or (transform_weight(conv.weight, plan.tile), conv.bias)))
    padding, last = list(padding_of(conv)), ops.is_channels_last(conv.weight)
    V = ops.input_transform(x, site.columns, site.column_offset, padding, plan.tile)
    M = ops.sparse_bgemm(V, site.weight, site.rows, site.row_offset, site.column_offset)
    return ops.output_transform(
        M, x, site.rows, site.row_offset, site.bias, None, None, padding, plan.tile, "none", last
    )


class PlannedInterpreter(fx.Interpreter):
    """Runs a graph; a convolution that is planned but not lowered yet is computed from its kept weights."""

    def __init__(self, graph_module: fx.GraphModule, plan: PruningPlan) -> None:
        super().__init__(graph_module)
        self._plan = plan

    def run_node(self, n: fx.Node) -> Any:
        path = n.meta.get(SITE)
        if n.op == "call_module" and isinstance(path, str) and path in self._plan:
            conv = self.fetch_attr(str(n.target))
            if isinstance(conv, nn.Conv2d):
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                x = args[0] if args else kwargs["input"]
                return pruned_convolution(x, conv, self._plan[path], self._plan.weights(path, conv))
        return super().run_node(n)


class Check(Protocol):
    """What :func:`make_check` returns."""

    def __call__(self, gm: fx.GraphModule, name: str, plan: PruningPlan = ...) -> None: ...


def _to_double(value: Any) -> Any:
    def convert(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return pytree.tree_map(convert, value)


def make_check(gm: fx.GraphModule, plan: PruningPlan, inputs: tuple[Any, ...]) -> Check:
    """A check for :func:`wsp_compiler.passes.run_pipeline`.

    Args:
        gm: the traced graph, before any pass.
        plan: the pruning plan.
        inputs: values of the graph's placeholders.

    Returns:
        check(gm, pass name), which raises :class:`PassError` if the graph's float64 output has changed. It takes the
        plan that fits the graph as ``plan`` if that is another one.
    """
    inputs = _to_double(inputs)

    def outputs(graph_module: fx.GraphModule, name: str, plan: PruningPlan) -> list[Tensor]:
        double = copy.deepcopy(graph_module).double()
        try:
            result = run_apart(PlannedInterpreter(double, plan).run, inputs, {})
        except Exception as error:  # a broken graph may fail in any way
            raise _changed(name, f"the graph fails in float64: {type(error).__name__}: {error}") from error
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]

    expected = outputs(gm, "none, the traced graph", plan)

    def check(gm: fx.GraphModule, name: str, plan: PruningPlan = plan) -> None:
        actual = outputs(gm, name, plan)
        if [tensor.shape for tensor in actual] != [tensor.shape for tensor in expected]:
            shapes = [[list(tensor.shape) for tensor in tensors] for tensors in (expected, actual)]
            raise _changed(name, f"changed the outputs' shapes from {shapes[0]} to {shapes[1]}")
        for index, (want, got) in enumerate(zip(expected, actual, strict=True)):
            error = relative_error(want, got)
            if not error <= TOLERANCE:
                raise _changed(
                    name,
                    f"changed output {index}: relative error {error:.2e} in float64, allowed {TOLERANCE:.0e}",
                )

    return check


def _changed(name: str, what: str) -> PassError:
    return PassError(
        what, where=f"pass {name}", fix="set WSP_DUMP=directory and compare the graphs before and after it"
    )
