"""Bias and ReLU behind max pooling: the same values, bit by bit, and only where nothing else reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import wsp_compiler
from tests.reference import randomise
from wsp_compiler.inductor import InductorUnit
from wsp_compiler.passes.base import CONV2D
from wsp_compiler.passes.sink_epilogue import SinkEpilogue
from wsp_compiler.plan import PruningPlan


class Stem(nn.Module):
    """ReLU(conv + bias), pooled in one of several ways."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 8, 7, stride=2, padding=3), pool
        self.after = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.pool(torch.relu(self.conv(x))))


def count(model: nn.Module) -> int:
    """Rewrites of the pass."""
    records = wsp_compiler.compile(model, 0.5, rest="inductor").record.passes
    return next(record.rewrites.count for record in records if record.name == "sink_epilogue")


POOLS = {
    "module": nn.MaxPool2d(3, 2, 1),
    "ceil": nn.MaxPool2d(3, 2, ceil_mode=True),
    "function": lambda y: F.max_pool2d(y, 2),
    "torch": lambda y: torch.max_pool2d(y, 3, 2),
}


def called(gm: nn.Module) -> list[str]:
    """Names of functions and modules in the order of their calls."""
    assert isinstance(gm, fx.GraphModule)
    names = {nn.MaxPool2d: "pool", nn.AvgPool2d: "average"}
    return [
        names.get(type(gm.get_submodule(str(n.target))), str(n.target)) if n.op == "call_module" else
        getattr(n.target, "__name__", str(n.target)) for n in gm.graph.nodes if n.op.startswith("call_")
    ]  # fmt: skip


def rest_of(model: nn.Module) -> fx.GraphModule:
    compiled = wsp_compiler.compile(model, 0.5, rest="inductor")
    (unit,) = (module for module in compiled.modules() if isinstance(module, InductorUnit))
    return unit.graph_module


@pytest.mark.parametrize("kind", POOLS)
def test_bias_and_relu_come_after_the_pooling(kind: str) -> None:
    x = torch.randn(2, 3, 29, 22)
    model = randomise(Stem(POOLS[kind]), x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gm = rest_of(model)
    names = called(gm)
    assert names.index("relu") > names.index("conv2d") + 1
    assert names.count("relu") == 1
    with torch.no_grad():
        torch.testing.assert_close(gm(x), model(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_are_the_same_bit_by_bit(dtype: torch.dtype) -> None:
    """An identity as convolution: NaN and infinities arrive at the pooling."""
    x, bias = (3 * torch.randn(2, 8, 13, 17)).to(dtype), torch.randn(8).to(dtype)
    x[0, 1, 3, 4], x[1, 2, 5, 5], x[1, 0, 0, 0] = float("nan"), float("inf"), float("-inf")
    root, graph = nn.Module(), fx.Graph()
    root.register_buffer("weight", torch.ones(8, 1, 1, 1, dtype=dtype))
    root.register_buffer("bias", bias)
    given = graph.placeholder("x")
    parameters = (graph.get_attr("weight"), graph.get_attr("bias"), None)
    conv = graph.call_function(CONV2D, (given, *parameters, [1, 1], [0, 0], [1, 1], 8, "relu", False))
    graph.output(graph.call_function(F.max_pool2d, (conv, 3, 2, 1)))
    gm = fx.GraphModule(root, graph)
    expected = gm(x)
    assert SinkEpilogue().run(gm, PruningPlan({})).count == 1
    gm.recompile()
    assert called(gm) == ["conv2d.default", "max_pool2d", "view", "add", "relu"]
    assert torch.equal(gm(x).nan_to_num(-1), expected.nan_to_num(-1))
    assert torch.equal(gm(x).isnan(), expected.isnan())
    assert bool(expected.isnan().any())


class Twice(Stem):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        return self.after(self.pool(y)) + y.mean()


class Indices(Stem):
    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.max_pool2d(torch.relu(self.conv(x)), 2, return_indices=True)[0])


OTHERS = [
    Twice(nn.MaxPool2d(2)), Indices(None), Stem(nn.AvgPool2d(2)), Stem(nn.AdaptiveMaxPool2d(4)),
    Stem(nn.MaxPool2d(3, 2, 1, dilation=2)), Stem(lambda y: F.max_pool2d(y, 3, 2, 1, 2)),
    Stem(lambda y: torch.max_pool2d(y, 3, dilation=(2, 2))),
]  # fmt: skip


@pytest.mark.parametrize("model", OTHERS)
def test_what_else_reads_the_values_keeps_them(model: nn.Module) -> None:
    names = called(rest_of(randomise(model, torch.randn(1, 3, 20, 20))))
    assert names[names.index("conv2d") + 1] == "relu"


def test_a_pooling_with_hooks_stays() -> None:
    model = Stem(nn.MaxPool2d(2)).eval()
    assert count(model) == 1
    model.pool.register_forward_hook(lambda *_: None)
    assert count(model) == 0


class Shortcut(Stem):
    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, torch.ones(8, 3, 1, 1), stride=2)
        return self.after(self.pool(torch.relu(self.conv(x) + y)))


def test_a_residual_stays_before_the_pooling() -> None:
    x = torch.randn(1, 3, 20, 20)
    model = randomise(Shortcut(nn.MaxPool2d(2)), x)
    assert count(model) == 0
    with torch.no_grad():
        torch.testing.assert_close(rest_of(model)(x), model(x))


def test_the_bias_is_no_image() -> None:
    model = Stem(nn.MaxPool2d(2)).eval()
    model.conv, model.after = nn.Conv2d(3, 16, 7, stride=2, padding=3), nn.Conv2d(16, 16, 3, padding=1)
    notes = {}
    for rest in ("eager", "inductor"):
        records = wsp_compiler.compile(model, 0.5, rest=rest).record.passes
        notes[rest] = next(record.rewrites.notes for record in records if record.name == "assign_layout")
    assert notes["inductor"] == notes["eager"]


def test_the_eager_pipeline_leaves_the_epilogue_with_cudnn() -> None:
    compiled = wsp_compiler.compile(Stem(nn.MaxPool2d(2)).eval(), 0.5)
    assert "sink_epilogue" not in [record.name for record in compiled.record.passes]
