"""Output-aware importance: a unit is worth the energy that it adds to the layer's output.

L2 norms of different positions are not comparable, since position k reaches the output through A and sees the
input through B. With a layer's :class:`~wsp_compiler.pruning.moments.Moments` the energy is measured,
E (U_k[f] V_k)^2 sum_o A[k, o]^2; without, the input counts as white noise, which needs the weights alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wsp_compiler.pruning.base import over_units
from wsp_compiler.pruning.moments import Moments, white_gram

TILE_OF_POSITIONS = {16: 2, 36: 4}
FILTERS_AT_A_TIME = 32


def output_energy(U: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Energy in the output of every unit that spans ``dims`` of U [p*p, n, c], for inputs of white noise."""
    weights = white_gram(TILE_OF_POSITIONS[U.shape[0]], U.device).diagonal()  # [p*p]
    by_position = tuple(dim for dim in dims if dim != 0)  # one after the other: U may be large
    scores = [over_units(U_k.double().square(), by_position) for U_k in torch.split(U, 1)]
    return over_units(torch.cat(scores) * weights.view(-1, 1, 1), dims[:1] if 0 in dims else ())


@dataclass(frozen=True)
class MeasuredEnergy:
    """Energy in the output of every unit, on the inputs that the moments were taken of. An Importance.

    Positions are treated as if they reached different outputs; what they share is left to the refit.
    """

    moments: Moments

    def __call__(self, U: Tensor, dims: tuple[int, ...]) -> Tensor:
        grams = self.moments.position_grams()  # [p*p, c, c]
        weights = U.to(grams)
        if 2 in dims:  # whole rows: channels of one position add up before they are squared
            energy = (torch.bmm(weights, grams) * weights).sum(2, keepdim=True)
            rest = tuple(dim for dim in dims if dim != 2)
            return energy.sum(dim=rest, keepdim=True) if rest else energy
        return over_units(weights.square() * grams.diagonal(dim1=1, dim2=2).unsqueeze(1), dims)


def relative_error(U: Tensor, keep: Tensor, tile: int) -> float:
    """Relative L2 error of the layer's output without refit, if its input were white noise.

    Args:
        U: [p*p, n, c] the layer's Winograd weights.
        keep: bool, broadcastable to U.
        tile: output tile side m.
    """
    gram, kept = white_gram(tile, U.device), keep.to(U.device).expand(U.shape)
    lost, total = torch.zeros_like(gram), torch.zeros_like(gram)  # sum over weights, [p*p, p*p]
    parts = (torch.split(tensor, FILTERS_AT_A_TIME, 1) for tensor in (U, kept))
    for part, kept_part in zip(*parts, strict=True):
        weights = part.double().flatten(1)  # [p*p, filters * c]
        total += weights @ weights.T
        weights = weights.masked_fill(kept_part.flatten(1), 0.0)
        lost += weights @ weights.T
    energies = [float((products * gram).sum()) for products in (lost, total)]
    return (max(0.0, energies[0]) / energies[1]) ** 0.5 if energies[1] > 0 else 0.0
