"""What a compiled convolution is compared with. Vendors are timed without bias and ReLU, in their favour.

CUDA: `cudnn_winograd` (WINOGRAD_NONFUSED forced), and PyTorch's conv2d with cuDNN trying all its algorithms:
`cudnn_fp32`, `cudnn_tf32`, `cudnn_fp16`, for bf16 models also `cudnn_bf16`.
CPU: PyTorch's conv2d (oneDNN): `torch_fp32`, for bf16 models also `torch_bf16`; and those of
:mod:`benchmarks.cpu_peers`.
Every conv2d is tried in both memory formats; the faster counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.arguments import DTYPES
from benchmarks.cpu_peers import makers
from benchmarks.cudnn_winograd import WinogradNonfused
from benchmarks.errors import relative_l2
from benchmarks.timing import Call

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WRONG = 0.05  # relative L2 error that no rounding gives


@dataclass(frozen=True)
class Variant:
    """One way to run a baseline: `make(x)` gives the callable for inputs like x, of this dtype and format."""

    baseline: str
    precision: str
    memory_format: str
    make: Callable[[Tensor], Call]

    @property
    def label(self) -> str:
        return f"{self.baseline}/{self.memory_format}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


def _conv2d(name: str, precision: str, memory_format: str, weight: Tensor) -> Variant:
    """PyTorch's conv2d; weight: [k, c, 3, 3] in fp32."""
    layout, tf32 = FORMATS[memory_format], precision == "tf32"

    def make(x: Tensor) -> Call:
        w = weight.to(x.device, x.dtype).contiguous(memory_format=layout)  # [k, c, 3, 3]
        if x.device.type == "cpu":
            return lambda x: F.conv2d(x, w, padding=1)

        def call(x: Tensor) -> Tensor:
            before = torch.backends.cudnn.allow_tf32
            torch.backends.cudnn.allow_tf32 = tf32
            try:
                return F.conv2d(x, w, padding=1)
            finally:
                torch.backends.cudnn.allow_tf32 = before

        return call

    return Variant(name, precision, memory_format, make)


def _winograd(precision: str, weight: Tensor) -> Variant:
    """cuDNN's WINOGRAD_NONFUSED; its output is checked once, so that what is timed is this convolution."""

    def make(x: Tensor) -> Call:
        w = weight.to(x.device, x.dtype)  # [k, c, 3, 3]
        call = WinogradNonfused(x, w)
        expected = F.conv2d(x[:1].double(), w.double(), padding=1)  # [1, k, h, w]
        error = relative_l2(call(x)[:1], expected)
        if not error < WRONG:
            raise ArithmeticError(f"cuDNN's result has a relative error of {error:.2e}")
        return call

    return Variant("cudnn_winograd", precision, "contiguous", make)


def variants(device: str, precision: str, weight: Tensor) -> tuple[Variant, ...]:
    """All baselines for a model of `precision` on `device`; weight: [k, c, 3, 3] in fp32."""
    if precision not in DTYPES:
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(DTYPES)}")
    low = [precision] if precision == "bf16" else []
    library = "torch" if device == "cpu" else "cudnn"
    timed = ["fp32", *low] if device == "cpu" else ["fp32", "tf32", "fp16", *low]
    found = [_conv2d(f"{library}_{p}", p, layout, weight) for p in timed for layout in FORMATS]
    if device == "cpu":
        peers = makers(weight).items()
        found += [Variant(name, "fp32", layout, make) for name, (layout, make) in peers]
    else:
        found.insert(0, _winograd("fp16" if precision in ("fp16", "bf16") else "fp32", weight))
    return tuple(found)
