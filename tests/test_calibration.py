"""calibration: errors shrink, nothing of the user's changes, plans reproduce it, and bad data is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wsp_compiler
from tests.reference import assert_untouched, randomise, relative_error, snapshot
from wsp_compiler.calibration import exact_float32
from wsp_compiler.errors import InputError, OptionError, PlanError
from wsp_compiler.plan import PruningPlan
from wsp_compiler.refits import NormStatistics


class Net(nn.Module):
    """Three prunable convolutions, batch norm behind one of them and behind a strided one, a residual."""

    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.a = nn.Conv2d(24, 24, 3, padding=1, bias=False)
        self.a_norm = nn.BatchNorm2d(24)
        self.b = nn.Conv2d(24, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 16, 3, stride=2, bias=False)
        self.down_norm = nn.BatchNorm2d(16)
        self.c = nn.Conv2d(16, 20, 3)
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        if self.branch and y.mean() < -1:  # torch.fx cannot follow
            return y
        y = y + F.relu(self.a_norm(self.a(y)))
        return self.c(F.relu(self.down_norm(self.down(F.relu(self.b(y))))))


def images(count: int = 12, side: int = 17) -> Tensor:
    """Smooth random pictures."""
    return F.avg_pool2d(torch.randn(count, 3, side + 4, side + 4), 5, 1) * 4


def net(branch: bool = False) -> nn.Module:
    return randomise(Net(branch), images())


def error(model: nn.Module, compiled: Any, x: Tensor) -> float:
    with torch.no_grad():
        return relative_error(compiled.graph_module(x), model(x))


@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("direction", ["row", "column"])
def test_calibration_beats_no_calibration_on_other_data(branch: bool, direction: str) -> None:
    model = net(branch)
    before = snapshot(model)
    options: dict[str, Any] = {"method": "wsp", "direction": direction, "pr_scope": "layer"}
    fitted = wsp_compiler.compile(model, 0.5, calibration=images(24), **options)
    raw = wsp_compiler.compile(model, 0.5, **options)
    test = images(8)
    assert error(model, fitted, test) < 0.75 * error(model, raw, test)
    assert list(fitted.plan.refits) == ["a", "b", "c"]
    assert list(fitted.plan.norms) == ["down_norm"]
    assert all(0 < fitted.plan.errors[path] < 1 for path in "abc")
    for path in fitted.plan:
        assert fitted.plan[path].kept_fraction == raw.plan[path].kept_fraction
    assert_untouched(model, before)


def test_the_kernels_compute_the_calibrated_graph() -> None:
    model = net()
    x = images(2)
    compiled = wsp_compiler.compile(model, 0.5, calibration=images(), example_inputs=(x,), check=True)
    assert relative_error(compiled(x), compiled.graph_module(x)) < 1e-5
    assert torch.equal(copy.deepcopy(compiled)(x), compiled(x))
    report = compiled.report()
    assert "neither calibrated" not in report
    assert "~" not in report.splitlines()[3]


def test_both_ways_of_running_agree() -> None:
    x, test = images(), images(4)
    plain, branching = net(), net(branch=True)
    branching.load_state_dict(plain.state_dict())
    one = wsp_compiler.compile(plain, 0.5, calibration=x)
    other = wsp_compiler.compile(branching, 0.5, calibration=x)
    assert one.record.untraced != other.record.untraced
    with torch.no_grad():
        assert relative_error(one.graph_module(test), other.graph_module(test)) < 1e-3


def test_a_plan_reproduces_it(tmp_path: Path) -> None:
    model, test = net(), images(2)
    compiled = wsp_compiler.compile(model, 0.5, calibration=images())
    compiled.plan.save(tmp_path / "plan")
    again = wsp_compiler.compile(model, plan=PruningPlan.load(tmp_path / "plan"))
    assert torch.equal(again.graph_module(test), compiled.graph_module(test))
    other = copy.deepcopy(model)
    wrong = copy.deepcopy(compiled.plan)
    wrong.norms["nowhere"] = NormStatistics(torch.ones(2), torch.ones(2))
    with pytest.raises(PlanError, match="nowhere: no such batch norm"):
        wsp_compiler.compile(other, plan=wrong)


def test_a_given_plan_keeps_its_choice() -> None:
    model = net()
    plan = wsp_compiler.compile(model, 0.5, method="bwsp", importance="l2").plan
    refitted = wsp_compiler.compile(model, plan=plan, calibration=images()).plan
    assert not plan.refits
    for path in plan:
        assert torch.equal(plan[path].keep, refitted[path].keep)
    even: dict[str, Any] = {"method": "bwsp", "calibration": images(), "pr_scope": "layer"}
    by_norm = wsp_compiler.compile(model, 0.5, importance="l2", **even).plan
    assert all(torch.equal(plan[path].keep, by_norm[path].keep) for path in plan)
    chosen = wsp_compiler.compile(model, 0.5, **even).plan
    assert any(not torch.equal(plan[path].keep, chosen[path].keep) for path in plan)


def test_what_is_not_pruned_is_not_refitted() -> None:
    model = net()
    rules = [wsp_compiler.PruneRule("a", pr=0.0), wsp_compiler.PruneRule("b", method="dense")]
    compiled = wsp_compiler.compile(model, 0.5, calibration=images(), rules=rules)
    assert list(compiled.plan.refits) == ["c"]
    nothing = wsp_compiler.compile(model, 0.0, calibration=images())
    assert not nothing.plan.refits
    assert not nothing.plan.norms
    assert error(model, nothing, images(2)) < 1e-5


def test_methods_by_default() -> None:
    model = net()
    assert wsp_compiler.compile(model, 0.5).plan["a"].method == "bwsp"
    assert wsp_compiler.compile(model, 0.5, calibration=images()).plan["a"].method == "wsp"


@pytest.mark.parametrize("tile", [2, 4])
def test_half_precision_models(tile: int) -> None:
    model = net().to(torch.bfloat16)
    compiled = wsp_compiler.compile(model, 0.3, calibration=images(40), tile=tile)
    assert all(refit.weight.dtype == torch.float32 for refit in compiled.plan.refits.values())
    raw = wsp_compiler.compile(model, 0.3, tile=tile)
    test = images(4).bfloat16()
    assert error(model, compiled, test) < 0.9 * error(model, raw, test)


@pytest.mark.parametrize("branch", [False, True])
def test_bad_data(branch: bool) -> None:
    model = net(branch)

    def compile_with(data: Any) -> None:
        wsp_compiler.compile(model, 0.5, calibration=data)

    with pytest.raises(InputError, match="holds no batch"):
        compile_with([])
    with pytest.raises(InputError, match=r"fails on batch 0, shapes \[\[2, 4, 9, 9\]\]"):
        compile_with(torch.randn(2, 4, 9, 9))
    with pytest.raises(InputError, match="NaN or infinite"):
        compile_with(torch.full((2, 3, 9, 9), float("nan")))
    with pytest.raises(OptionError, match="calibration is a int"):
        compile_with(3)
    model.get_submodule("a").weight.data.fill_(3e38)  # type: ignore[union-attr, operator]
    with pytest.raises(InputError, match="a: its output is NaN or infinite on calibration batch 0"):
        compile_with(images(2))


def test_labels_are_dropped() -> None:
    model, x = net(), images(4)
    plans = [
        wsp_compiler.compile(model, 0.5, calibration=data).plan
        for data in ([x], [(x, torch.arange(4))], [{"x": x, "label": torch.arange(4)}])
    ]
    assert plans[0] == plans[1] == plans[2]


def test_precision_settings_are_restored() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with exact_float32():
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
