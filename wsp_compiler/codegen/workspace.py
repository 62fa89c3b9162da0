"""Scratch memory of the CPU kernels: growing buffers of each calling thread, shared by all layers."""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class Workspace(threading.local):
    """Named float32 buffers that only grow. Each Python thread has its own."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, parts: int, size: int) -> Tensor:
        """A [parts, size] view; ``size`` is rounded up to whole cache lines. The content is undefined."""
        size = -(-max(size, 1) // 16) * 16
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < parts * size:
            buffer = torch.empty(parts * size, dtype=torch.float32)
            self._buffers[name] = buffer
        return buffer[: parts * size].view(parts, size)


workspace = Workspace()
