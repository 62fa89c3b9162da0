"""WinogradConv2d: a 3x3 convolution with Winograd-domain weights under a fixed ``keep``, for training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wsp_compiler.pruning.moments import white_gram
from wsp_compiler.winograd import transform
from wsp_compiler.winograd_conv import tile_combination, tile_filters, winograd_convolution

TIE = 1e-6
"""How near to the middle of two powers of two (in log2) a number takes the smaller one, on every machine."""


def position_scale(tile: int) -> Tensor:
    """[p*p, 1, 1]: the power of two next to how far each position's weights reach the output, for white noise."""
    reach = white_gram(tile).diagonal().sqrt()  # the square root of two is as far from 1 as from 2
    return torch.exp2(torch.ceil(torch.log2(reach) - 0.5 - TIE)).view(-1, 1, 1)


class WinogradConv2d(nn.Module):
    """y = A^T (U . keep x B^T d B) A + bias, with U, scaled by position, and bias as parameters.

    Every position has weights of its own: a pruned layer is in general not a 3x3 convolution any more. Gradients of
    pruned weights are exactly zero. ``weight`` is U times a power of two for each position, such that a step of one
    size moves the output about as far wherever it is taken: without, the positions of F(4x4, 3x3) would need
    learning rates up to 20 times apart, and all of them others than 3x3 filters.

    Args:
        U: [p*p, n, c] initial weights.
        bias: [n]; pruning refits it, so there always is one.
        keep: bool, broadcastable to U, True = kept.
        padding: zeros on both sides, (vertical, horizontal).
        tile: output tile side m, 2 or 4.
    """

    weight: nn.Parameter  # [p*p, n, c], U * scale
    bias: nn.Parameter  # [n]
    keep: Tensor
    scale: Tensor  # [p*p, 1, 1]
    combination: Tensor  # [m*m, p*p, p*p]; held here since a step that builds it cannot be a CUDA graph

    def __init__(self, U: Tensor, bias: Tensor, keep: Tensor, padding: tuple[int, int], tile: int) -> None:
        super().__init__()
        if U.shape[0] != transform(tile).positions:
            raise ValueError(f"U {list(U.shape)} does not belong to tile {tile}")
        self.tile, self.padding = tile, padding
        self.out_channels, self.in_channels = int(U.shape[1]), int(U.shape[2])
        self.register_buffer("keep", keep.to(U.device, copy=True))
        self.register_buffer("scale", position_scale(tile).to(U))
        self.register_buffer("combination", tile_combination(tile, U.dtype, U.device), persistent=False)
        self.weight = nn.Parameter(torch.where(self.keep, U.detach() * self.scale, torch.zeros_like(U)))
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        """[N, c, H, W] (or [c, H, W]) -> [N, n, H_out, W_out]. Under autocast the convolution alone is narrow."""
        with torch.autocast(input.device.type, enabled=False):
            W = tile_filters(self.winograd_weight(), self.tile, self.combination)
        return winograd_convolution(input, W, self.bias, self.padding, self.tile)

    def winograd_weight(self) -> Tensor:
        """U [p*p, n, c], zeros where pruned."""
        return self.weight * self.keep / self.scale

    def extra_repr(self) -> str:
        """Channels, tile and the share of weights that is kept."""
        kept = float(self.keep.float().mean())
        return f"{self.in_channels}, {self.out_channels}, tile={self.tile}, padding={self.padding}, kept={kept:.3f}"
