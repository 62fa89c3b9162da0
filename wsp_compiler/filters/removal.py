"""Which channels leave a graph under a plan, and what stands for the constants that they emit.

A pruned filter emits its bias. What its channel still adds in a reader is folded into the reader's bias where that is
exact: constants that are zero (behind ReLU often), linear layers, unpadded convolutions. Where zero padding
meets a constant, the sum is another one at the border, and a bias would be wrong there. One of the pruned
channels then stays as a carrier: the weights of the others are added to its own in proportion to the constants,
which is exact everywhere. So a group of channels loses all pruned ones but at most a few (one, as a rule).

Kernels may want their channels in multiples of a number. Then as many pruned channels stay as fill the last one up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from wsp_compiler.clone import named_modules
from wsp_compiler.filters.constants import constants_of, pads_constants
from wsp_compiler.filters.coupling import Coupling, couple
from wsp_compiler.plan import PruningPlan
from wsp_compiler.trace import SITE

CARRIER_RATIO = 1e-3
"""A carrier serves constants up to 1000 times as large; for larger ones another is taken."""


@dataclass(frozen=True)
class Fold:
    """What a reader does about the removed channels of its input.

    Attributes:
        stay: channels that are left, ascending.
        constant: float64 [C], of every removed channel; zeros elsewhere.
        carrier: the channel whose weights take up those of the removed ones, and its constant; None: the bias does.
    """

    stay: Tensor
    constant: Tensor
    carrier: tuple[int, float] | None


@dataclass(frozen=True)
class Removal:
    """What leaves a graph.

    Attributes:
        coupling: of the graph.
        removed: numbers of filters.
        reasons: path of a pruned convolution -> why (some of) its pruned filters stay.
        folds: node that reads images (a convolution or linear layer) -> what it does about them.
    """

    coupling: Coupling
    removed: frozenset[int] = frozenset()
    reasons: dict[str, str] = field(default_factory=dict[str, str])
    folds: dict[fx.Node, Fold] = field(default_factory=dict[fx.Node, Fold])

    def stay(self, node: fx.Node) -> Tensor:
        """Channels of the node's image that are left, ascending."""
        return torch.tensor(
            [
                i
                for i, number in enumerate(_numbers(self.coupling.values[node]))
                if number not in self.removed
            ],
            dtype=torch.long,
        )

    def sizes(self, gm: fx.GraphModule) -> dict[str, tuple[int, int]]:
        """Path -> (filters, channels) of every convolution that gets smaller."""
        found: dict[str, tuple[int, int]] = {}
        for node, operation in self.coupling.operations.items():
            conv = operation.module
            if not isinstance(conv, nn.Conv2d) or node not in self.coupling.values:
                continue
            x = operation.inputs[0]
            filters = len(self.stay(node))
            channels = len(self.stay(x)) if x in self.coupling.values else conv.in_channels
            if (filters, channels) != (conv.out_channels, conv.in_channels):
                found[str(node.meta.get(SITE, node.target))] = (filters, channels)
        return found


def pruned_filters(plan: PruningPlan) -> dict[str, Tensor]:
    """Path -> bool [n], False for filters that method "fp" prunes."""
    return {
        path: entry.keep.expand(1, entry.shape[1], 1).flatten()
        for path, entry in plan.items()
        if entry.method == "fp"
    }


def find_removal(
    gm: fx.GraphModule,
    plan: PruningPlan,
    coupling: Coupling | None = None,
    *,
    loud: bool = False,
    multiple: int = 1,
) -> Removal:
    """What leaves ``gm`` under ``plan``.

    Args:
        gm: as traced, with the plan's batch-norm statistics.
        plan: what is pruned.
        coupling: of ``gm``, if it is known already.
        loud: count on constants other than zero, as before a calibration that will set them.
        multiple: what Winograd kernels read and write keeps a multiple of so many channels, where pruned ones suffice.
    """
    keep = pruned_filters(plan)
    coupling = coupling or couple(gm)
    reasons: dict[str, str] = {}
    groups: list[frozenset[int]] = []
    for component in coupling.components():
        if not any(_is_pruned(coupling, number, keep) for number in component):
            continue
        why = coupling.why_fixed(component, keep)
        if why is None and not all(_is_pruned(coupling, number, keep) for number in component):
            why = "filters that its channels are tied to are kept"
        if why is None:
            groups.append(component)
        else:
            _explain(reasons, coupling, component, keep, why)
    wanted = frozenset(number for group in groups for number in group)
    constants = constants_of(coupling, _biases(gm, plan, keep), wanted)
    changing = _changing(coupling, constants, wanted)
    for group in [group for group in groups if group & changing]:
        _explain(
            reasons, coupling, group, keep, "zero padding makes something else of their constants at borders"
        )
        groups.remove(group)
    wanted = frozenset(number for group in groups for number in group)
    if loud:
        constants = {node: torch.where(value.isnan(), value, 1.0) for node, value in constants.items()}
    carriers, chosen = _carriers(coupling, plan, constants, groups, wanted)
    removed = wanted - carriers
    filling = _filling(coupling, plan, groups, removed, multiple)
    why = f"some of their channels fill up a multiple of {multiple}, which kernels want"
    _explain(reasons, coupling, filling, keep, why)
    removed -= filling
    removal = Removal(coupling, removed, reasons)
    for node, constant in constants_read(coupling, constants).items():
        stay = removal.stay(coupling.operations[node].inputs[0])
        if len(stay) < len(constant):
            left = constant.clone()
            left[stay] = 0.0
            carrier = chosen.get(node)
            by = None if carrier is None else (carrier, float(constant[carrier]))
            removal.folds[node] = Fold(stay, left, by)
    return removal


