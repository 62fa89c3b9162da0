"""Small networks: threads that wait for each other only cost time on a busy machine."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """One intra-op thread; undone by the fixture for all tests."""
    torch.set_num_threads(1)
