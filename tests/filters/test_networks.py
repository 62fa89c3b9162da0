"""Whole networks lose the channels of pruned filters and compute what they computed with zeros for them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import wsp_compiler
from examples.denoiser import load_denoiser
from tests.filters.nets import Dense, Residual, convolutions, randomised, without_filters
from tests.reference import assert_close, assert_untouched, randomise, relative_error, snapshot
from wsp_compiler.codegen.targets import CodeTarget
from wsp_compiler.plan import PruningPlan


def resnet() -> tuple[nn.Module, torch.Tensor]:
    x = torch.randn(1, 3, 64, 64)
    return randomise(torchvision.models.resnet18(weights=None), torch.randn(2, 3, 64, 64)), x


def vgg() -> tuple[nn.Module, torch.Tensor]:
    model: Any = torchvision.models.vgg11_bn(weights=None, num_classes=5)
    model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(512 * 49, 5))  # not its 120 million weights
    return randomise(model, torch.randn(2, 3, 32, 32)), torch.randn(1, 3, 32, 32)


def denoiser() -> tuple[nn.Module, torch.Tensor]:
    return load_denoiser(), torch.rand(1, 1, 23, 30)


def densenet() -> tuple[nn.Module, torch.Tensor]:
    return randomised(Dense(growth=20, layers=4)), torch.randn(2, 3, 15, 18)


NETWORKS: dict[str, Any] = {"resnet18": resnet, "vgg": vgg, "denoiser": denoiser, "densenet": densenet}
SMALLER = {
    "resnet18": {"layer1.0.conv1": (32, 64), "layer1.0.conv2": (64, 32), "layer4.1.conv1": (256, 512)},
    "vgg": {"features.4": (64, 64), "features.8": (128, 64), "features.25": (256, 256)},
    "denoiser": {"middle.0.convolution": (32, 64), "middle.14.convolution": (32, 32), "last": (1, 32)},
    "densenet": {"grows.0": (10, 8), "squeezes.3": (8, 38)},
}


def test_channels_fill_up_what_the_targets_kernels_want(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA: 26 of 64 filters are kept, 32 channels are left."""
    monkeypatch.setattr(CodeTarget, "channel_multiple", 32)
    model, x = denoiser()
    pruned = wsp_compiler.prune(model, 0.6, method="fp", importance="l2")
    compiled = wsp_compiler.compile(pruned)
    assert compiled.record.shrunk.sizes.items() >= SMALLER["denoiser"].items()
    assert "some of their channels fill up a multiple of 32" in compiled.report()
    with torch.no_grad():
        assert relative_error(compiled(x), pruned(x).double()) < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_physically_smaller_and_the_same(name: str) -> None:
    model, x = NETWORKS[name]()
    before = snapshot(model)
    rules = [wsp_compiler.PruneRule("grows.*")] if name == "densenet" else []
    compiled = wsp_compiler.compile(model, 0.5, method="fp", rules=rules)
    shrunk = compiled.record.shrunk
    assert shrunk is not None
    assert shrunk.sizes.items() >= SMALLER[name].items()
    expected = without_filters(model, compiled.plan)(x.double()).detach()
    exact = copy.deepcopy(compiled.graph_module).double()(x.double()).detach()
    assert relative_error(exact, expected) < 2e-6  # weights of lowered layers are stored in float32
    assert relative_error(model(x), expected) > 1e-3  # pruning is not nothing
    assert_untouched(model, before)
    text = compiled.report()
    for path, (filters, channels) in SMALLER[name].items():
        assert f"{filters}x{channels} (of " in next(
            line for line in text.splitlines() if line.startswith(f"{path} ")
        )


def test_what_stays_in_place_is_named_once() -> None:
    model, _ = resnet()
    text = wsp_compiler.compile(model, 0.5, method="fp").report()
    assert "10 convolutions are smaller without the channels of pruned filters" in text
    assert (
        "pruned filters of layer1.0.conv2, layer1.1.conv2 stay in place: their channels are tied to those of "
        "conv1, whose filters are not pruned"
    ) in text


def test_multiplies_of_the_smaller_layers() -> None:
    """Filters in place are skipped by row; one carrier among 32 filters is not worth that."""
    model, x = resnet()
    compiled = wsp_compiler.compile(model, 0.5, method="fp")
    assert compiled.record.shrunk is not None
    assert compiled.record.shrunk.plan["layer1.0.conv1"].kept_weights == 16 * 32 * 64
    entry = compiled.record.shrunk.plan["layer1.0.conv2"]
    assert entry.shape == (16, 64, 32)
    assert entry.kept_weights == 16 * 32 * 32
    smaller = compiled.record.shrunk
    left = sum(smaller.plan.get(path, entry).kept_weights for path, entry in compiled.plan.items())
    total = sum(entry.shape[0] * entry.shape[1] * entry.shape[2] for entry in compiled.plan.values())
    assert compiled.achieved_pr == pytest.approx(1 - left / total)
    masked = sum(entry.kept_weights for entry in compiled.plan.values())
    assert left < masked  # channels have left, too
    with torch.no_grad():
        assert compiled.graph_module(x).shape == (1, 1000)


