"""The networks of the experiments: CIFAR-style ResNets and VGG-16 for 32x32 images, torchvision's for larger ones."""

from __future__ import annotations

import torch
import torchvision
from torch import nn

from benchmarks.network_models import CIFAR_NETWORKS, cifar_resnet

NETWORKS = (*CIFAR_NETWORKS, "vgg16")


def vgg16(classes: int) -> nn.Sequential:
    """VGG-16 as it is used on CIFAR: batch norm, one linear layer; [n, 3, 32, 32] -> [n, classes]."""
    features = torchvision.models.vgg16_bn(weights=None).features
    return nn.Sequential(features, nn.Flatten(), nn.Linear(512, classes))


def make(name: str, classes: int, side: int = 32, seed: int = 0) -> nn.Module:
    """The named network with fresh weights, in eval mode, on the CPU.

    Args:
        name: one of :data:`NETWORKS`, or, for images larger than 64 pixels, any classifier of torchvision.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        if side > 64:
            return torchvision.models.get_model(name, weights=None, num_classes=classes).eval()
        if name not in NETWORKS:
            raise ValueError(f"unknown network {name!r}; known: {', '.join(NETWORKS)}")
        if name == "vgg16":
            return vgg16(classes).eval()
        model = cifar_resnet(CIFAR_NETWORKS[name])
        if classes != 10:
            model[-1] = nn.Linear(64, classes)
        return model.eval()
