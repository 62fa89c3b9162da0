"""The dense and the pruned network as graphs that advance together, from one module asked for to the next.

Every batch keeps the values that are still needed where it stands, so that all layers together cost one forward
pass of each network. What is kept is bounded: batches beyond the limit start again from their inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from wsp_compiler.activations import checked, device_and_dtype, failure, is_fitted, on_device, select
from wsp_compiler.clone import clone_module
from wsp_compiler.errors import InputError
from wsp_compiler.plan import PruningPlan
from wsp_compiler.trace import SITE, Call
from wsp_compiler.units import CallSignature

KEPT_BYTES = 2 * 2**30
"""Activations that are kept between layers, of all batches and both networks together."""


@dataclass
class _Standing:
    """One batch in one network: the values still needed before node number ``position`` runs."""

    position: int = 0
    values: dict[fx.Node, Any] = field(default_factory=dict[fx.Node, Any])

    @property
    def bytes(self) -> int:
        found: dict[int, int] = {}
        for leaf in pytree.tree_leaves(list(self.values.values())):
            if isinstance(leaf, Tensor):
                found[leaf.untyped_storage().data_ptr()] = leaf.untyped_storage().nbytes()
        return sum(found.values())


class Frontier:
    """Networks of a model that was traced whole.

    Args:
        graph_module: its graph before any pass; not modified.
        signature: how calls map to the graph's placeholders.
        calls: the inputs.
        kept_bytes: see :data:`KEPT_BYTES`.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        signature: CallSignature,
        calls: Sequence[Call],
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._interpreters = tuple(fx.Interpreter(clone_module(graph_module)) for _ in range(2))
        self._signature, self._calls, self._kept_bytes = signature, calls, kept_bytes
        self._device, self._dtype = device_and_dtype(graph_module)
        self._nodes: list[fx.Node] = list(graph_module.graph.nodes)
        self._first: dict[str, int] = {}  # path of a module -> number of the node that calls it first
        for number, node in enumerate(self._nodes):
            if node.op == "call_module":
                self._first.setdefault(str(node.meta.get(SITE, node.target)), number)
        last = {used: node for node in self._nodes for used in node.all_input_nodes}
        self._dying: dict[fx.Node, list[fx.Node]] = {}
        for used, node in last.items():
            self._dying.setdefault(node, []).append(used)
        self._standing: dict[tuple[bool, int], _Standing] = {}

    @property
    def batches(self) -> int:
        return len(self._calls)

    def module(self, path: str, *, pruned: bool) -> nn.Module:
        return self._interpreters[pruned].fetch_attr(str(self._nodes[self._first[path]].target))

    def order(self, plan: PruningPlan) -> list[tuple[str, bool]]:
        found: list[tuple[str, bool, bool]] = []
        pruned: set[fx.Node] = set()
        for path, number in self._first.items():
            node, module = self._nodes[number], self.module(path, pruned=False)
            if not is_fitted(path, module, plan):
                continue
            convolution = isinstance(module, nn.Conv2d)
            if convolution:
                pruned.add(node)
            found.append((path, convolution, bool(pruned & set(node.all_input_nodes))))
        return select(found)

    def capture(self, path: str, index: int, *, pruned: bool, output: bool) -> Tensor:
        number = self._first[path]
        standing = self._standing.pop((pruned, index), _Standing())
        if standing.position > number + output or (output and standing.position == number + 1):
            standing = _Standing()  # it is past that point
        call = on_device(self._calls[index], self._device, self._dtype)
        try:
            with torch.no_grad():
                value = self._advance(standing, call, number, pruned=pruned, output=output)
        except InputError:
            raise
        except Exception as error:  # the model's own operators
            raise failure(call, index, error) from error
        kept = sum(other.bytes for other in self._standing.values())
        if kept + standing.bytes <= self._kept_bytes:
            self._standing[pruned, index] = standing
        return checked(value, path, index, output=output)

    def finish(self, path: str, index: int, value: Tensor, *, pruned: bool) -> Any:
        number = self._first[path]
        standing = self._standing.get((pruned, index), _Standing())
        if standing.position > number + 1:
            standing = _Standing()
        # the rest of the graph may write into what it reads, and other layers still need that
        copied = _Standing(
            standing.position,
            dict(zip(standing.values, copy.deepcopy(list(standing.values.values())), strict=True)),
        )
        call = on_device(self._calls[index], self._device, self._dtype)
        node, last = self._nodes[number], len(self._nodes) - 1
        try:
            with torch.no_grad():
                if copied.position <= number:
                    self._advance(copied, call, number, pruned=pruned, output=True)
                if node in copied.values:
                    shape = copied.values[node].shape
                    copied.values[node] = value.to(copied.values[node].dtype).view(shape)
                return self._advance(copied, call, last, pruned=pruned, output=True)
        except Exception as error:  # the model's own operators
            raise failure(call, index, error) from error

    def _advance(self, standing: _Standing, call: Call, number: int, *, pruned: bool, output: bool) -> Tensor:
        interpreter = self._interpreters[pruned]
        interpreter.env = standing.values
        value: Any = None
        for node in self._nodes[standing.position : number + output]:
            if node.op == "placeholder":
                given = dict(zip(self._signature.placeholders, self._signature.bind(*call), strict=True))
                value = given[str(node.target)]
            else:
                value = interpreter.run_node(node)
            standing.values[node] = value
            for dead in self._dying.get(node, ()):
                standing.values.pop(dead, None)
            standing.position += 1
        if output:
            return value
        args, kwargs = interpreter.fetch_args_kwargs_from_env(self._nodes[number])
        return args[0] if args else kwargs["input"]
