"""How large a layer's output error would be under each candidate, from its moments alone.

Without refitting the error of any weights u of a filter is variance - 2 cross u + u gram u. What the refit wins back is
measured by refitting a sample of the filters at a few pruning ratios, and interpolated between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wsp_compiler.budget.interpolation import linear
from wsp_compiler.pruning.moments import Moments
from wsp_compiler.pruning.refit import Refit, refit
from wsp_compiler.site_plan import SitePlan

MOST_FILTERS = 64
"""Filters of a layer that stand for all."""
REFIT_STEPS = 15
"""Of conjugate gradients: an estimate, not the result."""


def sample_filters(moments: Moments, most: int = MOST_FILTERS) -> Tensor:
    """Numbers [at most ``most`` of n] of filters, spread evenly over the variances of their outputs."""
    count = len(moments.variance)
    if count <= most:
        return torch.arange(count)
    order = torch.argsort(moments.variance.cpu())
    return order[torch.linspace(0, count - 1, most).round().long()].sort().values


def of_filters(moments: Moments, chosen: Tensor) -> Moments:
    """The moments of some filters."""
    index = chosen.to(moments.cross.device)
    return replace(
        moments, cross=moments.cross[index], variance=moments.variance[index], mean=moments.mean[index]
    )


def keep_of(entry: SitePlan, chosen: Tensor) -> Tensor:
    """``entry.keep`` of the chosen filters, [p*p or 1, filters or 1, c or 1]."""
    return entry.keep[:, chosen] if entry.keep.shape[1] > 1 else entry.keep


class LayerErrors:
    """Predicts squared output errors of one layer, relative to the variance of the wanted output.

    Args:
        moments: of the layer's input and the wanted output.
        U: [p*p, n, c], its Winograd weights before pruning; F(m x m, 3x3) as in the moments.
        typical: kept share around which predictions matter most.

    Attributes:
        filters: numbers of the filters that are looked at.
    """

    def __init__(self, moments: Moments, U: Tensor, typical: float) -> None:
        self.filters = sample_filters(moments)
        self._moments = of_filters(moments, self.filters)
        self._U = U[:, self.filters.to(U.device)].to(moments.gram)  # [p*p, filters, c]
        self._energy = float(self._moments.variance.sum())
        constant = float(self._moments.mean.square().sum())
        if self._energy < 1e-6 * constant:  # what rounding leaves
            self._energy = 0.0
        self._refit_at = ((1 + typical) / 2, typical, typical / 2)
        self._fits: dict[int, tuple[SitePlan, Refit]] = {}  # by identity

    def without_refit(self, entry: SitePlan) -> float:
        """The error if the kept weights stay as they are; 0 for a layer whose output is constant."""
        if self._energy <= 0:
            return 0.0
        keep = keep_of(entry, self.filters).to(self._U.device)
        kept = torch.where(keep, self._U, torch.zeros_like(self._U))
        flat = kept.permute(1, 0, 2).reshape(len(self.filters), -1)  # [filters, p*p*c]
        gram, cross = self._moments.gram, self._moments.cross
        explained = float((flat * (2 * cross - flat @ gram)).sum(dtype=torch.float64))
        return max(0.0, self._energy - explained) / self._energy

    def refitted(self, entry: SitePlan) -> Refit:
        """The sampled filters, refitted roughly; their error is a root."""
        if id(entry) not in self._fits:
            keep = keep_of(entry, self.filters)
            self._fits[id(entry)] = entry, refit(self._moments, self._U, keep, max_steps=REFIT_STEPS)
        return self._fits[id(entry)][1]

    def predict(self, entries: Sequence[SitePlan]) -> list[float]:
        """The error of each candidate: refitted, unless it prunes nothing, as calibration does.

        The candidates share method, direction and tile and differ in how much they keep.
        """
        raw = [self.without_refit(entry) for entry in entries]
        pruned = [index for index, entry in enumerate(entries) if entry.kept_fraction < 1 and raw[index] > 0]
        anchors = {
            min(pruned, key=lambda index: abs(entries[index].kept_fraction - share))
            for share in self._refit_at
            if pruned
        }
        points = sorted(  # (kept share, log of what refitting leaves)
            (
                entries[index].kept_fraction,
                math.log(max(self.refitted(entries[index]).error ** 2, 1e-12) / raw[index]),
            )
            for index in anchors
        )
        return [
            error * math.exp(linear(points, entry.kept_fraction))
            if entry.kept_fraction < 1 and error > 0
            else error
            for entry, error in zip(entries, raw, strict=True)
        ]
