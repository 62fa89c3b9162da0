"""Scratch memory: aligned to cache lines, grows, one for each thread."""

from __future__ import annotations

import ctypes
import threading

import pytest

from wsp_compiler.codegen.workspace import Workspace


@pytest.mark.parametrize("sizes", [(1,), (16, 17, 33, 40), (1000, 1008, 1016, 1017, 10)])
def test_memory_is_aligned_large_enough_and_grows(sizes: tuple[int, ...]):
    space = Workspace()
    for size in sizes:
        start = space.address(size)
        assert start % 64 == 0
        assert start >= space.buffer.data_ptr()
        assert start + 4 * size <= space.buffer.data_ptr() + 4 * space.buffer.numel()
        ctypes.memset(start, 0, 4 * size)


def test_memory_that_is_large_enough_is_used_again():
    space = Workspace()
    first = space.address(100)
    assert space.address(50) == first
    assert space.address(100) == first


def test_threads_do_not_share_memory():
    space = Workspace()
    mine = space.address(64)
    others: list[int] = []
    thread = threading.Thread(target=lambda: others.append(space.address(64)))
    thread.start()
    thread.join()
    assert others[0] != mine
    assert space.address(64) == mine
