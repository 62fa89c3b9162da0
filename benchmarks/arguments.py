"""Command-line arguments that the benchmarks share: precisions, fractions, devices, threads."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import torch

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
"""Precision name -> dtype of tensors and weights, from the most to the least precise."""


def no_less_precise(precision: str, than: str) -> bool:
    """Whether results in `precision` are at least as precise as results in `than`."""
    order = list(DTYPES)
    return order.index(precision) <= order.index(than)


def fraction(text: str) -> float:
    """argparse type: a pruning ratio in [0, 1)."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction in [0, 1)")
    return value


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def add_common(parser: argparse.ArgumentParser, dtypes: Sequence[str]) -> None:
    """--device, --dtype, --threads, --json."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default, help="default: %(default)s")
    parser.add_argument("--dtype", choices=tuple(dtypes), default="fp32", help="default: %(default)s")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: torch.get_num_threads()")
    parser.add_argument("--json", metavar="FILE", help="write the record there, after every row")


def check_device(parser: argparse.ArgumentParser, device: str, dtype: str, on_cpu: Sequence[str]) -> None:
    """Ends the program with a message where this machine or this device cannot run what is asked."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA GPU here; use --device cpu")
    if device == "cpu" and dtype not in on_cpu:
        parser.error(f"--dtype {dtype} is not timed on --device cpu; choose from {', '.join(on_cpu)}")


def prepare(device: str, threads: int | None) -> None:
    """Process-wide settings: cuDNN tries all its algorithms, TF32 is off; TVM gets PyTorch's threads."""
    if threads is not None:
        torch.set_num_threads(threads)
    os.environ["TVM_NUM_THREADS"] = str(torch.get_num_threads())
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.benchmark_limit = 0  # no limit on the algorithms tried
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
