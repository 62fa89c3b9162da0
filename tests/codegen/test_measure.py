"""Measuring: interleaved, in the right unit, and failures cost only themselves."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from wsp_compiler.codegen import measure as module
from wsp_compiler.codegen.measure import measure, rotating_inputs

CPU = torch.device("cpu")


def test_inputs_rotate_and_are_not_zero() -> None:
    inputs = rotating_inputs((2, 8, 16, 16), torch.float16, CPU, True)
    assert len(inputs) == module.CPU_MOST_INPUTS
    assert len({x.data_ptr() for x in inputs}) == len(inputs)
    for x in inputs:
        assert x.shape == (2, 8, 16, 16)
        assert x.dtype == torch.float16
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert 0.8 < float(x.float().std()) < 1.2
    assert len(rotating_inputs((1, 1, 8000, 4000), torch.float32, CPU, False)) == 2


def test_times_are_microseconds_per_call_and_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_PAUSE_SECONDS", 0.0)
    order: list[str] = []

    def sleeper(label: str, seconds: float) -> module.Call:
        def call(x: Tensor) -> None:
            assert not torch.is_grad_enabled()
            if order[-1:] != [label]:
                order.append(label)
            time.sleep(seconds)

        return call

    inputs = [torch.ones(1), torch.ones(1)]
    calls = {"a": sleeper("a", 1e-3), "b": sleeper("b", 4e-3)}
    times, errors = measure(calls, {"a": inputs, "b": inputs}, rounds=3)
    assert not errors
    assert 1000 <= times["a"] < times["b"]
    assert times["b"] >= 4000
    assert order == ["a", "b"] * 4  # once to prepare, then three rounds


def test_what_fails_is_reported_and_the_rest_is_timed() -> None:
    def broken(x: Tensor) -> None:
        raise RuntimeError("does not\nbuild")

    inputs = [torch.ones(1)]
    times, errors = measure({"bad": broken, "good": torch.neg}, {"bad": inputs, "good": inputs}, rounds=2)
    assert set(times) == {"good"}
    assert errors == {"bad": "RuntimeError: does not build"}


@pytest.mark.cuda
def test_cuda_times_exclude_the_host() -> None:
    device = torch.device("cuda", 0)
    inputs = rotating_inputs((1, 1, 2048, 2048), torch.float32, device, False)
    assert sum(x.numel() * 4 for x in inputs) > torch.cuda.get_device_properties(device).L2_cache_size

    def slow_host(x: Tensor) -> Tensor:
        time.sleep(0.01)
        return x + 1

    times, errors = measure({"a": slow_host, "b": lambda x: x @ x}, {"a": inputs, "b": inputs})
    assert not errors
    assert 1 < times["a"] < 1000
    assert times["b"] > times["a"]
