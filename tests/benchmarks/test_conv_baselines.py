import pytest
import torch
import torch.nn.functional as F

from benchmarks.conv_baselines import FORMATS, variants

WEIGHT = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0))


def _names(device: str, precision: str) -> list[str]:
    return list(dict.fromkeys(variant.baseline for variant in variants(device, precision, WEIGHT)))


def test_baselines_per_device_and_precision() -> None:
    peers = ["torch_compile", "onnxruntime", "openvino", "ncnn"]
    assert _names("cpu", "fp32") == ["torch_fp32", *peers]
    assert _names("cpu", "bf16") == ["torch_fp32", "torch_bf16", *peers]
    assert _names("cuda", "fp16") == ["cudnn_winograd", "cudnn_fp32", "cudnn_tf32", "cudnn_fp16"]
    assert _names("cuda", "bf16")[-1] == "cudnn_bf16"


def test_every_conv2d_comes_in_both_formats() -> None:
    found = [v.label for v in variants("cuda", "tf32", WEIGHT) if v.baseline == "cudnn_tf32"]
    assert found == ["cudnn_tf32/contiguous", "cudnn_tf32/channels_last"]


@pytest.mark.parametrize(("model", "expected"), [("fp32", "fp32"), ("tf32", "fp32"), ("fp16", "fp16")])
def test_winograd_is_as_precise_as_the_model(model: str, expected: str) -> None:
    assert variants("cuda", model, WEIGHT)[0].precision == expected


def test_the_callables_compute_the_convolution() -> None:
    x = torch.randn(1, 8, 6, 6)
    own = [variant for variant in variants("cpu", "fp32", WEIGHT) if variant.baseline == "torch_fp32"]
    assert len(own) == 2
    for variant in own:
        given = x.contiguous(memory_format=FORMATS[variant.memory_format])
        torch.testing.assert_close(variant.make(given)(given), F.conv2d(x, WEIGHT, padding=1))


def test_unknown_precision() -> None:
    with pytest.raises(ValueError, match="unknown precision 'int8'; known: fp32"):
        variants("cpu", "int8", WEIGHT)
