"""Least squares: kept Winograd weights that give the wanted outputs best, for all filters of a layer at once.

Every filter f with kept weights S solves (gram + damping)[S, S] X = (cross + damping U)[f, S]. The matrix is
shared; only S differs. Conjugate gradients therefore run on all filters together: one product with the shared
matrix per step, restricted to the rows that each position keeps, preconditioned by each position's own block.

Damping is that of white noise in the input, whose wanted output is that of the unpruned weights: few or
similar samples leave directions open, and there the layer keeps doing what it did. It weighs every position as
the position reaches the output, where one constant for all would not. Its strength follows how many unknowns
there are for each sample: on features of a denoiser, with 0.01 to 2 unknowns a sample, held-out error was within
a few percent of the best at a strength equal to that ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from wsp_compiler.pruning.moments import Moments, white_gram

DAMPING = (1e-3, 1.0)
"""Least and most energy of the white noise, as a share of the inputs' own."""
TOLERANCE = 1e-4
"""Conjugate gradients stop when all residuals have shrunk by this factor, or after MAX_STEPS."""
MAX_STEPS = 150


@dataclass(frozen=True)
class Refit:
    """Refitted weights of one layer.

    Attributes:
        U: [p*p, n, c] float32, zero where not kept.
        bias: [n] float32.
        error: relative L2 error of the layer's output about its mean, on the samples of the moments.
        steps: of conjugate gradients.
    """

    U: Tensor
    bias: Tensor
    error: float
    steps: int


def refit(
    moments: Moments,
    U: Tensor,
    keep: Tensor,
    *,
    damping: float | None = None,
    match: bool = True,
    max_steps: int = MAX_STEPS,
) -> Refit:
    """Fit the kept weights and the bias to the wanted outputs.

    Args:
        moments: of the layer's input and the wanted output.
        U: [p*p, n, c], the weights before pruning.
        keep: bool, broadcastable to U, True = kept.
        damping: energy of the white noise as a share of the inputs' own; None: kept weights per filter / samples,
            within :data:`DAMPING`.
        match: scale every filter so that the mean and variance of its output are the wanted ones, which is what
            re-estimating the statistics of a batch norm behind it would do. Least squares alone shrinks outputs.
        max_steps: of conjugate gradients; fewer for an estimate of the error.
    """
    p2, n, c = U.shape
    dtype = moments.gram.dtype
    keep = keep.to(moments.gram.device).expand(U.shape)
    wanted = U.to(moments.gram).permute(1, 0, 2).reshape(n, p2 * c)
    kept = keep.permute(1, 0, 2).reshape(n, p2 * c)
    if damping is None:
        unknowns = float(kept.sum()) / n
        damping = min(DAMPING[1], max(DAMPING[0], unknowns / max(1, moments.samples)))
    system = _System(moments, kept.view(n, p2, c), damping)
    right = torch.where(kept, moments.cross + system.damp(wanted), torch.zeros((), dtype=dtype).to(wanted))
    fitted, steps = system.solve(right, torch.where(kept, wanted, torch.zeros_like(wanted)), max_steps)
    explained = (fitted * moments.cross).sum(1).double()
    energy = (fitted * system.gram_product(fitted)).sum(1).double()  # of the fitted output, about its mean
    variance = moments.variance
    if match:
        scale = torch.where(energy > 1e-9 * variance, (variance / energy.clamp_min(1e-30)).sqrt(), 1.0)
        fitted = fitted * scale.to(dtype).view(-1, 1)
        explained, energy = explained * scale, energy * scale.square()
    lost = float((variance - 2 * explained + energy).clamp_min(0).sum())
    error = (lost / max(float(variance.sum()), 1e-30)) ** 0.5
    bias = moments.mean - fitted.double() @ moments.reach
    return Refit(fitted.view(n, p2, c).permute(1, 0, 2).float().contiguous(), bias.float(), error, steps)


