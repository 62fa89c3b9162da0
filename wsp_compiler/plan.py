"""Sites and options -> PruningPlan: which convolutions become Winograd, with which pattern, tile and weights.

The plan is made on the unfolded weights, as the paper does; batch norm is folded later, in lowering. Passes
and kernels only obey it.
"""

from __future__ import annotations

import base64
import difflib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wsp_compiler.errors import PlanError
from wsp_compiler.options import DIRECTIONS, METHODS, TILES, CompileOptions
from wsp_compiler.pruning import IMPORTANCES, PATTERNS
from wsp_compiler.sites import ConvSite, unsupported
from wsp_compiler.winograd import transform, transform_weight

JSON_VERSION = 1


@dataclass(frozen=True, eq=False)
class SitePlan:
    """What happens to one convolution.

    Attributes:
        path: module path of the convolution.
        method, direction, tile: pattern and output tile side; direction is "row" where it has no meaning.
        pr: the share that was asked for.
        keep: bool, broadcastable to [p*p, n, c], True = kept, in the original filter order.
        shape: (p*p, n, c).
    """

    path: str
    method: str
    direction: str
    tile: int
    pr: float
    keep: Tensor
    shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        fault = self._fault()
        if fault is not None:
            raise PlanError(
                fault, where=self.path or "SitePlan", fix="make plans with wsp_compiler.compile or make_plan"
            )

    def _fault(self) -> str | None:
        """What is wrong with the plan, or None."""
        if self.method not in METHODS or self.direction not in DIRECTIONS or self.tile not in TILES:
            return f"unknown method {self.method!r}, direction {self.direction!r} or tile {self.tile!r}"
        if not 0 <= self.pr < 1:
            return f"pruning ratio {self.pr} is not in [0, 1)"
        if min(self.shape) < 1 or self.shape[0] != transform(self.tile).positions:
            return f"[p*p, n, c] = {list(self.shape)} does not belong to tile {self.tile}"
        sizes = zip(self.keep.shape, self.shape, strict=False)
        if (
            self.keep.dtype != torch.bool
            or self.keep.dim() != 3
            or any(k not in (1, size) for k, size in sizes)
        ):
            found = f"{self.keep.dtype} {list(self.keep.shape)}"
            return f"keep is {found}, not bool and broadcastable to {list(self.shape)}"
        if 1 not in self.keep.shape[1:]:
            return f"keep {list(self.keep.shape)} has neither whole rows nor whole columns"
        return None if bool(self.keep.any()) else "it keeps nothing"

    @property
    def kept_weights(self) -> int:
        """Number of Winograd weights kept."""
        shared = math.prod(size for size, k in zip(self.shape, self.keep.shape, strict=True) if k == 1)
        return int(self.keep.sum()) * shared

    @property
    def kept_fraction(self) -> float:
        """Kept weights / all Winograd weights; 1 - this is the achieved pruning ratio."""
        return self.kept_weights / math.prod(self.shape)

    @property
    def pattern(self) -> str:
        """Short name as in the papers: dense, FP, WSP-R, BWSP-C, ..."""
        if self.method == "dense":
            return "dense"
        suffix = f"-{self.direction[0].upper()}" if PATTERNS[self.method].uses_direction else ""
        return self.method.upper() + suffix

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SitePlan):
            return NotImplemented
        return _site_to_json(self) == _site_to_json(other)

    def __hash__(self) -> int:
        return hash((self.path, self.method, self.direction, self.tile, self.pr, self.shape))


@dataclass(frozen=True)
class PruningPlan(Mapping[str, SitePlan]):
    """Module path -> :class:`SitePlan`, in model order; ``left_alone`` says why others are not planned."""

    sites: dict[str, SitePlan] = field(default_factory=dict[str, SitePlan])
    left_alone: dict[str, str] = field(default_factory=dict[str, str])

    def __getitem__(self, path: str) -> SitePlan:
        try:
            return self.sites[path]
        except KeyError:
            raise KeyError(f"{path!r}: {self.left_alone.get(path, 'no such convolution')}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def to_json(self) -> str:
        """The plan as JSON text; ``keep`` as base64 of its packed bits."""
        sites = [_site_to_json(site) for site in self.sites.values()]
        return json.dumps({"version": JSON_VERSION, "sites": sites, "left_alone": self.left_alone}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """The plan written by :meth:`to_json`.

        Raises:
            PlanError: the text is not such a plan.
        """
        try:
            record = json.loads(text)
            if record["version"] != JSON_VERSION:
                raise ValueError(f"version {record['version']}, this package reads {JSON_VERSION}")
            sites = [_site_from_json(entry) for entry in record["sites"]]
            plan = cls(
                {site.path: site for site in sites},
                {str(path): str(why) for path, why in record["left_alone"].items()},
            )
            if len(plan) != len(sites):
                raise ValueError("a path is planned twice")
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).splitlines()[:1])
            raise PlanError(
                f"not a pruning plan ({why})",
                where="PruningPlan.from_json",
                fix="pass to_json()'s text unchanged",
            ) from error
        return plan

    def check_fits(self, convolutions: Mapping[str, nn.Conv2d]) -> None:
        """Raise :class:`PlanError` unless every planned site exists, has that shape and is eligible."""
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


def _site_to_json(site: SitePlan) -> dict[str, Any]:
    bits = np.packbits(site.keep.cpu().flatten().numpy())
    return {
        "path": site.path,
        "method": site.method,
        "direction": site.direction,
        "tile": site.tile,
        "pr": site.pr,
        "shape": list(site.shape),
        "keep_shape": list(site.keep.shape),
        "keep": base64.b64encode(bits.tobytes()).decode("ascii"),
    }


def _site_from_json(entry: dict[str, Any]) -> SitePlan:
    p2, n, c = (int(size) for size in entry["shape"])
    keep_shape = tuple(int(size) for size in entry["keep_shape"])
    bits = np.frombuffer(base64.b64decode(entry["keep"], validate=True), dtype=np.uint8)
    count = math.prod(keep_shape)
    if min(keep_shape) < 1 or len(bits) != -(-count // 8):
        raise ValueError(f"{entry['path']}: {len(bits)} bytes of keep for {list(keep_shape)} bits")
    keep = torch.as_tensor(np.unpackbits(bits, count=count).astype(bool)).view(keep_shape)
    return SitePlan(
        str(entry["path"]), str(entry["method"]), str(entry["direction"]), int(entry["tile"]),
        float(entry["pr"]), keep, (p2, n, c),
    )  # fmt: skip


def make_plan(
    sites: tuple[ConvSite, ...], convolutions: Mapping[str, nn.Conv2d], options: CompileOptions
) -> PruningPlan:
    """Decide for every site. Only this function decides.

    Args:
        sites: all convolutions of the model.
        convolutions: module path -> module, for the weights.
        options: the user's choices; every rule must match some path.

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
        method = (rule and rule.method) or options.method
        tile = (rule and rule.tile) or options.tile
        direction = (rule and rule.direction) or options.direction
        pr = options.pr if rule is None or rule.pr is None else rule.pr
        pattern = PATTERNS[method]
        U = transform_weight(convolutions[site.path].weight, tile)  # [p*p, n, c]
        plan.sites[site.path] = SitePlan(
            path=site.path,
            method=method,
            direction=direction if pattern.uses_direction else "row",
            tile=tile,
            pr=float(pr) if method != "dense" else 0.0,
            keep=pattern.keep(U, pr, direction, IMPORTANCES[options.importance]).cpu(),
            shape=(U.shape[0], U.shape[1], U.shape[2]),
        )
    return plan
