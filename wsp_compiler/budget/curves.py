"""How large a layer's output error would be under each candidate, from its moments alone.

Removing weights R from a filter costs R gram R^T; what the refit then wins back is measured by refitting a sample of
the filters at a few pruning ratios, and interpolated between them.
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
REFIT_AT = (0.9, 0.75, 0.5, 0.3, 0.15, 0.06)
"""Kept shares near which candidates are refitted."""
REFIT_STEPS = 20
"""Of conjugate gradients: an estimate, not the result."""


def sample_filters(moments: Moments, most: int = MOST_FILTERS) -> Tensor:
    """Numbers [at most ``most`` of n] of filters, spread evenly over the variances of their outputs."""
    count = len(moments.variance)
    if count <= most:
        return torch.arange(count)
    order = torch.argsort(moments.variance.cpu())
    return order[torch.linspace(0, count - 1, most).round().long()].sort().values


def _of_filters(moments: Moments, chosen: Tensor) -> Moments:
    index = chosen.to(moments.cross.device)
    return replace(
        moments,
        cross=moments.cross[index],
        variance=moments.variance[index],
        mean=moments.mean[index],
    )


def keep_of(entry: SitePlan, chosen: Tensor) -> Tensor:
    """``entry.keep`` of the chosen filters, [p*p or 1, filters or 1, c or 1]."""
    return entry.keep[:, chosen] if entry.keep.shape[1] > 1 else entry.keep


class LayerErrors:
    """Predicts relative squared output errors of one layer.

    Args:
        moments: of the layer in the dense network.
        U: [p*p, n, c], its Winograd weights; F(m x m, 3x3) as in the moments.
    """

    def __init__(self, moments: Moments, U: Tensor) -> None:
        self.filters = sample_filters(moments)
        self._moments = _of_filters(moments, self.filters)
        self._U = U[:, self.filters.to(U.device)].to(moments.gram)  # [p*p, filters, c]
        self._energy = max(float(self._moments.variance.sum()), 1e-30)
        self._fits: dict[int, tuple[SitePlan, Refit]] = {}  # by identity

    def without_refit(self, entry: SitePlan) -> float:
        """Squared error relative to the output's variance, if the other weights stay."""
        keep = keep_of(entry, self.filters).to(self._U.device)
        removed = torch.where(keep, torch.zeros_like(self._U), self._U)
        flat = removed.permute(1, 0, 2).reshape(len(self.filters), -1)  # [filters, p*p*c]
        rows = flat.abs().sum(1) > 0
        flat = flat[rows]
        return max(0.0, float(((flat @ self._moments.gram) * flat).sum())) / self._energy

    def refitted(self, entry: SitePlan) -> Refit:
        """The sampled filters, refitted roughly; their error is a root."""
        if id(entry) not in self._fits:
            keep = keep_of(entry, self.filters)
            self._fits[id(entry)] = entry, refit(self._moments, self._U, keep, max_steps=REFIT_STEPS)
        return self._fits[id(entry)][1]

    def predict(self, entries: Sequence[SitePlan]) -> list[float]:
        """Squared relative error of each candidate after refitting; 0 for those that prune nothing.

        The candidates share method, direction and tile and differ in how much they keep.
        """
        raw = [self.without_refit(entry) if entry.kept_fraction < 1 else 0.0 for entry in entries]
        pruned = [index for index, error in enumerate(raw) if error > 0]
        anchors = {
            min(pruned, key=lambda index: abs(entries[index].kept_fraction - share))
            for share in REFIT_AT
            if pruned
        }
        points: list[tuple[float, float]] = []  # (kept share, log of what refitting leaves)
        for index in anchors:
            error = self.refitted(entries[index]).error ** 2
            points.append((entries[index].kept_fraction, math.log(max(error, 1e-12) / raw[index])))
        points.sort()
        return [
            error * math.exp(linear(points, entry.kept_fraction)) if error > 0 else 0.0
            for entry, error in zip(entries, raw, strict=True)
        ]
