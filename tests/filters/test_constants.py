"""constants: what the channels of pruned filters emit, compared with the network whose filters are zero."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tests.filters.nets import Chain, Dense, Grouped, Residual, conv, randomised
from wsp_compiler.filters.constants import answer, constants_of, pads_constants
from wsp_compiler.filters.coupling import couple
from wsp_compiler.trace import trace


class Recorder(fx.Interpreter):
    """Keeps every node's value."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.seen: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.seen[n] = value.clone() if isinstance(value, Tensor) else value
        return value


def check(model: nn.Module, dead: dict[str, list[int]]) -> dict[str, Tensor]:
    """Node name -> constants found, after comparing each with what the node emits on random inputs."""
    model = randomised(model).double()
    with torch.no_grad():
        for path, filters in dead.items():
            model.get_submodule(path).weight[filters] = 0.0  # type: ignore[index, operator]
    gm = trace(model).units[""]
    coupling = couple(gm)
    numbers = frozenset(
        number for number, (path, index) in enumerate(coupling.filters) if index in dead.get(path, ())
    )
    layers: dict[str, Any] = {path: model.get_submodule(path) for path in dead}
    biases = {
        path: torch.zeros(layer.out_channels) if layer.bias is None else layer.bias
        for path, layer in layers.items()
    }
    found = constants_of(coupling, biases, numbers)
    recorder = Recorder(copy.deepcopy(gm))
    with torch.no_grad():
        recorder.run(torch.randn(2, 3, 14, 15, dtype=torch.float64))
    seen = {node.name: value for node, value in recorder.seen.items()}
    for node, constants in found.items():
        values = seen[node.name]
        if node in coupling.flat:
            values = values.view(len(values), len(constants), -1)
        for index in (~constants.isnan()).nonzero().flatten().tolist():
            channel = values[:, index]
            assert float((channel - constants[index]).abs().max()) < 1e-9, (node, index)
    return {node.name: value for node, value in found.items()}


def known(constants: Tensor) -> list[int]:
    return (~constants.isnan()).nonzero().flatten().tolist()


def test_through_activations_norms_pooling_and_flattening() -> None:
    found = check(Chain(), {"body.0": [1, 4], "body.3": [0, 7], "body.6": [2], "body.9": [3, 11]})
    assert known(found["body_0"]) == known(found["body_2"]) == [1, 4]
    assert float(found["body_2"].nan_to_num().min()) >= 0
    assert known(found["body_4"]) == known(found["body_5"]) == [0, 7]
    assert known(found["view"]) == known(found["dropout"]) == [3, 11]


def test_through_additions() -> None:
    found = check(Residual(), {"stem": [2, 5], "b": [2], "c": [2, 5], "a": [0]})
    assert known(found["a_norm"]) == [0]
    assert known(found["add"]) == known(found["add_1"]) == [2]
    assert known(found["mul"]) == known(found["add_2"]) == [2]


def test_through_concatenations() -> None:
    found = check(Dense(), {"stem": [1], "grows.0": [0, 5], "grows.2": [4]})
    assert known(found["norm"]) == [1, 8, 13, 24]


@pytest.mark.parametrize("padding", [0, 1])
def test_through_depthwise_convolutions(padding: int) -> None:
    found = check(Grouped(padding=padding), {"a": [0, 1, 2, 3, 4, 5], "b": [1]})
    silent = (found["relu"][:6] == 0).nonzero().flatten().tolist()
    expected = range(6) if padding == 0 else silent
    assert known(found["depthwise"]) == [
        filters for index in expected for filters in (2 * index, 2 * index + 1)
    ]
    assert 0 < len(silent) < 6


class Pooled(nn.Module):
    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.a, self.pool, self.b = conv(3, 6), pool, conv(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.pool(self.a(x)))


@pytest.mark.parametrize(
    ("pool", "keeps"),
    [
        (nn.MaxPool2d(3, padding=1, ceil_mode=True), True),
        (nn.AvgPool2d(2, ceil_mode=True), True),
        (nn.AvgPool2d(3, padding=1), False),
        (nn.AvgPool2d(2, divisor_override=3), False),
        (nn.Upsample(scale_factor=2, mode="bilinear"), True),
        (nn.AdaptiveMaxPool2d(3), True),
    ],
)
def test_pooling(pool: nn.Module, keeps: bool) -> None:
    found = check(Pooled(pool), {"a": [0, 3]})
    assert known(found["pool"]) == ([0, 3] if keeps else [])


class Averaged(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.a, self.b, self.options = conv(3, 6), conv(6, 4), options

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.avg_pool2d(self.a(x), 3, 1, **self.options))


def test_average_pooling_as_a_function() -> None:
    assert known(check(Averaged(), {"a": [1]})["avg_pool2d"]) == [1]
    assert known(check(Averaged(padding=1), {"a": [1]})["avg_pool2d"]) == []


@pytest.mark.parametrize(
    ("options", "pads"),
    [
        ({"padding": 1}, True),
        ({"padding": (0, 1)}, True),
        ({"padding": 0}, False),
        ({"padding": "same"}, True),
        ({"padding": "valid"}, False),
        ({"padding": 1, "padding_mode": "reflect"}, False),
    ],
)
def test_who_pads(options: Any, pads: bool) -> None:
    assert pads_constants(nn.Conv2d(4, 4, 3, **options)) is pads
    assert not pads_constants(nn.Conv2d(4, 4, 1, padding="same"))


def test_the_answer_of_a_convolution() -> None:
    layer = nn.Conv2d(6, 4, 3, groups=2, bias=False).double().requires_grad_(False)
    constant = torch.randn(6, dtype=torch.float64)
    expected = layer(constant.view(1, 6, 1, 1).expand(1, 6, 5, 5))
    torch.testing.assert_close(answer(layer, layer.weight, constant), expected[0, :, 1, 1])
