"""narrow: smaller modules compute the same on what is left, and the originals stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference import snapshot
from wsp_compiler.filters import narrow
from wsp_compiler.filters.removal import Fold

STAY = torch.tensor([0, 2, 3, 5])
CONSTANT = torch.tensor([0.0, 1.5, 0.0, 0.0, -0.7, 0.0], dtype=torch.float64)
"""Channels 1 and 4 of six leave; 5 emits a constant too and may be the carrier."""


def image(side: int = 9) -> Tensor:
    x = torch.randn(2, 6, side, side, dtype=torch.float64)
    x[:, 1], x[:, 4], x[:, 5] = 1.5, -0.7, 0.25
    return x


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"padding": 1, "padding_mode": "replicate"}])
def test_constants_in_the_bias(options: Any) -> None:
    layer = nn.Conv2d(6, 5, 3, **options).double().requires_grad_(False)
    before = snapshot(layer)
    filters = torch.tensor([1, 4])
    smaller = narrow.narrow_convolution(layer, filters, Fold(STAY, CONSTANT, None))
    assert (smaller.out_channels, smaller.in_channels) == (2, 4)
    x = image()
    torch.testing.assert_close(smaller(x[:, STAY]), layer(x)[:, filters])
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer.in_channels == 6


def test_constants_in_a_carrier() -> None:
    layer = nn.Conv2d(6, 5, 3, padding=1).double().requires_grad_(False)
    smaller = narrow.narrow_convolution(layer, torch.arange(5), Fold(STAY, CONSTANT, (5, 0.25)))
    x = image()
    torch.testing.assert_close(smaller(x[:, STAY]), layer(x))
    assert torch.equal(smaller.bias, layer.bias)  # type: ignore[arg-type]


def test_filters_alone_and_no_bias_from_nothing() -> None:
    layer = nn.Conv2d(6, 5, 1, bias=False).requires_grad_(False)
    smaller = narrow.narrow_convolution(layer, torch.tensor([3]), None)
    assert smaller.bias is None
    x = image().float()
    torch.testing.assert_close(smaller(x), layer(x)[:, 3:4])
    silent = Fold(STAY, torch.zeros(6, dtype=torch.float64), None)
    assert narrow.narrow_convolution(layer, torch.arange(5), silent).bias is None


def test_groups() -> None:
    layer = nn.Conv2d(6, 4, 3, groups=2).double().requires_grad_(False)
    stay = torch.tensor([0, 2, 3, 5])  # channel 1 of both groups leaves
    constant = torch.tensor([0.0, 1.5, 0.0, 0.0, -0.7, 0.0], dtype=torch.float64)
    smaller = narrow.narrow_convolution(layer, torch.arange(4), Fold(stay, constant, None))
    assert (smaller.groups, smaller.in_channels) == (2, 4)
    x = image()
    torch.testing.assert_close(smaller(x[:, stay]), layer(x))


@pytest.mark.parametrize("multiplier", [1, 3])
def test_depthwise(multiplier: int) -> None:
    layer = nn.Conv2d(6, 6 * multiplier, 3, groups=6, padding=1).double().requires_grad_(False)
    smaller = narrow.narrow_depthwise(layer, STAY)
    x = image()
    kept = torch.cat([torch.arange(multiplier) + multiplier * int(index) for index in STAY])
    torch.testing.assert_close(smaller(x[:, STAY]), layer(x)[:, kept])


@pytest.mark.parametrize("affine", [True, False])
def test_norms(affine: bool) -> None:
    layer = nn.BatchNorm2d(6, affine=affine).double().eval()
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2.0)
    x = image()
    torch.testing.assert_close(narrow.narrow_norm(layer, STAY)(x[:, STAY]), layer(x)[:, STAY])
    assert layer.num_features == 6


@pytest.mark.parametrize("slopes", [1, 6])
def test_prelu(slopes: int) -> None:
    layer = nn.PReLU(slopes).double()
    nn.init.uniform_(layer.weight)
    x = image()
    torch.testing.assert_close(narrow.narrow_prelu(layer, STAY)(x[:, STAY]), layer(x)[:, STAY])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("span", [1, 4])
def test_linear(bias: bool, span: int) -> None:
    layer = nn.Linear(6 * span, 3, bias=bias).double().requires_grad_(False)
    x = image(1 if span == 1 else 2)
    smaller = narrow.narrow_linear(layer, Fold(STAY, CONSTANT, None))
    torch.testing.assert_close(smaller(x[:, STAY].flatten(1)), layer(x.flatten(1)))
    assert smaller.in_features == 4 * span


def test_formats_and_dtypes() -> None:
    layer = nn.Conv2d(6, 5, 3).half().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    smaller = narrow.narrow_convolution(layer, torch.tensor([0, 1, 4]), Fold(STAY, CONSTANT, (5, 0.25)))
    assert smaller.weight.dtype == torch.float16
    assert smaller.weight.is_contiguous(memory_format=torch.channels_last)
    assert not smaller.weight.requires_grad


def test_replacing_a_module() -> None:
    root = nn.Sequential(nn.Sequential(nn.ReLU()))
    narrow.replace_module(root, "0.0", nn.Tanh())
    assert isinstance(root.get_submodule("0.0"), nn.Tanh)
