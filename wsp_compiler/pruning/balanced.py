"""BWSP: as WSP, with the same number of kept rows or columns in every position (ABWSP paper, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from wsp_compiler.pruning.base import UNIT_DIMS, Importance, keep_largest, kept_count


@dataclass(frozen=True)
class BalancedWinogradStructured:
    """Balanced Winograd structured pruning: the p*p matrix products all take the same time."""

    name: str = "bwsp"
    uses_direction: bool = True

    def keep(self, U: Tensor, pr: float, direction: str, importance: Importance) -> Tensor:
        """[p*p, n, 1] for rows, [p*p, 1, c] for columns."""
        scores = importance(U, UNIT_DIMS[direction])  # [p*p, n, 1] or [p*p, 1, c]
        flat = scores.reshape(scores.shape[0], -1)
        return keep_largest(flat, kept_count(flat.shape[1], pr)).reshape(scores.shape)
