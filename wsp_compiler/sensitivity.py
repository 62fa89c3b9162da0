"""How much an error in one layer's output matters to the network's output.

A relative error of 10% in one layer can be lost in the noise of the next or be amplified by all that follow. The gain
of a layer is measured, on calibration data: the layer alone is replaced by a pruned and refitted one, and what
its error becomes in the network's output is divided by it. Real pruning errors are used rather than random ones: they
are correlated with the signal and pass activations differently.
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


def gain(dense: Tensor, pruned: Tensor, before: Any, after: Any) -> float | None:
    """Squared relative error of the network's output for each unit of squared relative error in the layer's.

    Args:
        dense, pruned: [N, n, H, W], the layer's output in the dense network, and of the pruned layer.
        before, after: the network's outputs with either.

    Returns:
        None where it cannot be told.
    """
    change = output_change(before, after)
    wide = dense.double()
    energy = float((wide - wide.mean((0, 2, 3), keepdim=True)).square().sum())
    error = float((pruned.double() - wide).square().sum())
    return None if change is None or error <= 0 or energy <= 0 else change * energy / error


def fill(gains: Mapping[str, float | None]) -> dict[str, float]:
    """Gains for every layer where some or all are unknown.

    Returns:
        The median of the known ones (1 without any) for those unknown. None is below a thousandth of that: one batch
        does not show that a layer is useless.
    """
    known = [found for found in gains.values() if found is not None]
    typical = statistics.median(known) if known else 1.0
    typical = typical if typical > 0 else 1.0
    return {path: typical if found is None else max(found, 1e-3 * typical) for path, found in gains.items()}
