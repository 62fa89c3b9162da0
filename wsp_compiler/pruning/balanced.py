"""BWSP: as WSP, with the same number of kept rows or columns in every position (ABWSP paper, section 4.2).

Rows can also be balanced within groups of consecutive filters: equal kept rows in every (position, group). A
group is what one thread block of the fused kernels computes, so none of its rows are padding for another's sake.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from wsp_compiler.pruning.base import UNIT_DIMS, Importance, keep_largest, kept_count

BLOCK_ROWS = 32
"""Kept rows of one position that a thread block of the fused kernels has registers for, beside enough tiles."""
ROW_PADDING = 16
"""Kept rows of a thread block are padded to a multiple of it."""
BLOCK_FILTERS = 32
"""Filters of a thread block are a multiple of it."""


def fit_block(filters: int, pr: float) -> int:
    """The group size that fits the kernels, for ``filters`` filters of which the share ``pr`` is pruned.

    All filters, if nothing is pruned or a thread block has registers for the rows that they keep (at pr=0.8 up to
    160 filters). Else a divisor of ``filters`` that is a multiple of 32 and whose kept rows fit; of these the one
    that loses least to padding rows to a multiple of :data:`ROW_PADDING`, and of equals the largest, which prunes
    most freely. Without such a divisor all filters: kernels without this limit run the layer.
    """
    if kept_count(filters, pr) in (*range(BLOCK_ROWS + 1), filters):
        return filters
    sizes = [size for size in range(BLOCK_FILTERS, filters, BLOCK_FILTERS) if filters % size == 0]
    rows = {size: kept_count(size, pr) for size in sizes if kept_count(size, pr) <= BLOCK_ROWS}
    return min(
        rows,
        key=lambda size: (-(-rows[size] // ROW_PADDING) * ROW_PADDING / rows[size], -size),
        default=filters,
    )


def block_of(filters: int, pr: float, block: int | None) -> int:
    """The group size that a user's ``block`` means: None fits the kernels, else the largest divisor up to it."""
    if block is None:
        return fit_block(filters, pr)
    return max(size for size in range(1, min(block, filters) + 1) if filters % size == 0)


@dataclass(frozen=True)
class BalancedWinogradStructured:
    """Balanced Winograd structured pruning: the p*p matrix products all take the same time.

    Args:
        block: rows are balanced within groups of so many consecutive filters, a divisor of n; None for all n, which
            is the paper's BWSP. Columns are not grouped.
    """

    name: str = "bwsp"
    uses_direction: bool = True
    block: int | None = None

    def keep(self, U: Tensor, pr: float, direction: str, importance: Importance) -> Tensor:
        """[p*p, n, 1] for rows, [p*p, 1, c] for columns."""
        scores = importance(U, UNIT_DIMS[direction])  # [p*p, n, 1] or [p*p, 1, c]
        flat = scores.reshape(scores.shape[0], -1)
        size = self.block if self.block is not None and direction == "row" else flat.shape[1]
        groups = flat.reshape(flat.shape[0], -1, size)  # [p*p, n / block, block]
        return keep_largest(groups, kept_count(size, pr)).reshape(scores.shape)
