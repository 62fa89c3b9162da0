"""Large tensors begin at huge pages and look like any other; small ones are torch.empty's."""

from __future__ import annotations

import threading

import pytest
import torch

from wsp_compiler.codegen import cpu_memory
from wsp_compiler.codegen.cpu_memory import HUGE_PAGE, LARGE, Blocks, empty


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


def large(megabytes: int = 5) -> torch.Tensor:
    return empty((megabytes << 18,), torch.float32, torch.contiguous_format)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Blocks:
    """No blocks are kept yet."""
    made = Blocks()
    monkeypatch.setattr(cpu_memory, "blocks", made)
    return made


def test_memory_of_a_tensor_that_is_gone_is_used_again(blocks: Blocks):
    first = large()
    address = first.data_ptr()
    other = large()
    assert other.data_ptr() != address
    del first
    assert blocks.kept_bytes == 6 << 20  # whole huge pages
    again = large(6)
    assert again.data_ptr() == address
    assert blocks.kept_bytes == 0


def test_views_keep_the_memory(blocks: Blocks):
    tensor = large()
    view, alias = tensor.view(5, -1)[3], tensor.detach()
    view.fill_(7)
    del tensor
    assert blocks.kept_bytes == 0
    del alias
    large().fill_(1)
    assert bool((view == 7).all())
    del view
    assert blocks.kept_bytes == 12 << 20


def test_small_blocks_do_not_serve_large_tensors_nor_large_ones_small_tensors(blocks: Blocks):
    addresses = [large(size).data_ptr() for size in (8, 64)]
    assert large(16).data_ptr() not in addresses
    assert blocks.kept_bytes == (8 + 64 + 16) << 20


def test_little_is_kept(blocks: Blocks, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu_memory, "KEPT_BYTES", 20 << 20)
    tensors = [large(8) for _ in range(4)]
    last = tensors[-1].data_ptr()
    while tensors:
        tensors.pop(0)
    assert blocks.kept_bytes == 16 << 20
    assert large(8).data_ptr() == last  # its memory is the likeliest to be in a cache


def test_tensors_come_and_go_in_many_threads(blocks: Blocks):
    failures: list[str] = []

    def work(number: int) -> None:
        for turn in range(30):
            held = [large().fill_(100 * number + i) for i in range(3)]
            if any(float(t[turn]) != 100 * number + i or float(t[-1]) != t[0] for i, t in enumerate(held)):
                failures.append(f"{number} {turn}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert blocks.kept_bytes <= 7 * 6 * 6 << 20  # of seven tensors of six threads


def test_freeing_while_a_block_is_being_taken_does_not_wait(blocks: Blocks):
    """A tensor may be collected at any point of the thread that holds the lock."""
    tensor = large()
    with blocks._lock:
        del tensor
    assert blocks.kept_bytes == 6 << 20
    assert large().numel() == 5 << 18


def test_without_huge_pages_the_memory_is_as_good(monkeypatch: pytest.MonkeyPatch, blocks: Blocks):
    monkeypatch.delattr(cpu_memory.mmap, "MADV_HUGEPAGE", raising=False)
    assert float(large().fill_(2).sum()) == 2 * (5 << 18)
