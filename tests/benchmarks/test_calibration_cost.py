"""The cost of calibration, on a few small images."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import calibration_cost, results


@pytest.mark.slow
def test_one_row(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    calibration_cost.main(["--images", "2", "--side", "48", "--json", str(path)])
    (row,) = results.load(path).rows
    assert row["layers"] == 13
    assert row["seconds"] > 0
    assert row["host_memory_peak_mb"] >= row["host_memory_before_mb"]
