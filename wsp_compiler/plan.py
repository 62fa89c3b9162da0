"""Sites and options -> PruningPlan: which convolutions become Winograd, with which pattern, tile and weights.

The plan is made on the unfolded weights, as the paper does; batch norm is folded later, in lowering. Passes
and kernels only obey it.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wsp_compiler.errors import PlanError
from wsp_compiler.options import TILES, CompileOptions, PruneRule
from wsp_compiler.pruning import IMPORTANCES, PATTERNS
from wsp_compiler.pruning.balanced import BalancedWinogradStructured, block_of
from wsp_compiler.pruning.base import Importance
from wsp_compiler.pruning.output_aware import relative_error
from wsp_compiler.refits import NormStatistics, SiteRefit
from wsp_compiler.site_plan import SitePlan, site_from_json, site_to_json
from wsp_compiler.sites import ConvSite, unsupported
from wsp_compiler.speed import SiteTimes, SpeedSource
from wsp_compiler.winograd import remember_transforms, transform_weight

JSON_VERSION = 1
BALANCE_GAIN = 1.02
"""Balanced rows keep less of a layer's output than rows under one threshold: not for less than 2% of its time."""


@dataclass(frozen=True)
class PruningPlan(Mapping[str, SitePlan]):
    """Module path -> :class:`SitePlan`, in model order; ``left_alone`` says why others are not planned.

    ``times`` holds what was known about the speed of each site when the plan was made; it is no part of the plan
    and not saved with it.

    ``refits`` holds weights that differ from those of the model (calibrated or trained), ``norms`` batch-norm
    statistics by module path; both are tensors, which :meth:`save` writes and :meth:`to_json` only mentions.
    ``errors`` estimates each layer's relative L2 output error: measured by calibration, else for white noise.
    """

    sites: dict[str, SitePlan] = field(default_factory=dict[str, SitePlan])
    left_alone: dict[str, str] = field(default_factory=dict[str, str])
    times: dict[str, SiteTimes] = field(default_factory=dict[str, SiteTimes], compare=False, repr=False)
    refits: dict[str, SiteRefit] = field(default_factory=dict[str, SiteRefit], repr=False)
    norms: dict[str, NormStatistics] = field(default_factory=dict[str, NormStatistics], repr=False)
    errors: dict[str, float] = field(default_factory=dict[str, float], compare=False, repr=False)

    def __getitem__(self, path: str) -> SitePlan:
        try:
            return self.sites[path]
        except KeyError:
            raise KeyError(f"{path!r}: {self.left_alone.get(path, 'no such convolution')}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def weights(self, path: str, conv: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
        """(U [p*p, n, c], bias [n]) of a planned convolution on its device: refitted ones, else those of ``conv``.

        What ``keep`` removes may be anything in U.
        """
        site, refit = self[path], self.refits.get(path)
        if refit is None:
            return transform_weight(conv.weight, site.tile), conv.bias
        return refit.unpack(site.keep, site.shape).to(conv.weight.device), refit.bias.to(conv.weight.device)

    def save(self, path: str | Path) -> None:
        """Write the plan with its tensors to one safetensors file (the JSON text is its metadata)."""
        from wsp_compiler.plan_file import save_plan

        save_plan(self, path)

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """The plan that :meth:`save` wrote.

        Raises:
            PlanError: the file cannot be read, or is not such a plan.
        """
        from wsp_compiler.plan_file import load_plan

        return load_plan(path)

    def to_json(self) -> str:
        """The plan as JSON text; ``keep`` as base64 of its packed bits. Of tensors it holds the names alone."""
        record: dict[str, Any] = {
            "version": JSON_VERSION,
            "sites": [site_to_json(site) for site in self.sites.values()],
            "left_alone": self.left_alone,
            "errors": self.errors,
            "tensors": [*self.refits, *self.norms],
        }
        return json.dumps(record, indent=1)

    @classmethod
    def from_json(cls, text: str, tensors: PlanTensors | None = None) -> PruningPlan:
        """The plan written by :meth:`to_json`.

        Args:
            text: the JSON.
            tensors: (refits, norms) of a calibrated or trained plan, which the JSON does not hold.

        Raises:
            PlanError: the text is not such a plan, or the plan has tensors and they are not given.
        """
        try:
            record = json.loads(text)
            if record["version"] != JSON_VERSION:
                raise ValueError(f"version {record['version']}, this package reads {JSON_VERSION}")
            sites = [site_from_json(entry) for entry in record["sites"]]
            plan = cls(
                {site.path: site for site in sites},
                {str(path): str(why) for path, why in record["left_alone"].items()},
            )
            if len(plan) != len(sites):
                raise ValueError("a path is planned twice")
            plan.errors.update({str(path): float(error) for path, error in record.get("errors", {}).items()})
            missing = [str(path) for path in record.get("tensors", [])]
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).splitlines()[:1])
            raise PlanError(
                f"not a pruning plan ({why})",
                where="PruningPlan.from_json",
                fix="pass to_json()'s text unchanged",
            ) from error
        refits, norms = tensors or ({}, {})
        if missing and sorted(missing) != sorted([*refits, *norms]):
            raise PlanError(
                f"the plan has refitted weights ({', '.join(missing[:3])}, ...), which JSON does not hold",
                where="PruningPlan.from_json",
                fix="write such plans with plan.save(path) and read them with PruningPlan.load(path)",
            )
        plan.refits.update(refits)
        plan.norms.update(norms)
        return plan

    def check_fits(self, convolutions: Mapping[str, nn.Conv2d]) -> None:
        """Raise :class:`PlanError` unless every planned site exists, has that shape and is eligible."""
        for path, refit in self.refits.items():
            if path not in self.sites:
                raise PlanError("refitted, but not planned", where=path, fix="make the plan from this model")
            refit.check(path, self[path].kept_weights, self[path].shape[1])
        for path, site in self.sites.items():
            conv = convolutions.get(path)
            if conv is None:
                near = difflib.get_close_matches(path, list(convolutions), n=3)
                found = "the model has no such convolution" + f" (near names: {', '.join(near)})" * bool(near)
            elif site.shape[1:] != (conv.out_channels, conv.in_channels):
                found = f"the model's has [n, c] = {[conv.out_channels, conv.in_channels]}"
            elif (reason := unsupported(conv)) is not None:
                found = f"the model's is not eligible: {reason}"
            else:
                continue
            raise PlanError(
                f"planned for [n, c] = {list(site.shape[1:])}, but {found}",
                where=path or "the model itself",
                fix="make the plan from this model",
            )


