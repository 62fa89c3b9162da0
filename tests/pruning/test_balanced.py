"""BWSP: the same number of rows (or columns) in every position."""

from __future__ import annotations

import pytest
import torch

from wsp_compiler.pruning import IMPORTANCES, PATTERNS
from wsp_compiler.pruning.balanced import BLOCK_ROWS, BalancedWinogradStructured, block_of, fit_block
from wsp_compiler.pruning.base import kept_count

BWSP, L2 = PATTERNS["bwsp"], IMPORTANCES["l2"]


@pytest.mark.parametrize("pr", [0.0, 0.29, 0.5, 0.8, 0.99])
@pytest.mark.parametrize(("direction", "shape"), [("row", (16, 7, 1)), ("column", (16, 1, 5))])
def test_keeps_the_largest_units_of_each_position(pr: float, direction: str, shape: tuple[int, ...]) -> None:
    U = torch.randn(16, 7, 5).double() * torch.rand(16, 1, 1).double()
    keep = BWSP.keep(U, pr, direction, L2)
    assert keep.dtype == torch.bool
    assert keep.shape == shape
    matrices = U if direction == "row" else U.transpose(1, 2)
    size = max(shape[1:])
    for k in range(16):
        norms = [float(matrices[k, i].norm()) for i in range(size)]
        best = sorted(range(size), key=lambda i: -norms[i])[: kept_count(size, pr)]
        assert keep[k].flatten().nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("direction", ["row", "column"])
def test_ties_keep_the_first_units(direction: str) -> None:
    keep = BWSP.keep(torch.ones(36, 6, 6).double(), 0.5, direction, L2).reshape(36, 6)
    assert keep[:, :3].all()
    assert not keep[:, 3:].any()


def test_at_least_one_unit_of_every_position_stays() -> None:
    keep = BWSP.keep(torch.randn(36, 3, 4).double(), 0.9999, "column", L2)
    assert keep.sum(2).flatten().tolist() == [1] * 36


@pytest.mark.parametrize("pr", [0.0, 0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("block", [4, 8, 12, 24])
def test_blocks_keep_the_same_number_of_rows_in_every_group(pr: float, block: int) -> None:
    U = torch.randn(16, 24, 5).double() * torch.rand(16, 24, 1).double()
    keep = BalancedWinogradStructured(block=block).keep(U, pr, "row", L2)
    assert keep.shape == (16, 24, 1)
    groups = keep.view(16, 24 // block, block)
    assert (groups.sum(2) == kept_count(block, pr)).all()
    for k in range(16):
        for g in range(24 // block):
            best = BWSP.keep(U[k : k + 1, g * block : (g + 1) * block], pr, "row", L2)
            assert torch.equal(groups[k, g], best.flatten())


def test_one_block_is_the_papers_pattern_and_columns_have_no_blocks() -> None:
    U = torch.randn(16, 24, 6).double()
    assert torch.equal(
        BalancedWinogradStructured(block=24).keep(U, 0.6, "row", L2), BWSP.keep(U, 0.6, "row", L2)
    )
    blocked = BalancedWinogradStructured(block=4)
    assert torch.equal(blocked.keep(U, 0.6, "column", L2), BWSP.keep(U, 0.6, "column", L2))


@pytest.mark.parametrize(
    ("filters", "pr", "block"),
    [
        (64, 0.8, 64),
        (128, 0.8, 128),  # 26 rows
        (
            256,
            0.8,
            128,
        ),  # 52 rows would not fit; 26 pad to 32 as 13 to 16, but larger groups prune more freely
        (512, 0.8, 128),
        (512, 0.5, 64),  # 32 rows and nothing to pad
        (512, 0.9, 256),
        (384, 0.8, 128),
        (192, 0.5, 64),
        (128, 0.1, 32),
        (512, 0.0, 512),  # nothing is pruned
        (100, 0.1, 100),  # no divisor that is a multiple of 32
    ],
)
def test_the_block_that_fits_the_kernels(filters: int, pr: float, block: int) -> None:
    assert fit_block(filters, pr) == block_of(filters, pr, None) == block


@pytest.mark.parametrize("filters", range(1, 700, 23))
@pytest.mark.parametrize("pr", [0.0, 0.33, 0.8, 0.99])
def test_a_fitting_block_divides_the_filters(filters: int, pr: float) -> None:
    block = fit_block(filters, pr)
    assert filters % block == 0
    assert block == filters or (block % 32 == 0 and kept_count(block, pr) <= BLOCK_ROWS)


@pytest.mark.parametrize(
    ("filters", "asked", "block"), [(64, 64, 64), (96, 64, 48), (20, 32, 20), (7, 4, 1), (8, 1, 1)]
)
def test_an_asked_block_becomes_a_divisor(filters: int, asked: int, block: int) -> None:
    assert block_of(filters, 0.8, asked) == block
