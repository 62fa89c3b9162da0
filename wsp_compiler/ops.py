"""The operators ``wsp::*``: their meaning in plain PyTorch, which is the reference for the generated kernels.

A layer's kept weights are stored compacted, positions one after another (see :class:`WinogradSite`):

- ``rows`` [R]: the filter of every stored row, ``row_offset`` [p*p + 1]: position k owns rows[o_k : o_(k+1)];
- ``columns`` [C], ``column_offset`` [p*p + 1]: likewise the input channel of every stored column;
- ``weight`` [sum_k R_k * C_k]: the matrices U_k, each [R_k, C_k] row-major, concatenated.

Row pruning leaves all c columns in every position, column pruning all n rows. V is [C, T] and M is [R, T],
the positions concatenated. Arithmetic is float64 for float64 input and float32 otherwise. As for nn.Conv2d,
an input [c, H, W] is one image without a batch dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.nn import functional as F

from wsp_compiler.errors import InputError
from wsp_compiler.winograd import FILTER_SIDE, output_size, transform

Function = TypeVar("Function", bound=Callable[..., Any])

ACTIVATIONS = ("none", "relu", "relu6", "prelu")


class WinogradSite(nn.Module):
    """The buffers of one lowered convolution. Created with ``keep`` alone; lowering fills in the rest."""

    keep: Tensor  # bool, broadcastable to [p*p, n, c]
    weight: Tensor  # float32 [sum_k R_k * C_k]
    rows: Tensor  # int32 [R]
    row_offset: Tensor  # int32 [p*p + 1]
    columns: Tensor  # int32 [C]
    column_offset: Tensor  # int32 [p*p + 1]
    bias: Tensor  # float32 [n]

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", keep)

    @property
    def by_element(self) -> bool:
        """True if neither whole rows nor whole columns are kept: the layer is stored in full, with zeros."""
        return self.keep.shape[1] > 1 and self.keep.shape[2] > 1

    def fill(self, U: Tensor, bias: Tensor | None) -> None:
        """Store the kept part of U [p*p, n, c] (float64) and the bias [n] (zeros if None)."""
        positions, n, c = U.shape
        row_keep, column_keep = self.index((positions, n, c), U.device)
        by_row, by_column = not bool(row_keep.all()), not bool(column_keep.all())
        weight: list[Tensor] = []
        for k in range(positions):  # what nothing is removed from is not copied
            part = U[k][row_keep[k]] if by_row else U[k]
            part = part * self.keep[k].to(part.device) if self.by_element else part
            part = part[:, column_keep[k]] if by_column else part
            weight.append(part.float().reshape(-1))
        self.register_buffer("weight", torch.cat(weight))
        values = torch.zeros(n, device=U.device) if bias is None else bias.detach()
        self.register_buffer("bias", values.to(torch.float32, copy=True))

    def index(self, shape: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Store which rows and columns of [p*p, n, c] are kept; returns both as bool, [p*p, n] and [p*p, c]."""
        positions, n, c = shape
        keep = self.keep.to(device)
        if self.by_element:
            keep = torch.ones((1, 1, 1), dtype=torch.bool, device=device)
        by_column = keep.shape[1] == 1 and keep.shape[2] == c and c > 1
        row_keep = (keep[:, :, 0] if not by_column else keep[:, :1, 0] | True).expand(positions, n)
        column_keep = (keep[:, 0, :] if by_column else keep[:, 0, :1] | True).expand(positions, c)
        for name, kept in (("row", row_keep), ("column", column_keep)):
            index = kept.nonzero()[:, 1].int()
            offset = F.pad(kept.sum(1).cumsum(0), (1, 0)).int()
            self.register_buffer(f"{name}s", index)
            self.register_buffer(f"{name}_offset", offset)
        return row_keep, column_keep

    def position_weights(self) -> list[Tensor]:
        """The matrices U_k, each [R_k, C_k]."""
        return split_weight(self.weight, self.row_offset, self.column_offset)


def split_weight(weight: Tensor, row_offset: Tensor, column_offset: Tensor) -> list[Tensor]:
    """The flat ``weight`` as matrices U_k [R_k, C_k]."""
    rows, columns = _counts(row_offset), _counts(column_offset)
    parts = torch.split(weight, [r * c for r, c in zip(rows, columns, strict=True)])
    return [part.view(r, c) for part, r, c in zip(parts, rows, columns, strict=True)]


def _counts(offset: Tensor) -> list[int]:
    return cast("Any", offset.diff()).tolist()


