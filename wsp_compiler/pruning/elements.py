"""WWP: single Winograd weights under one threshold for the layer, which leaves no structure to the kernels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from wsp_compiler.pruning.base import Importance, keep_largest, kept_count


@dataclass(frozen=True)
class WinogradWeights:
    """Winograd weight pruning, the slow baseline of the ABWSP paper (its figure 1): runs as sparse matrices (CSR)."""

    name: str = "wwp"
    uses_direction: bool = False

    def keep(self, U: Tensor, pr: float, direction: str, importance: Importance) -> Tensor:
        """[p*p, n, c]: the elements with the largest scores."""
        flat = importance(U, ()).reshape(-1)
        return keep_largest(flat, kept_count(flat.numel(), pr)).reshape(U.shape)
