"""Sites and options -> PruningPlan: which convolutions become Winograd, with which pattern, tile and weights.

The plan is made on the unfolded weights, as the paper does; batch norm is folded later, in lowering. Passes
and kernels only obey it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wsp_compiler.errors import PlanError
from wsp_compiler.options import METHODS, TILES, CompileOptions
from wsp_compiler.pruning import IMPORTANCES, PATTERNS
from wsp_compiler.sites import ConvSite
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

    @property
    def kept_weights(self) -> int:
        """Number of Winograd weights kept."""
        return int(self.keep.expand(self.shape).sum())

    @property
    def kept_fraction(self) -> float:
        """Kept weights / all Winograd weights; 1 - this is the achieved pruning ratio."""
        total = self.shape[0] * self.shape[1] * self.shape[2]
        return self.kept_weights / total if total else 1.0

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
    """Module path -> :class:`SitePlan`, in model order; ``left_alone`` says why the others stay as they are."""

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
            sites = {entry["path"]: _site_from_json(entry) for entry in record["sites"]}
            return cls(sites, {str(path): str(why) for path, why in record["left_alone"].items()})
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise PlanError(
                f"not a pruning plan ({error})", where="PruningPlan.from_json", fix="pass to_json()'s text unchanged"
            ) from error

    def check_fits(self, convolutions: Mapping[str, nn.Conv2d]) -> None:
        """Raise :class:`PlanError` unless every planned site exists with the planned shape."""
        for path, site in self.sites.items():
            conv = convolutions.get(path)
            found = None if conv is None else (site.shape[0], conv.out_channels, conv.in_channels)
            if found != site.shape:
                raise PlanError(
                    f"planned for [p*p, n, c] = {list(site.shape)}, the model has {found and list(found)}",
                    where=path,
                    fix="make the plan from this model",
                )


def _site_to_json(site: SitePlan) -> dict[str, Any]:
    bits = np.packbits(site.keep.cpu().numpy().reshape(-1))
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
    allowed = all(k in (1, size) for k, size in zip(keep_shape, (p2, n, c), strict=True))
    if entry["method"] not in METHODS or entry["tile"] not in TILES or not allowed:
        raise ValueError(f"damaged entry for {entry['path']!r}")
    if p2 != transform(int(entry["tile"])).positions:
        raise ValueError(f"tile {entry['tile']} does not have {p2} positions")
    bits = np.frombuffer(base64.b64decode(entry["keep"], validate=True), dtype=np.uint8)
    count = int(np.prod(keep_shape))
    flat = np.unpackbits(bits, count=count).astype(bool)
    keep = torch.from_numpy(flat.reshape(keep_shape).copy())
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
            reason = f"{few} channels, fewer than {options.channel_threshold} (a rule that names it overrides)"
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
