"""What a plan decides about pruned filters once it is known which of them can leave the network.

Filters whose channels are tied are chosen together: a channel behind an addition can only leave if no branch
feeds it. ``pr`` counts what is left of the channels: where a carrier of constants has to stay (removal.py), one more
filter is pruned for it, so that 64 filters at pr=0.5 leave 32 channels and not 33.

What is left of a layer is a dense convolution with fewer filters; Winograd kernels run it unless the
vendor's library is known to be faster. A layer whose channels have to stay is held to the rule of all patterns:
it stays unpruned where the dense convolution is known to be faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import networkx as nx
import torch
from torch import Tensor, fx, nn

from wsp_compiler.filters.coupling import Coupling, couple
from wsp_compiler.filters.removal import Removal, find_removal
from wsp_compiler.options import CompileOptions
from wsp_compiler.plan import PruningPlan, choose_keep, site_times
from wsp_compiler.pruning.base import Importance, kept_count
from wsp_compiler.pruning.importance import IMPORTANCES
from wsp_compiler.site_plan import SitePlan
from wsp_compiler.sites import ConvSite, padding_of
from wsp_compiler.speed import SiteTimes, SpeedSource
from wsp_compiler.winograd import FILTER_SIDE, transform_weight


def settle_filters(
    plan: PruningPlan,
    units: Mapping[str, fx.GraphModule],
    sites: Sequence[ConvSite],
    convolutions: Mapping[str, nn.Conv2d],
    options: CompileOptions,
    speed: SpeedSource | None = None,
    scores: Mapping[str, Importance] | None = None,
    *,
    calibrated: bool = False,
) -> PruningPlan:
    """The plan with its entries of method "fp" settled; see the module's docstring.

    Args:
        plan: from :func:`wsp_compiler.plan.make_plan`; not modified.
        units: the traced graphs; not modified.
        sites, convolutions, options, speed: as for make_plan.
        scores: path -> what scores its filters, where it is not the options' importance.
        calibrated: the plan will be calibrated, so that pruned filters emit means and not their biases.
    """
    if not any(entry.method == "fp" for entry in plan.values()):
        return plan
    result = replace(
        plan,
        sites=dict(plan.sites),
        left_alone=dict(plan.left_alone),
        times=dict(plan.times),
        errors=dict(plan.errors),
    )
    known = {site.path: site for site in sites}
    default = IMPORTANCES[options.importance]
    for gm in units.values():
        coupling = couple(gm)
        mine = [name for name in coupling.paths if name in result and result[name].method == "fp"]
        importances = {name: (scores or {}).get(name, default) for name in mine}
        _choose(
            coupling,
            {name: scores[name] for name in mine} if scores else {},
            importances,
            result,
            convolutions,
        )
        removal = find_removal(gm, result, coupling, loud=calibrated)
        if room := _room_for_carriers(removal, removal.sizes(gm), result):
            _choose(coupling, {name: importances[name] for name in room}, importances, result, convolutions)
            removal = find_removal(gm, result, coupling, loud=calibrated)
        sizes = removal.sizes(gm)
        for name in mine:
            filters, channels = sizes.get(name, (known[name].filters, known[name].channels))
            times = result.times.get(name, SiteTimes(None, None))
            if filters < known[name].filters:
                _choose_how(result, known[name], convolutions[name], (filters, channels), options, speed)
            elif times.slower and not options.keep_slower:
                why = removal.reasons.get(name, "nothing of it is pruned")
                result.left_alone[name] = (
                    "the dense convolution is faster than pruned filters that stay in place "
                    f"({why}): {times.text()}"
                )
                del result.sites[name]
                result.errors.pop(name, None)
    return result


def _choose(
    coupling: Coupling,
    again: Mapping[str, Importance],
    importances: Mapping[str, Importance],
    plan: PruningPlan,
    convolutions: Mapping[str, nn.Conv2d],
) -> None:
    """Choose the filters of the layers in ``again`` anew, and together those that are tied."""
    for path, importance in again.items():
        U = transform_weight(convolutions[path].weight, plan[path].tile)
        plan.sites[path] = choose_keep(plan[path], U, importance)
    for tied in tied_paths(coupling, plan):
        _choose_together(coupling, {path: importances[path] for path in tied}, plan, convolutions)


def _room_for_carriers(
    removal: Removal, sizes: Mapping[str, tuple[int, int]], plan: PruningPlan
) -> list[str]:
    """Raise ``pr`` of the layers that more channels are left of than filters are kept; their paths."""
    found: list[str] = []
    for path, (filters, _) in sizes.items():
        entry = plan.get(path)
        if entry is None or entry.method != "fp" or filters == entry.shape[1] or path in removal.reasons:
            continue
        kept = int(entry.keep.sum())
        if 0 < filters - kept < kept:
            plan.sites[path] = replace(entry, pr=1 - (2 * kept - filters) / entry.shape[1])
            found.append(path)
    return found


def tied_paths(coupling: Coupling, plan: PruningPlan) -> list[tuple[str, ...]]:
    """Convolutions of method "fp" whose filters are tied to each other's or among themselves, and can all leave."""
    pruned = {path for path, entry in plan.items() if entry.method == "fp"}
    together: nx.Graph[str] = nx.Graph()
    stuck: set[str] = set()
    for component in coupling.components():
        paths = {coupling.filters[number][0] for number in component}
        if coupling.why_fixed(component, dict.fromkeys(pruned)) is not None:
            stuck |= paths
        elif len(component) > 1:
            cast("Any", nx).add_path(together, sorted(paths))
    groups = cast("list[set[str]]", list(cast("Any", nx).connected_components(together)))
    return [tuple(path for path in plan if path in group) for group in groups if not group & stuck]


