"""Output-aware importance: a unit is worth the energy that it adds to the layer's output.

L2 norms of different positions are not comparable, since position k reaches the output through A and sees the
input through B. With a layer's :class:`~wsp_compiler.pruning.moments.Moments` the energy is measured,
E (U_k[f] V_k)^2 sum_o A[k, o]^2; without, the input counts as white noise, which needs the weights alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wsp_compiler.pruning.moments import Moments, white_gram

TILE_OF_POSITIONS = {16: 2, 36: 4}


def output_energy(U: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Energy in the output of every unit that spans ``dims`` of U [p*p, n, c], for inputs of white noise."""
    weights = white_gram(TILE_OF_POSITIONS[U.shape[0]], U.device).diagonal()  # [p*p]
    return (U.double().square() * weights.view(-1, 1, 1)).sum(dim=dims, keepdim=True)


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
        return (weights.square() * grams.diagonal(dim1=1, dim2=2).unsqueeze(1)).sum(dim=dims, keepdim=True)


def relative_error(U: Tensor, keep: Tensor, tile: int) -> float:
    """Relative L2 error of the layer's output without refit, if its input were white noise.

    Args:
        U: [p*p, n, c] the layer's Winograd weights.
        keep: bool, broadcastable to U.
        tile: output tile side m.
    """
    gram = white_gram(tile, U.device)
    weights = U.double()
    lost = torch.where(keep.to(U.device), torch.zeros_like(weights), weights)
    energies = [((W := value.flatten(1)) @ W.T * gram).sum() for value in (lost, weights)]
    total = float(energies[1])
    return (max(0.0, float(energies[0])) / total) ** 0.5 if total > 0 else 0.0
