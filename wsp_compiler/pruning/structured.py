"""WSP: rows or columns of the p*p matrices under one threshold for the layer (ABWSP paper, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from wsp_compiler.pruning.base import UNIT_DIMS, Importance, keep_largest, kept_count


@dataclass(frozen=True)
class WinogradStructured:
    """Winograd structured pruning: positions may end up with unequal numbers of rows (or columns)."""

    name: str = "wsp"
    uses_direction: bool = True

    def keep(self, U: Tensor, pr: float, direction: str, importance: Importance) -> Tensor:
        """[p*p, n, 1] for rows, [p*p, 1, c] for columns."""
        scores = importance(U, UNIT_DIMS[direction])
        flat = scores.reshape(-1)
        return keep_largest(flat, kept_count(flat.numel(), pr)).reshape(scores.shape)
