"""Stable text of a compiled model: the per-layer table, what was left alone, what each pass did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wsp_compiler.passes.base import PassRecord
from wsp_compiler.plan import PruningPlan
from wsp_compiler.sites import ConvSite
from wsp_compiler.winograd import count_multiplies

HEADER = (
    "path",
    "shape n x c @ H x W",
    "decision",
    "pattern",
    "tile",
    "kept",
    "direct",
    "Winograd",
    "now",
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


def site_rows(sites: Sequence[ConvSite], plan: PruningPlan) -> list[tuple[str, ...]]:
    """One row of :data:`HEADER` cells for every convolution."""
    rows: list[tuple[str, ...]] = []
    for site in sites:
        known = site.input_shapes[0] if site.input_shapes else None
        shape = f"{site.filters}x{site.channels} @ " + (f"{known[-2]}x{known[-1]}" if known else "?")
        shape = shape if site.filters else "-"  # a functional convolution
        name = site.path or "(the model)"
        if not _is_lowered(site, plan):
            why = site.reject or plan.left_alone.get(site.path, "not in the plan")
            rows.append((name, shape, "left alone", "-", "-", "-", "-", "-", "-", why))
            continue
        entry = plan[site.path]
        direct = winograd = kept = 0
        for batch, height, width in site.output_sizes:
            counted = count_multiplies(
                batch, (site.filters, site.channels), (height, width), entry.tile, entry.kept_weights
            )
            direct, winograd, kept = direct + counted.direct, winograd + counted.winograd, kept + counted.kept
        counts = tuple(_count(value) if known else "?" for value in (direct, winograd, kept))
        decision = "Winograd" if entry.method == "dense" else "pruned"
        tile = f"F({entry.tile}x{entry.tile})"
        rows.append((name, shape, decision, entry.pattern, tile, f"{entry.kept_fraction:.4f}", *counts, ""))
    return rows


def format_report(
    sites: Sequence[ConvSite],
    plan: PruningPlan,
    untraced: Mapping[str, str],
    records: Sequence[PassRecord],
    notes: Sequence[str] = (),
) -> str:
    """The text of :meth:`wsp_compiler.CompiledModule.report`.

    Multiplies are per call on the shapes last seen (all calls of a shared convolution together): direct
    convolution, dense Winograd, and with the kept weights.
    """
    lowered = [plan[site.path] for site in sites if _is_lowered(site, plan)]
    total = sum(entry.shape[0] * entry.shape[1] * entry.shape[2] for entry in lowered)
    kept = sum(entry.kept_weights for entry in lowered)
    lines = [format_table(HEADER, site_rows(sites, plan)), ""]
    lines.append(f"{len(lowered)} of {len(sites)} convolutions run as Winograd; multiplies are per call")
    if total:
        lines.append(f"kept {kept} of {total} Winograd weights: achieved pr = {1 - kept / total:.4f}")
    for path, why in untraced.items():
        lines.append(f"not traced, runs as it was: {path or 'the model itself'}: {why}")
    for record in records:
        unit = f" ({record.unit})" if record.unit else ""
        declined = f", {len(record.rewrites.declined)} declined" if record.rewrites.declined else ""
        lines.append(f"pass {record.name}{unit}: {record.rewrites.count} rewrites{declined}")
    lines.extend(notes)
    return "\n".join(lines)
