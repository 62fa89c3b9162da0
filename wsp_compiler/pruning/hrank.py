"""HRank: a filter is worth the rank of the feature maps that it makes (Lin et al., HRank, CVPR 2020).

A filter's score is the mean over sample images of the rank of its feature map, a matrix [H, W], behind batch norm and
activation. A map of low rank carries little information, and ranks hardly change with the images. No labels needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

IMAGES = 500
"""Feature maps of a filter that are looked at; the paper's number."""
TOLERANCE = 1e-5
"""Singular values below it, relative to the largest, count as zero: float32 activations have no more digits."""


@dataclass
class FeatureRanks:
    """Means of the ranks of feature maps, over batches. An Importance of filters once maps have been added.

    Attributes:
        total: float64 [n], sum of the ranks seen.
        images: how many of each.
    """

    total: Tensor
    images: int = 0

    @classmethod
    def of(cls, filters: int) -> FeatureRanks:
        """Nothing seen yet."""
        return cls(torch.zeros(filters, dtype=torch.float64))

    def add(self, maps: Tensor) -> None:
        """Feature maps [N, n, H, W] of one batch; those beyond :data:`IMAGES` images are left out."""
        maps = maps[: max(0, IMAGES - self.images)]
        if len(maps):
            self.total += ranks(maps).sum(0).double().cpu()
            self.images += len(maps)

    def __call__(self, U: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Mean rank of every filter, [1, n, 1]; other units have none."""
        if dims != (0, 2):
            raise ValueError("HRank scores whole filters")
        return (self.total / max(1, self.images)).view(1, -1, 1).to(U.device)


def ranks(maps: Tensor) -> Tensor:
    """Rank of every matrix of [N, n, H, W], in float32: [N, n]."""
    rank = torch.linalg.matrix_rank(maps.detach().float(), rtol=TOLERANCE)  # pyright: ignore
    return cast("Tensor", rank)
