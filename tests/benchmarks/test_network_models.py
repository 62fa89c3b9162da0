import pytest
import torch
from torch import nn

from benchmarks.network_models import NETWORKS, build, check_network


def _tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())


def test_statistics_are_random_and_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "tiny", _tiny)
    state = torch.get_rng_state()
    model, again = build("tiny", size=8), build("tiny", size=8)
    assert torch.equal(torch.get_rng_state(), state)
    norm = model[1]
    assert not model.training
    assert norm.momentum == 0.1
    assert norm.running_mean.abs().min() > 0
    assert norm.running_var.std() > 0
    assert norm.weight.std() > 0
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(model(x), again(x))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_unknown_network_lists_the_names() -> None:
    with pytest.raises(ValueError, match="unknown network 'resnet19'; known: resnet18"):
        check_network("resnet19")
