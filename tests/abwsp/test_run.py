"""run: what decides a search's outcome, and the plan that compile asks for."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import wsp_compiler
from tests.abwsp.problem import PATHS, PR, Fidelity, batches, net
from tests.reference import relative_error
from wsp_compiler import PruneRule, api
from wsp_compiler.abwsp.run import Request, run, searched_plan
from wsp_compiler.batches import calibration_calls
from wsp_compiler.errors import ModelError
from wsp_compiler.options import CompileOptions
from wsp_compiler.plan import PruningPlan

OPTIONS = CompileOptions(PR, "abwsp", tune="off")


def test_settings_are_json_and_tell_searches_apart() -> None:
    model = net()
    calls = calibration_calls(batches(), model)

    def quality(module: nn.Module) -> float:
        return 1.0

    requests = [
        Request(OPTIONS, quality, None),
        Request(OPTIONS, quality, None, alpha=20.0),
        Request(OPTIONS, quality, None, refit=False),
        Request(OPTIONS, quality, None, finetune={"data": [], "steps": 3}),
        Request(OPTIONS, quality, None, finetune={"data": [], "steps": 4}),
        Request(OPTIONS, quality, None, finetune=lambda module: None),
        Request(CompileOptions(PR, rules=(PruneRule("conv1", pr=0.1),)), quality, None),
    ]
    texts = [json.dumps(request.settings(model, calls)) for request in requests]
    assert len(set(texts)) == len(texts)
    more = Request(OPTIONS, quality, None, beta=9)  # goes on from what fewer rounds have found
    assert json.dumps(more.settings(model, calls)) == texts[0]


def test_the_searched_plan_is_fitted() -> None:
    model = net()
    plan = searched_plan(model, OPTIONS, Fidelity(model), batches(), None, None)
    assert plan is not None
    assert tuple(plan.refits) == tuple(plan) == PATHS
    assert {entry.method for entry in plan.values()} <= {"wsp", "bwsp"}
    assert all(entry.kept_fraction == pytest.approx(1 - PR, abs=0.05) for entry in plan.values())


def test_other_requests_are_not_searched() -> None:
    model = net()

    def unused(module: nn.Module) -> float:
        raise AssertionError

    for options in (
        CompileOptions(PR, "wsp"),
        CompileOptions(PR, "abwsp", pr_scope="global"),
        CompileOptions(PR, "abwsp", max_drop=1.0),
        CompileOptions(PR, "abwsp", target_latency=1.0),
    ):
        assert searched_plan(model, options, unused, batches(), None, None) is None
    assert searched_plan(model, OPTIONS, None, batches(), None, None) is None
    assert searched_plan(model, OPTIONS, unused, None, None, None) is None


def test_compile_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sixteen assignments, five winners, and the plan is compiled as it is."""
    found: list[PruningPlan | None] = []

    def watched(*arguments: Any) -> PruningPlan | None:
        found.append(searched_plan(*arguments))
        return found[-1]

    monkeypatch.setattr(api, "searched_plan", watched)
    model = net()
    fidelity = Fidelity(model)
    x = batches(1, seed=5)[0]
    compiled = wsp_compiler.compile(model, PR, eval_fn=fidelity, calibration=batches(), keep_slower=True)
    assert fidelity.calls == 1 + 16 + 5
    assert found == [compiled.plan]
    assert tuple(compiled.plan.refits) == PATHS
    with torch.no_grad():
        assert relative_error(compiled(x), compiled.graph_module(x)) < 1e-5


def test_nothing_to_prune() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    plan = searched_plan(model, OPTIONS, lambda module: 1.0, x, None, None)
    assert plan is not None
    assert not plan.sites
    assert "3 channels" in plan.left_alone["0"]
    with pytest.raises(ModelError, match=r"no convolution is left to prune \(0: 3 channels"):
        run(model, Request(CompileOptions(PR, "wsp"), lambda module: 1.0, x))
