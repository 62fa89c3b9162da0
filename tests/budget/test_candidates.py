"""candidates: the grid within what options and rules leave open, and the multiplications counted."""

from __future__ import annotations

import pytest
from torch import nn

from wsp_compiler.budget.candidates import (
    GRID,
    by_kind,
    dense_multiplies,
    free_paths,
    grid_candidates,
    kept_multiplies,
    kind_of,
    output_sizes,
)
from wsp_compiler.options import CompileOptions, PruneRule
from wsp_compiler.plan import make_plan
from wsp_compiler.sites import ConvSite, find_sites


def test_every_ratio_of_the_grid_and_the_one_asked_for() -> None:
    conv = nn.Conv2d(16, 20, 3)
    found = grid_candidates("a", conv, CompileOptions(), ("wsp",), (0.37, 0.8))
    assert [entry.pr for entry in found] == sorted({*GRID, 0.37})
    assert {kind_of(entry) for entry in found} == {("wsp", "row", 2)}
    assert found[0].kept_fraction == 1


def test_patterns_and_tiles_are_left_open_by_the_options() -> None:
    conv = nn.Conv2d(16, 20, 3)
    found = grid_candidates("a", conv, CompileOptions(tile="auto", direction="column"), ("wsp", "bwsp"))
    assert set(by_kind(found)) == {(m, "column", t) for m in ("wsp", "bwsp") for t in (2, 4)}
    assert len(found) == 4 * len(GRID)
    assert all(kind_of(found[i]) == kind for kind, indices in by_kind(found).items() for i in indices)


def test_rules_narrow_them() -> None:
    options = CompileOptions(rules=(PruneRule("a", method="bwsp", tile=4),))
    found = grid_candidates("a", nn.Conv2d(16, 20, 3), options, ("wsp",))
    assert set(by_kind(found)) == {("bwsp", "row", 4)}


def test_layers_whose_ratio_a_rule_sets_do_not_share_the_budget() -> None:
    model = nn.Sequential(*(nn.Conv2d(16, 16, 3) for _ in range(6))).eval()
    convolutions = {path: conv for path, conv in model.named_modules() if isinstance(conv, nn.Conv2d)}
    rules = (
        PruneRule("0", pr=0.25),
        PruneRule("1", skip=True),
        PruneRule("2", method="dense"),
        PruneRule("3", tile=4),
        PruneRule("5", method="fp"),
    )
    options = CompileOptions(0.5, "wsp", rules=rules)
    assert free_paths(make_plan(find_sites(model), convolutions, options), options) == ["3", "4"]


def test_multiplications() -> None:
    """By hand: 7 x 9 outputs are 4 x 5 tiles of F(2x2), 2 x 3 of F(4x4)."""
    conv, sizes = nn.Conv2d(16, 20, 3), [(3, 7, 9), (1, 2, 2)]
    two = grid_candidates("a", conv, CompileOptions(), ("bwsp",), (0.5,))
    four = grid_candidates("a", conv, CompileOptions(tile=4), ("bwsp",), (0.5,))
    dense = 16 * 20 * 16 * (3 * 20 + 1)
    assert dense_multiplies(two[0], sizes) == dense_multiplies(four[0], sizes) == dense
    assert kept_multiplies(two[0], sizes) == dense
    assert kept_multiplies(four[0], sizes) == 36 * 20 * 16 * (3 * 6 + 1)
    half = next(entry for entry in two if entry.pr == 0.5)
    assert kept_multiplies(half, sizes) == pytest.approx(dense / 2)


def test_sizes_come_from_the_example_inputs_or_the_data() -> None:
    site = ConvSite("a", 16, 16, (3, 3), (1, 1), (1, 1), True, 2)
    assert output_sizes(site) == ()
    assert output_sizes(site, {"b": (1, 2, 3)}) == ()
    assert output_sizes(site, {"a": (4, 5, 6)}) == ((4, 5, 6), (4, 5, 6))
    known = ConvSite("a", 16, 16, (3, 3), (1, 1), (0, 0), True, 1, input_shapes=((2, 16, 7, 8),))
    assert output_sizes(known, {"a": (4, 5, 6)}) == ((2, 5, 6),)
