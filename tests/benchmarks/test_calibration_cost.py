"""The cost of calibration, on a few small images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from benchmarks import calibration_cost, results


def test_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(name: str, **_: Any) -> nn.Module:
        assert name == "resnet18"
        first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        return nn.Sequential(first, nn.BatchNorm2d(16), nn.ReLU(), second)

    scopes: list[str] = []

    def prune(*args: Any, **options: Any) -> nn.Module:
        scopes.append(options["pr_scope"])
        return original(*args, **options)

    original = calibration_cost.wsp_compiler.prune
    monkeypatch.setattr(calibration_cost.wsp_compiler, "prune", prune)
    monkeypatch.setattr(calibration_cost.models, "get_model", small)
    path = tmp_path / "cost.json"
    calibration_cost.main(["--images", "2", "--side", "48", "--pr-scope", "global", "--json", str(path)])
    assert scopes == ["global"]
    (row,) = results.load(path).rows
    assert row["layers"] == 1  # the first has too few channels
    assert row["seconds"] > 0
    assert row["host_memory_peak_mb"] >= row["host_memory_before_mb"]
