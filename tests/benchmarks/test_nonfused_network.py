"""The dense Winograd baseline's network, with PyTorch's convolution in cuDNN's place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import nonfused_network as module
from benchmarks.network_models import build, cifar_resnet
from benchmarks.nonfused_network import NonfusedConv, fits, nonfused_network


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Handles of the convolutions that were run."""
    found: list[int] = []

    def convolution(handle: int, x: Tensor) -> Tensor:
        assert x.is_contiguous()
        found.append(handle)
        return F.conv2d(x, module._weights[handle], padding=1)

    monkeypatch.setattr(module, "_convolution", convolution)
    return found


def test_the_network_computes_the_same(calls: list[int]) -> None:
    model, x = build("resnet20", size=32), torch.randn(2, 3, 32, 32)
    paths = [name for name, conv in model.named_modules() if isinstance(conv, nn.Conv2d) and fits(conv)]
    assert len(paths) == 17  # all but the two that halve the image
    network = nonfused_network(model, paths)
    assert sum(isinstance(child, NonfusedConv) for child in network.modules()) == 17
    assert not any(isinstance(child, nn.BatchNorm2d) for child in network.modules())
    for layout in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=layout)
        with torch.no_grad():
            torch.testing.assert_close(network(given), model(x), rtol=1e-4, atol=1e-4)
    assert len(calls) == 34


def test_other_convolutions_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, padding=1)).eval()
    with pytest.raises(ValueError, match="0 is no 3x3, stride 1"):
        nonfused_network(model, ["0"])


def test_depths_of_the_cifar_networks() -> None:
    for blocks, layers in ((3, 20), (5, 32), (9, 56)):
        model = cifar_resnet(blocks)
        weights = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        assert len(weights) == layers
        assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.cuda
def test_on_a_gpu() -> None:
    model, x = build("resnet20", size=32).cuda(), torch.randn(2, 3, 32, 32, device="cuda")
    paths = [name for name, conv in model.named_modules() if isinstance(conv, nn.Conv2d) and fits(conv)]
    with torch.no_grad():
        torch.testing.assert_close(nonfused_network(model, paths)(x), model(x), rtol=1e-2, atol=1e-2)
