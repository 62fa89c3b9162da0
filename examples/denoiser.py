"""The example network: a grayscale denoiser in the style of DnCNN, with its shipped weights.

Zhang, Zuo, Chen, Meng, Zhang: Beyond a Gaussian Denoiser: Residual Learning of Deep CNN for Image Denoising,
IEEE Transactions on Image Processing 26 (2017). 17 convolutions of 3x3, stride 1, 64 channels, batch norm on
the 15 in the middle; the network predicts the noise, and the input less that noise is the denoised photo.
15 of the 17 convolutions (99.8% of the multiplications) have 64 channels in and out.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn

from examples import optional_module

WEIGHTS = Path(__file__).with_name("denoiser.safetensors")
"""The shipped weights, written by `python -m examples.train_denoiser`."""


class Denoiser(nn.Module):
    """Removes Gaussian noise of a known strength from grayscale photos.

    Args:
        channels: of every hidden feature map.
        middle_layers: convolutions between the first and the last, each followed by batch norm and ReLU.
    """

    def __init__(self, channels: int = 64, middle_layers: int = 15) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.first_relu = nn.ReLU()
        self.middle = nn.Sequential(*(_middle_layer(channels) for _ in range(middle_layers)))
        self.last = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, photo: Tensor) -> Tensor:
        """Denoise a batch of photos.

        Args:
            photo: [batch, 1, height, width], intensities of about [0, 1] with noise.

        Returns:
            The denoised photos, the same shape; not clipped to [0, 1].
        """
        features = self.first_relu(self.first(photo))  # [batch, channels, height, width]
        noise = self.last(self.middle(features))  # [batch, 1, height, width]
        return photo - noise


def _middle_layer(channels: int) -> nn.Sequential:
    """Convolution (no bias: batch norm has one), batch norm, ReLU."""
    return nn.Sequential(
        OrderedDict(
            convolution=nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            batch_norm=nn.BatchNorm2d(channels),
            relu=nn.ReLU(),
        )
    )


def load_denoiser(path: Path | str = WEIGHTS) -> Denoiser:
    """The trained network in evaluation mode, float32, on the CPU.

    Args:
        path: a file written by `python -m examples.train_denoiser`; the shipped one by default.
    """
    safetensors = optional_module("safetensors.torch")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no denoiser weights at {path}; train them (5 minutes on a GPU): "
            f"python -m examples.train_denoiser --minutes 4 --out {path}"
        )
    model = Denoiser()
    model.load_state_dict(safetensors.load_file(path))
    return model.eval()


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of two photos in decibels, for intensities in [0, 1]; infinite when equal.

    Args:
        a, b: tensors of one shape, on any devices; compared in float64.
    """
    if a.shape != b.shape:
        raise ValueError(f"psnr needs two tensors of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    difference = a.detach().to("cpu", torch.float64) - b.detach().to("cpu", torch.float64)
    mean_square = difference.square().mean().item()
    return math.inf if mean_square == 0 else -10.0 * math.log10(mean_square)
