"""Tables of the experiments' record: means over seeds, rank correlations, and how ABWSP compares.

python -m benchmarks.accuracy.summary benchmarks/results/accuracy_digits_h100.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import text_table
from benchmarks.results import Row, load
from wsp_compiler.abwsp import spearman


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of a value over `count` seeds (deviation 0 for one seed)."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        found = list(values)
        deviation = statistics.stdev(found) if len(found) > 1 else 0.0
        return cls(statistics.fmean(found), deviation, len(found))

    def text(self) -> str:
        """In percent."""
        deviation = f" ± {100 * self.deviation:.2f}" if self.count > 1 else ""
        return f"{100 * self.mean:.2f}{deviation}"


def good(rows: Iterable[Row], experiment: str) -> list[Row]:
    """Rows of an experiment that succeeded."""
    return [row for row in rows if not row["failure"] and row["experiment"] == experiment]


def spreads(rows: Sequence[Row], value: str, *keys: str) -> dict[tuple[object, ...], Spread]:
    """Values of `keys` -> spread of `value` over the rows that share them and have it."""
    groups: dict[tuple[object, ...], list[float]] = {}
    for row in rows:
        if value in row:
            groups.setdefault(tuple(row[key] for key in keys), []).append(row[value])
    return {key: Spread.of(values) for key, values in groups.items()}


def dense_accuracy(rows: Sequence[Row]) -> dict[str, Spread]:
    """Network -> accuracy of its dense networks."""
    return {
        str(key[0]): spread for key, spread in spreads(good(rows, "dense"), "accuracy", "network").items()
    }


def method_lines(rows: Sequence[Row]) -> list[list[str]]:
    """Network, pr, method, accuracy before ("outlook") and after fine-tuning, drop against dense in points."""
    found = good(rows, "methods")
    dense = dense_accuracy(rows)
    before = spreads(found, "outlook_test", "network", "pr", "method")
    after = spreads(found, "accuracy", "network", "pr", "method")
    lines = [[name, "0", "dense", "", spread.text(), ""] for name, spread in dense.items()]
    for key in sorted(after, key=str):
        network, pr, method = key
        drop = 100 * (dense[str(network)].mean - after[key].mean) if str(network) in dense else float("nan")
        outlook = before[key].text() if key in before else ""
        lines.append([str(network), f"{pr:g}", str(method), outlook, after[key].text(), f"{drop:.2f}"])
    return lines


def correlations(rows: Sequence[Row]) -> dict[str, tuple[float, int]]:
    """Experiment -> (Spearman's rho of outlook and fine-tuned accuracy, number of candidates)."""
    found: dict[str, tuple[float, int]] = {}
    for experiment in ("outlook", "outlook_uneven"):
        some = good(rows, experiment)
        if len(some) > 2:
            rho = spearman([row["outlook"] for row in some], [row["accuracy"] for row in some])
            found[experiment] = (rho, len(some))
    return found


def adaptive_verdicts(rows: Sequence[Row]) -> list[str]:
    """For each network and ratio with all three: is ABWSP within one deviation of WSP, or above BWSP?"""
    after = spreads(good(rows, "methods"), "accuracy", "network", "pr", "method")
    lines: list[str] = []
    for network, pr in sorted({(str(key[0]), key[1]) for key in after}, key=str):
        three = [after.get((network, pr, method)) for method in ("wsp", "bwsp", "abwsp")]
        if any(spread is None for spread in three):
            continue
        wsp, bwsp, abwsp = (spread for spread in three if spread is not None)
        near = abwsp.mean >= wsp.mean - wsp.deviation
        verdict = "within one deviation of WSP" if near else "more than one deviation below WSP"
        above = "above" if abwsp.mean > bwsp.mean else "not above"
        lines.append(
            f"{network} pr={pr:g}: WSP {wsp.text()}, BWSP {bwsp.text()}, ABWSP {abwsp.text()}: {verdict}, {above} BWSP"
        )
    return lines


def text(rows: Sequence[Row]) -> str:
    """All tables."""
    parts = [
        text_table(["network", "pr", "method", "outlook", "fine-tuned", "drop"], method_lines(rows)),
        *adaptive_verdicts(rows),
        *(f"{name}: rho = {rho:.3f} over {count}" for name, (rho, count) in correlations(rows).items()),
    ]
    for experiment, keys in (
        ("ablation", ("pr", "importance", "calibrated")),
        ("tiles", ("pr", "tile")),
        ("epochs", ("network", "method", "epochs", "pr")),
        ("one_plan", ("network", "pr")),
    ):
        found = good(rows, experiment)
        values = ("one_shot", "outlook_test", "accuracy")
        columns = [spreads(found, value, *keys) for value in values]
        lines = [[*map(str, key), *(column[key].text() for column in columns)] for key in columns[-1]]
        if lines:
            parts += [experiment, text_table([*keys, *values], lines)]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.summary", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("record", type=Path)
    given = made.parse_args(arguments)
    print(text(load(given.record).rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
