"""FPGM: units that the others can replace go first (He et al., Filter Pruning via Geometric Median, CVPR 2019).

A unit's score is the sum of its distances to all units of its kind: the unit nearest to their geometric median,
which the others represent best, has the smallest. Rows, columns and single elements are compared within their
position, filters over all positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fpgm(U: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sum of Euclidean distances from every unit to its peers; ``dims`` of U [p*p, n, c] keep size 1."""
    if not dims:
        return _distances_of_numbers(U.flatten(1)).view(U.shape)
    if dims == (0, 2):
        vectors = U.permute(1, 0, 2).reshape(1, U.shape[1], -1)  # [1, n, p*p*c]
    else:
        vectors = U if dims == (2,) else U.transpose(1, 2)  # [p*p, units, length]
    scores = torch.cdist(vectors, vectors).sum(2)  # [1 or p*p, units]
    return scores.unsqueeze(2) if 2 in dims else scores.unsqueeze(1)


def _distances_of_numbers(values: Tensor) -> Tensor:
    """Sum of the distances from every number to the others of its row [p*p, units], by sorting."""
    ordered, index = values.sort(1)
    count, before = values.shape[1], torch.arange(values.shape[1], device=values.device)
    below = ordered.cumsum(1) - ordered  # sum of what is smaller
    above = ordered.sum(1, keepdim=True) - below - ordered
    sums = before * ordered - below + above - (count - 1 - before) * ordered
    return torch.empty_like(sums).scatter_(1, index, sums)
