"""The choice that ABWSP makes, WSP or BWSP for every layer: plans of assignments, and their total balanced speedup."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from wsp_compiler.abwsp.sampling import BWSP
from wsp_compiler.plan import BALANCE_GAIN, PruningPlan
from wsp_compiler.refits import NormStatistics


@dataclass(frozen=True)
class LayerPair:
    """Microseconds per call of one layer pruned by WSP and by BWSP, on the device."""

    wsp_us: float
    bwsp_us: float


@dataclass(frozen=True)
class Choices:
    """Two plans of one network, and all that lie between them.

    Attributes:
        wsp, bwsp: the plans in which every layer takes the one pattern or the other.
        times: layer path -> both times, where they are known.
    """

    wsp: PruningPlan
    bwsp: PruningPlan
    times: Mapping[str, LayerPair]

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Paths of the layers that have a choice.

        They are pruned in both plans, not in the same way, and not known to gain less than 2% by BWSP, which keeps less
        of what matters.
        """
        return tuple(
            path for path in self.wsp if path in self.bwsp and self._differs(path) and self._gains(path)
        )

    def _gains(self, path: str) -> bool:
        pair = self.times.get(path)
        return pair is None or pair.bwsp_us * BALANCE_GAIN <= pair.wsp_us

    def _differs(self, path: str) -> bool:
        a, b = self.wsp[path], self.bwsp[path]
        if a.method == b.method:  # a rule names it
            return False
        return a.tile != b.tile or not torch.equal(a.keep.expand(a.shape), b.keep.expand(b.shape))

    def methods(self, assignment: str) -> dict[str, str]:
        """Layer path -> "wsp" or "bwsp", of the layers that have a choice."""
        signs = zip(self.layers, assignment, strict=True)
        return {path: "bwsp" if sign == BWSP else "wsp" for path, sign in signs}

    def plan(self, assignment: str, norms: Mapping[str, NormStatistics] | None = None) -> PruningPlan:
        """The plan of an assignment, each layer as in the plan that it is taken from.

        A layer that only one of the two plans prunes (in the other, the dense convolution is known to be faster) is
        pruned. Batch-norm statistics are ``norms`` alone: those of the two plans belong to other networks.
        """
        chosen = self.methods(assignment)
        plan = PruningPlan(norms=dict(norms or {}))
        for path in dict.fromkeys((*self.wsp, *self.bwsp)):
            balanced = path not in self.wsp or chosen.get(path) == "bwsp"
            source = self.bwsp if balanced else self.wsp
            plan.sites[path] = source[path]
            for own, given in ((plan.refits, source.refits), (plan.errors, source.errors)):
                if path in given:
                    own[path] = given[path]  # type: ignore[assignment]
        for path, why in self.wsp.left_alone.items():
            if path not in plan.sites:
                plan.left_alone[path] = why
        return plan

    def total_speedup(self, assignment: str) -> float:
        """Total balanced speedup: sum of t_WSP / sum of the chosen patterns' times, over layers with known times.

        Layers without a choice count as WSP. 1.0 if no time is known.
        """
        methods = self.methods(assignment)
        known = [(pair, methods.get(path)) for path, pair in self.times.items() if path in self.wsp]
        wsp = sum(pair.wsp_us for pair, _ in known)
        chosen = sum(pair.bwsp_us if method == "bwsp" else pair.wsp_us for pair, method in known)
        return wsp / chosen if chosen > 0 else 1.0
