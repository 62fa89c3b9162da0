"""Every pruning pattern through one interface: compiled with generated kernels, against float64 arithmetic."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wsp_compiler
from tests.reference import assert_close, assert_untouched, pruned_convolution, randomise, snapshot
from wsp_compiler import PruneRule
from wsp_compiler.plan import PruningPlan

PATTERNS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    "FP": {"method": "fp"},
    "WWP": {"method": "wwp"},
    "WSP-R": {"method": "wsp"},
    "WSP-C": {"method": "wsp", "direction": "column"},
    "BWSP-R": {"method": "bwsp"},
    "BWSP-C": {"method": "bwsp", "direction": "column"},
    "BWSP-R/5": {"method": "bwsp", "block": 5},
}
TOLERANCE = {2: 1e-5, 4: 1e-4}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """One intra-op thread: these layers are too small for two. Undone by the fixture for all tests."""
    torch.set_num_threads(1)


class Net(nn.Module):
    """Odd sizes, batch norm, and a head that averages. Equal layers share kernels, which take long to build."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, stride=2)
        self.a, self.a_norm = nn.Conv2d(20, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20)
        self.b = nn.Conv2d(20, 20, 3, padding=1)
        self.c = nn.Conv2d(20, 20, 3, padding=1)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a_norm(self.a(F.relu(self.stem(x)))))
        return self.head(F.relu(self.c(F.relu(self.b(y)))).mean((2, 3)))


def net() -> nn.Module:
    return randomise(Net(), torch.randn(4, 3, 21, 27))


def in_float64(model: nn.Module, plan: PruningPlan, x: Tensor) -> Tensor:
    """The model with every planned convolution computed from its kept Winograd weights, in float64."""
    exact = copy.deepcopy(model).double()
    for path, entry in plan.items():
        layer: Any = exact.get_submodule(path)
        layer.forward = lambda x, layer=layer, entry=entry: pruned_convolution(
            x, layer, entry.keep, entry.tile
        )
    with torch.no_grad():
        return exact(x.double())


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("name", PATTERNS)
def test_one_pattern_for_all_layers(name: str, tile: int) -> None:
    """Kernels for F(2x2), the lowered graph for both: kernels take long to build, and have tests of their own."""
    model, x = net(), torch.randn(2, 3, 21, 27)
    before = snapshot(model)
    example = (x,) if tile == 2 else None
    compiled = wsp_compiler.compile(model, 0.5, example_inputs=example, tile=tile, **PATTERNS[name])
    plan = compiled.plan
    assert {entry.pattern for entry in plan.values()} == {name}
    assert list(plan) == ["a", "b", "c"]
    expected = in_float64(model, plan, x)
    if example is not None:
        assert_close(compiled(x), expected, TOLERANCE[tile])
    again = wsp_compiler.compile(model, plan=PruningPlan.from_json(plan.to_json()))
    assert_close(again.graph_module(x).detach(), expected, TOLERANCE[tile])
    assert_untouched(model, before)


MIXTURE = (
    PruneRule("a", method="fp", pr=0.4, tile=4),
    PruneRule("b", method="wwp", pr=0.7),
    PruneRule("c", method="wsp", direction="column", pr=0.3, tile=4),
)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_a_pattern_for_each_layer(order: tuple[int, ...]) -> None:
    """Filters leave the network, and what reads their channels may be pruned in any way."""
    model, x = net(), torch.randn(2, 3, 21, 27)
    rules = [
        PruneRule(path, MIXTURE[i].method, MIXTURE[i].direction, MIXTURE[i].pr, MIXTURE[i].tile)
        for path, i in zip("abc", order, strict=True)
    ]
    compiled = wsp_compiler.compile(model, rules=rules)
    assert [entry.method for entry in compiled.plan.values()] == [rule.method for rule in rules]
    expected = in_float64(model, compiled.plan, x)
    assert_close(compiled.graph_module(x).detach(), expected, 1e-4)
    exact = copy.deepcopy(compiled.graph_module).double()(x.double()).detach()
    assert_close(exact, expected, 1e-6)


def test_the_report_names_what_runs() -> None:
    model, x = net(), torch.randn(1, 3, 21, 27)
    compiled = wsp_compiler.compile(model, rules=MIXTURE, example_inputs=(x,), check=True)
    assert_close(compiled(x), in_float64(model, compiled.plan, x), 1e-4)
    text = compiled.report()
    a, b, c = (next(line for line in text.splitlines() if line.startswith(f"{path} ")) for path in "abc")
    assert "12x20 (of 20x20)" in a
    assert " FP " in a
    assert "20x12 (of 20x20)" in b
    assert "WWP" in b
    assert "csr-mkl" in b
    assert "WSP-C" in c
    assert "2 convolutions are smaller" in text
    assert "1 layers run as sparse matrices of single weights (WWP), of which no times are recorded" in text


@pytest.mark.parametrize("name", ["FP", "WWP", "WSP-R"])
@pytest.mark.parametrize("importance", ["output", "l2", "l1", "fpgm"])
def test_calibrated_with_every_criterion(name: str, importance: str) -> None:
    model, x = net(), torch.randn(2, 3, 21, 27)
    data = torch.randn(6, 3, 21, 27)
    options: dict[str, Any] = {"importance": importance, "pr_scope": "layer", **PATTERNS[name]}
    fitted = wsp_compiler.compile(model, 0.5, calibration=data, **options)
    raw = wsp_compiler.compile(model, 0.5, **options)
    assert set(fitted.plan.refits) == {"a", "b", "c"}
    with torch.no_grad():
        dense = model(x)
        errors = [float((compiled.graph_module(x) - dense).norm()) for compiled in (fitted, raw)]
    assert errors[0] < errors[1]
    trained = wsp_compiler.prune(model, plan=fitted.plan)
    with torch.no_grad():
        assert_close(trained(x), fitted.graph_module(x), 1e-4)


@pytest.mark.parametrize("name", ["FP", "WWP"])
def test_trained_then_compiled(name: str) -> None:
    """Gradients of pruned elements are zero; compile keeps what was trained."""
    model, x = net(), torch.randn(3, 3, 21, 27)
    pruned = wsp_compiler.prune(model, 0.6, **PATTERNS[name])
    optimizer = torch.optim.SGD(pruned.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        pruned(x).square().sum().backward()
        optimizer.step()
    layer: Any = pruned.get_submodule("b")
    keep = layer.keep.expand(layer.weight.shape)
    assert not layer.weight.grad[~keep].any()
    compiled = wsp_compiler.compile(pruned, example_inputs=(x,))
    assert compiled.plan["b"].method == PATTERNS[name]["method"]
    with torch.no_grad():
        assert_close(compiled(x), copy.deepcopy(pruned).double()(x.double()), 1e-5)
        assert_close(compiled.graph_module(x), compiled(x), 1e-5)
    assert compiled.plan["b"].pattern == name