PlanTensors = tuple[Mapping[str, SiteRefit], Mapping[str, NormStatistics]]
"""(refits, norms) of a plan."""


def choose_keep(entry: SitePlan, U: Tensor, importance: Importance) -> SitePlan:
    """``entry`` with what its pattern keeps of U [p*p, n, c] under another importance."""
    pattern = PATTERNS[entry.method]
    if isinstance(pattern, BalancedWinogradStructured):
        pattern = replace(pattern, block=entry.block)
    return replace(entry, keep=pattern.keep(U, entry.pr, entry.direction, importance).cpu())


def site_candidates(
    path: str, conv: nn.Conv2d, rule: PruneRule | None, options: CompileOptions
) -> tuple[SitePlan, ...]:
    """What a convolution can become: one SitePlan, or one per pattern and tile where these are to be chosen."""
    method = (rule and rule.method) or options.method
    if method == "abwsp":
        both = [replace(options, method=each) for each in ("bwsp", "wsp")]
        return tuple(entry for each in both for entry in site_candidates(path, conv, rule, each))
    direction = (rule and rule.direction) or options.direction
    pr = options.pr if rule is None or rule.pr is None else rule.pr
    tile = (rule and rule.tile) or options.tile
    pattern, block, n = PATTERNS[method], None, conv.out_channels
    if isinstance(pattern, BalancedWinogradStructured) and direction == "row":
        size = block_of(n, pr, options.block if rule is None or rule.block is None else rule.block)
        block = size if size < n else None
        pattern = replace(pattern, block=block)
    found: list[SitePlan] = []
    for side in TILES if isinstance(tile, str) else (tile,):
        U = transform_weight(conv.weight, side)  # [p*p, n, c]
        found.append(
            SitePlan(
                path=path,
                method=method,
                direction=direction if pattern.uses_direction else "row",
                tile=side,
                pr=float(pr) if method != "dense" else 0.0,
                keep=pattern.keep(U, pr, direction, IMPORTANCES[options.importance]).cpu(),
                shape=(U.shape[0], U.shape[1], U.shape[2]),
                block=block,
            )
        )
    return tuple(found)


