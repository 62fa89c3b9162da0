"""How much an error in one layer's output matters to the network's output.

Layers behind a pruned layer are refitted too, to make up for what it loses. So the weight of a layer's error is not
measured in the dense network, where nothing makes up for it, but in one that is pruned evenly and roughly refitted:
one layer at a time is exchanged for one that keeps more, and what the network's output gains is divided by
what the layer's own output gains. (In the denoiser the first layers weigh a tenth of what they do in the dense network.)
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def output_change(before: Any, after: Any) -> float | None:
    """Mean over the floating-point tensors of two outputs of the squared error, as a share of their energy.

    Args:
        before, after: what a network returned: tensors in any nesting.

    Returns:
        Per tensor, sum (after - before)^2 / sum (before - mean)^2; None if nothing compares (no such tensor, or
        other shapes, as detectors return) or is finite.
    """
    pairs = zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=False)
    shares: list[float] = []
    for old, new in pairs:
        if not (isinstance(old, Tensor) and isinstance(new, Tensor) and old.is_floating_point()):
            continue
        if old.shape != new.shape or old.numel() < 2:
            continue
        wide = old.double()
        energy = float((wide - wide.mean()).square().sum())
        change = float((new.double() - wide).square().sum())
        if energy > 0 and math.isfinite(change):
            shares.append(change / energy)
    return sum(shares) / len(shares) if shares else None


def fill(weights: Mapping[str, float | None]) -> dict[str, float]:
    """Weights for every layer where some or all are unknown.

    Returns:
        The median of the known ones (1 without any) for those unknown. None is below 5% of that: a few images do not
        show that a layer is useless.
    """
    known = [found for found in weights.values() if found is not None]
    typical = statistics.median(known) if known else 1.0
    typical = typical if typical > 0 else 1.0
    return {
        path: typical if found is None else max(found, LEAST_WEIGHT * typical)
        for path, found in weights.items()
    }


LEAST_WEIGHT = 0.05
"""Of the median weight."""
