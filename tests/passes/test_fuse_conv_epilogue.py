"""fuse_conv_epilogue: convolutions left to the vendor take their residual add and ReLU, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.graphs import Lowering, lowering
from wsp_compiler.passes.base import CONV2D, arguments, is_op
from wsp_compiler.passes.fuse_conv_epilogue import FuseConvEpilogue

X = torch.linspace(-4, 4, 2 * 4 * 6 * 7).view(2, 4, 6, 7).flip(1)


class Net(nn.Module):
    """``function(net, x)``; the 1x1 convolutions ``a`` and ``b`` are never lowered to Winograd."""

    def __init__(self, function: Callable[..., Tensor], **children: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, bias=False)
        for name, child in children.items():
            setattr(self, name, child)
        self.__dict__["function"] = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def lowered(function: Callable[..., Tensor], **children: Any) -> Lowering:
    return lowering(Net(function, **children).eval()).through("merge_stages")


def fused(case: Lowering) -> list[tuple[bool, str]]:
    """(has a residual, activation) of every convolution."""
    found = [arguments(node) for node in case.gm.graph.nodes if is_op(node, CONV2D)]
    return [(given["residual"] is not None, given["activation"]) for given in found]


@pytest.mark.parametrize(
    ("function", "expected", "calls"),
    [
        (lambda net, x: net.a(x), [(False, "none")], ["conv2d"]),
        (lambda net, x: F.relu(net.a(x)), [(False, "relu")], ["conv2d"]),
        (lambda net, x: net.a(x).relu_(), [(False, "relu")], ["conv2d"]),
        (lambda net, x: net.act(net.a(input=x)), [(False, "relu")], ["conv2d"]),
        (lambda net, x: F.relu(net.a(x) + x), [(True, "relu")], ["conv2d"]),
        (lambda net, x: F.relu(torch.sigmoid(x) + net.a(x)), [(True, "relu")], ["sigmoid", "conv2d"]),
        (lambda net, x: net.a(x) + x, [(False, "none")], ["conv2d", "add"]),
        (lambda net, x: net.a(x) + 1, [(False, "none")], ["conv2d", "add"]),
        (lambda net, x: F.relu6(net.a(x)), [(False, "none")], ["conv2d", "relu6"]),
        (lambda net, x: F.relu(net.a(x)) + x, [(False, "relu")], ["conv2d", "add"]),
        (lambda net, x: net.b(F.relu(net.a(x))), [(False, "relu"), (False, "none")], ["conv2d"] * 2),
    ],
)
def test_epilogues(
    function: Callable[..., Tensor], expected: list[tuple[bool, str]], calls: list[str]
) -> None:
    case = lowered(function, act=nn.ReLU(inplace=True))
    rewrites = case.run(FuseConvEpilogue())
    assert (rewrites.count, rewrites.declined) == (len(expected), ())
    assert fused(case) == expected
    assert case.calls == calls
    case.assert_equals_model(X)


def test_of_two_convolutions_that_are_added_one_takes_the_other() -> None:
    case = lowered(lambda net, x: F.relu(net.a(x) + net.b(x)))
    case.run(FuseConvEpilogue())
    assert sorted(fused(case)) == [(False, "none"), (True, "relu")]
    case.assert_equals_model(X)


def test_a_value_that_others_read_keeps_its_relu() -> None:
    def function(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        return F.relu(y) * y

    case = lowered(function)
    case.run(FuseConvEpilogue())
    assert fused(case) == [(False, "none")]
    case.assert_equals_model(X)


def hooked() -> nn.Module:
    conv = nn.Conv2d(4, 4, 1)
    conv.register_forward_hook(lambda module, args, output: output * 2)
    return conv


class OwnConv(nn.Conv2d):
    __module__ = "torch.nn.custom"  # keeps torch.fx from tracing into it


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (hooked(), "of the convolution: it has forward hooks"),
        (OwnConv(4, 4, 1), "OwnConv is not a plain Conv2d"),
        (nn.Conv2d(4, 4, 3, padding="same", dilation=2), "padding 'same', zeros"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding (1, 1), circular"),
        (nn.Conv2d(4, 4, 1, dtype=torch.float64), "no fused convolutions for torch.float64 on cpu"),
    ],
)
def test_does_not_fire(conv: nn.Module, reason: str) -> None:
    case = lowered(lambda net, x: F.relu(net.c(x)), c=conv)
    rewrites = case.run(FuseConvEpilogue())
    assert (rewrites.count, rewrites.declined) == (0, (("c", reason),))
    case.assert_equals_model(X)
