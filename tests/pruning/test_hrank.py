"""hrank: mean ranks of feature maps."""

from __future__ import annotations

import pytest
import torch

from wsp_compiler.pruning import PATTERNS
from wsp_compiler.pruning.hrank import IMAGES, FeatureRanks, ranks


def maps_of_rank(*wanted: int, images: int = 3) -> torch.Tensor:
    return torch.stack(
        [torch.randn(images, 9, rank) @ torch.randn(images, rank, 12) for rank in wanted], dim=1
    )


def test_ranks() -> None:
    assert ranks(maps_of_rank(0, 1, 4, 9)).tolist() == [[0, 1, 4, 9]] * 3
    assert ranks(maps_of_rank(2).half()).shape == (3, 1)


def test_means_over_batches() -> None:
    found = FeatureRanks.of(2)
    found.add(maps_of_rank(2, 3, images=1))
    found.add(maps_of_rank(5, 3, images=2))
    assert found.images == 3
    assert found(torch.ones(16, 2, 4), (0, 2)).flatten().tolist() == [4.0, 3.0]


def test_filters_of_low_rank_go_whatever_their_weights() -> None:
    found = FeatureRanks.of(4)
    found.add(maps_of_rank(1, 8, 2, 7))
    U = torch.ones(16, 4, 3) * torch.tensor([100.0, 1.0, 100.0, 1.0]).view(1, 4, 1)
    keep = PATTERNS["fp"].keep(U, 0.5, "row", found)
    assert keep.flatten().tolist() == [False, True, False, True]


def test_no_more_images_than_needed() -> None:
    found = FeatureRanks(torch.zeros(1, dtype=torch.float64), IMAGES - 1)
    found.add(maps_of_rank(3))
    assert (found.images, found.total.tolist()) == (IMAGES, [3.0])
    found.add(maps_of_rank(3))
    assert found.images == IMAGES


def test_other_units_have_no_rank() -> None:
    with pytest.raises(ValueError, match="whole filters"):
        FeatureRanks.of(2)(torch.ones(16, 2, 2), (2,))
