"""merge_stages: the three stages of a layer become one call, unless something comes between."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tests.graphs import Lowering, conv, lowering, randomise_norms
from wsp_compiler.passes import MergeStages
from wsp_compiler.passes.base import (
    INPUT_TRANSFORM,
    OUTPUT_TRANSFORM,
    SPARSE_BGEMM,
    WINOGRAD_CONV2D,
    arguments,
    is_op,
    set_argument,
)

X = torch.randn(2, 4, 6, 7)


def lowered(model: nn.Module, **options: Any) -> Lowering:
    return lowering(model, **options).through("fuse_epilogue")


def stage(case: Lowering, op: Any) -> fx.Node:
    return next(node for node in case.gm.graph.nodes if is_op(node, op))


def test_before_and_after() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.Sigmoid(), conv(4, 5))
    case = lowered(randomise_norms(model))
    stages = ["input_transform", "sparse_bgemm", "output_transform"]
    assert case.calls == [*stages, "Sigmoid", *stages]
    rewrites = case.run(MergeStages())
    assert (rewrites.count, rewrites.declined) == (2, ())
    assert case.calls == ["winograd_conv2d", "Sigmoid", "winograd_conv2d"]
    case.assert_equals_model(X)
    assert case.run(MergeStages()).count == 0


def test_every_argument_is_carried_over() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(4, 4, 3, padding=(0, 2)), nn.PReLU(4, init=-0.4)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(x) + x[:, :, 2:, :1])

    case = lowered(Block(), tile=4, method="dense")
    before = arguments(stage(case, OUTPUT_TRANSFORM))
    case.run(MergeStages())
    merged = arguments(next(node for node in case.gm.graph.nodes if is_op(node, WINOGRAD_CONV2D)))
    assert {name: merged[name] for name in before if name != "M"} == {
        name: value for name, value in before.items() if name != "M"
    }
    case.assert_equals_model(X)


class Between(nn.Module):
    """relu(conv(x) + skip), with ``function(net, x)`` called after the convolution and before the add."""

    def __init__(self, function: Callable[..., Any], **children: Any) -> None:
        super().__init__()
        self.conv = conv()
        for name, child in children.items():
            setattr(self, name, child)
        self.__dict__["function"] = function

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.conv(x)
        skip = self.function(self, x)
        return torch.relu(y + (x if skip is None else skip))


@torch.fx.wrap
def somebodys_function(x: Tensor) -> Tensor:
    return x.mul_(2)


def somebodys_module() -> nn.Module:
    class Doubling(nn.Module):
        __module__ = "somebody.layers"

        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    return Doubling()


def hooked_relu() -> nn.Module:
    relu = nn.ReLU()
    relu.register_forward_hook(lambda module, args, output: args[0].mul_(2))
    return relu


WRITES: dict[str, Callable[..., Any]] = {
    "method": lambda net, x: x.mul_(2),
    "torch function": lambda net, x: torch.relu_(x),
    "functional": lambda net, x: F.relu_(x),
    "inplace by name": lambda net, x: F.relu(x, inplace=True),
    "out": lambda net, x: torch.mul(x, 2, out=x),
    "module": lambda net, x: net.act(x),
    "module with a hook": lambda net, x: net.hooked(x),
    "aten operator": lambda net, x: torch.ops.aten.relu_.default(x),
    "unknown function": lambda net, x: somebodys_function(x),
}


def assert_does_not_fire(case: Lowering) -> None:
    calls = case.calls
    rewrites = case.run(MergeStages())
    assert rewrites.count == 0
    ((_, reason),) = rewrites.declined
    assert reason.startswith("the in-place operation ")
    assert reason.endswith(" comes between its stages")
    assert case.calls == calls


@pytest.mark.parametrize("name", sorted(WRITES))
@pytest.mark.parametrize("used", [False, True])
def test_does_not_fire_across_a_write(name: str, used: bool) -> None:
    def function(net: Any, x: Tensor) -> Tensor:
        y = WRITES[name](net, x)
        return torch.sigmoid(y) if used else x

    case = lowered(Between(function, act=nn.ReLU(inplace=True), hooked=hooked_relu()))
    assert_does_not_fire(case)
    case.assert_equals_model(X)


@pytest.mark.parametrize(
    ("target", "value"),
    [
        (operator.iadd, 3.0),
        (operator.imul, 2.0),
        (operator.ipow, 2.0),
        (operator.setitem, 0),
        (operator.iand, 1),
    ],
)
def test_does_not_fire_across_an_operator_that_writes(target: Any, value: float) -> None:
    """torch.fx records x += 1 as an addition; other front ends do not."""
    case = lowered(Between(lambda net, x: None))
    output = stage(case, OUTPUT_TRANSFORM)
    x = arguments(output)["x"]
    with case.gm.graph.inserting_before(output):
        case.gm.graph.call_function(target, (x, value) if target is not operator.setitem else (x, value, 2.0))
    assert_does_not_fire(case)


READS: dict[str, Callable[..., Any]] = {
    "method": lambda net, x: x.mul(2),
    "operator": lambda net, x: x * 2 + x.shape[0],
    "functional": lambda net, x: F.relu(F.max_pool2d(x, 3, 1, 1), False),
    "dropout": lambda net, x: F.dropout(x, 0.5, False),
    "module": lambda net, x: net.act(x),
    "lowered convolution": lambda net, x: net.other(x),
    "aten operator": lambda net, x: torch.ops.aten.relu.default(x),
}


@pytest.mark.parametrize("name", sorted(READS))
def test_fires_across_what_only_reads(name: str) -> None:
    case = lowered(Between(READS[name], act=nn.ReLU(), other=conv()))
    rewrites = case.run(MergeStages())
    assert rewrites.declined == ()
    assert "winograd_conv2d" in case.calls
    case.assert_equals_model(X)


@pytest.mark.parametrize("inplace", [False, True])
def test_inplace_given_by_position(inplace: bool) -> None:
    """torch.fx records it by name; a pass may not."""
    case = lowered(Between(lambda net, x: None))
    output = stage(case, OUTPUT_TRANSFORM)
    with case.gm.graph.inserting_before(output):
        case.gm.graph.call_function(F.leaky_relu, (arguments(output)["x"], 0.1, inplace))
    if inplace:
        assert_does_not_fire(case)
    else:
        assert case.run(MergeStages()).count == 1


def test_a_module_that_is_not_pytorchs_may_write() -> None:
    case = lowered(Between(lambda net, x: net.act(x), act=nn.ReLU()))
    call = next(node for node in case.gm.graph.nodes if node.op == "call_module")
    case.gm.add_submodule("act", somebodys_module())
    assert call.target == "act"
    ((_, reason),) = case.run(MergeStages()).declined
    assert reason == "the in-place operation act comes between its stages"


def test_an_in_place_operation_outside_the_chain_does_not_matter() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            x.mul_(2)
            y = self.conv(x)
            x.mul_(2)
            return y * x

    case = lowered(Around())
    assert case.run(MergeStages()).count == 1
    case.assert_equals_model(X)


def _rewire(case: Lowering, kind: str) -> str:
    """Edit the stages as a custom pass might; the reason expected."""
    V, M, y = (stage(case, op) for op in (INPUT_TRANSFORM, SPARSE_BGEMM, OUTPUT_TRANSFORM))
    x, graph = arguments(V)["x"], case.gm.graph
    if kind == "another M":
        with graph.inserting_before(y):
            set_argument(y, "M", graph.call_function(torch.neg, (M,)))
        return "its stages are not directly connected"
    if kind == "another V":
        with graph.inserting_before(M):
            set_argument(M, "V", graph.call_function(torch.neg, (V,)))
        return "its stages are not directly connected"
    if kind == "another input":
        with graph.inserting_before(V):
            set_argument(V, "x", graph.call_function(torch.neg, (x,)))
        return "its first and last stage differ in input, padding or tile"
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = ((y, V if kind == "V is read" else M),)
    return "V or M has other users"


@pytest.mark.parametrize("kind", ["another M", "another V", "another input", "V is read", "M is read"])
def test_does_not_fire_on_other_connections(kind: str) -> None:
    case = lowered(nn.Sequential(conv()))
    reason = _rewire(case, kind)
    rewrites = case.run(MergeStages())
    assert rewrites.count == 0
    assert [why for _, why in rewrites.declined] == [reason]
