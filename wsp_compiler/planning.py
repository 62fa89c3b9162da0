"""From options and data to a finished plan: even or uneven ratios, budgets, patterns, calibration.

``Planner.make`` says which of them applies:

max_drop        -> the least cost whose measured drop stays within it (budget/drop.py)
target_latency  -> the least error whose measured time stays within it (budget/latency.py)
pr, "global"    -> the least error at that share of multiplications
pr, "layer"     -> the same ratio in every layer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from wsp_compiler.adaptive import Pair, choose_patterns
from wsp_compiler.budget.candidates import free_paths, grid_candidates, kind_of, output_sizes
from wsp_compiler.budget.drop import largest_within
from wsp_compiler.budget.front import Front, Option, multiplies_front, time_front
from wsp_compiler.budget.latency import fit_latency
from wsp_compiler.budget.predict import Prediction, RoughPass, predict_from_weights, rough_pass
from wsp_compiler.budget.times import candidate_times
from wsp_compiler.calibration import calibrate, exact_float32, networks_of
from wsp_compiler.errors import BudgetError, OptionError
from wsp_compiler.filters.coupling import couple
from wsp_compiler.filters.feature_ranks import feature_ranks
from wsp_compiler.filters.settle import settle_filters, tied_paths
from wsp_compiler.options import CompileOptions
from wsp_compiler.plan import (
    BALANCE_GAIN,
    PruningPlan,
    make_plan,
    plan_times,
    site_candidates,
    site_times,
)
from wsp_compiler.progress import progress
from wsp_compiler.pruning.hrank import FeatureRanks
from wsp_compiler.site_plan import SitePlan
from wsp_compiler.sites import ConvSite
from wsp_compiler.speed import SpeedSource
from wsp_compiler.trace import Call, TracedModel

FINE_STEP = 0.025
"""Candidates close to even ratios."""
TRIAL_NOISE = 1.03
"""Uneven ratios are taken unless their roughly calibrated network has more error than the even one's by this factor."""
TYPICAL_RATIO = 0.5
"""Around which errors are predicted if pr=0 is given with a budget that does not read it."""


