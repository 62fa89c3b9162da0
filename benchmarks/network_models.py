"""torchvision networks without downloads: random weights, batch norm that is not the identity."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from torch import nn

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    name: lambda name=name: torchvision.models.get_model(name, weights=None)
    for name in ("resnet18", "resnet34", "resnet50", "vgg16", "vgg16_bn")
}


def check_network(name: str) -> str:
    """`name` itself; ValueError with all known names if it is not one of them."""
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(NETWORKS)}")
    return name


def _drift(statistic: torch.Tensor, low: float, high: float) -> None:
    """Multiplies each element by its own uniform factor in [low, high)."""
    statistic.mul_(torch.empty_like(statistic).uniform_(low, high))


def build(name: str, size: int = 96, seed: int = 0) -> nn.Module:
    """The named network in eval mode, fp32, on the CPU.

    Scales and shifts of batch norm are random. Its statistics are those of four random images of `size`
    pixels, each then changed by up to 20%: not the identity, yet no layer overflows fp16.
    """
    make = NETWORKS[check_network(name)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.random.default_generator.manual_seed(seed)
        model = make().requires_grad_(False)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0.0, 0.2)
        if norms:
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.momentum = 1.0  # the statistics of this one batch
            model.train()(torch.randn(4, 3, size, size))
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
                _drift(norm.running_mean, 0.8, 1.2)
                _drift(norm.running_var, 0.8, 1.2)
    return model.eval()
