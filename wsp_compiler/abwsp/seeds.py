"""Random numbers that depend on what is done and not on what was done before: a resumed search draws the same."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Generator
from typing import Any, cast

import numpy as np
import torch


@contextlib.contextmanager
def seeded(seed: int, *purpose: object) -> Generator[None]:
    """Seed Python's, numpy's and PyTorch's global generators by ``seed`` and ``purpose``; put them back at the end.

    GPUs that are in use are included.
    """
    text = "/".join(map(str, (seed, *purpose)))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
    python, old = random.getstate(), cast("Any", np.random).get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    fork = cast("Any", torch.random).fork_rng
    with fork(devices=devices):
        random.seed(number)
        np.random.seed(number)
        cast("Any", torch).manual_seed(number)
        try:
            yield
        finally:
            random.setstate(python)
            cast("Any", np.random).set_state(old)
