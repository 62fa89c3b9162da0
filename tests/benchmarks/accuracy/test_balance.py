"""Times of layers: one entry for every ratio, and a clear error without the networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import wsp_compiler
from benchmarks.accuracy import balance
from benchmarks.accuracy.models import make
from benchmarks.results import load


def test_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def times(model: Any, pr: float, x: Any, tune: str) -> Any:
        assert x[0].shape == (2, 3, 32, 32)
        return {"3.conv1": {"wsp_us": 3.0, "bwsp_us": 2.0, "ratio": 1.5}}

    monkeypatch.setattr(wsp_compiler, "balanced_speedup", times)
    arguments = ["--folder", str(tmp_path), "--pr", "0.4", "0.8", "--batch", "2", "--device", "cpu"]
    arguments += ["--json", str(tmp_path / "times.json")]
    with pytest.raises(FileNotFoundError, match=r"benchmarks\.accuracy\.run --only dense/resnet20/0"):
        balance.main(arguments)
    torch.save(
        make("resnet20", 10).state_dict(), tmp_path / "dense_resnet20_0_dense_0.0_200_l2_False_2_-1.pt"
    )
    assert balance.main(arguments) == 0
    row = load(tmp_path / "times.json").rows[0]
    assert set(row["times"]) == {"resnet20/0.4", "resnet20/0.8"}
    assert "pr=0.8: BWSP is 1.500 times" in capsys.readouterr().out
