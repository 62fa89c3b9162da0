"""fuse_epilogue: residual add and activation move into the output transform, and nothing else does."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graphs import Lowering, conv, lowering, randomise_norms
from wsp_compiler.passes import FuseEpilogue
from wsp_compiler.passes.base import OUTPUT_TRANSFORM, arguments, is_op

STAGES = ["input_transform", "sparse_bgemm", "output_transform"]
X = torch.linspace(-8, 8, 2 * 4 * 5 * 7).view(2, 4, 5, 7).flip(1) ** 3 / 64


class Net(nn.Module):
    """``function(net, x)`` as a module; net has ``a``, ``b`` (convolutions) and what is given."""

    def __init__(self, function: Callable[..., Tensor], **children: Any) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()
        for name, child in children.items():
            setattr(self, name, child)
        self.__dict__["function"] = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def lowered(model: nn.Module) -> Lowering:
    return lowering(model).through("fold_batch_norm")


def fused(case: Lowering) -> list[tuple[bool, str]]:
    """(has a residual, activation) of every output transform."""
    found = [arguments(node) for node in case.gm.graph.nodes if is_op(node, OUTPUT_TRANSFORM)]
    return [(given["residual"] is not None, given["activation"]) for given in found]


def slopes(case: Lowering) -> list[Tensor]:
    return [buffer for name, buffer in case.gm.named_buffers() if "slope" in name.rpartition(".")[2]]


ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "nn.ReLU": (lambda net, x: net.act(net.a(x)), "relu"),
    "nn.ReLU in place": (lambda net, x: net.act(net.a(x)), "relu"),
    "nn.ReLU6": (lambda net, x: net.act(net.a(x)), "relu6"),
    "nn.LeakyReLU": (lambda net, x: net.act(net.a(x)), "prelu"),
    "nn.PReLU": (lambda net, x: net.act(net.a(x)), "prelu"),
    "nn.PReLU of channels": (lambda net, x: net.act(net.a(x)), "prelu"),
    "F.relu": (lambda net, x: F.relu(net.a(x)), "relu"),
    "F.relu by name": (lambda net, x: F.relu(input=net.a(x)), "relu"),
    "F.relu in place": (lambda net, x: F.relu(net.a(x), True), "relu"),
    "F.relu_": (lambda net, x: F.relu_(net.a(x)), "relu"),
    "torch.relu": (lambda net, x: torch.relu(net.a(x)), "relu"),
    "torch.relu_": (lambda net, x: torch.relu_(net.a(x)), "relu"),
    ".relu": (lambda net, x: net.a(x).relu(), "relu"),
    ".relu_": (lambda net, x: net.a(x).relu_(), "relu"),
    "F.relu6": (lambda net, x: F.relu6(net.a(x)), "relu6"),
    "F.relu6 in place": (lambda net, x: F.relu6(net.a(x), inplace=True), "relu6"),
    "F.leaky_relu": (lambda net, x: F.leaky_relu(net.a(x)), "prelu"),
    "F.leaky_relu slope": (lambda net, x: F.leaky_relu(net.a(x), 0.3), "prelu"),
    "F.leaky_relu slope by name": (lambda net, x: F.leaky_relu(net.a(x), negative_slope=0.3), "prelu"),
    "F.leaky_relu_": (lambda net, x: F.leaky_relu_(net.a(x), 0.2), "prelu"),
    "F.prelu": (lambda net, x: F.prelu(net.a(x), net.weight), "prelu"),
    "F.prelu by name": (lambda net, x: F.prelu(net.a(x), weight=net.act.weight), "prelu"),
    ".prelu": (lambda net, x: net.a(x).prelu(net.weight), "prelu"),
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "nn.ReLU": nn.ReLU,
    "nn.ReLU in place": lambda: nn.ReLU(inplace=True),
    "nn.ReLU6": nn.ReLU6,
    "nn.LeakyReLU": lambda: nn.LeakyReLU(0.4),
    "nn.PReLU of channels": lambda: nn.PReLU(4, init=-0.7),
}


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(name: str) -> None:
    function, activation = ACTIVATIONS[name]
    act = MODULES.get(name, lambda: nn.PReLU(init=0.3))()
    case = lowered(Net(function, act=act, weight=nn.Parameter(torch.rand(4))))
    before = case.calls
    rewrites = case.run(FuseEpilogue())
    assert (rewrites.count, rewrites.declined) == (1, ())
    assert len(before) == 4
    assert case.calls == STAGES
    assert fused(case) == [(False, activation)]
    assert len(slopes(case)) == (activation == "prelu")
    case.assert_equals_model(X)
    assert case.run(FuseEpilogue()).count == 0


ADDS: dict[str, Callable[..., Tensor]] = {
    "y + r": lambda net, x: net.a(x) + x,
    "r + y": lambda net, x: x + net.a(x),
    "torch.add": lambda net, x: torch.add(net.a(x), x),
    "torch.add(r, y)": lambda net, x: torch.add(x, net.a(x)),
    ".add": lambda net, x: net.a(x).add(x),
    ".add_": lambda net, x: net.a(x).add_(x),
    "r.add(y)": lambda net, x: x.add(net.a(x)),
    "y + parameter": lambda net, x: net.a(x) + net.weight,
    "y + function": lambda net, x: net.a(x) + torch.sigmoid(x),
    "y + method": lambda net, x: net.a(x) + x.mean((2, 3), keepdim=True),
    "y + module": lambda net, x: net.a(x) + net.act(x),
    "y + part": lambda net, x: net.a(x) + x.chunk(2, 0)[0],
    "y + arithmetic": lambda net, x: net.a(x) + (net.weight * x.shape[0] + 1),
    "y + transposed": lambda net, x: net.a(x) + net.weight.mT,
}


@pytest.mark.parametrize("name", sorted(ADDS))
def test_residual_adds(name: str) -> None:
    case = lowered(Net(ADDS[name], weight=nn.Parameter(torch.randn(4, 1, 1)), act=nn.Sigmoid()))
    rewrites = case.run(FuseEpilogue())
    assert (rewrites.count, rewrites.declined) == (
        1,
        (("output_transform_default_1", "output is no add or activation that can be fused"),),
    )
    assert fused(case) == [(True, "none")]
    assert not {"add", "iadd", ".add", ".add_"} & set(case.calls[-1:])
    case.assert_equals_model(X[:, :, :, :5] if name == "y + transposed" else X)


@pytest.mark.parametrize("left", [True, False])
def test_in_place_operators(left: bool) -> None:
    """torch.fx records x += y as x + y; other front ends do not."""
    case = lowered(Net(lambda net, x: net.a(x) + x if left else x + net.a(x)))
    add = next(node for node in case.gm.graph.nodes if node.target is operator.add)
    add.target = operator.iadd
    rewrites = case.run(FuseEpilogue())
    assert rewrites.count == left
    if left:
        case.assert_equals_model(X)
    else:
        assert [why for _, why in rewrites.declined] == ["the add writes into the other operand"]


def test_residual_and_activation() -> None:
    case = lowered(Net(lambda net, x: F.relu(net.a(x) + x)))
    assert case.run(FuseEpilogue()).count == 2
    assert case.calls == STAGES
    assert fused(case) == [(True, "relu")]
    case.assert_equals_model(X)


def test_the_activation_comes_before_the_add() -> None:
    case = lowered(Net(lambda net, x: F.relu(net.a(x)) + x))
    assert case.run(FuseEpilogue()).count == 1
    assert case.calls == [*STAGES, "add"]
    case.assert_equals_model(X)


def test_the_residual_comes_from_before_or_after() -> None:
    def before(net: Any, x: Tensor) -> Tensor:
        skip = torch.tanh(x)
        return F.relu(net.a(x) + skip)

    def after(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        skip = torch.tanh(x)
        return F.relu(y + skip)

    for function in (before, after):
        case = lowered(Net(function))
        assert case.run(FuseEpilogue()).count == 2
        assert sorted(case.calls) == sorted([*STAGES, "tanh"])
        case.assert_equals_model(X)


def test_the_residual_is_read_where_the_add_stood() -> None:
    def function(net: Any, x: Tensor) -> Tensor:
        x = x * 1
        y = net.a(x)
        x.mul_(3)  # after the convolution read x, before the add does
        y = y + x
        x.mul_(0)
        return F.relu(y) + x

    case = lowered(Net(function))
    case.run(FuseEpilogue())
    assert fused(case) == [(True, "relu")]
    case.assert_equals_model(X)


def test_two_convolutions_are_added() -> None:
    """Either may take the other as its residual, only one of them does."""
    case = lowered(Net(lambda net, x: F.relu(net.a(x) + net.b(torch.tanh(x)))))
    assert case.run(FuseEpilogue()).count == 2
    assert sorted(fused(case)) == [(False, "none"), (True, "relu")]
    case.assert_equals_model(X)


def test_slopes_of_a_shared_convolution_stay_apart() -> None:
    def function(net: Any, x: Tensor) -> Tensor:
        return F.leaky_relu(net.a(net.first(net.a(net.second(net.a(x))))), 0.5)

    case = lowered(Net(function, first=nn.PReLU(init=-0.1), second=nn.PReLU(4, init=0.9)))
    assert case.run(FuseEpilogue()).count == 3
    assert len(slopes(case)) == 3
    case.assert_equals_model(X)


def test_after_batch_norm() -> None:
    model = randomise_norms(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(inplace=True)))
    case = lowered(model)
    case.run(FuseEpilogue())
    assert fused(case) == [(False, "relu")]
    case.assert_equals_model(X)


class OwnReLU(nn.ReLU):
    __module__ = "torch.nn.custom"  # keeps torch.fx from tracing into it

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, output: output * 2)
    return module


def patched(module: nn.Module) -> nn.Module:
    module.forward = types.MethodType(lambda self, x: x * 2, module)
    return module


def two_users(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    return F.relu(y) * y


def statement(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    F.relu_(y)  # its result is not used, its effect is
    return y


def wrong_side_method(net: Any, x: Tensor) -> Tensor:
    return (x * 1).add_(net.a(x))


def number(net: Any, x: Tensor) -> Tensor:
    return net.a(x) + x.shape[0]


NO_TENSOR = "the other operand is not known to be a second tensor"
OTHER = "is no add or activation that can be fused"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (two_users, "2 users"),
        (statement, "2 users"),
        (lambda net, x: torch.add(net.a(x), x, alpha=2), "the add has keyword arguments"),
        (lambda net, x: net.a(x).add(x, alpha=2), "the add has keyword arguments"),
        (wrong_side_method, "the add writes into the other operand"),
        (lambda net, x: net.a(x) + 1.0, NO_TENSOR),
        (lambda net, x: 1.0 + net.a(x), NO_TENSOR),
        (number, NO_TENSOR),
        (lambda net, x: net.a(x) + x.size()[0], NO_TENSOR),
        (lambda net, x: net.a(x) + x.size(1) * 2, NO_TENSOR),
        (lambda net, x: net.a(x) + x.dim(), NO_TENSOR),
        (lambda net, x: net.a(x) + torch.numel(x), NO_TENSOR),
        (lambda net, x: operator.add(*[net.a(x)] * 2), NO_TENSOR),
        (lambda net, x: net.a(x) + x + torch.tanh(x), "a residual is fused already"),
        (lambda net, x: net.act(net.a(x)), "of the activation: it has forward hooks"),
        (lambda net, x: net.other(net.a(x)), "of the activation: its forward is replaced"),
        (lambda net, x: net.own(net.a(x)), f"own {OTHER}"),
        (lambda net, x: torch.sigmoid(net.a(x)), f"sigmoid {OTHER}"),
        (lambda net, x: net.a(x), f"output {OTHER}"),
        (lambda net, x: net.a(x) - x, f"sub {OTHER}"),
        (lambda net, x: F.prelu(net.a(x), net.weight * 2), "the slope is not a parameter of the model"),
        (lambda net, x: F.leaky_relu(net.a(x), x.shape[0] * 0.1), "the slope is not a constant"),
        (lambda net, x: torch.where(x > 0, x, net.a(x)), f"where {OTHER}"),
    ],
)
def test_does_not_fire(function: Callable[..., Tensor], reason: str) -> None:
    model = Net(
        function,
        act=hooked(nn.ReLU()),
        other=patched(nn.ReLU()),
        own=OwnReLU(),
        weight=nn.Parameter(torch.rand(1)),
    )
    case = lowered(model)
    expected_calls = case.calls
    rewrites = case.run(FuseEpilogue())
    assert [why for _, why in rewrites.declined] == [reason]
    if rewrites.count == 0:
        assert case.calls == expected_calls
    case.assert_equals_model(X)


def test_a_placeholder_that_may_be_a_number_is_left_to_the_add() -> None:
    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: Tensor, offset: float = 0.5) -> Tensor:
            return self.conv(x) + offset

    model = Offset().eval()
    case = lowered(model)
    assert [why for _, why in case.run(FuseEpilogue()).declined] == [NO_TENSOR]
    torch.testing.assert_close(case.gm(X, 2.0), model(X, 2.0), rtol=1e-4, atol=1e-4)


def test_the_statement_keeps_its_effect_through_the_pipeline() -> None:
    case = lowering(Net(statement)).through("assign_layout")
    assert case.calls == ["winograd_conv2d", "relu_"]
    case.assert_equals_model(X)
