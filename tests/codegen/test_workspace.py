"""Scratch buffers: shape, alignment to cache lines, growth, one set for each thread."""

from __future__ import annotations

import threading

import torch

from wsp_compiler.codegen.workspace import Workspace


def test_views_have_whole_cache_lines():
    space = Workspace()
    for parts, size, rounded in ((1, 1, 16), (3, 16, 16), (2, 17, 32), (4, 0, 16)):
        view = space.take("V", parts, size)
        assert view.shape == (parts, rounded)
        assert view.dtype == torch.float32
        assert view.is_contiguous()
        assert view.data_ptr() % 64 == 0


def test_a_buffer_is_used_again_and_grows():
    space = Workspace()
    first = space.take("V", 2, 64)
    first.fill_(7)
    again = space.take("V", 4, 32)
    assert again.data_ptr() == first.data_ptr()
    assert bool((again == 7).all())
    larger = space.take("V", 2, 80)
    assert larger.shape == (2, 80)
    assert space.take("V", 1, 16).data_ptr() == larger.data_ptr()


def test_names_do_not_share_memory():
    space = Workspace()
    a, b = space.take("V", 1, 64), space.take("M", 1, 64)
    assert a.data_ptr() != b.data_ptr()
    a.fill_(1)
    b.fill_(2)
    assert bool((a == 1).all())


def test_threads_do_not_share_memory():
    space = Workspace()
    mine = space.take("V", 1, 64)
    others: list[int] = []

    def take() -> None:
        others.append(space.take("V", 1, 64).data_ptr())

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert others[0] != mine.data_ptr()
    assert space.take("V", 1, 64).data_ptr() == mine.data_ptr()
