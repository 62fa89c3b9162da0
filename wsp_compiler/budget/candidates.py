"""What each layer can become under a budget: one pattern and tile at a grid of pruning ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from wsp_compiler.options import CompileOptions
from wsp_compiler.plan import PruningPlan, site_candidates
from wsp_compiler.site_plan import SitePlan
from wsp_compiler.sites import ConvSite
from wsp_compiler.winograd import count_multiplies

GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Pruning ratios that a layer can get."""


def free_paths(plan: PruningPlan, options: CompileOptions) -> list[str]:
    """Planned convolutions whose pruning ratio no rule fixes: the budget is shared among these.

    Filters are tied over several layers and are pruned evenly.
    """
    found: list[str] = []
    for path, entry in plan.items():
        rule = options.rule_for(path)
        if entry.method not in ("dense", "fp") and (rule is None or rule.pr is None):
            found.append(path)
    return found


def grid_candidates(
    path: str, conv: nn.Conv2d, options: CompileOptions, methods: Sequence[str], extra: Sequence[float] = ()
) -> list[SitePlan]:
    """Every pattern and tile that the options leave open, at every ratio of :data:`GRID` and ``extra``.

    Args:
        methods: patterns to choose from where no rule names one.
    """
    rule = options.rule_for(path)
    found: list[SitePlan] = []
    for method in methods if rule is None or rule.method is None else (rule.method,):
        for pr in sorted({*GRID, *extra}):
            found += site_candidates(path, conv, rule, replace(options, pr=pr, method=method))
    return found


def kind_of(entry: SitePlan) -> tuple[str, str, int]:
    """Candidates of one kind differ in how much they keep."""
    return entry.method, entry.direction, entry.tile


def by_kind(entries: Sequence[SitePlan]) -> dict[tuple[str, str, int], list[int]]:
    """Kind -> indices of its candidates."""
    groups: dict[tuple[str, str, int], list[int]] = {}
    for index, entry in enumerate(entries):
        groups.setdefault(kind_of(entry), []).append(index)
    return groups


OutputSizes = Sequence[tuple[int, int, int]]
"""(images, H_out, W_out) of every call of one convolution."""


def kept_multiplies(entry: SitePlan, sizes: OutputSizes) -> int:
    """Multiplications of a planned convolution with its kept weights."""
    _, n, c = entry.shape
    return sum(
        count_multiplies(images, (n, c), (height, width), entry.tile, entry.kept_weights).kept
        for images, height, width in sizes
    )


def dense_multiplies(entry: SitePlan, sizes: OutputSizes) -> int:
    """Multiplications of the same convolution as unpruned F(2x2, 3x3), which every ratio refers to."""
    _, n, c = entry.shape
    return sum(count_multiplies(images, (n, c), (h, w), 2, 0).winograd for images, h, w in sizes)


def output_sizes(
    site: ConvSite, seen: Mapping[str, tuple[int, int, int]] | None = None
) -> tuple[tuple[int, int, int], ...]:
    """Of the example inputs, else (``seen``) of the first call in the calibration data; empty if unknown."""
    if site.output_sizes or seen is None or site.path not in seen:
        return site.output_sizes
    return (seen[site.path],) * max(1, site.calls)