def _fake(op: Any) -> Callable[[Function], Function]:
    """Decorator for the shape function of a custom operator."""
    return op.register_fake


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def suggest_channels_last(x: Tensor) -> bool:
    """True if PyTorch's convolution would take ``x`` for a channels_last tensor."""
    if x.dim() != 4:
        return False
    last = x.is_contiguous(memory_format=torch.channels_last)
    if last != x.is_contiguous():  # nearly always, and ten times faster than the general answer
        return last
    return suggest_memory_format(x) == torch.channels_last


def is_channels_last(weight: Tensor) -> bool:
    """True if a convolution with ``weight`` returns channels_last tensors whatever its input is."""
    return suggest_channels_last(weight)


def _images(x: Tensor) -> Tensor:
    """x as [N, c, H, W]."""
    if x.dim() not in (3, 4):
        raise InputError(
            f"expected an input [N, c, H, W] or [c, H, W], got {list(x.shape)}",
            where="Winograd convolution",
            fix="give images with a batch and a channel dimension",
        )
    return x if x.dim() == 4 else x.unsqueeze(0)


def _output_size(x: Tensor, padding: list[int]) -> tuple[int, int]:
    size = (output_size(x.shape[-2], padding[0]), output_size(x.shape[-1], padding[1]))
    if size[0] < 1 or size[1] < 1:
        raise InputError(
            f"an image of {x.shape[-2]}x{x.shape[-1]} with padding {padding} is smaller than the 3x3 filter",
            where="Winograd convolution",
            fix="give a larger image",
        )
    return size


