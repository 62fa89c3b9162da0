"""How much an error in one layer's output matters to the network's output.

The gain of a layer is measured in the dense network: the layer alone is replaced by a pruned one, and what its
error becomes in the network's output is divided by it. Real pruning errors are used rather than random ones: they are
correlated with the signal and pass activations differently.

In a calibrated network the layers behind are fitted to what the pruned ones before send, and make up for a part of
what those lose. On the denoiser (15 layers, pr=0.8) pruning one layer less and calibrating anew reduced the output's
error, per unit of gain, 2 to 10 times less for the first layers than for the last; :data:`REACH` follows that.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

REACH = 8.0
"""So many pruned layers behind a layer leave 1/e of its error's effect."""
LEAST_GAIN = 0.05
"""Of the median gain."""


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
    """Squared relative error of a network's output for each unit of squared relative error in a layer's.

    Args:
        dense, pruned: [N, n, H, W], the layer's output as it is and as the pruned layer gives it.
        before, after: the network's outputs with either.

    Returns:
        None where it cannot be told.
    """
    change = output_change(before, after)
    wide = dense.double()
    energy = float((wide - wide.mean((0, 2, 3), keepdim=True)).square().sum())
    error = float((pruned.double() - wide).square().sum())
    return None if change is None or error <= 0 or energy <= 0 else change * energy / error


def layer_weights(gains: Mapping[str, float | None]) -> dict[str, float]:
    """Weights of all layers from their gains in the dense network, in the order of the model's calls.

    A layer with d pruned layers behind it weighs exp(-d / REACH) of its gain, which these make up for the rest of.

    Returns:
        The median gain (1 without any) stands for unknown ones. None counts less than 5% of it: a few images do not
        show that a layer is useless.
    """
    known = [found for found in gains.values() if found is not None]
    typical = statistics.median(known) if known else 1.0
    typical = typical if typical > 0 else 1.0
    weights: dict[str, float] = {}
    for behind, (path, found) in enumerate(reversed(list(gains.items()))):
        own = typical if found is None else max(found, LEAST_GAIN * typical)
        weights[path] = own * math.exp(-behind / REACH)
    return {path: weights[path] for path in gains}
