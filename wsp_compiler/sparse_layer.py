"""SparseLayer: a Winograd convolution with single weights pruned (WWP), run through a library's sparse matrix product.

Elements leave nothing that generated kernels could skip, so the p*p matrices become one block-diagonal matrix in CSR,
which MKL multiplies on the CPU and cuSPARSE on CUDA. This is the baseline that structured pruning is compared with:
transforms are dense products, the sparse product is one library call, arithmetic is float32 whatever the model's dtype.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wsp_compiler.errors import InputError
from wsp_compiler.ops import WinogradSite, apply_activation, suggest_channels_last
from wsp_compiler.winograd import output_size, tile_grid, transform


def block_diagonal(site: WinogradSite) -> Tensor:
    """The p*p matrices [n, c] of a site that is stored in full as one sparse matrix [p*p*n, p*p*c], CSR."""
    matrices = torch.stack(site.position_weights())  # [p*p, n, c]
    positions, n, c = matrices.shape
    position, row, column = matrices.nonzero(as_tuple=True)
    counts = torch.bincount(position * n + row, minlength=positions * n)
    starts = F.pad(counts.cumsum(0), (1, 0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*[Ss]parse.*")  # "beta state"
        # 32-bit indices: MKL would convert others in every call
        return cast("Any", torch).sparse_csr_tensor(
            starts.int(), (position * c + column).int(), matrices[position, row, column],
            size=(positions * n, positions * c), device=matrices.device,
        )  # fmt: skip


class SparseLayer(nn.Module):
    """Runs one lowered convolution whose site is stored by element; arguments as of codegen's WinogradLayer.

    Args:
        path: module path of the convolution.
        site: its weights, zeros where pruned.
        slope: PReLU slope, if the activation has one.
        padding, tile, activation, channels_last: see wsp_compiler.ops.
        dtype: of the convolution's weight; inputs must have it outside autocast. None accepts any.
    """

    def __init__(
        self,
        path: str,
        site: WinogradSite,
        slope: Tensor | None,
        padding: tuple[int, int],
        tile: int,
        activation: str,
        channels_last: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.path, self.site, self.slope = path, site, slope
        self.padding, self.tile, self.activation = padding, tile, activation
        self.channels_last, self.dtype = channels_last, dtype
        self.filters = site.bias.numel()
        self.channels = int(site.keep.shape[2])
        self._state: dict[str, Any] = {"shape": None, "matrices": None}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_state": {"shape": self.last_shape, "matrices": None}}

    @property
    def last_shape(self) -> tuple[int, ...] | None:
        """Shape of the input of the last call."""
        return self._state["shape"]

    @property
    def label(self) -> str:
        """Which library multiplies."""
        return "csr-cusparse" if self.site.weight.is_cuda else "csr-mkl"

    def forward(self, x: Tensor, residual: Tensor | None = None, like: Tensor | None = None) -> Tensor:
        """The convolution with its epilogue: [N, c, H, W] (or [c, H, W]) -> [N, n, H_out, W_out].

        The output has the memory format of ``like``, by default of x.

        Raises:
            InputError: x does not fit the layer.
        """
        x = self._checked(x)
        images = x if x.dim() == 4 else x.unsqueeze(0)
        self._state["shape"] = tuple(images.shape)
        size = [output_size(images.shape[2 + i], self.padding[i]) for i in (0, 1)]
        y = self._convolution(images.float(), (size[0], size[1])) + self.site.bias.view(-1, 1, 1)
        y = y if x.dim() == 4 else y.squeeze(0)
        dtype = x.dtype
        if residual is not None:
            y, dtype = y + residual, torch.result_type(x, residual)
        y = apply_activation(y, self.activation, self.slope).to(dtype)
        last = y.dim() == 4 and (self.channels_last or suggest_channels_last(x if like is None else like))
        return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def _convolution(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """float32 [N, c, H, W] -> [N, n, H_out, W_out], without the bias."""
        U, BB, AA = self._matrices()
        (batch, c, height, width), m = x.shape, self.tile
        p, (vertical, horizontal) = m + 2, self.padding
        rows, columns = tile_grid(height, width, self.padding, m)
        below, right = rows * m + 2 - height - vertical, columns * m + 2 - width - horizontal
        padded = F.pad(x, (horizontal, right, vertical, below)).transpose(0, 1)  # [c, N, ...]
        d = padded.unfold(2, p, m).unfold(3, p, m)  # [c, N, rows, columns, p, p]
        patches = d.permute(4, 5, 0, 1, 2, 3).reshape(p * p, -1)  # [p*p, c*T]
        V = (BB @ patches).view(p * p * c, -1)  # [p*p*c, T]
        M = U @ V if V.numel() else V.new_zeros((U.shape[0], V.shape[1]))  # [p*p*n, T]
        y = (AA @ M.view(p * p, -1)).view(m, m, self.filters, batch, rows, columns)
        y = y.permute(3, 2, 4, 0, 5, 1).reshape(batch, self.filters, rows * m, columns * m)
        return y[:, :, : size[0], : size[1]]

    def _matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """(U as CSR, B^T (x) B^T [p*p, p*p], A^T (x) A^T [m*m, p*p])."""
        if self._state["matrices"] is None:
            device, matrices = self.site.weight.device, transform(self.tile)
            BT, AT = (matrices.tensor(name, torch.float32, device) for name in ("BT", "AT"))
            self._state["matrices"] = (
                block_diagonal(self.site), torch.kron(BT, BT), torch.kron(AT, AT),
            )  # fmt: skip
        return cast("tuple[Tensor, Tensor, Tensor]", self._state["matrices"])

    def _checked(self, x: Tensor) -> Tensor:
        where, device = (
            f"convolution {self.path}" if self.path else "the convolution",
            self.site.weight.device,
        )
        expected = self.dtype
        if x.device == device and torch.is_autocast_enabled(x.device.type):
            expected = torch.get_autocast_dtype(x.device.type)
            x = x.to(expected)
        if x.device != device or expected not in (None, x.dtype):
            raise InputError(
                f"expected an input of {expected} on {device}, got {x.dtype} on {x.device}",
                where=where,
                fix="convert or move the input, or compile the model for them",
            )
        smallest = [3 - 2 * padding for padding in self.padding]
        if x.dim() not in (3, 4) or x.shape[-3] != self.channels:
            raise InputError(
                f"expected an input [N, {self.channels}, H, W], got {list(x.shape)}",
                where=where,
                fix=f"give it {self.channels} channels",
            )
        if x.shape[-2] < smallest[0] or x.shape[-1] < smallest[1]:
            raise InputError(
                f"a {x.shape[-2]}x{x.shape[-1]} input is smaller than the 3x3 filter",
                where=where,
                fix="give a larger image",
            )
        return x