def _tile_grid(x: Tensor, padding: list[int], tile: int) -> tuple[int, int]:
    size = _output_size(x, padding)
    return (-(-size[0] // tile), -(-size[1] // tile))


@torch.library.custom_op("wsp::input_transform", mutates_args=())
def input_transform(
    x: Tensor, columns: Tensor, column_offset: Tensor, padding: list[int], tile: int
) -> Tensor:
    """V = B^T d B of every tile d, compacted to the kept columns.

    Args:
        x: [N, c, H, W] or [c, H, W].
        columns, column_offset: see the module's docstring.
        padding: zeros added (vertically, horizontally) on each side.
        tile: output tile side m.

    Returns:
        [C, T], T = N * ceil(H_out / m) * ceil(W_out / m).
    """
    winograd = transform(tile)
    dtype, p = _compute_dtype(x.dtype), winograd.input_side
    x, tiles = _images(x), _tile_grid(x, padding, tile)
    below = [count * tile + FILTER_SIDE - 1 - x.shape[2 + i] - padding[i] for i, count in enumerate(tiles)]
    padded = F.pad(x.to(dtype), (padding[1], below[1], padding[0], below[0]))
    d = padded.unfold(2, p, tile).unfold(3, p, tile)  # [N, c, tile rows, tile columns, p, p]
    BT = winograd.tensor("BT", dtype, x.device)
    full = torch.einsum("ai,nchwij,bj->abcnhw", BT, d, BT)
    V = full.reshape(p * p, x.shape[1], x.shape[0] * tiles[0] * tiles[1])  # [p*p, c, T]
    position = torch.repeat_interleave(column_offset.diff().long())
    return V[position, columns.long()]


@_fake(input_transform)
def _(x: Tensor, columns: Tensor, column_offset: Tensor, padding: list[int], tile: int) -> Tensor:
    x, tiles = _images(x), _tile_grid(x, padding, tile)
    return x.new_empty((columns.shape[0], x.shape[0] * tiles[0] * tiles[1]), dtype=_compute_dtype(x.dtype))


@torch.library.custom_op("wsp::sparse_bgemm", mutates_args=())
def sparse_bgemm(
    V: Tensor, weight: Tensor, rows: Tensor, row_offset: Tensor, column_offset: Tensor
) -> Tensor:
    """M_k = U_k V_k for every position k, over the kept rows and columns only.

    Args:
        V: [C, T].
        weight, rows, row_offset, column_offset: see the module's docstring; of ``rows`` only the length.

    Returns:
        [R, T].
    """
    parts = torch.split(V, _counts(column_offset))
    matrices = split_weight(weight.to(V.dtype), row_offset, column_offset)
    return torch.cat([U_k @ V_k for U_k, V_k in zip(matrices, parts, strict=True)])


@_fake(sparse_bgemm)
def _(V: Tensor, weight: Tensor, rows: Tensor, row_offset: Tensor, column_offset: Tensor) -> Tensor:
    return V.new_empty((rows.shape[0], V.shape[1]))


def apply_activation(y: Tensor, activation: str, slope: Tensor | None) -> Tensor:
    """The epilogue's activation; "prelu" multiplies negative values by ``slope``, [1] or [size of dim 1]."""
    if activation == "relu":
        return F.relu(y)
    if activation == "relu6":
        return F.relu6(y)
    if activation == "prelu":
        assert slope is not None
        return torch.where(y < 0, y * slope.to(y.dtype).view(-1, *[1] * (y.dim() - 2)), y)
    return y


@torch.library.custom_op("wsp::output_transform", mutates_args=())
def output_transform(
    M: Tensor,
    x: Tensor,
    rows: Tensor,
    row_offset: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    slope: Tensor | None,
    padding: list[int],
    tile: int,
    activation: str,
    channels_last: bool,
    like: Tensor | None = None,
) -> Tensor:
    """Y = A^T M A of every tile, pruned rows counting as zero, then + bias, + residual, activation.

    Args:
        M: [R, T].
        x: the convolution's input; only its shape, dtype and memory format are read.
        rows, row_offset: see the module's docstring.
        bias: [n].
        residual: None, or a tensor that is added before the activation.
        slope: None, or the negative slope of "prelu", [1] or [n].
        padding, tile: as in :func:`input_transform`.
        activation: one of :data:`ACTIVATIONS`.
        channels_last: the output is channels_last whatever the input is: the convolution's weight was, or
            only lowered layers read the output.
        like: None, or a tensor whose memory format the output takes instead of x's.

    Returns:
        [N, n, H_out, W_out] (or [n, H_out, W_out]) of x's dtype.
    """
    winograd = transform(tile)
    n, p, T, batch = bias.shape[0], winograd.input_side, M.shape[1], _images(x).shape[0]
    size, tiles = _output_size(x, padding), _tile_grid(x, padding, tile)
    full = M.new_zeros((p * p, n, T))
    position = torch.repeat_interleave(row_offset.diff().long())
    full[position, rows.long()] = M
    AT = winograd.tensor("AT", M.dtype, M.device)
    y = torch.einsum("ai,ijfnhw,bj->nfhawb", AT, full.view(p, p, n, batch, tiles[0], tiles[1]), AT)
    y = y.reshape(batch, n, tiles[0] * tile, tiles[1] * tile)[:, :, : size[0], : size[1]]
    y = y + bias.to(y.dtype).view(-1, 1, 1)
    y = y if x.dim() == 4 else y.squeeze(0)
    if residual is not None:
        y = y + residual
    y = apply_activation(y, activation, slope).to(_output_dtype(x, residual))
    # contiguous() leaves a tensor with one channel as it is: both formats, but not the strides of either
    last = _output_format(x if like is None else like, y, channels_last)
    return torch.empty_like(y, memory_format=last).copy_(y)


def _output_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    return x.dtype if residual is None else torch.result_type(x, residual)


def _output_format(x: Tensor, y: Tensor, channels_last: bool) -> torch.memory_format:
    last = y.dim() == 4 and (channels_last or suggest_channels_last(x))
    return torch.channels_last if last else torch.contiguous_format


@_fake(output_transform)
def _(
    M: Tensor,
    x: Tensor,
    rows: Tensor,
    row_offset: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    slope: Tensor | None,
    padding: list[int],
    tile: int,
    activation: str,
    channels_last: bool,
    like: Tensor | None = None,
) -> Tensor:
    y = x.new_empty((*x.shape[:-3], bias.shape[0], *_output_size(_images(x), padding)))
    if residual is not None:
        y = y + residual
    return torch.empty_like(y, memory_format=_output_format(x if like is None else like, y, channels_last))


@torch.library.custom_op("wsp::winograd_conv2d", mutates_args=())
def winograd_conv2d(
    x: Tensor,
    weight: Tensor,
    rows: Tensor,
    row_offset: Tensor,
    columns: Tensor,
    column_offset: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    slope: Tensor | None,
    padding: list[int],
    tile: int,
    activation: str,
    channels_last: bool,
    like: Tensor | None = None,
) -> Tensor:
    """The three stages as one operator; arguments as in the separate ones."""
    V = input_transform(x, columns, column_offset, padding, tile)
    M = sparse_bgemm(V, weight, rows, row_offset, column_offset)
    return output_transform(
        M, x, rows, row_offset, bias, residual, slope, padding, tile, activation, channels_last, like
    )


@_fake(winograd_conv2d)
def _(
    x: Tensor,
    weight: Tensor,
    rows: Tensor,
    row_offset: Tensor,
    columns: Tensor,
    column_offset: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    slope: Tensor | None,
    padding: list[int],
    tile: int,
    activation: str,
    channels_last: bool,
    like: Tensor | None = None,
) -> Tensor:
    M = x.new_empty((rows.shape[0], 0))
    return output_transform(
        M, x, rows, row_offset, bias, residual, slope, padding, tile, activation, channels_last, like
    )
