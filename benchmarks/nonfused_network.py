"""A network whose eligible convolutions run cuDNN's WINOGRAD_NONFUSED: the dense Winograd baseline of whole networks.

Batch norm is folded first, as in ours. The convolution is an operator that torch.compile does not look into, so
bias, residual add and ReLU after it are fused with each other into one kernel.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx.experimental import optimization

from benchmarks.cudnn_winograd import WinogradNonfused

Convolution = Callable[[Tensor, Tensor], Tensor]
_weights: dict[int, Tensor] = {}
_prepared: dict[tuple[int, torch.Size, torch.dtype], WinogradNonfused] = {}


def cudnn_nonfused(handle: int, x: Tensor) -> Tensor:
    """The convolution with the weights of `handle` on x: [n, c, h, w], contiguous -> [n, k, h, w]."""
    key = (handle, x.shape, x.dtype)
    if key not in _prepared:
        _prepared[key] = WinogradNonfused(x, _weights[handle])
    return _prepared[key](x, torch.empty((x.shape[0], _weights[handle].shape[0], *x.shape[2:]), dtype=x.dtype,
                                         device=x.device))  # fmt: skip


def _operator(x: Tensor, handle: int) -> Tensor:
    return _convolution(handle, x.contiguous())


def _fake(x: Tensor, handle: int) -> Tensor:
    return x.new_empty((x.shape[0], _weights[handle].shape[0], *x.shape[2:]))


_convolution: Callable[[int, Tensor], Tensor] = cudnn_nonfused
_library = torch.library.Library("wsp_benchmarks", "FRAGMENT")
_library.define("winograd_nonfused(Tensor x, int handle) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("winograd_nonfused", _operator, "CompositeExplicitAutograd")
torch.library.register_fake("wsp_benchmarks::winograd_nonfused", _fake)


class NonfusedConv(nn.Module):
    """A 3x3, stride 1, padding 1 convolution by cuDNN's WINOGRAD_NONFUSED, then its bias."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.handle = len(_weights)
        _weights[self.handle] = conv.weight.detach().contiguous()
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()  # here, where torch.compile may fuse it into what made x
        y = torch.ops.wsp_benchmarks.winograd_nonfused(x, self.handle)
        return y if self.bias is None else y + self.bias.view(1, -1, 1, 1)


def fits(conv: nn.Conv2d) -> bool:
    """Whether cuDNN's Winograd can run it."""
    window = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    return window == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def nonfused_network(model: nn.Module, paths: Collection[str]) -> nn.Module:
    """A copy of `model`, batch norm folded, whose convolutions at `paths` are :class:`NonfusedConv`.

    Raises:
        ValueError: a path is no convolution that cuDNN's Winograd can run.
    """
    folded = cast("Any", optimization).fuse(copy.deepcopy(model))
    for path in paths:
        conv = folded.get_submodule(path)
        if not isinstance(conv, nn.Conv2d) or not fits(conv):
            raise ValueError(f"{path} is no 3x3, stride 1, padding 1 convolution")
        parent, _, leaf = path.rpartition(".")
        setattr(folded.get_submodule(parent), leaf, NonfusedConv(conv))
    return folded
