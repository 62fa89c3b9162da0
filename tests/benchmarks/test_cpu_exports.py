"""Exported networks compute what the PyTorch module computes, in every runtime that is installed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.cpu_exports import layers_of, to_ncnn, to_onnx
from benchmarks.cpu_peers import ncnn_network, onnx_runtime, openvino, result
from benchmarks.errors import relative_l2

from ..reference import randomise


class Small(nn.Module):
    """All operations that are covered, with a value that is read three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.relu = nn.ReLU()
        self.mean = nn.AdaptiveAvgPool2d((1, 1))
        self.drop = nn.Dropout()
        self.last = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm(self.first(x))))
        x = self.relu(self.conv(x) + x) - x
        return self.last(self.drop(torch.flatten(self.mean(x), 1)))


@pytest.fixture
def network() -> tuple[nn.Module, Tensor, Tensor]:
    x = torch.randn(1, 3, 32, 32)
    model = randomise(Small(), torch.randn(4, 3, 32, 32))
    with torch.no_grad():
        return model, x, model(x)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "ncnn"])
def test_runtimes_agree_with_pytorch(runtime: str, network: tuple[nn.Module, Tensor, Tensor]):
    pytest.importorskip(runtime)
    model, x, expected = network
    if runtime == "ncnn":
        call = ncnn_network(*to_ncnn(model, x), x)
    else:
        pytest.importorskip("onnx")
        call = {"onnxruntime": onnx_runtime, "openvino": openvino}[runtime](to_onnx(model, x), x)
    assert relative_l2(result(call, x).reshape(expected.shape), expected) < 1e-4


def test_batch_norm_is_folded_and_unknown_operations_are_named(network: tuple[nn.Module, Tensor, Tensor]):
    model, x, _ = network
    kinds = [layer.kind for layer in layers_of(model, x)]
    assert kinds == ["conv", "relu", "max_pool", "conv", "add", "relu", "sub", "mean", "flatten", "linear"]
    with pytest.raises(ValueError, match="not covered"):
        layers_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid()), x)
