"""Values between a few known ones."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def linear(points: Sequence[tuple[float, float]], x: float) -> float:
    """Piecewise linear through sorted ``points``, constant beyond them."""
    if x <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in itertools.pairwise(points):
        if x <= right:
            return low + (high - low) * (x - left) / (right - left) if right > left else high
    return points[-1][1]
