"""Figures from the records of the benchmarks. Needs matplotlib (pip install wsp_compiler[benchmarks]).

    python -m benchmarks.plots bars benchmarks/results/conv_layers_h100_fp16.json docs/figures/speedup_fp16.png
    python -m benchmarks.plots sweep benchmarks/results/sweep_h100_fp16.json docs/figures/sweep_fp16.png
    python -m benchmarks.plots roofline benchmarks/results/conv_layers_h100_fp16.json docs/figures/roofline.png

`bars`: speedup over each baseline, case by case. `sweep`: speedup over the strongest baseline against the pruning
ratio, a line a layer. `roofline`: multiplications and additions of the direct convolution a second, against the
bytes that have to move at least; above the roof is what Winograd and pruning save.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Record, Row, geomean, load

MOST_BYTES = 150_000
COLOURS = ("#1b6ca8", "#e07b39", "#5a9367", "#8e5ea2", "#c0392b", "#7f8c8d")
ELEMENT_BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2}
CEILINGS = {"fp16": 752.0, "bf16": 752.0, "tf32": 381.0, "fp32": 52.0, "copy": 2.42}
"""Measured on an H100 80GB HBM3: TFLOP/s of matrix products, TB/s of a copy (docs/kernels.md)."""


def good_rows(record: Record) -> list[Row]:
    """The rows that did not fail.

    Raises:
        ValueError: there are none.
    """
    rows = [row for row in record.rows if not row["failure"]]
    if not rows:
        raise ValueError("the record has no row that succeeded")
    return rows


def bars(axes: Any, record: Record) -> None:
    """Grouped bars: speedup over each baseline; a line at 1, the geomean in the legend."""
    rows = good_rows(record)
    names = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        found = [(x, row["ratios"][name]) for x, row in enumerate(rows) if name in row["ratios"]]
        places = [x + (index - (len(names) - 1) / 2) * width for x, _ in found]
        label = f"{name} (geomean {geomean(ratio for _, ratio in found):.2f}x)"
        axes.bar(
            places, [ratio for _, ratio in found], width, label=label, color=COLOURS[index % len(COLOURS)]
        )
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row["name"] for row in rows], rotation=45, ha="right")
    axes.set_yscale("log")
    axes.set_ylabel("speedup")
    axes.legend(fontsize=7)


def sweep(axes: Any, record: Record) -> None:
    """Lines: speedup over the strongest baseline against the pruning ratio."""
    rows = good_rows(record)
    for index, key in enumerate(dict.fromkeys((row["case"], row["batch"]) for row in rows)):
        found = sorted(
            (row["pr"], row["strongest_ratio"]) for row in rows if (row["case"], row["batch"]) == key
        )
        axes.plot(
            *zip(*found, strict=True), marker="o", markersize=3, linewidth=1.2, label=f"{key[0]} N={key[1]}",
            color=COLOURS[index % len(COLOURS)], linestyle=("-", "--", ":")[index // len(COLOURS) % 3],
        )  # fmt: skip
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("pruning ratio")
    axes.set_ylabel("speedup over the strongest baseline")
    axes.legend(fontsize=7)


def roofline_point(row: Row) -> tuple[float, float]:
    """(direct operations per byte of input, output and weights, direct TFLOP/s) of one row."""
    channels, pixels = _sizes(row["case"])
    operations = 2.0 * row["direct_multiplies"]
    elements = 2 * row["batch"] * channels * pixels + 9 * channels * channels
    return operations / (elements * ELEMENT_BYTES[row["dtype"]]), operations / row["ours_us"] / 1e6


def _sizes(case: str) -> tuple[int, int]:
    """Channels and pixels of a case's name, 64@56 or 64@360x640."""
    channels, _, image = case.partition("@")
    sides = [int(side) for side in image.split("x")]
    return int(channels), sides[0] * sides[-1]


def roofline(axes: Any, record: Record) -> None:
    """Points under, and above, the direct convolution's roof."""
    rows = good_rows(record)
    points = [roofline_point(row) for row in rows]
    peak, bandwidth = CEILINGS[rows[0]["dtype"]], CEILINGS["copy"]
    most = 2 * max(intensity for intensity, _ in points)
    knee = peak / bandwidth
    least = min(knee, *(intensity for intensity, _ in points)) / 3
    axes.plot([least, knee, max(most, knee)], [least * bandwidth, peak, peak], color="black", linewidth=1)
    for index, (row, (intensity, speed)) in enumerate(zip(rows, points, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        axes.scatter(
            [intensity],
            [speed],
            s=18,
            color=colour,
            marker="os^"[index // len(COLOURS) % 3],
            label=row["name"],
        )
    axes.legend(fontsize=6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations of the direct convolution per byte")
    axes.set_ylabel("TFLOP/s of the direct convolution")


KINDS: dict[str, Callable[[Any, Record], None]] = {"bars": bars, "sweep": sweep, "roofline": roofline}


def save_figure(figure: Any, path: Path, dpi: int) -> None:
    """Writes a PNG; ValueError if it has more than MOST_BYTES."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than {MOST_BYTES}")


def draw(kind: str, record: Record, path: Path) -> None:
    """Writes one figure as a PNG of at most 150 kB.

    Raises:
        ValueError: nothing to draw, or the picture is too large.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    try:
        KINDS[kind](axes, record)
        where = f"{record.environment['device']}, commit {record.commit[:12]}"
        axes.set_title(f"{good_rows(record)[0].get('dtype', '')} on {where}", fontsize=8)
        save_figure(figure, path, dpi=110)
    finally:
        pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("kind", choices=tuple(KINDS))
    made.add_argument("record", type=Path, help="JSON that a benchmark wrote")
    made.add_argument("png", type=Path)
    given = made.parse_args(arguments)
    try:
        draw(given.kind, load(given.record), given.png)
    except (OSError, ValueError, ImportError) as problem:
        made.error(str(problem))
    return 0


if __name__ == "__main__":
    sys.exit(main())
