"""Times of fine-tuned networks: rows, baselines, failures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import wsp_compiler
from benchmarks.accuracy import speed
from benchmarks.accuracy.experiments import Job
from benchmarks.accuracy.models import make
from benchmarks.results import load
from examples.pruned_file import save_pruned


@pytest.fixture
def two_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    def peers(model: Any, x: torch.Tensor) -> dict[str, Any]:
        def missing() -> Any:
            raise ModuleNotFoundError("No module named 'openvino'")

        return {"torch": lambda: lambda x: model(x), "openvino": missing}

    monkeypatch.setattr("benchmarks.cpu_networks.peers", peers)


@pytest.mark.usefixtures("two_runtimes")
def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_compile: Callable[..., Any]) -> None:
    job = Job("methods", "resnet20", 0, "wsp", 0.8)
    dense = make("resnet20", 10)
    torch.save(dense.state_dict(), tmp_path / (job.dense.name.replace("/", "_") + ".pt"))
    path = tmp_path / (job.name.replace("/", "_") + ".safetensors")
    save_pruned(wsp_compiler.prune(dense, 0.8, method="wsp"), path, {"job": job.name})
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(wsp_compiler, "compile", fake_compile(calls=calls))
    out = tmp_path / "speed.json"
    arguments = ["--folder", str(tmp_path), "--device", "cpu", "--threads", "1", "--json", str(out)]
    assert speed.main([*arguments, "--only", "methods_resnet20"]) == 0
    dense_row, row = load(out).rows
    assert (dense_row["name"], row["name"]) == ("dense_winograd", job.name)
    assert row["strongest"] == "torch"
    assert row["strongest_ratio"] == pytest.approx(row["baselines_us"]["torch"] / row["ours_us"])
    assert row["winograd_ratio"] == pytest.approx(dense_row["ours_us"] / row["ours_us"])
    assert "openvino" in row["unavailable"]
    assert row["shape"] == [1, 3, 32, 32]
    assert calls[0]["method"] == "dense"
    assert "method" not in calls[1]  # compiled as it was trained
    with pytest.raises(SystemExit):
        speed.main([*arguments, "--only", "nothing"])


@pytest.mark.usefixtures("two_runtimes")
def test_a_failure_is_a_row(monkeypatch: pytest.MonkeyPatch, fake_compile: Callable[..., Any]) -> None:
    made = fake_compile()

    def compile_function(model: Any, **options: Any) -> Any:
        if "method" not in options:
            raise RuntimeError("no kernel")
        return made(model, **options)

    monkeypatch.setattr(wsp_compiler, "compile", compile_function)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)).eval()
    rows = speed.compare(model, {"tuned": model}, (1, 3, 8, 8), "cpu")
    assert [row["failure"] for row in rows] == [None, "RuntimeError: no kernel"]
    assert "ours_us" not in rows[1]
