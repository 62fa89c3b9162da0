"""Stable text of a compiled model: the per-layer table, what was left alone, what each pass did."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from wsp_compiler.filters.shrink import Shrunk
from wsp_compiler.passes.base import PassRecord
from wsp_compiler.plan import PruningPlan
from wsp_compiler.site_plan import SitePlan
from wsp_compiler.sites import ConvSite
from wsp_compiler.speed import SiteTimes, Timing
from wsp_compiler.winograd import count_multiplies

HEADER = (
    "path",
    "shape n x c @ H x W",
    "decision",
    "pattern",
    "tile",
    "kept",
    "error",
    "direct",
    "Winograd",
    "now",
    "kernel",
    "us",
    "dense us",
    "why",
)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns separated by two spaces."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in (header, *rows)
    ]
    return "\n".join(line.rstrip() for line in [lines[0], "-" * len(lines[0].rstrip()), *lines[1:]])


def _count(value: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= 0.9995 * size:  # what three digits round up to the unit
            return f"{value / size:.3g}{unit}"
    return str(value)


def is_lowered(site: ConvSite, plan: PruningPlan) -> bool:
    """True if the plan has this convolution, and passes may lower it."""
    return site.path in plan and site.reject is None


def _us(timing: Timing | None) -> str:
    return "?" if timing is None else f"{timing.us:.1f}" if timing.us < 1000 else f"{timing.us:.0f}"


def site_rows(
    sites: Sequence[ConvSite],
    plan: PruningPlan,
    times: Mapping[str, SiteTimes] | None = None,
    kernels: Mapping[str, str] | None = None,
    shrunk: Shrunk | None = None,
) -> list[tuple[str, ...]]:
    """One row of :data:`HEADER` cells for every convolution; see :func:`format_report`."""
    times, kernels, shrunk = times or {}, kernels or {}, shrunk or Shrunk(plan)
    rows: list[tuple[str, ...]] = []
    for site in sites:
        known = site.input_shapes[0] if site.input_shapes else None
        size = shrunk.sizes.get(site.path, (site.filters, site.channels))
        shape = f"{size[0]}x{size[1]}"
        shape += f" (of {site.filters}x{site.channels})" if site.path in shrunk.sizes else ""
        shape += " @ " + (f"{known[-2]}x{known[-1]}" if known else "?")
        shape = shape if site.filters else "-"  # a functional convolution
        name = site.path or "(the model)"
        if not is_lowered(site, plan):
            why = site.reject or plan.left_alone.get(site.path, "not in the plan")
            seen = times.get(site.path)
            both = ("-", "-") if seen is None else (_us(seen.pruned), _us(seen.dense))
            rows.append((name, shape, "left alone", *["-"] * 8, *both, why))
            continue
        known_times = times.get(site.path, SiteTimes(None, None))
        entry = _what_is_left(plan[site.path], shrunk)
        direct = winograd = kept = 0
        for batch, height, width in site.output_sizes:
            counted = count_multiplies(
                batch, (site.filters, site.channels), (height, width), entry.tile, entry.kept_weights
            )
            now = counted.direct * size[0] * size[1] // (site.filters * site.channels)
            now = counted.kept if entry.winograd else now
            direct, winograd, kept = direct + counted.direct, winograd + counted.winograd, kept + now
        counts = tuple(_count(value) if known else "?" for value in (direct, winograd, kept))
        decision = "Winograd" if entry.method == "dense" else "pruned"
        tile = f"F({entry.tile}x{entry.tile})" if entry.winograd else "-"
        kernel = kernels.get(site.path, "?").partition(" ")[0] if entry.winograd else "vendor"
        slower = known_times.slower and site.path not in shrunk.sizes
        why = f"the dense convolution would be faster: {known_times.text()}" if slower else ""
        both = (_us(known_times.pruned), _us(known_times.dense))
        fraction = f"{entry.kept_weights / math.prod(plan[site.path].shape):.4f}"
        rows.append(
            (
                name,
                shape,
                decision,
                entry.pattern,
                tile,
                fraction,
                _error(plan, site.path),
                *counts,
                kernel,
                *both,
                why,
            )
        )
    return rows


def kept_of(lowered: Sequence[SitePlan], shrunk: Shrunk) -> tuple[int, int]:
    """Winograd weights that are kept, without the channels of pruned filters, and all that there were."""
    kept = sum(_what_is_left(entry, shrunk).kept_weights for entry in lowered)
    return kept, sum(math.prod(entry.shape) for entry in lowered)


def _what_is_left(entry: SitePlan, shrunk: Shrunk) -> SitePlan:
    """The entry of the smaller convolution, where pruned filters or channels have left it."""
    if entry.path in shrunk.plan or entry.path not in shrunk.sizes:
        return shrunk.plan.get(entry.path, entry)
    shape = (entry.shape[0], *shrunk.sizes[entry.path])
    return replace(entry, keep=torch.ones((1, 1, 1), dtype=torch.bool), shape=shape)


def _error(plan: PruningPlan, path: str) -> str:
    """Relative L2 error of the layer's output, "~" before one that assumes white noise as its input."""
    if path not in plan.errors:
        return "?"
    return f"{'' if path in plan.refits else '~'}{plan.errors[path]:.3f}"