class _System:
    """The damped gram as a linear operator on weights [n, p*p*c] restricted to the kept ones."""

    def __init__(self, moments: Moments, kept: Tensor, damping: float) -> None:
        self.gram, self.kept = moments.gram, kept
        _, p2, c = kept.shape
        white = white_gram(moments.tile, self.gram.device)
        share = float(self.gram.diagonal().double().sum()) / (float(white.diagonal().sum()) * c)
        self.white = (white * damping * max(share, 1e-30)).to(self.gram.dtype)  # [p*p, p*p]
        rows = kept.any(2)  # [n, p*p]
        self.rows = [rows[:, k].nonzero().flatten() for k in range(p2)]
        self.whole_rows = bool((kept == rows.unsqueeze(2)).all())
        blocks = moments.position_grams()  # [p*p, c, c]
        eye = torch.eye(c, dtype=blocks.dtype, device=blocks.device)
        blocks = blocks + self.white.diagonal().view(-1, 1, 1) * eye
        self.diagonal = blocks.diagonal(dim1=1, dim2=2).reshape(1, p2, c)
        if self.whole_rows:
            # Not linalg.inv: with PyTorch 2.14 and several CPU threads its batched LU fails from 256 channels on.
            factor, failed = cast("Any", torch.linalg).cholesky_ex(blocks.double())
            inverse = torch.cholesky_inverse(factor).to(blocks.dtype)
            diagonal = torch.diag_embed(1 / self.diagonal.view(p2, c))
            self.inverse = torch.where((failed == 0).view(-1, 1, 1), inverse, diagonal)

    def damp(self, X: Tensor) -> Tensor:
        """Damping times X [n, p*p*c]."""
        blocks = X.view(self.kept.shape)
        return torch.einsum("kl,nlc->nkc", self.white, blocks).reshape(X.shape)

    def gram_product(self, X: Tensor) -> Tensor:
        """X gram, computed where something is kept only."""
        n, p2, c = self.kept.shape
        columns = self.gram.view(p2 * c, p2, c)
        result = torch.zeros_like(X)
        by_position = result.view(n, p2, c)
        for k, rows in enumerate(self.rows):
            if len(rows) == n:
                by_position[:, k] = X @ columns[:, k]
            elif len(rows):
                by_position[rows, k] = X[rows] @ columns[:, k]
        return result

    def product(self, X: Tensor) -> Tensor:
        """X (gram + damping) on the kept weights."""
        return torch.where(
            self.kept.reshape(X.shape), self.gram_product(X) + self.damp(X), torch.zeros_like(X)
        )

    def precondition(self, R: Tensor) -> Tensor:
        n, p2, c = self.kept.shape
        blocks = R.view(n, p2, c)
        if not self.whole_rows:
            return (blocks / self.diagonal).reshape(R.shape)
        solved = torch.bmm(blocks.transpose(0, 1), self.inverse).transpose(0, 1)
        return torch.where(self.kept, solved, torch.zeros_like(solved)).reshape(R.shape)

    def solve(self, right: Tensor, start: Tensor, max_steps: int = MAX_STEPS) -> tuple[Tensor, int]:
        """Preconditioned conjugate gradients, every filter on its own: (solution, steps)."""
        x, residual = start, right - self.product(start)
        scaled = self.precondition(residual)
        direction, rho = scaled, (residual * scaled).sum(1, keepdim=True)
        first = (right * self.precondition(right)).sum(1, keepdim=True)
        steps = 0
        for steps in range(1, max_steps + 1):
            image = self.product(direction)
            curvature = (direction * image).sum(1, keepdim=True)
            step = torch.where(curvature > 0, rho / curvature.clamp_min(1e-38), torch.zeros_like(rho))
            x = x + step * direction
            residual = residual - step * image
            scaled = self.precondition(residual)
            previous, rho = rho, (residual * scaled).sum(1, keepdim=True)
            if steps % 5 == 0 and bool((rho <= TOLERANCE**2 * first).all()):
                break
            turn = torch.where(previous > 0, rho / previous.clamp_min(1e-38), torch.zeros_like(rho))
            direction = scaled + turn * direction
        return x, steps
