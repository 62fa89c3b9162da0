"""Nothing is pruned: the layer runs as dense Winograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wsp_compiler.pruning.base import Importance


@dataclass(frozen=True)
class Dense:
    """Keep everything, whatever ``pr`` says."""

    name: str = "dense"
    uses_direction: bool = False

    def keep(self, U: Tensor, pr: float, direction: str, importance: Importance) -> Tensor:
        """All True, [1, 1, 1]."""
        return torch.ones((1, 1, 1), dtype=torch.bool, device=U.device)
