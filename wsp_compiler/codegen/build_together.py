"""Build CUDA kernels side by side, before they are needed one after the other.

TVM generates one text at a time; the CUDA compiler, which takes most of the time, runs in several threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

MOST_THREADS = 8


def build_together(builds: Iterable[Callable[[], object]]) -> None:
    """Run all ``builds`` in threads. One that fails is left for its caller, who meets the error where it matters."""

    def attempt(build: Callable[[], object]) -> None:
        try:
            build()
        except Exception:  # whatever a kernel that does not build raises
            return

    with ThreadPoolExecutor(max(1, min(MOST_THREADS, os.cpu_count() or 1))) as threads:
        list(threads.map(attempt, builds))
