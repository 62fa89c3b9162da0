"""Memory for large outputs and scratch: blocks on huge pages that are used again.

The C library maps large blocks anew for every allocation, and the kernel then clears them page by page on first touch:
for a 64 MiB output that takes longer than the convolution. Linux does it in pages of 2 MiB where it is asked to
(``madvise``), which is 6 to 10 times faster; where it cannot, nothing is lost. Blocks whose tensors are gone serve
later ones, which need no clearing at all; at most :data:`KEPT_BYTES` wait for that.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import threading
import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
LARGE = 4 << 20
"""Bytes from which on a block is worth huge pages."""
KEPT_BYTES = 256 << 20
"""Bytes of free blocks that are kept at most."""


@dataclass(frozen=True)
class Block:
    """Mapped memory: ``size`` bytes from ``address``, the beginning of a huge page."""

    memory: mmap.mmap
    address: int
    size: int


def _mapped(size: int) -> Block:
    memory = mmap.mmap(-1, size + HUGE_PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    begin = -(-start // HUGE_PAGE) * HUGE_PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE, begin - start, size)
    return Block(memory, begin, size)


@dataclass
class Blocks:
    """Blocks that wait for their next use, the one freed last at the end.

    Tensors may be freed at any point of any thread, also while this object is being used by that very thread; so
    what was freed goes through ``_returned``, whose operations are atomic.
    """

    _free: list[Block] = field(default_factory=list[Block])
    _returned: list[Block] = field(default_factory=list[Block])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, size: int) -> Block:
        """A block of at least ``size`` bytes and at most an eighth more, mapped anew if there is none."""
        whole = -(-size // HUGE_PAGE) * HUGE_PAGE
        with self._lock:
            self._settle()
            fitting = [
                (block.size, -i)
                for i, block in enumerate(self._free)
                if whole <= block.size <= whole * 9 // 8
            ]
            if fitting:
                return self._free.pop(-min(fitting)[1])
        return _mapped(whole)

    def give_back(self, block: Block) -> None:
        """``block`` has no user any more."""
        self._returned.append(block)
        if self._lock.acquire(blocking=False):  # else its holder or the next one settles
            try:
                self._settle()
            finally:
                self._lock.release()

    def _settle(self) -> None:
        while self._returned:
            self._free.append(self._returned.pop())
        while sum(block.size for block in self._free) > KEPT_BYTES:
            self._free.pop(0)

    @property
    def kept_bytes(self) -> int:
        """Bytes of all free blocks."""
        return sum(block.size for block in (*self._free, *self._returned))


blocks = Blocks()


def empty(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """As torch.empty on the CPU; the memory of a large tensor is a block of its own.

    Args:
        shape: four sizes for channels_last.
        memory_format: torch.contiguous_format or torch.channels_last.
    """
    count = math.prod(shape)
    if count * dtype.itemsize < LARGE:
        return torch.empty(shape, dtype=dtype, memory_format=memory_format)
    block = blocks.take(count * dtype.itemsize)
    memory = (ctypes.c_char * block.size).from_address(block.address)
    weakref.finalize(memory, blocks.give_back, block).atexit = False
    flat = torch.frombuffer(memory, dtype=dtype, count=count)  # keeps `memory` while its storage lives
    if memory_format == torch.channels_last:
        _, c, h, w = shape
        return flat.as_strided(shape, (h * w * c, 1, w * c, c))
    return flat.view(shape)
