"""units: how calls map to placeholders, and how a traced unit stands in for the original module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from wsp_compiler.errors import InputError
from wsp_compiler.units import CallSignature, TracedUnit, has_convolution, make_unit


class Options(nn.Module):
    def forward(
        self, x: Tensor, y: Tensor | None = None, flag: bool = True, mode: str = "a", scale: float = 2.0
    ) -> Tensor:
        return x * scale


def test_arguments_that_steer_control_flow_are_fixed() -> None:
    call = CallSignature.of(Options(), (torch.zeros(1),), {})
    assert call.placeholders == ("x", "scale")
    assert call.fixed == {"y": None, "flag": True, "mode": "a"}


def test_an_example_decides_what_is_fixed() -> None:
    y = torch.zeros(1)
    call = CallSignature.of(Options(), (torch.zeros(1), y), {"mode": "b"})
    assert call.placeholders == ("x", "y", "scale")
    assert call.fixed == {"flag": True, "mode": "b"}


def test_bind_orders_values_and_applies_defaults() -> None:
    x, call = torch.zeros(1), CallSignature.of(Options(), (), {})
    assert call.bind((x,), {}) == (x, 2.0)
    assert call.bind((), {"scale": 3.0, "x": x}) == (x, 3.0)
    assert call.bind((x, None, True, "a", 4.0), {}) == (x, 4.0)


@pytest.mark.parametrize(
    ("name", "value"), [("flag", False), ("mode", "b"), ("y", torch.zeros(2)), ("y", 0), ("mode", None)]
)
def test_another_value_for_a_fixed_argument_is_an_error(name: str, value: Any) -> None:
    call = CallSignature.of(Options(), (), {})
    with pytest.raises(InputError, match=f"argument {name} was fixed to") as caught:
        call.bind((torch.zeros(1),), {name: value})
    assert f"example_inputs that give {name}" in caught.value.fix


def test_a_call_that_does_not_fit_raises_what_the_model_would() -> None:
    call = CallSignature.of(Options(), (), {})
    with pytest.raises(TypeError):
        call.bind((), {})
    with pytest.raises(TypeError):
        call.bind((torch.zeros(1),), {"unknown": 1})


@pytest.mark.parametrize("forward", [lambda self, *images: 0, lambda self, x, **options: 0])
def test_variable_arguments_cannot_be_placeholders(forward: Any) -> None:
    module = type("Variable", (nn.Module,), {"forward": forward})()
    with pytest.raises(TypeError, match="whose arguments a graph cannot name"):
        CallSignature.of(module, (), {})


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.size = 7

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    @property
    def double_size(self) -> int:
        return 2 * self.size

    def part(self, x: Tensor) -> Tensor:
        return self.conv(x)


def unit_of(module: nn.Module, parts: list[str] | None = None) -> TracedUnit:
    calls = [] if parts is None else parts
    graph_module = fx.symbolic_trace(module)
    return make_unit(module, graph_module, CallSignature.of(module, (), {}), lambda: calls.append("part"))


def test_a_unit_runs_its_graph_and_answers_like_the_original() -> None:
    block, x = Block().eval(), torch.randn(1, 3, 4, 4)
    unit = unit_of(block)
    assert torch.equal(unit(x), block(x))
    assert torch.equal(unit(x=x), block(x))
    assert isinstance(unit, Block)
    assert isinstance(unit, TracedUnit)
    assert (unit.size, unit.double_size, unit.training) == (7, 14, False)
    assert unit.conv.weight is block.conv.weight
    with pytest.raises(AttributeError):
        _ = unit.nothing


def test_the_originals_tensors_are_registered_once() -> None:
    unit = unit_of(Block())
    assert sorted(unit.state_dict()) == ["graph_module.conv.bias", "graph_module.conv.weight"]


def test_calls_of_parts_are_noticed() -> None:
    parts: list[str] = []
    block = Block()
    unit, x = unit_of(block, parts), torch.randn(1, 3, 4, 4)
    unit(x)
    _ = unit.conv.weight
    assert parts == []
    assert torch.equal(unit.part(x), block(x))
    assert parts == ["part"]
    assert not block.conv._forward_pre_hooks


def test_a_sequential_can_be_walked_through() -> None:
    parts: list[str] = []
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    unit = unit_of(model, parts)
    assert isinstance(unit, nn.Sequential)
    assert len(unit) == 2
    assert [type(child) for child in unit] == [nn.Conv2d, nn.ReLU]
    assert isinstance(unit[1], nn.ReLU)
    unit[1](torch.zeros(1))
    assert parts == []
    unit[0](torch.zeros(1, 3, 2, 2))
    assert parts == ["part"]


def test_a_unit_that_is_no_container_is_true() -> None:
    assert unit_of(Block())
    assert not hasattr(type(unit_of(Block())), "__len__")


def test_a_unit_can_be_copied() -> None:
    block, x = Block().eval(), torch.randn(1, 3, 4, 4)
    unit = copy.deepcopy(unit_of(block))
    assert torch.equal(unit(x), block(x))
    assert isinstance(unit, Block)
    assert unit.graph_module.conv.weight is not block.conv.weight
    assert unit.conv.weight is unit.graph_module.conv.weight
    with torch.no_grad():
        unit.graph_module.conv.weight.zero_()
    assert not torch.equal(unit(x), block(x))


def test_a_graph_module_can_be_the_original() -> None:
    graph_module, x = fx.symbolic_trace(Block().eval()), torch.randn(1, 3, 4, 4)
    unit = unit_of(graph_module)
    assert torch.equal(unit(x), graph_module(x))
    assert torch.equal(copy.deepcopy(unit)(x), graph_module(x))


def test_has_convolution() -> None:
    assert has_convolution(nn.Conv2d(1, 1, 1))
    assert has_convolution(nn.Sequential(nn.Sequential(nn.Conv2d(1, 1, 1))))
    assert not has_convolution(nn.Sequential(nn.Conv1d(1, 1, 1), nn.ReLU()))
