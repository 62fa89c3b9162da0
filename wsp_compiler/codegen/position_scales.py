"""Powers of two that give every Winograd position about the same range, since float16 has few exponents.

With D = diag(POSITION_SCALES[m]) the fused kernel computes

    y = A^T M A = (A^T D^-1) (D M D) (D^-1 A),   (D M D)_ij = sum_c (D_i D_j U_ij) V_ij,

so that all of D_i D_j U_ij V_ij have about the same bound, and V scaled by :func:`input_scale`.
"""

from __future__ import annotations

import math

POSITION_SCALES = {2: (1.0, 1.0, 1.0, 1.0), 4: (4.0, 2.0, 2.0, 4.0, 4.0, 1.0)}
"""D for each output tile side m."""
OUTPUT_SCALE = {2: 1.0, 4: 2.0}
"""The emitted output transform is OUTPUT_SCALE * A^T D^-1 in each dimension."""
INPUT_GROWTH = {2: (2.0, 2.0, 2.0, 2.0), 4: (10.0, 10.0, 10.0, 6.0, 6.0, 10.0)}
"""Sum of the absolute values of each row of B^T."""


def input_scale(m: int, precision: str) -> float:
    """What B^T d B is multiplied by: a power of two that keeps float16 V finite for every finite input."""
    if precision != "fp16":
        return 1.0
    return 2.0 ** -math.ceil(math.log2(max(INPUT_GROWTH[m]) ** 2))