def _accuracy_lines(lowered: Sequence[str], plan: PruningPlan) -> list[str]:
    """What the errors mean, and once that pruning without calibration or training costs accuracy."""
    pruned = [path for path in lowered if plan[path].kept_fraction < 1]
    raw = [path for path in pruned if path not in plan.refits]
    lines: list[str] = []
    if pruned:
        lines.append(
            "error: relative L2 error of the layer's own output, on the calibration data (~: estimated from the "
            "weights, for white noise)"
        )
    if raw:
        lines.append(
            f"warning: {len(raw)} of {len(pruned)} pruned layers are neither calibrated nor fine-tuned, which costs "
            "accuracy: compile with calibration=, or fine-tune what wsp_compiler.prune returns"
        )
    return lines


def _filter_lines(shrunk: Shrunk) -> list[str]:
    """How many convolutions got smaller, and why pruned filters are still there."""
    lines: list[str] = []
    if shrunk.sizes:
        lines.append(f"{len(shrunk.sizes)} convolutions are smaller without the channels of pruned filters")
    by_reason: dict[str, list[str]] = {}
    for path, why in shrunk.reasons.items():
        by_reason.setdefault(why, []).append(path or "the model")
    return lines + [
        f"pruned filters of {', '.join(sorted(paths))} stay in place: {why}"
        for why, paths in by_reason.items()
    ]


def _speed_lines(lowered: Sequence[str], times: Mapping[str, SiteTimes]) -> list[str]:
    """Where the times come from, and for how many layers the speed was not checked."""
    lines: list[str] = []
    entries = [entry for entry in times.values() if entry.pruned is not None and entry.dense is not None]
    sources = Counter(
        timing.source for entry in entries for timing in (entry.pruned, entry.dense) if timing is not None
    )
    if sources:
        listed = ", ".join(f"{count} {source}" for source, count in sources.items())
        lines.append(f"times of pruned and dense convolutions, in us: {listed}")
    unknown = [path for path in lowered if path not in times or times[path] not in entries]
    if unknown:
        lines.append(
            f"speed not checked for {len(unknown)} layers: no example_inputs, or no times known on this device "
            "(tune='fast' measures them)"
        )
    return lines


def format_report(
    sites: Sequence[ConvSite],
    plan: PruningPlan,
    untraced: Mapping[str, str],
    records: Sequence[PassRecord],
    notes: Sequence[str] = (),
    times: Mapping[str, SiteTimes] | None = None,
    kernels: Mapping[str, str] | None = None,
    shrunk: Shrunk | None = None,
) -> str:
    """The text of :meth:`wsp_compiler.CompiledModule.report`.

    Multiplies are per call on the shapes last seen (all calls of a shared convolution together): direct
    convolution, dense Winograd, and with the kept weights. ``times`` are both times of each convolution as the plan
    knew them, in microseconds per call; ``kernels`` says what was chosen to run it; ``shrunk`` what became of the plan
    once pruned filters had left the network.
    """
    times, kernels, shrunk = times or {}, kernels or {}, shrunk or Shrunk(plan)
    lowered = [plan[site.path] for site in sites if is_lowered(site, plan)]
    kept, total = kept_of(lowered, shrunk)
    winograd = sum(_what_is_left(entry, shrunk).winograd for entry in lowered)
    lines = [format_table(HEADER, site_rows(sites, plan, times, kernels, shrunk)), ""]
    lines.append(f"{winograd} of {len(sites)} convolutions run as Winograd; multiplies are per call")
    if total:
        lines.append(f"kept {kept} of {total} Winograd weights: achieved pr = {1 - kept / total:.4f}")
    paths = [site.path for site in sites if is_lowered(site, plan)]
    lines += _filter_lines(shrunk)
    lines += _accuracy_lines(paths, plan)
    lines += _speed_lines(paths, times)
    if sparse := [path for path in paths if plan[path].method == "wwp"]:
        lines.append(
            f"{len(sparse)} layers run as sparse matrices of single weights (WWP), of which no times are recorded: a "
            "baseline, as a rule slower than dense convolutions"
        )
    lines += [f"kernel of {path or 'the model'}: {kernels[path]}" for path in sorted(kernels)]
    for path, why in untraced.items():
        lines.append(f"not traced, runs as it was: {path or 'the model itself'}: {why}")
    for record in records:
        unit = f" ({record.unit})" if record.unit else ""
        declined = f", {len(record.rewrites.declined)} declined" if record.rewrites.declined else ""
        said = "".join(f"; {note}" for note in record.rewrites.notes)
        lines.append(f"pass {record.name}{unit}: {record.rewrites.count} rewrites{declined}{said}")
    lines.extend(notes)
    return "\n".join(lines)
