"""Memory for large outputs and scratch, on huge pages.

The C library maps large blocks anew for every allocation, and the kernel then clears them page by page on first touch:
for a 64 MiB output that takes longer than the convolution. Linux does it in pages of 2 MiB where it is asked to
(``madvise``), which is 6 to 10 times faster; where it cannot, nothing is lost.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
LARGE = 4 << 20
"""Bytes from which on a block is worth huge pages."""
MADV_HUGEPAGE = 14  # linux/mman.h


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def empty(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """As torch.empty on the CPU; a large tensor begins at a huge page of a larger storage.

    Args:
        shape: four sizes for channels_last.
        memory_format: torch.contiguous_format or torch.channels_last.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    advise = _madvise()
    if size < LARGE or advise is None:
        return torch.empty(shape, dtype=dtype, memory_format=memory_format)
    whole = -(-size // HUGE_PAGE) * HUGE_PAGE
    flat = torch.empty((whole + HUGE_PAGE) // dtype.itemsize, dtype=dtype)
    begin = -(-flat.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    advise(begin, whole, MADV_HUGEPAGE)
    offset = (begin - flat.data_ptr()) // dtype.itemsize
    if memory_format == torch.channels_last:
        _, c, h, w = shape
        return flat.as_strided(shape, (h * w * c, 1, w * c, c), offset)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return flat.as_strided(shape, strides, offset)
