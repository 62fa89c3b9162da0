"""The denoiser's accuracy table on small photos: rows, and calibration ahead of the L2 norm."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import denoiser_accuracy, results
from examples import photos


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = photos.load
    monkeypatch.setattr(photos, "load", lambda name: load(name)[:, :, 100:196, 60:188])
    monkeypatch.setattr(photos, "HELD_OUT", ("camera",))
    path = tmp_path / "table.json"
    denoiser_accuracy.main(
        [
            "--pr",
            "0.5",
            "--methods",
            "calibrated",
            "L2, BWSP-R",
            "--crops",
            "2",
            "--side",
            "96",
            "--json",
            str(path),
        ]
    )
    dense, calibrated, by_norm = results.load(path).rows
    assert dense["mean_drop_db"] == 0
    assert calibrated["method"] == "calibrated"
    assert calibrated["mean_drop_db"] == calibrated["largest_drop_db"]
    assert calibrated["mean_drop_db"] < 1.2
    assert by_norm["mean_drop_db"] > 3
    assert calibrated["peak_memory_mb"] > 0
