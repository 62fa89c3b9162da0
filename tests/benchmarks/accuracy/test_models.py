"""The experiments' networks: shapes, seeds, layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.accuracy.models import NETWORKS, make


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes(name: str) -> None:
    model = make(name, 7)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert not model.training
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert convolutions == {"vgg16": 13}.get(
        name, int(name.removeprefix("resnet") or 0) - 1 if "res" in name else 0
    )


def test_seeds() -> None:
    one, same, other = (make("resnet20", 10, seed=seed)[0].weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_large_images_take_torchvisions_networks() -> None:
    assert make("resnet18", 5, side=224)(torch.zeros(1, 3, 224, 224)).shape == (1, 5)
    with pytest.raises(ValueError, match="known: resnet20"):
        make("resnet18", 5)
