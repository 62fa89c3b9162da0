"""FP: whole filters, that is the same row of all p*p matrices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from wsp_compiler.pruning.base import Importance, keep_largest, kept_count


@dataclass(frozen=True)
class Filters:
    """Filter pruning. The filter's channel stays in the output and carries its bias alone."""

    name: str = "fp"
    uses_direction: bool = False

    def keep(self, U: Tensor, pr: float, direction: str, importance: Importance) -> Tensor:
        """[1, n, 1]: the n - floor(pr*n) filters with the largest score over all positions."""
        scores = importance(U, (0, 2)).reshape(1, -1)  # [1, n]
        return keep_largest(scores, kept_count(scores.shape[1], pr)).unsqueeze(2)