def site_times(
    entry: SitePlan, site: ConvSite, conv: nn.Conv2d, speed: SpeedSource | None, *, dense: bool = True
) -> SiteTimes:
    """Both times of a planned convolution on the inputs that the site has seen; ``dense`` asks for the second."""
    if speed is None or not site.formats:
        return SiteTimes(None, None)
    pruned = speed.pruned(entry.path, conv, entry.keep, entry.tile, site.formats)
    return SiteTimes(pruned, speed.dense(entry.path, conv, site.formats) if dense else None)


def plan_times(
    plan: PruningPlan,
    sites: tuple[ConvSite, ...],
    convolutions: Mapping[str, nn.Conv2d],
    speed: SpeedSource | None,
) -> dict[str, SiteTimes]:
    """Both times of everything that a finished plan lowers, for the report; the plan stays as it is."""
    known = {site.path: site for site in sites}
    return {
        path: site_times(entry, known[path], convolutions[path], speed)
        for path, entry in plan.items()
        if path in known
    }


def _fastest(
    candidates: tuple[SitePlan, ...], site: ConvSite, conv: nn.Conv2d, speed: SpeedSource | None
) -> tuple[SitePlan, SiteTimes]:
    """The candidate with the shortest known time; the first if none is known. Balance has to gain something."""
    times = [site_times(entry, site, conv, speed) for entry in candidates]
    mixed = len({entry.method for entry in candidates}) > 1

    def microseconds(index: int) -> float:
        timing = times[index].pruned
        handicap = BALANCE_GAIN if mixed and candidates[index].method == "bwsp" else 1.0
        return math.inf if timing is None else timing.us * handicap

    best = min(range(len(candidates)), key=microseconds)
    return candidates[best], times[best]


@remember_transforms()
def make_plan(
    sites: tuple[ConvSite, ...],
    convolutions: Mapping[str, nn.Conv2d],
    options: CompileOptions,
    speed: SpeedSource | None = None,
) -> PruningPlan:
    """Decide for every site. Only this function decides.

    Args:
        sites: all convolutions of the model.
        convolutions: module path -> module, for the weights.
        options: the user's choices; every rule must match some path.
        speed: knows times on the device; without it, or without recorded inputs, speed is not checked.

    Raises:
        RuleError: a rule matches no convolution.
    """
    options.check_rules_used(convolutions)
    plan = PruningPlan()
    for site in sites:
        rule = options.rule_for(site.path) if site.path in convolutions else None
        reason = site.reject
        if reason is None and rule is not None and rule.skip:
            reason = f"skipped by PruneRule({rule.match!r})"
        few = min(site.filters, site.channels)
        if reason is None and rule is None and few < options.channel_threshold:
            reason = (
                f"{few} channels, fewer than {options.channel_threshold} (a rule that names it overrides)"
            )
        if reason is not None:
            plan.left_alone[site.path] = reason
            continue
        conv = convolutions[site.path]
        entry, times = _fastest(site_candidates(site.path, conv, rule, options), site, conv, speed)
        plan.times[site.path] = times
        # filters may leave the network, which settle_filters decides
        if times.slower and not options.keep_slower and entry.method != "fp":
            plan.left_alone[site.path] = f"the dense convolution is faster: {times.text()}"
            continue
        plan.sites[site.path] = entry
        plan.errors[site.path] = relative_error(
            transform_weight(conv.weight, entry.tile), entry.keep, entry.tile
        )
    return plan
