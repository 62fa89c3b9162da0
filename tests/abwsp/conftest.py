"""Searches of tiny networks run on one thread: it is faster, and child processes compute the same bits."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_torch_settings: None) -> None:
    torch.set_num_threads(1)  # _torch_settings puts it back
