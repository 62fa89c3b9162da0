"""The comparison of outlooks, on a hardly trained network and three assignments."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import outlook_refit, results
from wsp_compiler import spearman


@pytest.mark.slow
def test_three_assignments(tmp_path: Path) -> None:
    path = tmp_path / "outlook.json"
    outlook_refit.main(["--assignments", "3", "--epochs", "2", "--steps", "2", "--json", str(path)])
    *rows, last = results.load(path).rows
    assert [row["assignment"] for row in rows][:2] == ["0" * 7, "1" * 7]
    assert len(rows) == last["assignments"] == 3
    for row in rows:
        assert all(0 <= row[way] <= 1 for way in (*outlook_refit.WAYS, "fine_tuned"))
    for way, rho in last["spearman"].items():
        assert rho == pytest.approx(
            spearman([row[way] for row in rows], [row["fine_tuned"] for row in rows]), nan_ok=True
        )
