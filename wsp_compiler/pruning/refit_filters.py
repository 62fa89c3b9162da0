"""Least squares for kept filters that stay 3x3: Winograd weights restricted to U = G g G^T.

Layers whose kept filters the vendor's library runs cannot take the p*p weights per channel that
:func:`wsp_compiler.pruning.refit.refit` fits. The same moments serve: with K = G (x) G, U = K g, the normal
equations of g are K^T gram K g = K^T cross, one system of 9 c unknowns that all kept filters share. Damping is that
of refit, white noise in the input.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from wsp_compiler.pruning.moments import Moments, white_gram
from wsp_compiler.pruning.refit import DAMPING, Refit
from wsp_compiler.winograd import FILTER_SIDE, transform

TAPS = FILTER_SIDE**2


def refit_filters(moments: Moments, U: Tensor, keep: Tensor, *, damping: float | None = None) -> Refit:
    """Fit the kept filters and all biases to the wanted outputs.

    Args:
        moments: of the layer's input and the wanted output.
        U: [p*p, n, c], the weights before pruning.
        keep: bool, broadcastable to [1, n, 1], True = kept.
        damping: energy of the white noise as a share of the inputs' own; None: 9 c / samples, within refit.DAMPING.

    Returns:
        Weights, bias and error as from refit; ``U`` is that of 3x3 filters.
    """
    (p2, n, c), device = U.shape, moments.gram.device
    linear: Any = torch.linalg
    G = transform(moments.tile).tensor("G", torch.float64, device)
    K = torch.kron(G, G)  # [p*p, 9]
    gram = moments.gram.double().view(p2, c, p2, c)
    gram = torch.einsum("kq,kilj->qilj", K, gram)
    gram = torch.einsum("lr,qilj->qirj", K, gram).reshape(TAPS * c, TAPS * c)
    cross = torch.einsum("kq,fki->fqi", K, moments.cross.double().view(n, p2, c)).reshape(n, TAPS * c)
    wanted = torch.einsum("qk,kfi->fqi", linear.pinv(K), U.to(device).double()).reshape(n, TAPS * c)
    if damping is None:
        damping = min(DAMPING[1], max(DAMPING[0], TAPS * c / max(1, moments.samples)))
    white = white_gram(moments.tile, device)  # [p*p, p*p]
    share = float(moments.gram.diagonal().double().sum()) / (float(white.diagonal().sum()) * c)
    noise = (K.T @ white @ K) * damping * max(share, 1e-30)  # [9, 9]
    damp = torch.kron(noise, torch.eye(c, dtype=noise.dtype, device=device))
    kept = keep.to(device).expand(1, n, 1).flatten()
    fitted = torch.zeros_like(wanted)
    fitted[kept] = cast("Tensor", linear.solve(gram + damp, (cross + wanted @ damp)[kept].T)).T
    explained, energy = (fitted * cross).sum(1), ((fitted @ gram) * fitted).sum(1)
    variance = moments.variance.to(energy)
    matched = energy > 1e-9 * variance  # as in refit: the output keeps its mean and variance
    scale = torch.where(matched, (variance / energy.clamp_min(1e-30)).sqrt(), 1.0)
    fitted, explained, energy = fitted * scale.view(-1, 1), explained * scale, energy * scale.square()
    lost = float((variance - 2 * explained + energy).clamp_min(0).sum())
    error = (lost / max(float(variance.sum()), 1e-30)) ** 0.5
    result = torch.einsum("kq,fqi->kfi", K, fitted.view(n, TAPS, c))
    flat = result.permute(1, 0, 2).reshape(n, p2 * c)
    bias = moments.mean.double() - flat @ moments.reach.double()
    return Refit(result.float().contiguous(), bias.float(), error, 1)
