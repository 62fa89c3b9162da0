"""The CPU network benchmark: its rows, its table, and a runtime that cannot run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import cpu_networks
from benchmarks.cpu_networks import main, run_network


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))

    def some(model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
        def fails() -> Any:
            raise RuntimeError("no such library\nand a long story")

        return {"torch": lambda: lambda x: model(x), "other": fails}

    monkeypatch.setattr(cpu_networks, "NETWORKS", {"small": (network, (1, 3, 12, 12))})
    monkeypatch.setattr(cpu_networks, "peers", some)


def test_a_row_and_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "rows.json"
    assert main(["--networks", "small", "--json", str(path), "--pr", "0.5"]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["unavailable"] == {"other": "RuntimeError: no such library"}
    assert set(row["tiles_us"]) == {"F2", "F4"}
    assert row["ours_us"] == min(row["tiles_us"].values()) > 0
    assert row["strongest_ratio"] == pytest.approx(row["baselines_us"]["torch"] / row["ours_us"])
    assert row["relative_errors"]["torch"] < 1e-6
    assert row["relative_errors"]["ours F2"] < 1e-5
    assert row["relative_errors"]["ours F4"] < 1e-4
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("microseconds")
    assert lines[-2].startswith("geomean")
    assert lines[-1].startswith("minimum")


def test_a_network_that_fails_is_a_failure(capsys: pytest.CaptureFixture[str]):
    def compile(*args: Any, **options: Any) -> Any:
        raise ValueError("broken")

    assert main(["--networks", "small"], compile) == 1
    assert "FAILED small: ValueError: broken" in capsys.readouterr().out


def test_errors_are_those_of_the_kept_weights():
    from wsp_compiler import compile

    row = run_network("small", 0.9, compile)
    assert row["relative_errors"]["ours F2"] < 1e-5