@dataclass
class Planner:
    """Makes the plan of one model.

    Attributes:
        traced: the model, before any pass.
        sites, convolutions: all of its convolutions, and their modules by path.
        options: what the user asks for.
        speed: knows times on the device, or None.
        calls: calibration data, or None.
    """

    traced: TracedModel
    sites: tuple[ConvSite, ...]
    convolutions: Mapping[str, nn.Conv2d]
    options: CompileOptions
    speed: SpeedSource | None = None
    calls: Sequence[Call] | None = None

    def make(
        self,
        measure: Callable[[PruningPlan], float] | None = None,
        evaluate: Callable[[PruningPlan], float] | None = None,
    ) -> PruningPlan:
        """The plan, calibrated if there is data.

        Args:
            measure: milliseconds of the whole network compiled by a plan; for target_latency.
            evaluate: drop of eval_fn under a plan; for max_drop.

        Raises:
            BudgetError: a budget cannot be met.
        """
        if self.options.max_drop is not None:
            assert evaluate is not None
            return self._within_drop(self.options.max_drop, evaluate)
        if self.options.target_latency is not None:
            assert measure is not None
            return self._within_latency(self.options.target_latency, measure)
        base = self._base()
        scope = self.options.pr_scope or ("layer" if self.calls is None else "global")
        if scope == "global" and self.options.pr > 0 and free_paths(base, self.options):
            return self.calibrated(self._global(base))
        return self.calibrated(self._balanced(base))

    def calibrated(self, plan: PruningPlan, choose: bool | None = None) -> PruningPlan:
        """``plan`` refined on the data, with a progress bar; as it is without data.

        Args:
            choose: choose ``keep`` anew; by default where importance is "output".
        """
        settled: set[str] = set()
        if choose is None:
            plan = self._settled(plan)
            tied = [paths for gm in self.traced.units.values() for paths in tied_paths(couple(gm), plan)]
            settled = {path for paths in tied for path in paths}
        if self.calls is None:
            return plan
        choose = self.options.importance == "output" if choose is None else choose
        with progress("calibrating", len(plan) * len(self.calls)) as advance:
            return calibrate(
                self.traced,
                plan,
                self.calls,
                choose=choose,
                settled=settled,
                on_step=lambda path: advance(f"calibrating {path}"),
            )

    def _settled(self, plan: PruningPlan) -> PruningPlan:
        """Method "fp": which filters go together, and how what is left of their layers runs."""
        scores: dict[str, FeatureRanks] = {}
        filters = [path for path, entry in plan.items() if entry.method == "fp"]
        if self.options.importance == "hrank" and filters:
            if self.calls is None:
                raise OptionError(
                    "importance='hrank' ranks feature maps, which needs sample inputs",
                    where="compile",
                    fix="pass calibration, or use another importance",
                )
            with progress("ranking feature maps", len(filters) * len(self.calls)) as advance, torch.no_grad():
                networks = networks_of(self.traced, self.calls)
                order = [path for path, _ in networks.order(plan) if path in filters]
                scores = feature_ranks(
                    networks,
                    self.traced.units,
                    order,
                    lambda path: advance(f"ranking feature maps of {path}"),
                )
        return settle_filters(
            plan, self.traced.units, self.sites, self.convolutions, self.options, self.speed, scores,
            calibrated=self.calls is not None,
        )  # fmt: skip

    def _base(self, *, budget: bool = False) -> PruningPlan:
        """Every layer at the same ratio; with data "abwsp" begins with "wsp", which keeps most.

        Args:
            budget: for budgets that do not read ``pr``: slower layers too, and at some ratio above 0.
        """
        options = self.options
        if budget:
            options = replace(options, keep_slower=True, pr=options.pr or TYPICAL_RATIO)
        if self.calls is not None and options.method == "abwsp":
            options = replace(options, method="wsp")
        return make_plan(self.sites, self.convolutions, options, self.speed)

    def _grid(self, base: PruningPlan, methods: Sequence[str] = ()) -> dict[str, list[SitePlan]]:
        """The candidates of every layer that shares the budget: of ``methods``, else of the base plan's pattern."""
        pr = self.options.pr
        extra = (pr, max(0.0, pr - FINE_STEP), min(0.99, pr + FINE_STEP))
        return {
            path: grid_candidates(
                path, self.convolutions[path], self.options, methods or (base[path].method,), extra
            )
            for path in free_paths(base, self.options)
        }

    def _predictions(self, base: PruningPlan, candidates: Mapping[str, Sequence[SitePlan]]) -> RoughPass:
        """What each candidate adds to the error of the network's output; with data, the error of ``base`` too."""
        if self.calls is None:
            return RoughPass(predict_from_weights(candidates, self.convolutions), None)
        with (
            progress("predicting errors", len(base) * len(self.calls)) as advance,
            exact_float32(),
            torch.no_grad(),
        ):
            return rough_pass(
                self.traced,
                base,
                candidates,
                self.calls,
                choose=self.options.importance == "output",
                on_step=lambda path: advance(f"predicting errors of {path}"),
            )

    def _global(self, base: PruningPlan) -> PruningPlan:
        """Least error at ``pr`` over all layers together; but even ratios if a trial says that others are worse."""
        found = self._predictions(base, self._grid(base))
        front = self._multiplies_front(base, found.predictions)
        plan = front.plan(within_ratio(front, self.options.pr))
        if found.change is not None:
            tried = self._predictions(plan, {})
            if tried.change is None or tried.change > TRIAL_NOISE * found.change:
                plan = base
        return self._without_slower(self._balanced(plan))

    def _multiplies_front(self, base: PruningPlan, predictions: Mapping[str, Prediction]) -> Front:
        seen = {path: found.seen for path, found in predictions.items() if found.seen is not None}
        sizes = {site.path: output_sizes(site, seen) for site in self.sites if site.path in predictions}
        for path, known in sizes.items():
            if not known:
                raise BudgetError(
                    "its image size is not known, so that its multiplications cannot be counted",
                    where=path or "the model itself",
                    fix="pass example_inputs or calibration, or pr_scope='layer'",
                )
        return multiplies_front(base, predictions, sizes)

    def _time_front(self) -> Front | None:
        """All patterns and tiles, with their times; None where times are unknown."""
        base = self._base(budget=True)
        methods = ("wsp", "bwsp") if self.options.method == "abwsp" else ()
        candidates = self._grid(base, methods)
        sites = {site.path: site for site in self.sites}
        times = candidate_times(candidates, sites, self.convolutions, self.speed)
        if any(us is None or dense is None for us, dense in times.values()):
            return None
        return time_front(base, self._predictions(base, candidates).predictions, times)

    def _within_latency(self, target: float, measure: Callable[[PruningPlan], float]) -> PruningPlan:
        front = self._time_front()
        if front is None:
            raise BudgetError(
                "the times of some layers are not known",
                where="target_latency",
                fix="pass example_inputs, and tune='fast', which measures them",
            )
        return self.calibrated(self._timed(fit_latency(front, target, measure)))

    def _within_drop(self, most: float, drop_of: Callable[[PruningPlan], float]) -> PruningPlan:
        front = self._time_front() if self.speed is not None else None
        if front is None:
            base = self._base(budget=True)
            front = self._multiplies_front(base, self._predictions(base, self._grid(base)).predictions)

        def prepared(chosen: Mapping[str, Option]) -> PruningPlan:
            return self.calibrated(front.plan(chosen))

        return self._timed(largest_within(front, most, prepared, drop_of))

    def _balanced(self, plan: PruningPlan) -> PruningPlan:
        """ABWSP on calibration data: balanced rows where they are faster and cost next to nothing."""
        if self.options.method != "abwsp" or self.calls is None or self.speed is None:
            return plan
        known = {site.path: site for site in self.sites}
        pairs: dict[str, tuple[SitePlan, SitePlan]] = {}
        times: dict[str, Pair | None] = {}
        for path in free_paths(plan, self.options):
            rule, conv = self.options.rule_for(path), self.convolutions[path]
            if plan[path].pr == 0 or (rule is not None and rule.method is not None):
                continue
            options = replace(self.options, method="bwsp", pr=plan[path].pr, tile=plan[path].tile)
            (other,) = site_candidates(path, conv, rule, options)
            pairs[path] = plan[path], other
            us = [
                site_times(entry, known[path], conv, self.speed, dense=False).pruned for entry in pairs[path]
            ]
            times[path] = None if us[0] is None or us[1] is None else (us[0].us, us[1].us)
        if not any(pair is not None and pair[0] >= BALANCE_GAIN * pair[1] for pair in times.values()):
            return plan
        predictions = self._predictions(plan, pairs).predictions
        errors = {path: (found.errors[0], found.errors[1]) for path, found in predictions.items()}
        chosen = choose_patterns(errors, times)
        balanced = {path: predictions[path].entries[1] for path, method in chosen.items() if method == "bwsp"}
        return replace(plan, sites={**plan.sites, **balanced})

    def _without_slower(self, plan: PruningPlan) -> PruningPlan:
        """``plan`` with times; layers known to be no faster than dense stay dense, unless the user wants them."""
        timed = self._timed(plan)
        if self.options.keep_slower:
            return timed
        for path, times in timed.times.items():
            if path in timed.sites and times.slower and timed[path].method != "fp":
                del timed.sites[path]
                timed.errors.pop(path, None)
                timed.left_alone[path] = f"the dense convolution is faster: {times.text()}"
        return timed

    def _timed(self, plan: PruningPlan) -> PruningPlan:
        times = plan_times(plan, self.sites, self.convolutions, self.speed)
        return replace(
            plan,
            sites=dict(plan.sites),
            left_alone=dict(plan.left_alone),
            errors=dict(plan.errors),
            times={**plan.times, **times},
        )


def within_ratio(front: Front, pr: float) -> dict[str, Option]:
    """The options of least error that keep at most 1 - ``pr`` of the multiplications.

    Even ratios round up to whole rows; what they keep at ``pr`` is allowed too.
    """
    even = {
        path: option
        for path, found in front.options.items()
        for option in found
        if option.entry is not None
        and option.entry.pr == pr
        and kind_of(option.entry) == kind_of(front.base[path])
    }
    chosen = front.chosen(max((1 - pr) * front.whole, front.cost(even)))
    assert chosen is not None
    return chosen if front.error(chosen) < front.error(even) else even  # rounding of costs may miss it
