"""What a run prints: a table, one line per baseline, two verdict lines; its progress goes to stderr.

A row has `name` and `failure` (a text, or None); where that is None also `ours_us`, `ratios` (baseline ->
their time / our time), `strongest` (the name of a baseline) and `strongest_ratio`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.results import Row, geomean, minimum

STDERR = Console(stderr=True)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; call what it yields with the name of each of the `total` items as it begins."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=STDERR) as bar:
        task = bar.add_task("", total=total)
        begun = 0

        def begin(name: str) -> None:
            nonlocal begun
            bar.update(task, description=name, completed=begun)
            begun += 1

        yield begin
        bar.update(task, description="done", completed=total)


def text_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to equal width: the first to the left, the others to the right."""
    lines = [list(headers), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    padded = (
        [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    )
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def time_cell(microseconds: float | None, ratio: float | None = None) -> str:
    """`26.7 (1.57x)`; `-` where there is no time."""
    if microseconds is None:
        return "-"
    shown = f"{microseconds:.4g}" if microseconds < 1000 else f"{microseconds:.0f}"
    return shown if ratio is None else f"{shown} ({ratio:.2f}x)"


def row_line(row: Row) -> str:
    """One row in short, for the progress of a run."""
    if row["failure"]:
        return f"FAILED {row['name']}: {row['failure']}"
    ratio = f"{row['strongest_ratio']:.2f}x against {row['strongest']}"
    return f"{row['name']}: {time_cell(row['ours_us'])} us, {ratio}"


def baseline_lines(rows: Sequence[Row]) -> list[str]:
    """Per baseline, over the rows that have it: geomean and minimum of its ratios."""
    names = dict.fromkeys(name for row in rows for name in row.get("ratios", {}))
    lines = []
    for name in names:
        found = [(row["name"], row["ratios"][name]) for row in rows if name in row.get("ratios", {})]
        where, least = minimum(found)
        mean = geomean(ratio for _, ratio in found)
        count = f"{len(found)} case{'' if len(found) == 1 else 's'}"
        lines.append(f"vs {name}: geomean {mean:.3f}x, minimum {least:.3f}x ({where}), {count}")
    return lines


def verdict_lines(rows: Sequence[Row], scope: str = "") -> list[str]:
    """Two lines, geomean and minimum, against the strongest baseline of each row that did not fail."""
    found = [(row["name"], row["strongest_ratio"]) for row in rows if not row["failure"]]
    if not found:
        return [f"geomean - (none of {len(rows)} cases succeeded)", "minimum -"]
    mean = geomean(ratio for _, ratio in found)
    where, least = minimum(found)
    counted = f"{len(found)} of {len(rows)} cases"
    return [
        f"geomean {mean:.3f}x over the strongest baseline of each case{scope} ({counted})",
        f"minimum {least:.3f}x ({where})",
    ]


def failure_lines(rows: Sequence[Row]) -> list[str]:
    """One line per row that failed."""
    return [row_line(row) for row in rows if row["failure"]]
