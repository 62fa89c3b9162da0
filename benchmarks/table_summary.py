"""What of the measured times ships in a schedule table, and the summary that is printed of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from benchmarks.report import text_table
from benchmarks.results import geomean
from wsp_compiler.codegen.cost_model import fit, fit_kind, group_of
from wsp_compiler.codegen.schedule_records import VENDOR, LayerKey, Record


def kept(records: Sequence[Record], best: int) -> Iterator[Record]:
    """What ships: of every layer the ``best`` fastest and every fourth of the others, for the cost model."""
    layers: dict[LayerKey, list[Record]] = {}
    for record in records:
        layers.setdefault(record.key, []).append(record)
    for members in layers.values():
        good = sorted((r for r in members if r.us is not None), key=lambda r: r.us or math.inf)
        yield from good[:best]
        yield from good[best::4]
        yield from [r for r in members if r.us is None][:2]


def _call_of(key: LayerKey) -> tuple[object, ...]:
    """What a layer and the vendor's convolution in its place have in common."""
    return (key.channels, key.filters, key.height, key.width, key.batch, key.precision, key.threads)


def summary(records: Sequence[Record]) -> str:
    """The fastest kernel of every layer beside the vendor's, and how well the cost model fits."""
    vendor = {_call_of(r.key): r.us for r in records if r.kind == VENDOR and r.us is not None}
    rows: list[tuple[str, ...]] = []
    ratios: dict[tuple[str, int, int, int], list[float]] = {}
    for key in dict.fromkeys(record.key for record in records if record.kind != VENDOR):
        good = [r for r in records if r.key == key and r.us is not None]
        theirs = vendor.get(_call_of(key))
        shape = f"{key.filters}" if key.channels == key.filters else f"{key.channels}-{key.filters}"
        name = f"{shape}@{key.height} N={key.batch} {key.precision} F{key.tile} rows={key.rows[1]}"
        name += f" threads={key.threads}" * key.device.startswith("CPU")
        if not good or theirs is None:
            rows.append((name, "-", "-", "-", "no candidate ran" if not good else "vendor unknown"))
            continue
        best = min(good, key=lambda r: r.us or math.inf)
        ours = best.us or math.inf
        knobs = " ".join(f"{k}={v}" for k, v in best.knobs.items())
        rows.append((name, f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}", f"{best.kind} {knobs}"))
        share = round(10 * key.rows[0] / key.filters) * 10
        threads = key.threads if key.device.startswith("CPU") else 0
        ratios.setdefault((key.precision, key.tile, share, threads), []).append(theirs / ours)
    lines = [text_table(("layer", "us", "vendor", "ratio", "kernel"), rows), ""]
    for (precision, tile, share, threads), found in ratios.items():
        lines.append(
            f"{precision} F{tile}{f' threads={threads}' * bool(threads)}, about {share}% of the rows: "
            f"{geomean(found):.2f}x over {len(found)} layers, least {min(found):.2f}"
        )
    return "\n".join([*lines, *model_errors(records)])


def model_errors(records: Sequence[Record]) -> list[str]:
    """Root mean square of log(predicted / measured) of every fit, and with each layer left out of it in turn."""
    lines: list[str] = []
    for group, fitted in fit(records).fitted.items():
        members = [r for r in records if r.us is not None and group_of(r.key, r.kind) == group]
        squares: list[float] = []
        for key in dict.fromkeys(r.key for r in members):
            others = fit_kind([r for r in members if r.key != key])
            if others is not None:
                for r in (r for r in members if r.key == key):
                    squares.append(math.log(others.predict(r.key, r.kind, r.knobs) / (r.us or math.inf)) ** 2)
        unseen = f"{math.sqrt(math.fsum(squares) / len(squares)):.3f}" if squares else "unknown"
        lines.append(
            f"cost model {' '.join(group)}: {fitted.records} records, rms log error {fitted.error:.3f}, "
            f"on layers left out {unseen}"
        )
    return lines
