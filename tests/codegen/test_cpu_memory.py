"""Large tensors begin at huge pages and look like any other; small ones are torch.empty's."""

from __future__ import annotations

import pytest
import torch

from wsp_compiler.codegen import cpu_memory
from wsp_compiler.codegen.cpu_memory import HUGE_PAGE, LARGE, empty


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 3, 5, 7), (2, 64, 200, 210), (1, 1, 1500, 1500), (0, 64, 200, 210)])
def test_shape_strides_and_type_are_those_of_torch(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype
):
    expected = torch.empty(shape, dtype=dtype, memory_format=layout)
    found = empty(shape, dtype, layout)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.is_contiguous(memory_format=layout)
    if min(shape) > 1:
        assert found.stride() == expected.stride()
    if expected.numel() * dtype.itemsize >= LARGE:
        assert found.data_ptr() % HUGE_PAGE == 0
    found.fill_(1)
    assert float(found.sum(dtype=torch.float64)) == expected.numel()


def test_without_madvise_it_is_torch_empty(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_memory, "_madvise", lambda: None)
    assert empty((1 << 21,), torch.float32, torch.contiguous_format).storage_offset() == 0


def test_other_platforms_have_no_madvise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_memory.sys, "platform", "darwin")
    assert cpu_memory._madvise.__wrapped__() is None
