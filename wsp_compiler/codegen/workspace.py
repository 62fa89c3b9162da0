"""Scratch memory of the CPU kernels: one growing buffer of each calling thread, shared by all layers."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from wsp_compiler.codegen.cpu_memory import empty


class Workspace(threading.local):
    """Float32 memory that only grows. Each Python thread has its own."""

    def __init__(self) -> None:
        self.buffer: Tensor = torch.empty(0)
        self._start = 0

    def address(self, size: int) -> int:
        """Address of at least ``size`` elements, a multiple of 64 bytes. The content is undefined."""
        if self.buffer.numel() < size + 16:
            self.buffer = torch.empty(0)  # give the old one back first
            self.buffer = empty((size + 16,), torch.float32, torch.contiguous_format)
            self._start = -(-self.buffer.data_ptr() // 64) * 64
        return self._start


workspace = Workspace()
