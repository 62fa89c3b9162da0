"""The denoiser's accuracy table on small photos: rows, and calibration ahead of the L2 norm."""

from __future__ import annotations

from pathlib import Path

import pytest

import wsp_compiler
from benchmarks import denoiser_accuracy, results
from examples import photos
from examples.denoiser import load_denoiser
from examples.pruned_file import save_pruned


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = photos.load
    monkeypatch.setattr(photos, "load", lambda name: load(name)[:, :, 100:196, 60:188])
    monkeypatch.setattr(photos, "HELD_OUT", ("camera",))
    path = tmp_path / "table.json"
    tuned = tmp_path / "tuned.safetensors"
    save_pruned(wsp_compiler.prune(load_denoiser(), 0.25, method="wsp", importance="l2"), tuned)
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
            "--finetuned",
            str(tuned),
            "--json",
            str(path),
        ]
    )
    dense, calibrated, by_norm, finetuned = results.load(path).rows
    assert dense["mean_drop_db"] == 0
    assert calibrated["method"] == "calibrated"
    assert calibrated["mean_drop_db"] == calibrated["largest_drop_db"]
    assert calibrated["mean_drop_db"] < 1.2
    assert by_norm["mean_drop_db"] > 3
    assert calibrated["peak_memory_mb"] > 0
    assert (finetuned["method"], finetuned["pr"]) == ("fine-tuned", 0.25)
    assert finetuned["mean_drop_db"] == pytest.approx(
        dense["psnr_db"]["camera"] - finetuned["psnr_db"]["camera"]
    )


def test_quoted_drops_are_those_of_the_results() -> None:
    root = Path(__file__).resolve().parents[2]
    found = results.load(root / "benchmarks" / "results" / "denoiser_accuracy.json").rows
    text = (root / "docs" / "accuracy.md").read_text(encoding="utf-8")
    pruned = [row for row in found if row["pr"] > 0]
    for row in pruned:
        drops = f"{row['mean_drop_db']:.2f} ({row['largest_drop_db']:.2f})"
        assert f"| {row['pr']:g} | {row['method']} | {drops} |" in text
    calibrated = {row["pr"]: row["mean_drop_db"] for row in pruned if row["method"] == "calibrated"}
    quoted = " / ".join(f"{calibrated[pr]:.2f}" for pr in (0.3, 0.5, 0.8))
    assert f"loses {quoted} dB" in " ".join((root / "README.md").read_text(encoding="utf-8").split())
    assert calibrated[0.3] < 0.5
    assert calibrated[0.5] < 1.2
    assert calibrated[0.8] < 3
