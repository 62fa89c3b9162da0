"""One plan: the most pruned network that loses little enough, its quality and its time."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wsp_compiler
from benchmarks.accuracy import one_plan
from benchmarks.accuracy.experiments import Job
from benchmarks.accuracy.models import make
from benchmarks.accuracy.tasks import Task
from benchmarks.results import load
from examples import photos
from examples.denoiser import load_denoiser
from examples.pruned_file import save_pruned


class Scaled(nn.Module):
    """Loses quality as its name says."""

    def __init__(self, loss: float, pr: float = 0.0) -> None:
        super().__init__()
        self.achieved_pr = pr
        self.loss = nn.Parameter(torch.tensor(loss), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0 + 10 - self.loss


def as_it_is(model: nn.Module, **options: Any) -> nn.Module:
    """In place of compile."""
    layers = [m for m in model.modules() if isinstance(m, wsp_compiler.WinogradConv2d)]
    model.achieved_pr = 1 - sum(float(m.keep.float().mean()) for m in layers) / len(layers)  # type: ignore[assignment]
    return model


@pytest.fixture
def fake_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(dense: Any, tuned: dict[str, Any], shape: Any, device: str) -> list[dict[str, Any]]:
        common = {"failure": None, "strongest": "torch", "shape": list(shape)}
        return [{"name": name, "strongest_ratio": 1.5, **common} for name in ("dense_winograd", *tuned)]

    monkeypatch.setattr(one_plan, "compare", compare)


@pytest.mark.usefixtures("fake_times")
def test_the_most_pruned_that_is_good_enough_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:

    def compile(model: Scaled, target: str | None = None) -> Scaled:
        """On the device every network counts the same; what is chosen follows the CPU's count."""
        compiled = copy.deepcopy(model)
        compiled.achieved_pr = model.achieved_pr if target == "cpu" else 0.6
        return compiled

    monkeypatch.setattr(wsp_compiler, "compile", compile)
    x = torch.zeros(1, 1, 2, 2)
    subject = one_plan.Subject(
        Scaled(0.0),
        {"a": Scaled(0.05, 0.7), "b": Scaled(0.5, 0.9), "c": Scaled(0.1, 0.8)},
        lambda model: float(model(x).mean()),
        0.3,
        (1, 1, 2, 2),
        "dB",
    )
    rows = one_plan.judge(subject, "cpu")
    assert [row["name"] for row in rows] == ["b", "c", "a"]
    assert [row["pr"] for row in rows] == [0.9, 0.8, 0.7]
    assert [row["device_pr"] for row in rows] == [0.6, 0.6, 0.6]
    assert [row["chosen"] for row in rows] == [False, True, False]
    assert rows[1]["loss"] == pytest.approx(0.1, abs=1e-5)
    assert [row["strongest_ratio"] for row in rows] == [1.5, 1.5, 1.5]


@pytest.mark.usefixtures("fake_times")
def test_the_denoiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_photo = photos.load
    monkeypatch.setattr(photos, "load", lambda name: load_photo(name)[:, :, 40:72, 40:72])
    monkeypatch.setattr(photos, "HELD_OUT", ("camera",))
    monkeypatch.setattr(wsp_compiler, "compile", as_it_is)
    files = []
    for pr in (0.1, 0.9):
        files.append(tmp_path / f"pr{pr}.safetensors")
        save_pruned(wsp_compiler.prune(load_denoiser(), pr, method="wsp"), files[-1])
    out = tmp_path / "out.json"
    arguments = ["--device", "cpu", "--threads", "1", "--json", str(out)]
    names = [str(file) for file in files]
    found = one_plan.main([*arguments, "--files", *names])
    rows = load(out).rows
    assert [row["name"] for row in rows] == ["pr0.9", "pr0.1"]
    assert rows[0]["loss"] > 0.3
    assert not rows[0]["chosen"]
    assert found == (0 if rows[1]["chosen"] else 1)
    with pytest.raises(SystemExit):
        one_plan.main(arguments)


@pytest.mark.usefixtures("fake_times")
def test_a_classifier(tmp_path: Path, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_plan, "load_task", lambda name, folder, device: replace(task, classes=10))
    monkeypatch.setattr(wsp_compiler, "compile", as_it_is)
    arguments = ["--network", "resnet20", "--folder", str(tmp_path), "--device", "cpu", "--batch", "5"]
    arguments += ["--threads", "1", "--json", str(tmp_path / "out.json")]
    with pytest.raises(FileNotFoundError, match="--only one_plan"):
        one_plan.main(arguments)
    job = Job("one_plan", "resnet20", 0, "wsp", 0.8)
    dense = make("resnet20", 10)
    torch.save(dense.state_dict(), tmp_path / (job.dense.name.replace("/", "_") + ".pt"))
    same = wsp_compiler.prune(dense, 0.0, method="wsp")
    save_pruned(same, tmp_path / (job.name.replace("/", "_") + ".safetensors"), {"job": job.name})
    assert one_plan.main(arguments) == 0
    (row,) = load(tmp_path / "out.json").rows
    assert row["chosen"]
    assert row["loss"] == pytest.approx(0.0, abs=1e-6)
    assert row["shape"] == [5, 3, 32, 32]
    with torch.no_grad():
        x = torch.randn(1, 3, 32, 32).half().float()
        assert torch.allclose(one_plan.Cast(dense, torch.float32)(x), dense(x))
