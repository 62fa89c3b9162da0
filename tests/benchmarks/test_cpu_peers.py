"""The CPU peers compute the convolution that they are timed on; what is not installed says so."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.nn import functional as F

from benchmarks.conv_baselines import FORMATS, variants
from benchmarks.cpu_peers import makers, result
from benchmarks.errors import relative_l2

PACKAGES = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino", "onnx"), "ncnn": ("ncnn",)}


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "ncnn"])
@pytest.mark.parametrize(("channels", "size"), [(32, 14), (20, 7)])
def test_peers_compute_the_convolution(name: str, channels: int, size: int):
    for package in PACKAGES[name]:
        pytest.importorskip(package)
    weight = torch.randn(48, channels, 3, 3)
    layout, make = makers(weight)[name]
    xs = [torch.randn(1, channels, size, size).contiguous(memory_format=FORMATS[layout]) for _ in range(3)]
    call = make(xs[0])
    for x in (*xs, xs[0]):
        expected = F.conv2d(x.double(), weight.double(), padding=1)
        assert relative_l2(result(call, x), expected) < 1e-4


def test_ncnn_takes_single_images():
    pytest.importorskip("ncnn")
    with pytest.raises(ValueError, match="one image"):
        makers(torch.randn(8, 8, 3, 3))["ncnn"][1](torch.randn(2, 8, 6, 6))


def test_peers_are_among_the_cpu_baselines():
    names = {variant.baseline for variant in variants("cpu", "fp32", torch.randn(8, 8, 3, 3))}
    assert names == {"torch_fp32", "torch_compile", "onnxruntime", "openvino", "ncnn"}
    cuda = {variant.baseline for variant in variants("cuda", "fp32", torch.randn(8, 8, 3, 3))}
    assert not cuda & names


def test_a_missing_package_is_an_import_error():
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        pytest.skip("it is installed")
    with pytest.raises(ImportError):
        makers(torch.randn(8, 8, 3, 3))["onnxruntime"][1](torch.randn(1, 8, 6, 6))
