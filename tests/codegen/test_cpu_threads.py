"""Kernels' parallel loops run on PyTorch's OpenMP threads."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import wsp_compiler
from wsp_compiler.codegen import cpu_threads
from wsp_compiler.codegen.cpu_emit import B, store, view, wide
from wsp_compiler.codegen.targets import cpu_target
from wsp_compiler.codegen.tvm_import import IRBuilder, T

needs_openmp = pytest.mark.skipif(not cpu_threads.uses_openmp(), reason="PyTorch without GNU OpenMP")


def thread_numbers() -> object:
    """A kernel that writes the OpenMP thread number of every iteration of a parallel loop."""
    addresses = cpu_threads.openmp_addresses()
    assert addresses is not None
    with IRBuilder() as builder, B.prim_func():
        B.func_name("numbers")
        out, count = B.arg("out", T.int64()), B.arg("count", T.int32())
        with B.parallel(count) as i:
            buffer = view(out + wide(i) * 4, "int32", 4)
            store(buffer, 0, T.call_extern("int32", "omp_get_thread_num"), 1)
    return builder.get()


@needs_openmp
def test_loops_run_on_openmp_threads_as_many_as_torch_says():
    from wsp_compiler.codegen.build import build

    kernel = build(thread_numbers, "numbers", cpu_target(), ()).function
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 2, 4):
            torch.set_num_threads(threads)
            out = torch.full((12,), -1, dtype=torch.int32)
            kernel(out.data_ptr(), 12)
            assert sorted(set(out.tolist())) == list(range(threads))
    finally:
        torch.set_num_threads(before)


def test_without_openmp_tvm_runs_the_loops(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_threads.sys, "platform", "darwin")
    assert cpu_threads.openmp_addresses() is None
    cpu_threads._launcher.cache_clear()
    try:
        assert not cpu_threads.uses_openmp()
        with cpu_threads.openmp_loops():
            pass
    finally:
        monkeypatch.undo()
        cpu_threads._launcher.cache_clear()


@pytest.mark.parametrize("shape", [(1, 32, 7, 7), (2, 32, 30, 20)])
@pytest.mark.parametrize("last", [False, True])
def test_outputs_do_not_depend_on_the_number_of_threads(shape: tuple[int, ...], last: bool):
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(shape).contiguous(memory_format=layout)
    model = nn.Sequential(nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 32, 3)).eval()
    compiled = wsp_compiler.compile(model, 0.6)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = compiled(x)
        for threads in (2, 4, 3, 1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(compiled(x), expected)
    finally:
        torch.set_num_threads(before)


def test_eight_python_threads_call_one_model_at_once():
    model = nn.Sequential(nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 32, 3)).eval()
    compiled = wsp_compiler.compile(model, 0.6)
    inputs = [torch.randn(1 + i % 3, 32, 9 + i, 12) for i in range(8)]
    expected = [compiled(x) for x in inputs]
    found: list[list[bool]] = [[] for _ in inputs]

    def call(i: int) -> None:
        for _ in range(10):
            found[i].append(torch.equal(compiled(inputs[i]), expected[i]))

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[True] * 10] * 8
