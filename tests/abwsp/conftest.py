"""Searches of tiny networks run on one thread: it is faster, and child processes compute the same bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_torch_settings: None) -> Iterator[None]:
    torch.set_num_threads(1)
    yield
