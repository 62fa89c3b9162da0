"""One convolution on the `wsp::*` operators, and the same computed in full, for the tests of the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wsp_compiler import ops
from wsp_compiler.pruning import IMPORTANCES, PATTERNS
from wsp_compiler.winograd import transform, transform_weight

WSP: Any = torch.ops.wsp
PRUNED = [("wsp", "row"), ("wsp", "column"), ("bwsp", "row"), ("bwsp", "column"), ("fp", "row")]


class Layer:
    """A convolution and its site, filled under a pattern."""

    def __init__(
        self, c: int, n: int, padding: tuple[int, int], tile: int, method: str, direction: str = "row"
    ) -> None:
        self.conv = nn.Conv2d(c, n, 3, padding=padding).requires_grad_(False)
        self.tile, self.padding = tile, list(padding)
        U = transform_weight(self.conv.weight, tile)
        self.site = ops.WinogradSite(PATTERNS[method].keep(U, 0.5, direction, IMPORTANCES["l2"]))
        self.site.fill(U, self.conv.bias)
        self.exact = self.site.weight.double()

    def run(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        slope: Tensor | None = None,
        activation: str = "none",
        channels_last: bool = False,
        merged: bool = False,
    ) -> Tensor:
        site = self.site
        tail = (site.bias, residual, slope, self.padding, self.tile, activation, channels_last)
        if merged:
            index = (site.rows, site.row_offset, site.columns, site.column_offset)
            return WSP.winograd_conv2d(x, site.weight, *index, *tail)
        V = WSP.input_transform(x, site.columns, site.column_offset, self.padding, self.tile)
        M = WSP.sparse_bgemm(V, site.weight, site.rows, site.row_offset, site.column_offset)
        return WSP.output_transform(M, x, site.rows, site.row_offset, *tail)


def masked_convolution(x: Tensor, conv: nn.Conv2d, keep: Tensor, tile: int) -> Tensor:
    """float64, all p*p matrices in full with zeros for what is not kept; tiles cut out one by one."""
    winograd, p, pad = transform(tile), tile + 2, conv.padding
    AT, BT = winograd.tensor("AT", torch.float64), winograd.tensor("BT", torch.float64)
    U = (transform_weight(conv.weight, tile) * keep).view(p, p, conv.out_channels, conv.in_channels)
    size = [x.shape[2 + i] + 2 * int(pad[i]) - 2 for i in (0, 1)]
    counts = [-(-extent // tile) for extent in size]
    image = torch.zeros(*x.shape[:2], counts[0] * tile + 2, counts[1] * tile + 2, dtype=torch.float64)
    inside = image[:, :, int(pad[0]) :, int(pad[1]) :][:, :, : x.shape[2], : x.shape[3]]
    inside.copy_(x[:, :, : inside.shape[2], : inside.shape[3]])
    y = torch.zeros(x.shape[0], conv.out_channels, counts[0] * tile, counts[1] * tile, dtype=torch.float64)
    for top in range(0, counts[0] * tile, tile):
        for left in range(0, counts[1] * tile, tile):
            V = BT @ image[:, :, top : top + p, left : left + p] @ BT.T  # [N, c, p, p]
            M = (U.permute(2, 3, 0, 1) * V.unsqueeze(1)).sum(2)  # [N, n, p, p]
            y[:, :, top : top + tile, left : left + tile] = AT @ M @ AT.T
    assert conv.bias is not None
    return y[:, :, : size[0], : size[1]] + conv.bias.double().view(-1, 1, 1)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    """The weights are stored in float32, so even float64 inputs allow 1e-6."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    difference = float((actual - expected).double().norm())
    assert difference <= tolerance * float(expected.double().norm()) + 1e-12
