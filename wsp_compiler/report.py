"""Stable text of a compiled model: the per-layer table, what was left alone, what each pass did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from wsp_compiler.passes.base import PassRecord
from wsp_compiler.plan import PruningPlan
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


def _is_lowered(site: ConvSite, plan: PruningPlan) -> bool:
    return site.path in plan and site.reject is None


def _us(timing: Timing | None) -> str:
    return "?" if timing is None else f"{timing.us:.1f}" if timing.us < 1000 else f"{timing.us:.0f}"


def site_rows(
    sites: Sequence[ConvSite],
    plan: PruningPlan,
    times: Mapping[str, SiteTimes] | None = None,
    kernels: Mapping[str, str] | None = None,
) -> list[tuple[str, ...]]:
    """One row of :data:`HEADER` cells for every convolution; see :func:`format_report`."""
    times, kernels = times or {}, kernels or {}
    rows: list[tuple[str, ...]] = []
    for site in sites:
        known = site.input_shapes[0] if site.input_shapes else None
        shape = f"{site.filters}x{site.channels} @ " + (f"{known[-2]}x{known[-1]}" if known else "?")
        shape = shape if site.filters else "-"  # a functional convolution
        name = site.path or "(the model)"
        if not _is_lowered(site, plan):
            why = site.reject or plan.left_alone.get(site.path, "not in the plan")
            seen = times.get(site.path)
            both = ("-", "-") if seen is None else (_us(seen.pruned), _us(seen.dense))
            rows.append((name, shape, "left alone", *["-"] * 8, *both, why))
            continue
        entry, known_times = plan[site.path], times.get(site.path, SiteTimes(None, None))
        direct = winograd = kept = 0
        for batch, height, width in site.output_sizes:
            counted = count_multiplies(
                batch, (site.filters, site.channels), (height, width), entry.tile, entry.kept_weights
            )
            direct, winograd, kept = direct + counted.direct, winograd + counted.winograd, kept + counted.kept
        counts = tuple(_count(value) if known else "?" for value in (direct, winograd, kept))
        decision = "Winograd" if entry.method == "dense" else "pruned"
        tile = f"F({entry.tile}x{entry.tile})"
        kernel = kernels.get(site.path, "?").partition(" ")[0]
        why = f"the dense convolution would be faster: {known_times.text()}" if known_times.slower else ""
        both = (_us(known_times.pruned), _us(known_times.dense))
        fraction = f"{entry.kept_fraction:.4f}"
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
) -> str:
    """The text of :meth:`wsp_compiler.CompiledModule.report`.

    Multiplies are per call on the shapes last seen (all calls of a shared convolution together): direct
    convolution, dense Winograd, and with the kept weights. ``times`` are both times of each convolution as the plan
    knew them, in microseconds per call; ``kernels`` says what was chosen to run it.
    """
    times, kernels = times or {}, kernels or {}
    lowered = [plan[site.path] for site in sites if _is_lowered(site, plan)]
    total = sum(entry.shape[0] * entry.shape[1] * entry.shape[2] for entry in lowered)
    kept = sum(entry.kept_weights for entry in lowered)
    lines = [format_table(HEADER, site_rows(sites, plan, times, kernels)), ""]
    lines.append(f"{len(lowered)} of {len(sites)} convolutions run as Winograd; multiplies are per call")
    if total:
        lines.append(f"kept {kept} of {total} Winograd weights: achieved pr = {1 - kept / total:.4f}")
    paths = [site.path for site in sites if _is_lowered(site, plan)]
    lines += _accuracy_lines(paths, plan)
    lines += _speed_lines(paths, times)
    lines += [f"kernel of {path or 'the model'}: {kernels[path]}" for path in sorted(kernels)]
    for path, why in untraced.items():
        lines.append(f"not traced, runs as it was: {path or 'the model itself'}: {why}")
    for record in records:
        unit = f" ({record.unit})" if record.unit else ""
        declined = f", {len(record.rewrites.declined)} declined" if record.rewrites.declined else ""
        lines.append(f"pass {record.name}{unit}: {record.rewrites.count} rewrites{declined}")
    lines.extend(notes)
    return "\n".join(lines)
