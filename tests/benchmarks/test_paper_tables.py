"""Speedups over dense Winograd: the logic, with PyTorch's convolution in cuDNN's place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import nonfused_network, paper_tables
from benchmarks.network_models import NETWORKS
from benchmarks.results import load

RUN = ["--device", "cpu", "--networks", "tiny", "--size", "12", "--batch", "2"]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny() -> nn.Module:
        convs = [nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), *convs)

    def convolution(handle: int, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, nonfused_network._weights[handle], padding=1)

    monkeypatch.setitem(NETWORKS, "tiny", tiny)
    monkeypatch.setattr(nonfused_network, "_convolution", convolution)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)


def test_end_to_end(fake_compile: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, options = tmp_path / "record.json", []
    arguments = [*RUN, "--pr", "0", "0.84", "--json", str(file)]
    assert paper_tables.main(arguments, fake_compile(1.0, options)) == 0
    assert [(o["pr"], o["method"], o["rest"], o["keep_slower"]) for o in options] == [
        (0.0, "dense", "inductor", True),
        (0.84, "bwsp", "inductor", True),
    ]
    rows = load(file).rows
    assert [row["name"] for row in rows] == ["tiny N=2 pr=0", "tiny N=2 pr=0.84"]
    for row in rows:
        layouts = [us for label, us in row["times_us"].items() if label.startswith("dense_winograd")]
        assert len(layouts) == 2
        assert row["strongest_ratio"] == pytest.approx(min(layouts) / row["ours_us"])
        assert row["lowered"] == 1  # the first convolution has three channels
    out = capsys.readouterr().out
    assert "PR 84%" in out
    assert "tiny" in out


def test_a_failing_ratio_leaves_the_others(fake_compile: Any, tmp_path: Path) -> None:
    right, file = fake_compile(), tmp_path / "record.json"

    def fails(model: nn.Module, **options: Any) -> Any:
        if options["pr"] == 0.5:
            raise RuntimeError("no kernel")
        return right(model, **options)

    assert paper_tables.main([*RUN, "--pr", "0.5", "0.6", "--json", str(file)], fails) == 1
    first, second = load(file).rows
    assert first["failure"] == "ours pr=0.5: RuntimeError: no kernel"
    assert second["failure"] is None


def test_a_wrong_baseline_does_not_count(
    fake_compile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nonfused_network, "_convolution", lambda handle, x: x * 0)
    file = tmp_path / "record.json"
    assert paper_tables.main([*RUN, "--pr", "0.5", "--json", str(file)], fake_compile()) == 1
    assert "relative error against eager" in load(file).rows[0]["failure"]


def test_unknown_network(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        paper_tables.main(["--device", "cpu", "--networks", "resnet21"])
    assert "unknown network 'resnet21'" in capsys.readouterr().err
