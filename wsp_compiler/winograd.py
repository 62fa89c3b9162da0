"""Winograd's minimal filtering F(m x m, 3x3): matrices, tile arithmetic and the glossary of symbols.

Symbols (Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", 2015; the ABWSP paper):

====== ==========================================================================================
m      side of an output tile (2 or 4);  r = 3 side of the filter;  p = m + 2 side of an input tile
n, c   filters (output channels) and input channels of a convolution
T      number of tiles, batch * ceil(H_out / m) * ceil(W_out / m)
G      [p, 3]   filter transform,  U = G g G^T            U: [p*p, n, c], "position" = one of p*p
B^T    [p, p]   input transform,   V = B^T d B            V: [p*p, c, T]
A^T    [m, p]   output transform,  Y = A^T (U_k V_k) A    M: [p*p, n, T], M_k = U_k V_k
====== ==========================================================================================

The matrices come from the package ``wincnn`` (Cook-Toom) at fixed interpolation points: 0, 1, -1 (and
infinity) for F(2x2, 3x3), 0, 1, -1, 2, -2 (and infinity) for F(4x4, 3x3).
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Generator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import wincnn
from torch import Tensor

FILTER_SIDE = 3
INTERPOLATION_POINTS: dict[int, tuple[int, ...]] = {2: (0, 1, -1), 4: (0, 1, -1, 2, -2)}

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class WinogradTransform:
    """The three matrices of F(m x m, 3x3) as nested tuples of floats (thirds are rounded)."""

    tile: int
    BT: Matrix  # [p, p]
    G: Matrix  # [p, 3]
    AT: Matrix  # [m, p]

    @property
    def input_side(self) -> int:
        """p = m + 2."""
        return self.tile + FILTER_SIDE - 1

    @property
    def positions(self) -> int:
        """p * p, the number of matrix products."""
        return self.input_side**2

    @property
    def input_growth(self) -> float:
        """Largest possible ratio of max|V| to max|d|: the squared largest row sum of |B^T|."""
        return max(sum(abs(value) for value in row) for row in self.BT) ** 2

    def tensor(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """One matrix, ``name`` in {"BT", "G", "AT"}, as a tensor."""
        return torch.tensor(getattr(self, name), dtype=dtype, device=device)


def _nested(matrix: Any) -> Matrix:
    return tuple(tuple(float(matrix[i, j]) for j in range(matrix.cols)) for i in range(matrix.rows))


@functools.cache
def transform(tile: int) -> WinogradTransform:
    """The transform F(tile x tile, 3x3), tile 2 or 4."""
    AT, G, BT, _ = cast("Any", wincnn).cookToomFilter(INTERPOLATION_POINTS[tile], tile, FILTER_SIDE)
    return WinogradTransform(tile=tile, BT=_nested(BT), G=_nested(G), AT=_nested(AT))


@dataclass
class _Recent:
    """The weight that was transformed last, and what became of it."""

    weight: weakref.ref[Tensor] | None = None
    version: int = 0
    transformed: dict[int, Tensor] = field(default_factory=dict[int, Tensor])


_recent: ContextVar[_Recent | None] = ContextVar("recent", default=None)


@contextlib.contextmanager
def remember_transforms() -> Generator[None]:
    """Inside, :func:`transform_weight` keeps the results for the weight that it was given last."""
    token = _recent.set(_Recent())
    try:
        yield
    finally:
        _recent.reset(token)


def transform_weight(weight: Tensor, tile: int) -> Tensor:
    """U = G g G^T of every filter, in float64.

    Args:
        weight: [n, c, 3, 3], any floating dtype.
        tile: output tile side m.

    Returns:
        [p*p, n, c] float64, not to be written to: it may be shared (:func:`remember_transforms`).
    """
    recent = _recent.get()
    if recent is None or weight.is_inference():
        return _transformed(weight, tile)
    if recent.weight is None or recent.weight() is not weight or recent.version != weight._version:
        recent.weight, recent.version, recent.transformed = weakref.ref(weight), weight._version, {}
    if tile not in recent.transformed:
        recent.transformed[tile] = _transformed(weight, tile)
    return recent.transformed[tile]


def _transformed(weight: Tensor, tile: int) -> Tensor:
    G = transform(tile).tensor("G", torch.float64, weight.device)  # [p, 3]
    filters = weight.detach().double().reshape(-1, FILTER_SIDE**2)  # [n * c, 9]
    U = torch.kron(G, G) @ filters.T  # [p*p, n * c], three times as fast as an einsum over G and G
    return U.reshape(-1, weight.shape[0], weight.shape[1])


def output_size(size: int, padding: int) -> int:
    """Output extent of a 3-wide, stride-1 convolution over ``size`` with ``padding`` on both sides."""
    return size + 2 * padding - FILTER_SIDE + 1


def tile_grid(height: int, width: int, padding: tuple[int, int], tile: int) -> tuple[int, int]:
    """Tiles (rows, columns) that cover the output of one image of ``height`` x ``width``."""
    return (-(-output_size(height, padding[0]) // tile), -(-output_size(width, padding[1]) // tile))


@dataclass(frozen=True)
class Multiplies:
    """Multiplications of one convolution per call: direct, dense Winograd, and with the kept weights."""

    direct: int
    winograd: int
    kept: int


def count_multiplies(
    batch: int, channels: tuple[int, int], output: tuple[int, int], tile: int, kept_weights: int
) -> Multiplies:
    """Multiplications for ``batch`` images, (n, c) ``channels`` and (H_out, W_out) ``output``.

    ``kept_weights`` counts the stored weights over all positions: each meets every tile once.
    """
    n, c = channels
    tiles = batch * (-(-output[0] // tile)) * (-(-output[1] // tile))
    direct = batch * output[0] * output[1] * n * c * FILTER_SIDE**2
    return Multiplies(direct, tiles * transform(tile).positions * n * c, tiles * kept_weights)
