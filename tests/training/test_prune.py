"""prune and unprune: what is trained is what compile runs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import wsp_compiler
from tests.reference import assert_untouched, relative_error, snapshot
from tests.test_calibration import images, net
from wsp_compiler.errors import PlanError
from wsp_compiler.training.layer import WinogradConv2d
from wsp_compiler.training.prune import prune, unprune


def shake(model: nn.Module) -> nn.Module:
    """Change every parameter and statistic a little, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter))
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
                norm.running_mean.add_(0.1)
    return model


def test_equals_the_compiled_plan() -> None:
    model, x = net(), images(2)
    before = snapshot(model)
    plan = wsp_compiler.compile(model, 0.5, calibration=images()).plan
    pruned = prune(model, plan=plan)
    assert_untouched(model, before)
    assert type(pruned) is type(model)
    expected = wsp_compiler.compile(model, plan=plan).graph_module(x)
    assert relative_error(pruned(x), expected) < 1e-5
    direct = prune(model, 0.5, calibration=images())
    assert [name for name, m in direct.named_modules() if isinstance(m, WinogradConv2d)] == ["a", "b", "c"]


def test_a_ratio_over_all_layers_is_uneven() -> None:
    model = net()
    kept = {}
    for scope in ("layer", "global"):
        pruned = prune(model, 0.6, calibration=images(), pr_scope=scope)
        layers = [module for module in pruned.modules() if isinstance(module, WinogradConv2d)]
        kept[scope] = [float(layer.keep.float().mean()) for layer in layers]
    assert max(kept["layer"]) - min(kept["layer"]) < 0.05
    assert kept["global"] != kept["layer"]
    plan = wsp_compiler.compile(model, 0.6, calibration=images(), method="wsp").plan
    assert kept["global"] == [float(entry.keep.float().mean()) for entry in plan.values()]


@pytest.mark.parametrize(("tile", "tolerance"), [(2, 1e-5), (4, 1e-4)])
@pytest.mark.parametrize("method", ["wsp", "bwsp", "fp"])
@pytest.mark.parametrize("direction", ["row", "column"])
def test_trained_then_compiled_loses_nothing(
    tile: int, tolerance: float, method: str, direction: str
) -> None:
    model, x = net(), images(3)
    pruned = shake(prune(model, 0.5, tile=tile, method=method, direction=direction))
    with torch.no_grad():
        expected = copy.deepcopy(pruned).double()(x.double())
    compiled = wsp_compiler.compile(pruned, example_inputs=(x,))
    assert relative_error(compiled(x), expected) < tolerance
    assert "neither calibrated" not in compiled.report()


def test_a_saved_state_dict_compiles_to_the_same(tmp_path: Path) -> None:
    model, x = net(), images(2)
    pruned = shake(prune(model, 0.5))
    torch.save(pruned.state_dict(), tmp_path / "state.pt")
    safetensors.torch.save_file(pruned.state_dict(), tmp_path / "state.safetensors")
    expected = wsp_compiler.compile(pruned).graph_module(x)
    for state in (
        torch.load(tmp_path / "state.pt", weights_only=True),
        safetensors.torch.load_file(tmp_path / "state.safetensors"),
    ):
        fresh = prune(net(), 0.5)
        fresh.load_state_dict(state)
        assert torch.equal(wsp_compiler.compile(fresh).graph_module(x), expected)


def test_unprune() -> None:
    assert unprune(net()) is None
    pruned = prune(net(), 0.5)
    before = snapshot(pruned)
    found = unprune(pruned)
    assert found is not None
    plain, plan = found
    assert isinstance(plain.get_submodule("a"), nn.Conv2d)
    assert list(plan) == ["a", "b", "c"]
    assert_untouched(pruned, before)
    with torch.no_grad():
        pruned.get_submodule("a").weight[0, 0] = float("nan")  # type: ignore[index, operator]
    with pytest.raises(PlanError, match="a: its weights are NaN"):
        wsp_compiler.compile(pruned)


def test_a_shared_convolution_stays_shared() -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1)
    pruned = prune(nn.Sequential(conv, nn.ReLU(), conv).eval(), 0.5)
    assert isinstance(pruned, nn.Sequential)
    assert pruned[0] is pruned[2]
    lone = prune(nn.Conv2d(16, 16, 3).eval(), 0.5)
    assert isinstance(lone, WinogradConv2d)
    x = torch.randn(1, 16, 8, 8)
    assert relative_error(wsp_compiler.compile(lone).graph_module(x), lone(x)) < 1e-5
