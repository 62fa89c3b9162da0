"""fold_conv_batch_norm: batch norm after convolutions that are not lowered."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.graphs import Lowering, as_double, conv, lowering, randomise_norms
from wsp_compiler.options import PruneRule
from wsp_compiler.passes import FoldConvBatchNorm


def case_of(model: nn.Module, **options: Any) -> Lowering:
    return lowering(randomise_norms(model), **options).through("fold_batch_norm")


def norms(case: Lowering) -> int:
    return case.calls.count("BatchNorm2d")


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 1),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 8, 5, groups=2, dilation=2, padding=4),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    ],
)
def test_before_and_after(layer: nn.Conv2d) -> None:
    model = nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels, eps=1e-3), nn.ReLU())
    case = case_of(model)
    assert case.calls == ["Conv2d", "BatchNorm2d", "ReLU"]
    assert case.run(FoldConvBatchNorm()).count == 1
    assert case.calls == ["Conv2d", "ReLU"]
    case.assert_equals_model(torch.randn(2, 4, 12, 12))
    assert case.run(FoldConvBatchNorm()).count == 0


def test_nested_modules_and_the_users_model() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.BatchNorm2d(4))))
    randomise_norms(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer = model[0][0]
    case = case_of(model)
    assert case.run(FoldConvBatchNorm()).count == 1
    after = model.state_dict()
    assert model[0][0] is layer
    assert after.keys() == before.keys()
    assert case.gm.get_submodule("0.0") is not layer


def test_lowered_convolutions_are_not_looked_at() -> None:
    case = case_of(nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(4)))
    assert case.run(FoldConvBatchNorm()).declined == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_folded_with_one_rounding(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).requires_grad_(False)
    randomise_norms(model).to(dtype)
    exact = as_double(model)
    case = lowering(model).through("fold_batch_norm")
    assert case.run(FoldConvBatchNorm()).count == 1
    folded = case.gm.get_submodule("0")
    assert folded.weight.dtype == folded.bias.dtype == dtype
    x = torch.randn(1, 8, 5, 5).to(dtype)
    expected = exact(x.double())
    error = float((as_double(case.gm)(x.double()) - expected).norm() / expected.norm())
    assert error < torch.finfo(dtype).eps


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(torch.relu(self.conv(x))))


class Scaled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def hooked(module: Any) -> Any:
    module.register_forward_hook(lambda module, args, output: output * 2)
    return module


def patched(module: Any) -> Any:
    module.forward = types.MethodType(lambda self, x: x * 2, module)
    return module


def with_scale(value: float, dtype: torch.dtype) -> nn.Module:
    """A batch norm that scales by ``value`` in a network of ``dtype``."""
    norm = nn.BatchNorm2d(4, eps=0.0)
    nn.init.constant_(norm.weight, value)
    return nn.Sequential(nn.Conv2d(4, 4, 1), norm).to(dtype)


@pytest.mark.parametrize(
    ("model", "node", "reason"),
    [
        (Branch(), "norm", "conv has other users"),
        (CalledTwice(), "norm", "the convolution is called more than once"),
        (nn.Sequential(Scaled(4, 4, 1), nn.BatchNorm2d(4)), "1", "Scaled is not a plain Conv2d"),
        (
            nn.Sequential(hooked(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)),
            "1",
            "of the convolution: it has forward",
        ),
        (
            nn.Sequential(patched(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)),
            "1",
            "of the convolution: its forward",
        ),
        (nn.Sequential(nn.Conv2d(4, 4, 1), hooked(nn.BatchNorm2d(4))), "1", "it has forward hooks"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), patched(nn.BatchNorm2d(4))), "1", "its forward is replaced"),
        (
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
            "1",
            "it normalises with batch statistics",
        ),
    ],
)
def test_does_not_fire(model: nn.Module, node: str, reason: str) -> None:
    case = case_of(model)
    rewrites = case.run(FoldConvBatchNorm())
    assert rewrites.count == 0
    ((where, why),) = rewrites.declined
    assert where == node
    assert reason in why
    assert norms(case) == 1
    case.assert_equals_model(torch.randn(2, 4, 6, 6))


@pytest.mark.parametrize("scale", [1e-5, 6e4])
def test_does_not_fire_where_float16_cannot_hold_the_weights(scale: float) -> None:
    model = with_scale(scale, torch.float16).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.rand(4, 4, 1, 1) + 1.2)
    case = lowering(model).through("fold_batch_norm")
    rewrites = case.run(FoldConvBatchNorm())
    assert rewrites.declined == (("1", "the folded weights do not fit torch.float16"),)
    assert lowering(with_scale(scale, torch.float32)).through("fold_conv_batch_norm").calls == ["Conv2d"]


def test_a_skipped_convolution_is_folded_here() -> None:
    model = nn.Sequential(conv(), nn.BatchNorm2d(4))
    case = case_of(model, rules=(PruneRule("0", skip=True),))
    assert case.run(FoldConvBatchNorm()).count == 1
    case.assert_equals_model(torch.randn(1, 4, 6, 6))
