"""Convolutions that stay with the vendor's library: the operator ``wsp::conv2d`` and its launcher.

cuDNN and oneDNN apply bias, residual and ReLU while they write their output, which PyTorch's ``conv2d`` does not
ask them to. Both are fastest on channels_last images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsp_compiler.ops import suggest_channels_last

TIMED_CALLS = 10
TIMED_ROUNDS = 3
_mkldnn: Any = torch.ops.mkldnn


def prefers_channels_last(weight: Tensor) -> bool:
    """True if the vendor's library is faster on channels_last images for this weight's device and dtype.

    cuDNN's tensor core kernels take nothing else; on the CPU oneDNN would convert in every call.
    """
    if weight.is_cuda:
        half = weight.dtype in (torch.float16, torch.bfloat16)
        return half or (weight.dtype == torch.float32 and torch.backends.cudnn.allow_tf32)
    return fuses(weight)


def fuses(weight: Tensor) -> bool:
    """True if the vendor's library has fused convolutions for this weight's device and dtype."""
    if weight.is_cuda:
        return torch.backends.cudnn.is_available() and weight.dtype in (
            torch.float16, torch.bfloat16, torch.float32,
        )  # fmt: skip
    return (
        weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    )


def _conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str,
    channels_last: bool,
) -> Tensor:
    """A convolution, + residual, then the activation.

    Args:
        x: [N, c, H, W] or [c, H, W].
        weight: [n, c / groups, kh, kw].
        bias: [n] or None.
        residual: None, or a tensor that is added before the activation.
        stride, padding, dilation: (vertical, horizontal); ``groups`` as in torch.nn.Conv2d.
        activation: "none" or "relu".
        channels_last: the output is channels_last whatever x and weight are.
    """
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if channels_last and y.dim() == 4:
        y = y.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        y = y + residual
    return F.relu(y) if activation == "relu" else y


conv2d = torch.library.custom_op("wsp::conv2d", _conv2d, mutates_args=())
cast("Any", conv2d).register_fake(_conv2d)
conv2d_op: Any = torch.ops.wsp.conv2d.default


class VendorConv(nn.Module):
    """Runs one ``wsp::conv2d`` with the vendor's fused kernels where they apply and are faster.

    On CUDA the first call of every kind times the fused call against the separate ones; inside a graph capture,
    or where cuDNN has no engine for it, the separate calls run. cuDNN's fused ReLU may turn NaN into 0. On the CPU
    weights are packed by oneDNN at the first call. Arguments as of the operator; ``weight`` is copied if its memory
    format has to change.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        activation: str,
        channels_last: bool,
    ) -> None:
        super().__init__()
        if channels_last:
            weight = weight.detach().contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.stride, self.padding, self.dilation = list(stride), list(padding), list(dilation)
        self.groups, self.activation, self.channels_last = groups, activation, channels_last
        self._state: dict[str, Any] = {"fused": {}, "packed": None}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_state": {"fused": {}, "packed": None}}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, c, H, W] (or [c, H, W]) -> the convolution's output with its epilogue."""
        plain = x.dim() != 4 or x.numel() == 0 or x.dtype != self.weight.dtype
        if plain or torch.is_autocast_enabled(x.device.type) or not fuses(self.weight):
            return self._separate(x, residual)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if residual is not None and not self._fits(x, residual):
            return self._separate(x, residual)
        if x.is_cuda:
            return self._cuda(x, residual)
        # oneDNN's packed convolutions return channels_last
        return self._cpu(x, residual) if suggest_channels_last(x) else self._separate(x, residual)

    def _fits(self, x: Tensor, residual: Tensor) -> bool:
        window = zip(
            x.shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation, strict=True
        )
        size = [(h + 2 * p - d * (k - 1) - 1) // s + 1 for h, k, s, p, d in window]
        shape = (x.shape[0], self.weight.shape[0], *size)
        return tuple(residual.shape) == shape and (residual.dtype, residual.device) == (x.dtype, x.device)

    def _separate(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.channels_last and y.dim() == 4:
            y = y.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            y = y + residual
        return F.relu_(y) if self.activation == "relu" else y

    def _cpu(self, x: Tensor, residual: Tensor | None) -> Tensor:
        how = (self.padding, self.stride, self.dilation, self.groups)
        packed: Any = self._state["packed"]
        if packed is None:
            reorder = cast("Any", torch)._C._nn.mkldnn_reorder_conv2d_weight
            packed = reorder(self.weight.to_mkldnn(), *how, list(x.shape))
            self._state["packed"] = packed
        if residual is None:
            y = _mkldnn._convolution_pointwise(x, packed, self.bias, *how, "none", [], "")
        else:
            residual = residual.contiguous(memory_format=torch.channels_last)
            y = _mkldnn._convolution_pointwise.binary(
                x, residual, packed, self.bias, *how, "add", 1.0, None, [], None
            )
        # oneDNN's own ReLU turns NaN into 0
        return F.relu_(y) if self.activation == "relu" else y

    def _cuda(self, x: Tensor, residual: Tensor | None) -> Tensor:
        if self.activation != "relu":
            return self._separate(x, residual)
        key = (tuple(x.shape), x.stride(1) == 1, residual is None, torch.backends.cudnn.allow_tf32)
        chosen = self._state["fused"].get(key)
        if chosen is None:
            if torch.cuda.is_current_stream_capturing():
                return self._separate(x, residual)
            chosen = self._fused_is_faster(x, residual)
            self._state["fused"][key] = chosen
        return self._fused(x, residual) if chosen else self._separate(x, residual)

    def _fused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        how = (self.stride, self.padding, self.dilation, self.groups)
        if residual is None:
            y = torch.cudnn_convolution_relu(x, self.weight, self.bias, *how)
        else:
            y = torch.cudnn_convolution_add_relu(x, self.weight, residual, 1.0, self.bias, *how)
        # the strides of a 1x1 weight do not tell cuDNN the format
        return y.contiguous(memory_format=torch.channels_last) if self.channels_last else y

    def _fused_is_faster(self, x: Tensor, residual: Tensor | None) -> bool:
        try:
            self._fused(x, residual)
        except RuntimeError:  # cuDNN has no engine for this convolution with this epilogue
            return False
        with torch.cuda.device(x.device):
            fused, separate = fastest_cuda(
                [lambda: self._fused(x, residual), lambda: self._separate(x, residual)]
            )
        return fused <= separate


def fastest_cuda(candidates: Sequence[Callable[[], object]]) -> list[float]:
    """Least milliseconds of :data:`TIMED_CALLS` calls of each candidate on the current stream, interleaved."""
    best = [float("inf")] * len(candidates)
    for call in candidates:
        call()
    for _ in range(TIMED_ROUNDS):
        for index, call in enumerate(candidates):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(TIMED_CALLS):
                call()
            end.record()
            end.synchronize()
            best[index] = min(best[index], start.elapsed_time(end))
    return best
