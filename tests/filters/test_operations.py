"""operations: what nodes do to channels, and what is not understood."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from wsp_compiler.filters.operations import operation_of
from wsp_compiler.trace import trace


def kind(model: nn.Module) -> str:
    gm = trace(nn.Sequential(nn.Conv2d(4, 4, 3), model).eval()).units[""]
    conv = next(node for node in gm.graph.nodes if node.op == "call_module")
    return operation_of(gm, next(iter(conv.users))).kind


class Calls(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, output: output * 2)
    return module


class Twice(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv2d(4, 6, 1), "conv"),
        (nn.Conv2d(4, 8, 3, groups=4), "depthwise"),
        (nn.Conv2d(4, 8, 3, groups=2), "grouped"),
        (Twice(4, 4, 3), "opaque"),
        (nn.BatchNorm2d(4), "norm"),
        (nn.BatchNorm2d(4, track_running_stats=False), "opaque"),
        (nn.GroupNorm(2, 4), "opaque"),
        (nn.Linear(5, 3), "linear"),
        (nn.Flatten(), "flatten"),
        (nn.Flatten(0), "opaque"),
        (nn.Flatten(2), "opaque"),
        (nn.ReLU(), "elementwise"),
        (nn.PReLU(4), "elementwise"),
        (nn.Dropout2d(), "elementwise"),
        (nn.Softmax(1), "opaque"),
        (nn.MaxPool2d(2), "pool"),
        (nn.MaxPool2d(2, return_indices=True), "opaque"),
        (nn.Upsample(scale_factor=2), "pool"),
        (nn.PixelShuffle(2), "opaque"),
        (hooked(nn.ReLU()), "opaque"),
    ],
)
def test_modules(module: nn.Module, expected: str) -> None:
    assert kind(module) == expected


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: F.relu(x), "elementwise"),
        (lambda x: x.relu_(), "elementwise"),
        (lambda x: F.leaky_relu(x, 0.2), "elementwise"),
        (lambda x: F.dropout(x), "opaque"),
        (lambda x: F.dropout(x, training=False), "elementwise"),
        (lambda x: x * 2, "elementwise"),
        (lambda x: 1 - x, "elementwise"),
        (lambda x: x + x, "binary"),
        (lambda x: torch.add(x, x, alpha=2), "opaque"),
        (lambda x: F.max_pool2d(x, 2), "pool"),
        (lambda x: F.max_pool2d(x, 2, return_indices=True), "opaque"),
        (lambda x: F.interpolate(x, scale_factor=2), "pool"),
        (lambda x: x.mean((2, 3)), "flatten"),
        (lambda x: x.mean([-1, -2], keepdim=True), "pool"),
        (lambda x: torch.mean(x, dim=(2, 3)), "flatten"),
        (lambda x: x.mean(1), "opaque"),
        (lambda x: x.mean(), "opaque"),
        (lambda x: torch.flatten(x, 1), "flatten"),
        (lambda x: x.flatten(start_dim=1), "flatten"),
        (lambda x: torch.flatten(x, 1, 2), "opaque"),
        (lambda x: x.flatten(), "opaque"),
        (lambda x: torch.cat([x, x], 1), "opaque"),
        (lambda x: x.size(2), "size"),
        (lambda x: x.size(1), "opaque"),
        (lambda x: x.size(), "opaque"),
        (lambda x: x.shape[-1], "size"),
        (lambda x: x.shape[2:], "size"),
        (lambda x: x.shape[1], "opaque"),
        (lambda x: x.dtype, "size"),
        (lambda x: x[:, :2], "opaque"),
        (lambda x: torch.softmax(x, 1), "opaque"),
        (lambda x: x.view(-1, 16), "opaque"),
        (lambda x: x.permute(0, 2, 3, 1), "opaque"),
    ],
)
def test_functions_and_methods(function: Any, expected: str) -> None:
    assert kind(Calls(function)) == expected


def nodes_of(function: Any) -> tuple[fx.GraphModule, list[fx.Node]]:
    gm = trace(nn.Sequential(nn.Conv2d(4, 4, 3), Calls(function)).eval()).units[""]
    return gm, list(gm.graph.nodes)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.view(x.size(0), -1), "flatten"),
        (lambda x: x.reshape(x.shape[0], -1), "flatten"),
        (lambda x: x.view(x.size(1), -1), "opaque"),
        (lambda x: x.view(x.size(0), x.size(1), -1), "opaque"),
        (lambda x: torch.cat([x, F.relu(x)], dim=1), "cat"),
        (lambda x: torch.cat([x, F.relu(x)], 0), "opaque"),
        (lambda x: torch.cat([x, F.relu(x)]), "opaque"),
        (lambda x: x - F.relu(x), "binary"),
    ],
)
def test_the_last_node(function: Any, expected: str) -> None:
    gm, nodes = nodes_of(function)
    assert operation_of(gm, nodes[-2]).kind == expected


@pytest.mark.parametrize(
    ("function", "writes"),
    [
        (lambda x: F.relu(x), False),
        (lambda x: F.relu(x, inplace=True), True),
        (lambda x: torch.relu_(x), True),
        (lambda x: x.add_(1), True),
    ],
)
def test_who_writes_into_its_input(function: Any, writes: bool) -> None:
    gm, nodes = nodes_of(function)
    assert operation_of(gm, nodes[-2]).writes is writes


def test_a_module_says_whether_it_writes() -> None:
    gm = trace(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True)).eval()).units[""]
    assert operation_of(gm, list(gm.graph.nodes)[-2]).writes
