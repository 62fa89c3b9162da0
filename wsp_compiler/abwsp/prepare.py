"""What a search needs before its first candidate: both plans, and each layer's time under both.

ABWSP paper, section 4.3, "Pre-processing".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from wsp_compiler.abwsp.choices import Choices, LayerPair
from wsp_compiler.abwsp.ranks import Ranks
from wsp_compiler.activations import device_and_dtype
from wsp_compiler.clone import named_modules
from wsp_compiler.options import CompileOptions
from wsp_compiler.plan import PruningPlan
from wsp_compiler.planning import Planner
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
        refit: fit the kept weights of both plans on the calibration inputs.
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
                self.calls if self.refit else None,
            ).make()
            for method in METHODS
        )
        return wsp, bwsp

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
