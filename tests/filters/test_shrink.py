"""shrink: the smaller network equals the one whose pruned filters are zero, to the last digits of float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.filters.nets import (
    Chain,
    Dense,
    Grouped,
    Residual,
    convolutions,
    planned,
    randomised,
    without_filters,
)
from tests.reference import assert_untouched, relative_error, snapshot
from wsp_compiler.filters.shrink import VENDOR, Shrunk, shrink, spatial_filters
from wsp_compiler.options import PruneRule
from wsp_compiler.plan import PruningPlan
from wsp_compiler.refits import SiteRefit
from wsp_compiler.trace import TracedModel
from wsp_compiler.verify import PlannedInterpreter
from wsp_compiler.winograd import transform_weight

NETS: dict[str, Any] = {
    "chain": Chain, "residual": Residual, "dense": Dense, "grouped": Grouped,
    "grouped unpadded": lambda: Grouped(padding=0),
}  # fmt: skip


def as_vendor(plan: PruningPlan) -> PruningPlan:
    """The plan with every pruned filter's layer left to the vendor's library."""
    sites = {
        path: replace(entry, winograd=False) if entry.method == "fp" else entry
        for path, entry in plan.items()
    }
    return replace(plan, sites=sites)


def outputs(run: Any, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(run(x)) if isinstance(leaf, Tensor)]


def worst(model: nn.Module, plan: PruningPlan, traced: TracedModel, shrunk: Shrunk) -> float:
    """Largest relative error of the float64 graphs against the network with zero filters."""
    x = torch.randn(2, 3, 15, 18, dtype=torch.float64)
    gm = copy.deepcopy(traced.units[""]).double()
    actual = outputs(PlannedInterpreter(gm, shrunk.plan).run, x)
    expected = outputs(without_filters(model, plan), x)
    return max(relative_error(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("name", NETS)
def test_as_vendor_convolutions_it_is_exact(name: str) -> None:
    model = randomised(NETS[name]().double())
    traced, plan = planned(model.float())
    model = model.double()
    traced, plan = planned_double(model, plan)
    before = snapshot(model)
    shrunk = shrink(traced.units, as_vendor(plan))
    assert shrunk.sizes
    assert not any(entry.method == "fp" and not entry.winograd for entry in shrunk.plan.values())
    assert worst(model, plan, traced, shrunk) < 1e-12
    assert_untouched(model, before)


def planned_double(model: nn.Module, plan: PruningPlan) -> tuple[TracedModel, PruningPlan]:
    """The same plan on the graphs of a float64 model, which cannot be planned."""
    from wsp_compiler.trace import trace

    return trace(model), plan


@pytest.mark.parametrize("multiple", [1, 2, 5])
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("name", NETS)
def test_as_winograd_it_is_exact_up_to_float32_weights(name: str, tile: int, multiple: int) -> None:
    model = randomised(NETS[name]())
    traced, plan = planned(model, tile=tile)
    shrunk = shrink(traced.units, plan, multiple)
    assert shrunk.sizes or multiple > 1
    assert worst(model, plan, traced, shrunk) < 2e-6


@pytest.mark.parametrize("refitted", [False, True])
def test_channels_that_stay_for_kernels_emit_their_constants(refitted: bool) -> None:
    model = randomised(Chain())
    traced, plan = planned(model)
    plan = with_refits(model, plan) if refitted else plan
    original = copy.deepcopy(traced.units[""]).double()
    sizes = [shrink(copy.deepcopy(traced.units), plan, multiple).sizes["body.3"] for multiple in (1, 6)]
    assert sizes[0] in ((4, 4), (5, 4))  # with a carrier
    assert sizes[1] == (6, 6)
    shrunk = shrink(traced.units, plan, 6)
    x = torch.randn(2, 3, 15, 18, dtype=torch.float64)
    (expected,) = outputs(PlannedInterpreter(original, plan).run, x)
    (actual,) = outputs(PlannedInterpreter(copy.deepcopy(traced.units[""]).double(), shrunk.plan).run, x)
    assert relative_error(actual, expected) < 2e-6


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize(
    ("method", "direction"),
    [("wsp", "row"), ("wsp", "column"), ("wwp", "row"), ("bwsp", "column"), ("dense", "row")],
)
@pytest.mark.parametrize("refitted", [False, True])
def test_readers_under_every_pattern(method: str, direction: str, tile: int, refitted: bool) -> None:
    """Also where their weights are stored as Winograd weights, and where they read without padding."""
    model = randomised(Chain())
    rules = (
        PruneRule(r"body\.[36]", method=method, direction=direction, tile=tile),
        PruneRule(r"body\.9", method="fp", pr=0.6),
    )
    traced, plan = planned(model, *rules, importance="l2")
    if refitted:
        plan = with_refits(model, plan)
    original = copy.deepcopy(traced.units[""]).double()
    shrunk = shrink(traced.units, plan)
    assert shrunk.sizes == {"body.0": (4, 3), "body.3": (8, 4), "body.9": (5, 8)}
    x = torch.randn(2, 3, 15, 18, dtype=torch.float64)
    (expected,) = outputs(PlannedInterpreter(original, plan).run, x)
    (actual,) = outputs(PlannedInterpreter(copy.deepcopy(traced.units[""]).double(), shrunk.plan).run, x)
    assert relative_error(actual, expected) < 2e-6


def with_refits(model: nn.Module, plan: PruningPlan) -> PruningPlan:
    """Every planned layer with Winograd weights that no 3x3 filter has, and biases of its own."""
    refits: dict[str, SiteRefit] = {}
    for path, entry in plan.items():
        U = transform_weight(model.get_submodule(path).weight, entry.tile)  # type: ignore[arg-type]
        U = (U * (1 + 0.3 * torch.randn_like(U))).float()
        refits[path] = SiteRefit.pack(U, torch.randn(entry.shape[1]), entry.keep)
    return replace(plan, refits=refits)


@pytest.mark.parametrize("tile", [2, 4])
def test_refitted_filters_as_vendor_convolutions(tile: int) -> None:
    model = randomised(Chain())
    traced, plan = planned(model, tile=tile)
    changed = copy.deepcopy(model)
    refits: dict[str, SiteRefit] = {}
    for path, entry in plan.items():
        layer: Any = changed.get_submodule(path)
        with torch.no_grad():
            layer.weight.mul_(1 + 0.3 * torch.randn_like(layer.weight))
            layer.bias = nn.Parameter(torch.randn(entry.shape[1]))
        refits[path] = SiteRefit.pack(transform_weight(layer.weight, tile), layer.bias, entry.keep)
    shrunk = shrink(traced.units, as_vendor(replace(plan, refits=refits)))
    assert not shrunk.plan.sites
    assert not shrunk.plan.refits
    assert set(shrunk.plan.left_alone.values()) >= {VENDOR}
    assert worst(changed, plan, traced, shrunk) < 2e-6


def test_spatial_filters_invert_the_transform() -> None:
    weight = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    for tile in (2, 4):
        torch.testing.assert_close(spatial_filters(transform_weight(weight, tile), tile), weight)


def test_without_filters_nothing_changes() -> None:
    model = randomised(Chain())
    traced, plan = planned(model, method="wsp")
    modules = dict(traced.units[""].named_modules())
    assert shrink(traced.units, plan).plan is plan
    assert dict(traced.units[""].named_modules()) == modules


def test_memory_formats_and_dtypes_stay() -> None:
    model = randomised(Residual()).to(torch.float16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    traced, plan = planned(model)
    shrink(traced.units, as_vendor(plan))
    a = convolutions(traced.units[""])["a"]
    assert a.weight.dtype == torch.float16
    assert a.weight.is_contiguous(memory_format=torch.channels_last)
    assert a.weight.shape == (3, 5, 3, 3)


def test_filters_that_cannot_be_followed_run_as_winograd() -> None:
    """A plan that leaves them to the vendor is for a graph where they leave."""
    layer = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(layer, nn.ReLU(), layer).eval()
    traced, plan = planned(model)
    shrunk = shrink(traced.units, as_vendor(plan))
    assert not shrunk.sizes
    assert shrunk.plan["0"].winograd
