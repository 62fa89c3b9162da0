"""The table of what balance gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import balance
from benchmarks.results import load


def test_times_real_layers_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "record.json"
    arguments = [
        "--device",
        "cpu",
        "--networks",
        "resnet20",
        "--size",
        "32",
        "--tune",
        "off",
        "--json",
        str(file),
    ]
    seen: dict[str, Any] = {}

    def measure(model: torch.nn.Module, pr: float, x: torch.Tensor, **options: Any) -> dict[str, Any]:
        assert x.shape == (1, 3, 32, 32)
        model(x)
        seen.update(options)
        return {
            "3.conv1": {"wsp_us": 3.0, "bwsp_us": 2.0, "ratio": 1.5},
            "4.conv1": {"wsp_us": 8.0, "bwsp_us": 3.0, "ratio": 8 / 3},
        }

    assert balance.main(arguments, measure) == 0
    assert (seen["tile"], seen["tune"], seen["importance"]) == (2, "off", "output")
    rows = load(file).rows
    assert [row["layer"] for row in rows] == ["3.conv1", "4.conv1"]
    assert all(row["weights"] == "random" for row in rows)
    assert "geomean 2.00x over 2 layers, from 1.50x to 2.67x" in capsys.readouterr().out


def test_a_failure_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(*_: Any, **__: Any) -> dict[str, Any]:
        raise RuntimeError("out of memory")

    arguments = ["--device", "cpu", "--networks", "denoiser", "--size", "16"]
    assert balance.main(arguments, measure) == 1
    assert "out of memory" in capsys.readouterr().out
