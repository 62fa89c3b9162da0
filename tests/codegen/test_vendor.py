"""The vendor's convolutions compute one and the same thing."""

from __future__ import annotations

import pytest
import torch

from wsp_compiler.codegen.vendor import vendor_calls, vendor_settings

from .emulation import assert_close, make_case


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_ways_agree(residual: bool, activation: str, dtype: str) -> None:
    spec = make_case(residual=residual, activation=activation, dtype=dtype, padding=(1, 0)).spec
    calls = vendor_calls(spec, torch.device("cpu"), 3)
    assert {last for _, last in calls.values()} == {True, False}
    assert len(calls) == 4
    x = torch.randn(3, spec.channels, spec.height, spec.width).to(
        torch.empty(0, dtype=getattr(torch, dtype)).dtype
    )
    outputs = {}
    for label, (call, last) in calls.items():
        given = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        outputs[label] = call(given)
    first = next(iter(outputs.values()))
    assert isinstance(first, torch.Tensor)
    assert first.shape == (3, spec.filters, *spec.output_size)
    assert bool((first >= 0).all()) == (activation == "relu")
    for output in outputs.values():
        assert isinstance(output, torch.Tensor)
        assert_close(output, first.double(), 1e-5 if dtype == "float32" else 2e-2)


def test_the_residual_is_not_written_to() -> None:
    spec = make_case(residual=True, activation="relu").spec
    x = torch.randn(2, spec.channels, spec.height, spec.width)
    for call, _ in vendor_calls(spec, torch.device("cpu"), 2).values():
        first, second = call(x), call(x)
        assert isinstance(first, torch.Tensor)
        assert isinstance(second, torch.Tensor)
        assert torch.equal(first, second)


@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_settings_are_put_back(precision: str) -> None:
    cudnn = torch.backends.cudnn
    before = (cudnn.benchmark, cudnn.benchmark_limit, cudnn.allow_tf32)
    with vendor_settings(precision):
        assert cudnn.benchmark
        assert cudnn.allow_tf32 == (precision == "tf32")
    assert (cudnn.benchmark, cudnn.benchmark_limit, cudnn.allow_tf32) == before
