"""Digits made hard: random pose, pieces of other digits, colours and noise, on the device that trains.

A plain digit is recognised by any network, pruned or not. With these distortions ResNet-20 makes errors, so that
accuracies of pruned networks can be told apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SIDE = 32


@dataclass(frozen=True)
class Distortion:
    """How far a digit is from the one that was written.

    Args:
        rotation: largest angle, degrees.
        zoom: smallest and largest size of the digit, of its own.
        shear: largest shear.
        shift: largest shift, of half the picture's side.
        clutter: how many other digits stick into the picture.
        noise: standard deviation of Gaussian noise; intensities lie in [0, 1].
    """

    rotation: float = 30.0
    zoom: tuple[float, float] = (0.6, 1.1)
    shear: float = 0.3
    shift: float = 0.25
    clutter: int = 3
    noise: float = 0.35

    def __call__(self, digits: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 [n, 1, h, w] -> float32 [n, 3, 32, 32], mean about 0; every call draws anew."""
        n, device = len(digits), digits.device
        intensity = digits.float() / 255.0
        limits = torch.tensor([self.shift, self.shift], device=device)
        shift = (self._uniform(generator, device, n, 2) * 2 - 1) * limits
        picture = self._placed(intensity, shift, generator).unsqueeze(1)  # [n, 1, 1, side, side]
        back, front, other = (self._uniform(generator, device, n, 3, 1, 1) for _ in range(3))
        back = 0.6 * back
        image = back.expand(n, 3, SIDE, SIDE)
        for _ in range(self.clutter):
            order = torch.randperm(n, generator=generator, device=device)
            angle = self._uniform(generator, device, n) * 2 * math.pi
            distance = 0.75 + 0.35 * self._uniform(generator, device, n, 1)
            away = distance * torch.stack((angle.cos(), angle.sin()), dim=1)
            piece = self._placed(intensity[order], away, generator)
            image = torch.lerp(image, other, 0.8 * piece)
        # a digit as dark as what is behind it could not be seen: the front is at least 0.3 away from the back
        image = torch.lerp(image, back + 0.3 + 0.5 * front, picture[:, 0])
        noise = torch.randn(image.shape, generator=generator, device=device)
        return (image + self.noise * noise - 0.45) / 0.3

    def _placed(self, intensity: Tensor, shift: Tensor, generator: torch.Generator) -> Tensor:
        """Every digit turned, sized, sheared and shifted, [n, 1, side, side]; shift: [n, 2]."""
        n, device = len(intensity), intensity.device
        angle, shear, size = (self._uniform(generator, device, n) for _ in range(3))
        angle = (2 * angle - 1) * math.radians(self.rotation)
        shear = (2 * shear - 1) * self.shear
        inverse = 1 / (self.zoom[0] + (self.zoom[1] - self.zoom[0]) * size)
        cos, sin = angle.cos() * inverse, angle.sin() * inverse
        rows = torch.stack((cos, shear * inverse - sin, sin, cos), dim=1).view(n, 2, 2)
        theta = torch.cat((rows, -(rows @ shift.unsqueeze(2))), dim=2)
        grid = F.affine_grid(theta, [n, 1, SIDE, SIDE], align_corners=False)
        return F.grid_sample(intensity, grid, align_corners=False)

    @staticmethod
    def _uniform(generator: torch.Generator, device: torch.device, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)
