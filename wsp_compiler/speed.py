"""What is known about a convolution's time, pruned and dense, and the comparison. The plan decides with it.

Times come from a :class:`SpeedSource`, which :mod:`wsp_compiler.codegen` implements; nothing here knows kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

MEASURED, TABLE, OTHER_KERNELS = "measured", "table", "table of other kernels"
LESS_PRUNED, MODEL = "a less pruned layer", "cost model"
"""Where a time comes from: measured here, a shipped record of this device, one of another version of the kernels, the
time of the same layer with somewhat more kept rows (an upper bound), or a model fitted to such records. From the most
to the least certain."""


@dataclass(frozen=True)
class CallFormat:
    """One call of a convolution: input shape [N, c, H, W] or [c, H, W], dtype, and whether it is channels_last."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool


@dataclass(frozen=True)
class Timing:
    """Time of one layer.

    Attributes:
        us: microseconds, all calls of a shared convolution together.
        source: :data:`MEASURED`, :data:`TABLE`, :data:`OTHER_KERNELS`, :data:`LESS_PRUNED` or :data:`MODEL`; of
            several calls the least certain.
        kernel: what runs.
    """

    us: float
    source: str
    kernel: str = ""


class SpeedSource(Protocol):
    """Answers how long a convolution takes; None where nothing is known about it on this device."""

    def pruned(
        self, path: str, conv: nn.Conv2d, keep: Tensor, tile: int, calls: Sequence[CallFormat]
    ) -> Timing | None:
        """Of the fastest kernels for F(tile x tile, 3x3) with ``keep``, bias and activation included."""
        ...

    def dense(self, path: str, conv: nn.Conv2d, calls: Sequence[CallFormat]) -> Timing | None:
        """Of the vendor's convolution in the faster memory format, bias and activation included."""
        ...


@dataclass(frozen=True)
class SiteTimes:
    """Both times of one site; None is unknown."""

    pruned: Timing | None
    dense: Timing | None

    @property
    def slower(self) -> bool:
        """True if both are known and the pruned kernels are not faster."""
        return self.pruned is not None and self.dense is not None and self.pruned.us >= self.dense.us

    def text(self) -> str:
        """ "12.1 us pruned, 10.2 us dense (measured)", with both sources where they differ."""
        if self.pruned is None or self.dense is None:
            return "speed not checked"
        sources = dict.fromkeys((self.pruned.source, self.dense.source))
        ours, theirs = (f"{us:.0f}" if us >= 100 else f"{us:.3g}" for us in (self.pruned.us, self.dense.us))
        return f"{ours} us pruned, {theirs} us dense ({', '.join(sources)})"


def add_timings(timings: Sequence[Timing | None]) -> Timing | None:
    """Several calls together; None if one of them is unknown or there is none."""
    known = [timing for timing in timings if timing is not None]
    if not known or len(known) < len(timings):
        return None
    order = (MEASURED, TABLE, OTHER_KERNELS, LESS_PRUNED, MODEL)
    source = max((timing.source for timing in known), key=order.index)
    kernels = dict.fromkeys(timing.kernel for timing in known if timing.kernel)
    return Timing(sum(timing.us for timing in known), source, ", ".join(kernels))
