"""Tables: means over seeds, correlations, verdicts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.accuracy import summary
from benchmarks.accuracy.summary import Spread
from benchmarks.results import Row, new_record


def row(experiment: str, accuracy: float, **other: object) -> Row:
    base: Row = {"experiment": experiment, "network": "resnet20", "seed": 0, "pr": 0.8, "method": "wsp"}
    return base | {"accuracy": accuracy, "failure": None, "outlook": 0.5, "outlook_test": 0.5} | other


ROWS = [
    row("dense", 0.92, method="dense", pr=0.0),
    *(row("methods", value) for value in (0.89, 0.90, 0.91)),
    *(row("methods", value, method="bwsp") for value in (0.86, 0.87)),
    *(row("methods", value, method="abwsp") for value in (0.88, 0.90)),
    row("methods", 0.1, failure="it broke"),
    *(row("outlook", 0.1 * x, outlook=x * x, candidate=x) for x in (1, 2, 3, 4)),
    row("ablation", 0.9, importance="l2", calibrated=False, one_shot=0.2),
]


def test_spreads_are_over_seeds() -> None:
    found = summary.spreads(summary.good(ROWS, "methods"), "accuracy", "method")
    assert found[("wsp",)].mean == pytest.approx(0.9)
    assert found[("wsp",)].deviation == pytest.approx(0.01)
    assert found[("wsp",)].count == 3
    assert found[("bwsp",)].deviation == pytest.approx(0.01 / math.sqrt(2))
    assert Spread.of([0.5]).text() == "50.00"
    assert found[("wsp",)].text() == "90.00 ± 1.00"


def test_correlation_and_verdict() -> None:
    assert summary.correlations(ROWS) == {"outlook": (pytest.approx(1.0), 4)}
    (line,) = summary.adaptive_verdicts(ROWS)
    assert "ABWSP 89.00" in line
    assert "within one deviation of WSP, above BWSP" in line
    worse = [item | {"accuracy": 0.8} if item["method"] == "abwsp" else item for item in ROWS]
    assert "more than one deviation below WSP, not above BWSP" in summary.adaptive_verdicts(worse)[0]


def test_the_command_prints_every_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = new_record("benchmarks.accuracy.run", [], "cpu")
    record.rows = ROWS
    record.save(tmp_path / "r.json")
    assert summary.main([str(tmp_path / "r.json")]) == 0
    text = capsys.readouterr().out
    assert "90.00 ± 1.00  2.00" in text  # fine-tuned, and the drop in points
    assert "rho = 1.000 over 4" in text
    assert "ablation" in text
    assert "it broke" not in text
