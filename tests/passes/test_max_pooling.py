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
from wsp_compiler.passes.max_pooling import epilogue_behind, max_pool_behind


class Stem(nn.Module):
    """ReLU(conv + bias), pooled in one of several ways."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 8, 7, stride=2, padding=3), pool
        self.after = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.pool(torch.relu(self.conv(x))))


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
    y, bias = (3 * torch.randn(2, 8, 13, 17)).to(dtype), torch.randn(8).to(dtype)
    y[0, 1, 3, 4], y[1, 2, 5, 5], y[1, 0, 0, 0] = float("nan"), float("inf"), float("-inf")
    graph = fx.Graph()
    pool = graph.call_function(F.max_pool2d, (graph.placeholder("y"), 3, 2, 1))
    graph.output(pool)
    gm = fx.GraphModule({}, graph)
    gm.register_buffer("bias", bias)
    epilogue_behind(next(node for node in gm.graph.nodes if node.target is F.max_pool2d), "bias", relu=True)
    gm.recompile()
    expected = F.max_pool2d(torch.relu(y + bias.view(-1, 1, 1)), 3, 2, 1)
    assert torch.equal(gm(y).nan_to_num(-1), expected.nan_to_num(-1))
    assert torch.equal(gm(y).isnan(), expected.isnan())
    assert bool(expected.isnan().any())


class Twice(Stem):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        return self.after(self.pool(y)) + y.mean()


class Indices(Stem):
    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.max_pool2d(torch.relu(self.conv(x)), 2, return_indices=True)[0])


OTHERS = [Twice(nn.MaxPool2d(2)), Indices(None), Stem(nn.AvgPool2d(2)), Stem(nn.AdaptiveMaxPool2d(4))]


@pytest.mark.parametrize("model", OTHERS)
def test_what_else_reads_the_values_keeps_them(model: nn.Module) -> None:
    names = called(rest_of(randomise(model, torch.randn(1, 3, 20, 20))))
    assert names[names.index("conv2d") + 1] == "relu"


def test_a_pooling_with_hooks_stays() -> None:
    pool = nn.MaxPool2d(2)
    model = nn.Sequential(nn.ReLU(), pool)
    gm = fx.symbolic_trace(model)
    relu = next(node for node in gm.graph.nodes if node.target == "0")
    assert max_pool_behind(gm, relu) is not None
    gm.get_submodule("1").register_forward_hook(lambda *_: None)
    assert max_pool_behind(gm, relu) is None