def _choose_together(
    coupling: Coupling,
    paths: Mapping[str, Importance],
    plan: PruningPlan,
    convolutions: Mapping[str, nn.Conv2d],
) -> None:
    """Keep whole groups of tied filters: those whose scores, relative to their layers' means, add up to most.

    The smallest pr of the layers counts.
    """
    scores: dict[str, Tensor] = {}
    for path, importance in paths.items():
        U = transform_weight(convolutions[path].weight, plan[path].tile)
        found = importance(U, (0, 2)).flatten().cpu()  # [n]
        scores[path] = found / found.mean().clamp_min(1e-30)
    groups = [group for group in coupling.components() if coupling.filters[min(group)][0] in paths]
    members = [[coupling.filters[number] for number in group] for group in groups]
    totals = [sum(float(scores[path][index]) for path, index in group) for group in members]
    count = kept_count(len(groups), min(plan[path].pr for path in paths))
    order = sorted(range(len(groups)), key=lambda index: (-totals[index], index))
    keep = {path: torch.zeros((1, plan[path].shape[1], 1), dtype=torch.bool) for path in paths}
    for path, index in (member for place in order[:count] for member in members[place]):
        keep[path][0, index, 0] = True
    for path in paths:
        plan.sites[path] = replace(plan[path], keep=keep[path])


def _choose_how(
    plan: PruningPlan,
    site: ConvSite,
    conv: nn.Conv2d,
    size: tuple[int, int],
    options: CompileOptions,
    speed: SpeedSource | None,
) -> None:
    """Whether Winograd kernels or the vendor's library runs what is left, ``size`` = (filters, channels)."""
    path, (filters, channels) = site.path, size
    smaller = nn.Conv2d(channels, filters, FILTER_SIDE, padding=padding_of(conv)).to(conv.weight)
    formats = tuple(
        replace(call, shape=(*call.shape[:-3], channels, *call.shape[-2:])) for call in site.formats
    )
    entry = plan[path]
    keep, shape = torch.ones((1, 1, 1), dtype=torch.bool), (entry.shape[0], filters, channels)
    whole = SitePlan(path, "dense", "row", entry.tile, 0.0, keep, shape)
    times = site_times(whole, replace(site, formats=formats), smaller, speed)
    winograd = not times.slower or options.keep_slower
    plan.times[path] = SiteTimes(times.pruned if winograd else times.dense, plan.times[path].dense)
    plan.sites[path] = replace(entry, winograd=winograd)
