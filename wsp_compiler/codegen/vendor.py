"""The vendor's dense convolution with bias and activation, as fast as PyTorch can run it: what a plan competes with.

cuDNN chooses among all its algorithms, fused with the activation and not, in both memory formats; oneDNN runs with
weights in its own layout and not. The fastest counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from wsp_compiler.codegen.measure import Call
from wsp_compiler.codegen.spec import KernelSpec
from wsp_compiler.winograd import FILTER_SIDE

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@contextlib.contextmanager
def vendor_settings(precision: str) -> Generator[None]:
    """cuDNN tries all algorithms, in TF32 if and only if ``precision`` is "tf32"; as before afterwards."""
    cudnn: Any = torch.backends.cudnn
    before = (cudnn.benchmark, cudnn.benchmark_limit, cudnn.allow_tf32)
    cudnn.benchmark, cudnn.benchmark_limit, cudnn.allow_tf32 = True, 0, precision == "tf32"
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.benchmark_limit, cudnn.allow_tf32 = before


def _activate(y: Tensor, activation: str) -> Tensor:
    return y if activation == "none" else F.relu_(y)


def vendor_calls(spec: KernelSpec, device: torch.device, batch: int) -> dict[str, tuple[Call, bool]]:
    """Label -> (a callable on inputs [N, c, H, W], whether those have to be channels_last).

    Weights are random; every activation other than none is timed as ReLU. The residual, if any, is part of the
    callable.
    """
    dtype, padding = DTYPES[spec.dtype], list(spec.padding)
    generator = torch.Generator(device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        values = torch.empty(shape, device=device).normal_(generator=generator)
        return values.to(dtype)

    weight = random(spec.filters, spec.channels, FILTER_SIDE, FILTER_SIDE) / (3 * spec.channels**0.5)
    bias = random(spec.filters)
    image = (batch, spec.filters, *spec.output_size)
    added = random(*image) if spec.residual else None
    calls: dict[str, tuple[Call, bool]] = {}
    for name, layout in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format)):
        w = weight.contiguous(memory_format=layout)
        r = None if added is None else added.contiguous(memory_format=layout)
        last = layout is torch.channels_last

        def plain(x: Tensor, w: Tensor = w, r: Tensor | None = r) -> Tensor:
            y = F.conv2d(x, w, bias, padding=padding)
            return _activate(y if r is None else y.add_(r), spec.activation)

        calls[f"conv2d {name}"] = (plain, last)
        if device.type == "cuda" and spec.activation != "none":
            calls[f"fused {name}"] = (_cudnn_fused(w, bias, r, padding), last)
        if device.type == "cpu" and torch.backends.mkldnn.is_available() and spec.dtype != "float16":
            calls[f"packed {name}"] = (_packed(w, bias, r, padding, spec.activation), last)
    return calls


def _cudnn_fused(weight: Tensor, bias: Tensor, residual: Tensor | None, padding: list[int]) -> Call:
    """cuDNN's convolution that applies bias, residual and ReLU itself."""
    how = ([1, 1], padding, [1, 1], 1)

    def call(x: Tensor) -> Tensor:
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *how)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *how)

    return call


def _packed(
    weight: Tensor, bias: Tensor, residual: Tensor | None, padding: list[int], activation: str
) -> Call:
    """oneDNN with weights reordered once for the input's shape, as torch.compile with freezing runs it."""
    mkldnn: Any = torch.ops.mkldnn
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # pyright: ignore
    how = (padding, [1, 1], [1, 1], 1)
    packed: dict[tuple[int, ...], Any] = {}

    def call(x: Tensor) -> Tensor:
        shape = tuple(x.shape)
        if shape not in packed:
            packed[shape] = reorder(weight.to_mkldnn(), *how, list(shape))
        fused = "relu" if activation != "none" and residual is None else "none"
        y: Tensor = mkldnn._convolution_pointwise(x, packed[shape], bias, *how, fused, [], "")
        return y if residual is None else _activate(y.add_(residual), activation)

    return call
