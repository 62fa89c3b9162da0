"""Networks without downloads: random weights, batch norm that is not the identity.

torchvision's, and ResNet-20, 32 and 56 for 32x32 images (He et al., "Deep Residual Learning for Image
Recognition", section 4.2: 6n + 2 layers, three stages of 16, 32 and 64 channels, shortcuts without weights).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which takes every second pixel and pads channels with zeros."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.stride, self.added = channels // channels_in, channels - channels_in
        self.conv1 = nn.Conv2d(channels_in, channels, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return F.relu(y + x)


def cifar_resnet(blocks: int) -> nn.Sequential:
    """ResNet of 6 * blocks + 2 layers: [n, 3, 32, 32] -> [n, 10]."""
    stages = [CifarBlock(16, 16) for _ in range(blocks)]
    for channels in (32, 64):
        stages += [
            CifarBlock(channels // 2, channels),
            *(CifarBlock(channels, channels) for _ in range(blocks - 1)),
        ]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    stem = (nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*stem, *stages, *head)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    name: lambda name=name: torchvision.models.get_model(name, weights=None)
    for name in ("resnet18", "resnet34", "resnet50", "vgg16", "vgg16_bn")
}
CIFAR_NETWORKS = {f"resnet{6 * blocks + 2}": blocks for blocks in (3, 5, 9)}
NETWORKS |= {name: lambda blocks=blocks: cifar_resnet(blocks) for name, blocks in CIFAR_NETWORKS.items()}


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
