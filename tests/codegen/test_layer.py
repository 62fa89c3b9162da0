"""WinogradLayer: which kernels a call gets, what it keeps, and what it remembers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wsp_compiler
from wsp_compiler import PruneRule
from wsp_compiler.codegen import layer as module
from wsp_compiler.codegen.layer import WinogradLayer, effective_precision
from wsp_compiler.codegen.spec import KernelSpec
from wsp_compiler.codegen.targets import CodeTarget
from wsp_compiler.errors import InputError

CPU, CUDA = CodeTarget(torch.device("cpu"), "x86-64", 4), CodeTarget(torch.device("cuda", 0), "sm_90", 0)
LAST = torch.channels_last


def layer_of(model: nn.Module, **options: Any) -> WinogradLayer:
    (layer,) = wsp_compiler.compile(model.eval(), 0.5, rules=[PruneRule(".*")], **options).layers()
    return layer


def specs(layer: WinogradLayer) -> list[KernelSpec]:
    """Of the kernels built so far."""
    return [kernels.spec for kernels in layer._state["layers"].values()]


@pytest.mark.parametrize(
    ("option", "dtype", "target", "tf32", "expected"),
    [
        (None, torch.float32, CPU, True, "fp32"),
        (None, torch.float16, CPU, True, "fp32"),
        (None, torch.bfloat16, CPU, True, "bf16"),
        ("bf16", torch.float32, CPU, True, "bf16"),
        ("fp32", torch.bfloat16, CPU, True, "fp32"),
        (None, torch.float32, CUDA, True, "tf32"),
        (None, torch.float32, CUDA, False, "fp32"),
        (None, torch.float16, CUDA, True, "fp16"),
        (None, torch.bfloat16, CUDA, True, "bf16"),
        ("fp32", torch.float16, CUDA, True, "fp32"),
    ],
)
def test_effective_precision(
    option: str | None,
    dtype: torch.dtype,
    target: CodeTarget,
    tf32: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    assert effective_precision(option, dtype, target) == expected


def test_a_kind_of_input_is_prepared_once(monkeypatch: pytest.MonkeyPatch):
    builds: list[int] = []
    monkeypatch.setattr(module, "on_build", [lambda: builds.append(1)])
    layer = layer_of(nn.Conv2d(16, 16, 3, padding=1))
    contiguous = torch.randn(2, 16, 6, 8)
    calls = [
        (contiguous, 1),
        (contiguous[:1], 1),
        (torch.randn(5, 16, 6, 8), 1),
        (contiguous[:, :, :, :7], 2),
        (contiguous.to(memory_format=LAST), 3),
        (contiguous, 3),
        (contiguous.to(memory_format=LAST)[:, :, 1:], 4),
    ]
    for x, total in calls:
        layer(x)
        assert len(builds) == len(specs(layer)) == total
        assert layer.last_shape == tuple(x.shape)
    assert [(made.height, made.width) for made in specs(layer)] == [(6, 8), (6, 7), (6, 8), (5, 8)]
    assert [made.input_channels_last for made in specs(layer)] == [False, False, True, True]
    assert [made.output_channels_last for made in specs(layer)] == [False, False, True, True]


def test_what_is_pruned_decides_the_kernel():
    x = torch.randn(1, 16, 6, 8)
    for method, direction, rows, columns in (
        ("dense", "row", False, False),
        ("fp", "row", True, False),
        ("wsp", "row", True, False),
        ("bwsp", "column", False, True),
    ):
        layer = layer_of(nn.Conv2d(16, 16, 3), method=method, direction=direction)
        layer(x)
        assert [(made.rows_pruned, made.columns_pruned) for made in specs(layer)] == [(rows, columns)]
        assert (layer.filters, layer.channels) == (16, 16)


@pytest.mark.parametrize(("filters", "channels"), [(1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("direction", ["row", "column"])
def test_one_filter_or_one_channel(filters: int, channels: int, direction: str):
    conv = nn.Conv2d(channels, filters, 3, padding=1).eval()
    for method in ("wsp", "bwsp", "fp"):
        compiled = wsp_compiler.compile(
            conv, 0.5, method=method, direction=direction, rules=[PruneRule(".*")]
        )
        (layer,) = compiled.layers()
        assert (layer.filters, layer.channels) == (filters, channels)
        x = torch.randn(2, channels, 5, 4)
        assert torch.allclose(compiled(x), compiled.graph_module(x), atol=1e-5)


class Add(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.same, self.relu = nn.Conv2d(16, 16, 3, padding=1), nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return self.relu(self.conv(x) + self.same(r))


def test_residuals_that_fit_are_added_in_the_kernel():
    layer = layer_of(Add())
    x = torch.randn(2, 16, 6, 8)
    layer(x, torch.randn(2, 16, 6, 8))
    layer(x, torch.randn(2, 16, 6, 8).to(memory_format=LAST))
    assert [(made.residual, made.activation) for made in specs(layer)] == [(True, "relu")]


@pytest.mark.parametrize("shape", [(1, 16, 6, 8), (16, 1, 1), (2, 1, 6, 8), (3, 2, 16, 6, 8)])
def test_residuals_that_broadcast_are_added_by_pytorch(shape: tuple[int, ...]):
    model = Add().eval()
    compiled = wsp_compiler.compile(model, 0, method="dense")
    x, residual = torch.randn(2, 16, 6, 8), torch.randn(shape)
    y = compiled(x, residual)
    (layer,) = compiled.layers()
    assert {(made.residual, made.activation) for made in specs(layer)} >= {(False, "none")}
    with torch.no_grad():
        expected = model(x, residual)
    assert (y.shape, y.stride()) == (expected.shape, expected.stride())
    assert torch.allclose(y, expected, atol=1e-5)


def test_copies_build_their_own_kernels_and_share_nothing_that_changes():
    layer = layer_of(nn.Conv2d(16, 16, 3, padding=1))
    x = torch.randn(1, 16, 6, 8)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    assert specs(twin) == []
    assert twin.last_shape == layer.last_shape
    assert torch.equal(twin(x), expected)
    twin(torch.randn(1, 16, 5, 5))
    assert layer.last_shape == (1, 16, 6, 8)
    assert len(specs(layer)) == 1


def test_packed_weights_are_shared_by_image_sizes():
    layer = layer_of(nn.Conv2d(16, 16, 3, padding=1))
    for size in (5, 6, 7):
        layer(torch.randn(1, 16, size, size))
    weights = [kernels.weights for kernels in layer._state["layers"].values()]
    assert len(weights) == 3
    assert all(entry is weights[0] for entry in weights)


def test_the_dtype_is_the_weights_outside_autocast():
    layer = layer_of(nn.Conv2d(16, 16, 3).to(torch.bfloat16))
    x = torch.randn(1, 16, 6, 6)
    with pytest.raises(InputError, match=r"expected an input of torch\.bfloat16, got torch\.float32"):
        layer(x)
    with torch.autocast("cpu", dtype=torch.float16):
        assert layer(x).dtype == torch.float16
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    layer.dtype = None  # a layer that a custom pass made: any dtype it can compute in
    assert layer(x).dtype == torch.float32
    with pytest.raises(InputError, match=r"float32, float16 or bfloat16, got torch\.float64"):
        layer(x.double())
