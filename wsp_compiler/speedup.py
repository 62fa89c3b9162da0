"""Measured times per layer: what balance gains (the paper's balanced speedup), and what a compiled model's layers take.

Balanced speedup of a layer = time(WSP) / time(BWSP) at the same pruning ratio (ABWSP paper, section 4.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
from torch import nn

from wsp_compiler.codegen.plan_speed import PlanSpeed
from wsp_compiler.codegen.targets import resolve_target
from wsp_compiler.codegen.tuner import Tuner
from wsp_compiler.errors import CompiledModuleError, ModelError
from wsp_compiler.options import CompileOptions, PruneRule
from wsp_compiler.plan import make_plan, site_times
from wsp_compiler.site_plan import SitePlan
from wsp_compiler.sites import ConvSite, collect_sites
from wsp_compiler.speed import LESS_PRUNED, MODEL, SpeedSource
from wsp_compiler.trace import check_model, trace

if TYPE_CHECKING:
    from wsp_compiler.runtime import CompiledModule


class BalancedSpeedup(TypedDict):
    """Microseconds per call of a layer pruned by WSP and by BWSP, and their ratio."""

    wsp_us: float
    bwsp_us: float
    ratio: float


class LayerTime(TypedDict):
    """Microseconds per call of a lowered layer and of the dense convolution in its place; None is unknown."""

    us: float | None
    dense_us: float | None
    kernel: str


def _device_and_convolutions(model: nn.Module) -> tuple[Any, dict[str, nn.Conv2d]]:
    modules = cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
    convolutions = {path: module for path, module in modules if isinstance(module, nn.Conv2d)}
    devices = {conv.weight.device for conv in convolutions.values()}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no convolution"
        raise ModelError(f"its convolutions are on: {found}", where="model", fix="move it to one device")
    return next(iter(devices)), convolutions


def balanced_speedup(
    model: nn.Module,
    pr: float,
    example_inputs: Any,
    *,
    tile: int = 2,
    direction: str = "row",
    block: int | None = None,
    rules: Iterable[PruneRule] = (),
    precision: str | None = None,
    tune: str = "fast",
    importance: str = "output",
) -> dict[str, BalancedSpeedup]:
    """Time(WSP) / time(BWSP) of every eligible layer on the model's device.

    On the CPU positions do not run side by side, so that ratios are near 1.

    Args:
        model: in eval mode; not modified.
        pr: pruning ratio of both patterns, in [0, 1).
        example_inputs: as for :func:`wsp_compiler.compile`; they give the layers' shapes.
        tile, direction, block, rules, precision: as for :func:`wsp_compiler.compile`; ``method`` in rules is ignored.
        tune: "fast" and "full" measure what is not known yet, "off" asks records and the cost model alone.
        importance: which rows or columns are kept, as for :func:`wsp_compiler.compile`; the paper's is "l2".

    Returns:
        Module path -> times and ratio; layers whose time is unknown are left out. Where one of the two was never
        measured, both are the cost model's.

    Raises:
        WspError: as :func:`wsp_compiler.compile`.
    """
    model = check_model(model)
    device, convolutions = _device_and_convolutions(model)
    sites = collect_sites(trace(model, example_inputs))
    sources = speed_sources(None, device, precision, tune)
    plain = tuple(
        PruneRule(rule.match, None, rule.direction, rule.pr, rule.tile, rule.skip, rule.block)
        for rule in rules
    )
    entries: dict[str, list[SitePlan]] = {}
    for method in ("wsp", "bwsp"):
        options = CompileOptions(
            pr, method, direction, tile, importance, rules=plain, precision=precision, block=block
        )
        for path, entry in make_plan(sites, convolutions, options).items():
            entries.setdefault(path, []).append(entry)
    pairs = {path: (pair[0], pair[1]) for path, pair in entries.items()}
    return compare_pairs(pairs, sites, convolutions, sources)


def speed_sources(
    target: Any, device: torch.device, precision: str | None, tune: str
) -> tuple[SpeedSource, SpeedSource]:
    """(times as known or measured, times of the cost model alone) on what a user's ``target`` means on ``device``."""
    tuner = Tuner(resolve_target(target, device), tune)
    modelled = Tuner(tuner.target, "off", tuner.schedules, model_only=True)
    return PlanSpeed(tuner, precision), PlanSpeed(modelled, precision)


def compare_pairs(
    pairs: Mapping[str, tuple[SitePlan, SitePlan]],
    sites: Iterable[ConvSite],
    convolutions: Mapping[str, nn.Conv2d],
    sources: tuple[SpeedSource, SpeedSource],
) -> dict[str, BalancedSpeedup]:
    """Times of layers pruned in two ways, (WSP, BWSP), from :func:`speed_sources`.

    Returns:
        Module path -> times and ratio; layers whose time is unknown are left out. Where one of the two was never
        measured, both are the cost model's: times of one layer always compare with each other.
    """
    by_path = {site.path: site for site in sites}
    found: dict[str, BalancedSpeedup] = {}
    for path, pair in pairs.items():
        for source in sources:
            wsp, bwsp = (
                site_times(entry, by_path[path], convolutions[path], source, dense=False).pruned
                for entry in pair
            )
            if (
                wsp is not None
                and bwsp is not None
                and bool({MODEL, LESS_PRUNED} & {wsp.source, bwsp.source}) == (source is sources[1])
            ):
                found[path] = BalancedSpeedup(wsp_us=wsp.us, bwsp_us=bwsp.us, ratio=wsp.us / bwsp.us)
                break
    return found


def layer_times(compiled: CompiledModule, tune: str = "fast") -> dict[str, LayerTime]:
    """Time of every lowered layer of ``compiled`` and of the dense convolution, at the shape of its last call.

    Args:
        compiled: called at least once, or compiled with example_inputs.
        tune: as for :func:`balanced_speedup`.

    Raises:
        CompiledModuleError: no layer has been called yet.
    """
    tuner = Tuner(compiled.target, tune)
    found: dict[str, LayerTime] = {}
    for layer in compiled.layers():
        kernels = layer.last_kernels
        if kernels is None or layer.last_shape is None or 0 in layer.last_shape:
            continue
        choice = tuner.choose(kernels, layer.last_shape[0])
        dense = tuner.dense(kernels.spec, layer.last_shape[0])
        found[layer.path] = LayerTime(
            us=None if choice.timing is None else choice.timing.us,
            dense_us=None if dense is None else dense.us,
            kernel=choice.candidate.label,
        )
    if not found:
        raise CompiledModuleError(
            "no layer has run yet, so that shapes are unknown",
            where="layer_times",
            fix="compile with example_inputs, or call the module once",
        )
    return found