def constants_read(coupling: Coupling, constants: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
    """Node of a convolution or linear layer -> constants of the channels that it reads [C]."""
    found: dict[fx.Node, Tensor] = {}
    for node, operation in coupling.operations.items():
        if operation.kind in ("conv", "grouped", "linear") and operation.inputs[0] in constants:
            found[node] = constants[operation.inputs[0]]
    return found


def _numbers(channels: Tensor) -> list[int]:
    return cast("Any", channels).tolist()


def _is_pruned(coupling: Coupling, number: int, keep: Mapping[str, Tensor]) -> bool:
    path, index = coupling.filters[number]
    return path in keep and not bool(keep[path][index])


def _explain(
    reasons: dict[str, str], coupling: Coupling, group: frozenset[int], keep: Mapping[str, Tensor], why: str
) -> None:
    for path in {coupling.filters[number][0] for number in group}:
        if path in keep:
            reasons.setdefault(path, why)


def _biases(gm: fx.GraphModule, plan: PruningPlan, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    modules = dict(named_modules(gm))
    for node in gm.graph.nodes:
        path = node.meta.get(SITE)
        if path not in keep:
            continue
        conv, refit = modules[str(node.target)], plan.refits.get(path)
        if refit is not None:
            found[path] = refit.bias
        elif isinstance(conv, nn.Conv2d):
            found[path] = torch.zeros(len(keep[path])) if conv.bias is None else conv.bias
    return found


def _changing(
    coupling: Coupling, constants: Mapping[fx.Node, Tensor], wanted: frozenset[int]
) -> frozenset[int]:
    """Filters whose channel is no constant somewhere, or one that a grouped convolution cannot take up."""
    found: set[int] = set()
    for node, constant in constants.items():
        numbers = _numbers(coupling.values[node])
        unknown = _numbers(constant.isnan())
        found |= {number for number, bad in zip(numbers, unknown, strict=True) if bad and number in wanted}
    for node, constant in constants_read(coupling, constants).items():
        conv = coupling.operations[node].module
        if (
            coupling.operations[node].kind == "grouped"
            and isinstance(conv, nn.Conv2d)
            and pads_constants(conv)
        ):
            numbers = _numbers(coupling.values[coupling.operations[node].inputs[0]])
            loud = _numbers(constant != 0)
            found |= {number for number, bad in zip(numbers, loud, strict=True) if bad and number in wanted}
    return frozenset(found)


def folds_into_bias(module: nn.Module | None, path: str, plan: PruningPlan) -> bool:
    """True if constant channels add one constant per filter of ``module``, at the border too."""
    if not isinstance(module, nn.Conv2d):
        return True  # a linear layer
    entry = plan.get(path)
    # Pruned or refitted Winograd weights are no 3x3 filter: a constant image gives a pattern within each tile.
    filters = (
        entry is None or not entry.winograd or (entry.method in ("fp", "dense") and path not in plan.refits)
    )
    return filters and not pads_constants(module)


def _carriers(
    coupling: Coupling,
    plan: PruningPlan,
    constants: Mapping[fx.Node, Tensor],
    groups: list[frozenset[int]],
    wanted: frozenset[int],
) -> tuple[frozenset[int], dict[fx.Node, int]]:
    """(filters that stay as carriers, reader -> the carrier's channel in its input)."""
    group_of = {number: group for group in groups for number in group}
    stays: set[int] = set()
    chosen: dict[fx.Node, int] = {}
    for node, constant in constants_read(coupling, constants).items():
        operation = coupling.operations[node]
        if folds_into_bias(operation.module, str(node.meta.get(SITE, node.target)), plan):
            continue
        numbers = _numbers(coupling.values[operation.inputs[0]])
        mine = torch.tensor([number in wanted for number in numbers])
        size = torch.where(mine, constant.abs(), 0.0)  # constants of others are NaN
        if not bool((size > 0).any()):
            continue
        there = torch.tensor([number in stays for number in numbers])
        staying = torch.where(there, size, 0.0)
        enough = float(staying.max()) > CARRIER_RATIO * float(size.max())
        index = int((staying if enough else size).argmax())
        chosen[node] = index
        stays |= group_of[numbers[index]]
    return frozenset(stays), chosen


def _filling(
    coupling: Coupling,
    plan: PruningPlan,
    groups: list[frozenset[int]],
    removed: frozenset[int],
    multiple: int,
) -> frozenset[int]:
    """Filters of `removed` that stay after all, to fill up what Winograd kernels read and write."""
    group_of = {number: group for group in groups for number in group}
    found: set[int] = set()
    for node, operation in coupling.operations.items():
        entry = plan.get(str(node.meta.get(SITE, node.target)))
        if entry is None or not entry.winograd:
            continue
        for image in (operation.inputs[0], node):
            if image not in coupling.values:
                continue
            numbers = _numbers(coupling.values[image])
            leaving = [number for number in numbers if number in removed and number not in found]
            missing = -(len(numbers) - len(leaving)) % multiple
            if missing <= len(leaving):
                for number in leaving[:missing]:
                    found |= group_of[number]
    return frozenset(found)