def vendor_plan(model: nn.Module, x: torch.Tensor, **options: Any) -> PruningPlan:
    """Filters of every layer that can get smaller are left to the vendor's library, as where that is faster."""
    compiled = wsp_compiler.compile(model, 0.5, method="fp", rules=[wsp_compiler.PruneRule(".*")])
    shrunk, plan = compiled.record.shrunk, compiled.plan
    assert shrunk is not None
    smaller = {path for path, (n, _) in shrunk.sizes.items() if path in plan and n < plan[path].shape[1]}
    assert smaller
    sites = {path: replace(entry, winograd=path not in smaller) for path, entry in plan.items()}
    return replace(plan, sites=sites)


def test_kept_filters_may_run_as_the_vendors_convolutions() -> None:
    model, x = randomised(Residual()), torch.randn(2, 3, 15, 18)
    plan = vendor_plan(model, x)
    compiled = wsp_compiler.compile(
        model, plan=PruningPlan.from_json(plan.to_json()), example_inputs=(x,), check=True
    )
    assert compiled.plan == plan
    assert [layer.path for layer in compiled.layers()] == ["out"]
    with torch.no_grad():
        for actual, expected in zip(compiled(x), without_filters(model, plan)(x.double()), strict=True):
            assert_close(actual, expected, 1e-5)
    row = next(line for line in compiled.report().splitlines() if line.startswith("a "))
    assert "3x5 (of 6x10)" in row
    assert "vendor" in row
    assert "1 of 5 convolutions run as Winograd" in compiled.report()


def test_calibration_refits_them_as_3x3_filters() -> None:
    model, x = randomised(Residual()), torch.randn(2, 3, 15, 18)
    plan, data = vendor_plan(model, x), torch.randn(16, 3, 15, 18)
    raw = wsp_compiler.compile(model, plan=plan)
    fitted = wsp_compiler.compile(model, plan=plan, calibration=data)
    assert set(fitted.plan.refits) == set(plan)
    assert convolutions(fitted.graph_module)["a"].weight.shape == (3, 5, 3, 3)  # type: ignore[arg-type]
    with torch.no_grad():
        dense = model(x)
        errors = [
            sum(float((a - b).norm()) for a, b in zip(compiled.graph_module(x), dense, strict=True))
            for compiled in (fitted, raw)
        ]
    assert errors[0] < 0.9 * errors[1]
    again = wsp_compiler.compile(model, plan=fitted.plan)
    with torch.no_grad():
        assert all(
            torch.equal(a, b) for a, b in zip(again.graph_module(x), fitted.graph_module(x), strict=True)
        )


def test_a_trained_model_shrinks_too() -> None:
    model, x = randomised(Dense(growth=20)), torch.randn(2, 3, 15, 18)
    rules = [wsp_compiler.PruneRule("grows.*")]
    pruned = wsp_compiler.prune(model, 0.5, method="fp", rules=rules)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        expected = copy.deepcopy(pruned).double()(x.double())
        compiled = wsp_compiler.compile(pruned)
        assert_close(compiled.graph_module(x), expected, 1e-5)
    assert compiled.record.shrunk is not None
    assert {"grows.0", "squeezes.1"} <= set(compiled.record.shrunk.sizes)


def test_tied_filters_stay_tied_through_calibration() -> None:
    model, x = randomised(Residual()), torch.randn(2, 3, 15, 18)
    rules = [wsp_compiler.PruneRule(".*")]
    compiled = wsp_compiler.compile(
        model, 0.5, method="fp", rules=rules, calibration=torch.randn(8, 3, 15, 18), pr_scope="layer"
    )
    plan = compiled.plan
    assert torch.equal(plan["stem"].keep, plan["b"].keep)
    assert torch.equal(plan["c"].keep, plan["b"].keep)
    assert set(plan.refits) == set(plan)
    assert compiled.record.shrunk is not None
    assert compiled.record.shrunk.sizes["c"] == (5, 5)
    trained = copy.deepcopy(wsp_compiler.prune(model, plan=plan)).double()  # the same weights, in full
    exact = copy.deepcopy(compiled.graph_module).double()
    with torch.no_grad():
        for actual, expected in zip(exact(x.double()), trained(x.double()), strict=True):
            assert relative_error(actual, expected) < 2e-6
