"""Second moments of a layer's inputs and outputs: all that scoring and refitting its Winograd weights need.

With M_k = U_k V_k, output o of a tile is y[f, o] = sum_k A[k, o] U_k[f] V_k + b[f], linear in the filter's
p*p*c weights. The squared error to given outputs, summed over samples, is therefore a quadratic form whose
matrix all filters share:

    gram[(k, i), (l, j)] = sum_o A[k, o] A[l, o] sum_t V_k[i, t] V_l[j, t]
    cross[f, (k, i)]     = sum_o A[k, o] sum_t V_k[i, t] y[f, o, t]

Outputs outside the image do not count: tiles at the lower and right border have terms of their own. The size
is that of one layer, (p*p*c)^2 numbers, however many samples are added.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from wsp_compiler.winograd import tile_grid, transform

CHUNK_ELEMENTS = 2**24
"""V is formed for so many images at a time that it has about this many elements (64 MiB in float32)."""


@dataclass(frozen=True)
class Moments:
    """Means per output value, about the mean (a bias is fitted along with the weights).

    Attributes:
        gram: [p*p*c, p*p*c], symmetric.
        cross: [n, p*p*c].
        variance: [n], of the wanted outputs.
        reach: [p*p*c], the mean output per unit of each weight: U . reach + b is the mean output.
        mean: [n], of the wanted outputs.
        tile: output tile side m.
        samples: output values per filter that were seen.
    """

    gram: Tensor
    cross: Tensor
    variance: Tensor
    reach: Tensor
    mean: Tensor
    tile: int
    samples: int

    @property
    def channels(self) -> int:
        """c."""
        return self.gram.shape[0] // transform(self.tile).positions

    def position_grams(self) -> Tensor:
        """The diagonal blocks [p*p, c, c]: what each position alone adds to the output."""
        positions = transform(self.tile).positions
        blocks = self.gram.view(positions, self.channels, positions, self.channels)
        return torch.stack([blocks[k, :, k] for k in range(positions)])


class MomentsBuilder:
    """Sums up :class:`Moments` over batches.

    Args:
        channels, filters: c and n.
        tile: output tile side m.
        padding: of the convolution, (vertical, horizontal).
        device: where the sums are kept, 4 * (p*p*c)^2 bytes in float32.
        dtype: of the sums.
    """

    def __init__(
        self,
        channels: int,
        filters: int,
        tile: int,
        padding: tuple[int, int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        matrices = transform(tile)
        self.tile, self.padding, self.channels = tile, padding, channels
        self.positions = matrices.positions
        size = self.positions * channels
        self.gram = torch.zeros((size, size), dtype=dtype, device=device)
        self.cross = torch.zeros((filters, size), dtype=dtype, device=device)
        self.reach = torch.zeros(size, dtype=torch.float64, device=device)
        self.total = torch.zeros(filters, dtype=torch.float64, device=device)
        self.squares = torch.zeros(filters, dtype=torch.float64, device=device)
        self.samples = 0
        AT, BT = matrices.tensor("AT", dtype, device), matrices.tensor("BT", dtype, device)
        self._A = torch.einsum("ai,bj->ijab", AT, AT).reshape(self.positions, -1)  # [p*p, m*m]
        self._B = torch.einsum("ih,jw->ijhw", BT, BT).reshape(self.positions, 1, *BT.shape)  # [p*p, 1, p, p]

    def add(self, x: Tensor, y: Tensor) -> None:
        """One batch.

        Args:
            x: [N, c, H, W], the layer's input in the pruned network.
            y: [N, n, H_out, W_out], the output that is wanted.
        """
        x, y = x.to(self.gram.dtype), y.to(self.gram.dtype)
        grid = tile_grid(x.shape[2], x.shape[3], self.padding, self.tile)
        per_image = self.positions * x.shape[1] * grid[0] * grid[1]
        images = max(1, CHUNK_ELEMENTS // max(1, per_image))
        for first in range(0, len(x), images):
            self._add_chunk(x[first : first + images], y[first : first + images], grid)

    def _add_chunk(self, x: Tensor, y: Tensor, grid: tuple[int, int]) -> None:
        (images, c), m, n = x.shape[:2], self.tile, y.shape[1]
        below, right = grid[0] * m - y.shape[2], grid[1] * m - y.shape[3]
        vertical, horizontal = self.padding
        padded = F.pad(x, (horizontal, horizontal + right, vertical, vertical + below))
        patches = F.conv2d(padded.reshape(images * c, 1, *padded.shape[2:]), self._B, stride=m)
        V = patches.view(images, c, self.positions, *grid).permute(
            2, 1, 0, 3, 4
        )  # [p*p, c, N, rows, columns]
        outputs = F.pixel_unshuffle(F.pad(y, (0, right, 0, below)), m)  # zeros outside the image
        outputs = outputs.view(images, n, m * m, *grid).permute(2, 1, 0, 3, 4)  # [m*m, n, N, rows, columns]
        for inside, rows, columns in _tile_kinds(m, grid, (below, right)):
            A = self._A[:, inside]  # [p*p, outputs inside the image]
            some_V = V[..., rows, columns].reshape(self.positions, c, -1)  # [p*p, c, T]
            self._add_gram(some_V, A @ A.T)
            wanted = outputs[..., rows, columns].reshape(m * m, n, -1)[inside]  # [outputs, n, T]
            Z = torch.einsum("ko,ont->knt", A, wanted)
            by_position = self.cross.view(n, self.positions, c)
            for k in range(self.positions):
                by_position[:, k] += Z[k] @ some_V[k].T
            self.reach += (A.sum(1, keepdim=True) * some_V.sum(2)).flatten().double()
        self.total += y.sum((0, 2, 3)).double()
        self.squares += y.square().sum((0, 2, 3)).double()
        self.samples += images * y.shape[2] * y.shape[3]

    def _add_gram(self, V: Tensor, weights: Tensor) -> None:
        """Adds weights[k, l] V_k V_l^T for k <= l; many weights are zero."""
        blocks = self.gram.view(self.positions, self.channels, self.positions, self.channels)
        for k, l, weight in _pairs(weights):  # noqa: E741
            blocks[k, :, l].addmm_(V[k], V[l].T, alpha=weight)

    def build(self) -> Moments:
        """The moments of everything added so far; the builder is used up."""
        count = max(1, self.samples)
        blocks = self.gram.view(self.positions, self.channels, self.positions, self.channels)
        for k in range(self.positions):
            for l in range(k):  # noqa: E741
                blocks[k, :, l] = blocks[l, :, k].T
        reach, mean = self.reach / count, self.total / count
        narrow = reach.to(self.gram.dtype)
        self.gram.div_(count).addr_(narrow, narrow, alpha=-1)
        self.cross.div_(count).addr_(mean.to(narrow.dtype), narrow, alpha=-1)
        variance = (self.squares / count - mean.square()).clamp_min(0)
        return Moments(self.gram, self.cross, variance, reach, mean, self.tile, self.samples)


def _pairs(weights: Tensor) -> Iterator[tuple[int, int, float]]:
    values = cast("list[list[float]]", cast("Any", weights).tolist())
    for k, row in enumerate(values):
        for l in range(k, len(row)):  # noqa: E741
            if abs(row[l]) > 1e-12:
                yield k, l, row[l]


def _tile_kinds(
    m: int, grid: tuple[int, int], outside: tuple[int, int]
) -> Iterator[tuple[Tensor, slice, slice]]:
    """(outputs inside the image [m*m] bool, rows, columns) of inner and border tiles."""

    def parts(count: int, beyond: int) -> Iterator[tuple[int, slice]]:
        if beyond == 0:
            yield m, slice(0, count)
            return
        if count > 1:
            yield m, slice(0, count - 1)
        yield m - beyond, slice(count - 1, count)

    for height, rows in parts(grid[0], outside[0]):
        for width, columns in parts(grid[1], outside[1]):
            inside = torch.zeros((m, m), dtype=torch.bool)
            inside[:height, :width] = True
            yield inside.flatten(), rows, columns


def white_gram(tile: int, device: torch.device | str = "cpu") -> Tensor:
    """E[V_k V_l] sum_o A[k, o] A[l, o] / m^2 for inputs that are white noise: [p*p, p*p] float64."""
    matrices = transform(tile)
    AT = matrices.tensor("AT", torch.float64, device)
    BT = matrices.tensor("BT", torch.float64, device)
    one_side = (AT.T @ AT) * (BT @ BT.T)  # [p, p]
    return torch.kron(one_side, one_side) / tile**2
