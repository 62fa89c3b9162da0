"""A pruned Winograd convolution in terms that PyTorch is fast at, on any device and with gradients.

All m*m outputs of a tile are linear in its p x p input patch, so a layer with Winograd weights U is one
convolution with p x p filters and stride m that has m*m output channels for each filter, and a pixel shuffle:

    y[f, m t + a, m s + b] = sum_c sum_hw W[f, a, b, c, h, w] x[c, m t + h, m s + w]
    W[f, a, b, c, h, w]    = sum_ij A^T[a, i] A^T[b, j] U_ij[f, c] B^T[i, h] B^T[j, w]

The arithmetic differs from the lowered operators', the function does not: pruned weights are exactly zero in
U, not in W. Calibration and training run layers this way; neither needs generated kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from wsp_compiler.winograd import FILTER_SIDE, tile_grid, transform


def tile_combination(tile: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """[m*m, p*p, p*p]: how output o of a tile depends on patch element q through position k, indexed [o, k, q]."""
    matrices = transform(tile)
    p = matrices.input_side
    AT = matrices.tensor("AT", torch.float64)  # [m, p]
    BT = matrices.tensor("BT", torch.float64)  # [p, p]
    left = torch.einsum("ai,bj->abij", AT, AT).reshape(tile * tile, p * p, 1)
    right = torch.einsum("ih,jw->ijhw", BT, BT).reshape(p * p, p * p)
    return (left * right).to(device, dtype)


def tile_filters(U: Tensor, tile: int, combination: Tensor | None = None) -> Tensor:
    """The filters W that compute whole output tiles.

    Args:
        U: [p*p, n, c] Winograd weights, zeros where pruned; differentiable.
        tile: output tile side m.
        combination: :func:`tile_combination` of U's dtype and device, for callers that keep it; made here if None.

    Returns:
        [n*m*m, c, p, p] of U's dtype, the m*m outputs of a filter next to each other.
    """
    p, (n, c) = tile + FILTER_SIDE - 1, U.shape[1:]
    if combination is None:
        combination = tile_combination(tile, U.dtype, U.device)
    W = torch.einsum("okq,knc->nocq", combination, U)  # [n, m*m, c, p*p]
    return W.reshape(n * tile * tile, c, p, p)


def winograd_convolution(
    x: Tensor, W: Tensor, bias: Tensor | None, padding: tuple[int, int], tile: int
) -> Tensor:
    """The layer whose tiles :func:`tile_filters` computes.

    Args:
        x: [N, c, H, W] or [c, H, W], of W's dtype.
        W: [n*m*m, c, p, p].
        bias: [n] or None.
        padding: zeros on both sides, (vertical, horizontal).
        tile: output tile side m.

    Returns:
        [N, n, H_out, W_out] (or [n, H_out, W_out]).
    """
    if x.dim() == 3:
        return winograd_convolution(x.unsqueeze(0), W, bias, padding, tile).squeeze(0)
    height, width = x.shape[2] + 2 * padding[0] - 2, x.shape[3] + 2 * padding[1] - 2
    rows, columns = tile_grid(x.shape[2], x.shape[3], padding, tile)
    below, right = rows * tile - height, columns * tile - width  # the last tiles may be partly outside
    padded = F.pad(x, (padding[1], padding[1] + right, padding[0], padding[0] + below))
    y = F.pixel_shuffle(F.conv2d(padded, W, stride=tile), tile)[:, :, :height, :width]
    return y if bias is None else y + bias.view(-1, 1, 1)
