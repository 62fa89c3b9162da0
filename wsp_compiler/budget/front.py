"""Plans of least predicted error for every budget: options of each layer with one cost and one error each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from wsp_compiler.budget.allocate import allocate
from wsp_compiler.budget.candidates import OutputSizes, dense_multiplies, kept_multiplies
from wsp_compiler.budget.predict import Prediction
from wsp_compiler.budget.times import LayerTimes
from wsp_compiler.plan import PruningPlan
from wsp_compiler.site_plan import SitePlan


@dataclass(frozen=True)
class Option:
    """One thing that a layer can become.

    Attributes:
        entry: its plan; None leaves the layer to the dense convolution.
        cost: in the front's unit.
        error: squared, that it adds to the network's output.
    """

    entry: SitePlan | None
    cost: float
    error: float


@dataclass(frozen=True)
class Front:
    """The options of every layer that shares the budget.

    Attributes:
        base: holds what does not share it, and every layer's place.
        options: path -> what the layer can become.
        whole: the cost with nothing pruned, to which ratios refer.
    """

    base: PruningPlan
    options: Mapping[str, Sequence[Option]]
    whole: float

    def costs(self) -> list[list[tuple[float, float]]]:
        """(cost, error) of every option of every layer."""
        return [[(option.cost, option.error) for option in found] for found in self.options.values()]

    @property
    def least(self) -> float:
        """The lowest total cost."""
        return sum(min(option.cost for option in found) for found in self.options.values())

    def chosen(self, budget: float) -> dict[str, Option] | None:
        """The options of least total error within ``budget``; None if it is below :attr:`least`."""
        indices = allocate(self.costs(), budget)
        if indices is None:
            return None
        pairs = zip(self.options.items(), indices, strict=True)
        return {path: found[index] for (path, found), index in pairs}

    def cost(self, chosen: Mapping[str, Option]) -> float:
        """Total cost of one option for every layer."""
        return sum(option.cost for option in chosen.values())

    def error(self, chosen: Mapping[str, Option]) -> float:
        """Total predicted squared error of the network's output."""
        return sum(option.error for option in chosen.values())

    def plan(self, chosen: Mapping[str, Option]) -> PruningPlan:
        """``base`` with the chosen options in the layers' places."""
        plan = replace(
            self.base,
            sites=dict(self.base.sites),
            left_alone=dict(self.base.left_alone),
            times={path: times for path, times in self.base.times.items() if path not in chosen},
            errors=dict(self.base.errors),
        )
        for path, option in chosen.items():
            if option.entry is None:
                del plan.sites[path]
                plan.errors.pop(path, None)
                plan.left_alone[path] = "the dense convolution is fast enough for the target latency"
            else:
                plan.sites[path] = option.entry
                plan.errors[path] = math.sqrt(option.error)
        return plan


def multiplies_front(
    base: PruningPlan, predictions: Mapping[str, Prediction], sizes: Mapping[str, OutputSizes]
) -> Front:
    """Cost: multiplications with the kept weights; whole: those of unpruned F(2x2, 3x3)."""
    options = {
        path: [
            Option(entry, float(kept_multiplies(entry, sizes[path])), error)
            for entry, error in zip(found.entries, found.errors, strict=True)
        ]
        for path, found in predictions.items()
    }
    whole = sum(dense_multiplies(found.entries[0], sizes[path]) for path, found in predictions.items())
    return Front(base, options, float(whole))


def time_front(
    base: PruningPlan, predictions: Mapping[str, Prediction], times: Mapping[str, LayerTimes]
) -> Front | None:
    """Cost: microseconds; whole: those of the dense convolutions, which are options too. None if some are unknown."""
    options: dict[str, list[Option]] = {}
    whole = 0.0
    for path, found in predictions.items():
        us, dense = times[path]
        if us is None or dense is None:
            return None
        options[path] = [
            Option(None, dense, 0.0),
            *(Option(*values) for values in zip(found.entries, us, found.errors, strict=True)),
        ]
        whole += dense
    return Front(base, options, whole)


__all__ = ["Front", "Option", "multiplies_front", "time_front"]
