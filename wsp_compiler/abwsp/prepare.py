"""What a search needs before its first candidate: both plans, and each layer's time under both.

ABWSP paper, section 4.3, "Pre-processing".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from wsp_compiler.abwsp.choices import Choices, LayerPair
from wsp_compiler.abwsp.ranks import Ranks
from wsp_compiler.activations import device_and_dtype
from wsp_compiler.calibration import exact_float32, fit_site, networks_of
from wsp_compiler.clone import named_modules
from wsp_compiler.options import CompileOptions
from wsp_compiler.plan import PruningPlan
from wsp_compiler.planning import Planner
from wsp_compiler.progress import progress
from wsp_compiler.sites import ConvSite, collect_sites
from wsp_compiler.speed import SpeedSource
from wsp_compiler.trace import Call, TracedModel, trace

METHODS = ("wsp", "bwsp")


@dataclass(frozen=True)
class Preparation:
    """The network before the search.

    Attributes:
        model: in eval mode; not modified.
        options: of both plans; the method is set here.
        calls: calibration inputs.
        example_inputs: give the layers' shapes.
        refit: fit the kept weights of both plans on the calibration inputs, each layer for itself.
        target: where times are measured, see :func:`wsp_compiler.compile`.
        given_times: times to use instead.
    """

    model: nn.Module
    options: CompileOptions
    calls: Sequence[Call]
    example_inputs: Any
    refit: bool
    target: Any
    given_times: Mapping[str, LayerPair] | None = None

    def choices(self, ranks: Ranks) -> Choices:
        """Both plans and the times, the same on every rank; rank 0 alone measures."""
        traced = trace(self.model, self.example_inputs)
        sites = collect_sites(traced)
        plans = ranks.first(lambda: self._plans(traced, sites))
        return Choices(*plans, ranks.first(lambda: self._times(plans, sites)))

    def _convolutions(self) -> dict[str, nn.Conv2d]:
        return {path: conv for path, conv in named_modules(self.model) if isinstance(conv, nn.Conv2d)}

    def _sources(self) -> tuple[SpeedSource, SpeedSource]:
        from wsp_compiler.speedup import speed_sources  # it loads tvm

        return speed_sources(
            self.target, device_and_dtype(self.model)[0], self.options.precision, self.options.tune
        )

    def _plans(self, traced: TracedModel, sites: tuple[ConvSite, ...]) -> tuple[PruningPlan, PruningPlan]:
        """Both plans; what is slower than the dense convolution is left out of them."""
        speed = None if self.options.keep_slower or self.given_times is not None else self._sources()[0]
        wsp, bwsp = (
            Planner(
                traced,
                sites,
                self._convolutions(),
                replace(self.options, method=method, pr_scope="layer"),
                speed,
            ).make()
            for method in METHODS
        )
        return (self._fitted(traced, wsp), self._fitted(traced, bwsp)) if self.refit else (wsp, bwsp)

    def _fitted(self, traced: TracedModel, plan: PruningPlan) -> PruningPlan:
        """``plan`` with every layer fitted to what it receives in the dense network.

        Fitted one after the other, as calibration does, layers make up for the errors of those before them, and are of
        no use behind others: such candidates have an outlook that says little.
        """
        result = replace(plan, sites=dict(plan.sites), refits={}, errors=dict(plan.errors))
        with (
            progress("fitting layers", len(plan) * len(self.calls)) as advance,
            exact_float32(),
            torch.no_grad(),
        ):
            networks = networks_of(traced, self.calls)
            for path, is_convolution in networks.order(plan):
                if not is_convolution:
                    continue
                conv, entry = networks.module(path, pruned=False), plan[path]
                assert isinstance(conv, nn.Conv2d)
                choose = self.options.importance == "output" and entry.method in METHODS
                entry, fitted, error = fit_site(
                    networks, conv, entry, choose, partial(advance, f"fitting {path}")
                )
                result.sites[path], result.refits[path], result.errors[path] = entry, fitted, error
        return result

    def _times(
        self, plans: tuple[PruningPlan, PruningPlan], sites: tuple[ConvSite, ...]
    ) -> dict[str, LayerPair]:
        if self.given_times is not None:
            return dict(self.given_times)
        from wsp_compiler.speedup import compare_pairs

        layers = Choices(*plans, {}).layers
        pairs = {path: (plans[0][path], plans[1][path]) for path in layers}
        found = compare_pairs(pairs, sites, self._convolutions(), self._sources())
        return {path: LayerPair(times["wsp_us"], times["bwsp_us"]) for path, times in found.items()}
