"""plan_file: a plan with tensors survives a file; damaged files say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import wsp_compiler
from wsp_compiler.errors import PlanError
from wsp_compiler.plan import PruningPlan


@pytest.fixture(scope="module")
def calibrated() -> PruningPlan:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1), nn.BatchNorm2d(4)
    )
    return wsp_compiler.compile(model.eval(), 0.5, calibration=torch.randn(2, 3, 12, 12)).plan


def test_a_plan_and_its_tensors_come_back(calibrated: PruningPlan, tmp_path: Path) -> None:
    calibrated.save(tmp_path / "plan.safetensors")
    again = PruningPlan.load(tmp_path / "plan.safetensors")
    assert again == calibrated
    assert again.errors == calibrated.errors
    assert list(again.refits) == ["1"]
    assert list(again.norms) == ["4"]
    assert len(calibrated.to_json()) < 4000


def test_json_alone_does_not_lose_weights_silently(calibrated: PruningPlan) -> None:
    with pytest.raises(PlanError, match=r"(?s)refitted weights.*PruningPlan\.load"):
        PruningPlan.from_json(calibrated.to_json())
    again = PruningPlan.from_json(calibrated.to_json(), (calibrated.refits, calibrated.norms))
    assert again == calibrated


def test_plans_without_tensors(tmp_path: Path) -> None:
    plan = PruningPlan(left_alone={"a": "why"})
    plan.save(tmp_path / "plan")
    assert PruningPlan.load(tmp_path / "plan") == plan


def test_damaged_files(calibrated: PruningPlan, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        PruningPlan.load(tmp_path / "missing")
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(PlanError, match="cannot be read"):
        PruningPlan.load(tmp_path / "text")
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(PlanError, match="holds no plan"):
        PruningPlan.load(tmp_path / "other")
    safetensors.torch.save_file(
        {"refit/1/weight": torch.ones(1)}, tmp_path / "half", metadata={"wsp_plan": calibrated.to_json()}
    )
    with pytest.raises(PlanError, match="misses the tensor 'refit/1/bias'"):
        PruningPlan.load(tmp_path / "half")
