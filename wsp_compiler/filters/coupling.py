"""Which channels of a graph have to stay or go together.

A channel is the output of one filter, wherever it flows: activations, batch norm and pooling pass it on, concatenation
puts it beside others, an addition ties it to the channel that it meets, a grouped convolution to the channels that
stand at the same place in the other groups. Ties are edges of a networkx graph over filters; what is connected
goes together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import networkx as nx
import torch
from torch import Tensor, fx, nn

from wsp_compiler.filters.operations import Operation, operation_of
from wsp_compiler.trace import SITE

Filter = tuple[str, int]
"""(module path of a convolution, number of one of its filters)."""


@dataclass
class Coupling:
    """The channels of one graph.

    Attributes:
        operations: what every node does; "opaque" also where its channels could not be followed.
        values: node -> number of the filter behind each of its channels [C], of none behind features; images that could
            not be followed are missing.
        filters: number -> filter.
        fixed: number -> why its channel has to stay.
        ties: graph over numbers.
        flat: nodes whose channels lie one after another along rows of features.
    """

    operations: dict[fx.Node, Operation] = field(default_factory=dict[fx.Node, Operation])
    values: dict[fx.Node, Tensor] = field(default_factory=dict[fx.Node, Tensor])
    filters: list[Filter] = field(default_factory=list[Filter])
    fixed: dict[int, str] = field(default_factory=dict[int, str])
    ties: nx.Graph[int] = field(default_factory=lambda: nx.Graph())
    flat: set[fx.Node] = field(default_factory=set[fx.Node])

    @property
    def paths(self) -> list[str]:
        """The convolutions whose filters were followed, in graph order."""
        return list(dict.fromkeys(path for path, _ in self.filters))

    def components(self) -> list[frozenset[int]]:
        """Filters that go together, the earliest first."""
        found = cast("Iterable[set[int]]", cast("Any", nx).connected_components(self.ties))
        return sorted(map(frozenset, found), key=min)

    def why_fixed(self, component: Iterable[int], prunable: Mapping[str, object]) -> str | None:
        """Why filters that go together have to stay; None if all are of ``prunable`` convolutions and none is fixed."""
        for number in sorted(component):
            if number in self.fixed:
                return self.fixed[number]
            path = self.filters[number][0]
            if path not in prunable:
                return f"their channels are tied to those of {path}, whose filters are not pruned"
        return None


def couple(gm: fx.GraphModule) -> Coupling:
    """Follow the channels of every convolution through ``gm`` (as traced, before any pass)."""
    found = Coupling()
    calls: Counter[int] = Counter()
    for node in gm.graph.nodes:
        operation = found.operations[node] = operation_of(gm, node)
        calls[id(operation.module)] += 1
    for node, operation in list(found.operations.items()):
        module, why = operation.module, None
        if module is not None and calls[id(module)] > 1 and module.state_dict():
            why = "which is called more than once"
        elif operation.writes and not _only_reader(found, operation.inputs[0]):
            why = "which writes into an image that others read"
        given = [found.values[x] for x in operation.inputs if x in found.values]
        value = None if why else _value(found, node, operation, given)
        if value is not None:
            found.values[node] = value
        elif operation.kind != "size":
            found.operations[node] = Operation("opaque", operation.inputs)
            for channels in given:
                for number in _numbers(channels):
                    reason = f"their channels are read by {node.name}" + (f", {why}" if why else "")
                    found.fixed.setdefault(number, reason)
    return found


def _value(found: Coupling, node: fx.Node, operation: Operation, given: list[Tensor]) -> Tensor | None:
    """Channels of the node's image, of none for features; None if they cannot be followed."""
    kind, module = operation.kind, operation.module
    if kind in ("conv", "grouped") and isinstance(module, nn.Conv2d):
        return _convolution(found, str(node.meta.get(SITE, node.target)), module, given)
    if not given or len(given) != len(operation.inputs) - (len(operation.inputs) == 2 and kind == "flatten"):
        return None
    if operation.inputs[0] in found.flat:
        if kind == "elementwise" and not isinstance(module, nn.PReLU):
            found.flat.add(node)
            return given[0]
        whole = isinstance(module, nn.Linear) and module.in_features % len(given[0]) == 0
        return given[0][:0] if whole else None
    if kind == "depthwise" and isinstance(module, nn.Conv2d):
        multiplier = module.out_channels // module.groups
        return given[0].repeat_interleave(multiplier) if len(given[0]) == module.in_channels else None
    if kind == "cat":
        return None if found.flat.intersection(operation.inputs) else torch.cat(given)
    if kind == "binary":
        if len(given[0]) != len(given[-1]) or operation.inputs[-1] in found.flat:
            return None
        _tie(found, given[0], given[-1])
        return given[0]
    if kind == "flatten":
        found.flat.add(node)
    fits = kind in ("norm", "elementwise", "pool", "flatten")
    if isinstance(module, nn.BatchNorm2d):
        fits = module.num_features == len(given[0])
    elif isinstance(module, nn.PReLU):
        fits = module.num_parameters in (1, len(given[0]))
    return given[0] if fits else None


def _convolution(found: Coupling, path: str, conv: nn.Conv2d, given: list[Tensor]) -> Tensor | None:
    if given and len(given[0]) != conv.in_channels:
        return None
    if given and conv.groups > 1:
        groups = given[0].view(conv.groups, -1)
        for other in groups[1:]:
            _tie(found, groups[0], other)
    numbers = torch.arange(len(found.filters), len(found.filters) + conv.out_channels)
    found.filters.extend((path, index) for index in range(conv.out_channels))
    found.ties.add_nodes_from(_numbers(numbers))
    return numbers


def _tie(found: Coupling, left: Tensor, right: Tensor) -> None:
    found.ties.add_edges_from(zip(_numbers(left), _numbers(right), strict=True))


def _numbers(channels: Tensor) -> list[int]:
    return cast("Any", channels).tolist()


def _only_reader(found: Coupling, image: fx.Node) -> bool:
    """True if nobody reads ``image``, or what it may be another name of, a second time."""
    while len(image.users) == 1:
        operation = found.operations[image]
        aliases = operation.kind in ("flatten", "elementwise") or operation.writes
        if not aliases or not operation.inputs:
            return True
        image = operation.inputs[0]
    return False
