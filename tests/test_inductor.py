"""rest="inductor": one graph for torch.compile, the launchers opaque in it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import wsp_compiler
from tests.reference import randomise
from wsp_compiler.errors import WspError
from wsp_compiler.inductor import InductorUnit, input_kind

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        y = torch.relu(self.b(torch.relu(self.a(y))) + y)
        return self.head(y)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 18, 15)


def units(compiled: nn.Module) -> list[InductorUnit]:
    return [module for module in compiled.modules() if isinstance(module, InductorUnit)]


def test_results_shapes_and_strides(x: Tensor) -> None:
    model = randomise(Net(), x)
    compiled = wsp_compiler.compile(model, 0.5, rest="inductor", example_inputs=x)
    for given in (x, torch.randn(1, 3, 9, 24), x.contiguous(memory_format=torch.channels_last)):
        expected = compiled.graph_module(given)
        for _ in range(2):
            actual = compiled(given)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
            assert actual.stride() == expected.stride()
    assert len(list(compiled.layers())) == 2
    assert "winograd_conv2d" in compiled.kernel_source("a")
    clone = copy.deepcopy(compiled)
    del compiled
    torch.testing.assert_close(clone(x), clone.graph_module(x), rtol=1e-4, atol=1e-4)


def test_there_are_no_graph_breaks(x: Tensor) -> None:
    compiled = wsp_compiler.compile(Net().eval(), 0.5, rest="inductor")
    (unit,) = units(compiled)
    dynamo: Any = torch._dynamo
    with torch.no_grad():
        explained = dynamo.explain(unit.graph_module)(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    targets = [str(node.target) for graph in explained.graphs for node in graph.graph.nodes]
    assert sum("winograd_layer" in target for target in targets) == 2


@pytest.mark.slow
def test_resnet18() -> None:
    model = randomise(torchvision.models.resnet18(), torch.randn(4, 3, 64, 64))
    x = torch.randn(2, 3, 64, 64)
    compiled = wsp_compiler.compile(model, 0.8, rest="inductor", example_inputs=x)
    exact = copy.deepcopy(compiled.graph_module).double()(x.double())
    assert float((compiled(x).double() - exact).norm() / exact.norm()) < 1e-5


def test_autocast_is_refused(x: Tensor) -> None:
    compiled = wsp_compiler.compile(Net().eval(), 0.5, rest="inductor")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(WspError, match="autocast"):
        compiled(x)


def test_what_torch_compile_cannot_do_is_said(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = wsp_compiler.compile(Net().eval(), 0.5, rest="inductor")
    dynamo: Any = torch._dynamo

    def refuse(*args: Any) -> Any:
        raise dynamo.exc.Unsupported("something else")

    (unit,) = units(compiled)
    unit._state["call"] = refuse
    with pytest.raises(WspError, match=r"something else[\s\S]*rest='eager'"):
        compiled(x)


def test_kinds_of_input(x: Tensor) -> None:
    assert input_kind((x, 1)) == input_kind((x.clone(), 1))
    others = [(x, 2), (x[:1], 1), (x.contiguous(memory_format=torch.channels_last), 1), (x.double(), 1)]
    assert len({input_kind(args) for args in [(x, 1), *others]}) == 5
