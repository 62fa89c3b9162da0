"""Tensors that calibration or training adds to a plan: refitted Winograd weights, batch-norm statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wsp_compiler.errors import PlanError


@dataclass(frozen=True, eq=False)
class SiteRefit:
    """Weights of one pruned convolution that are no longer those of its 3x3 filters.

    Attributes:
        weight: float32 [kept weights], U [p*p, n, c] where ``keep`` is True, in that order, on the CPU.
        bias: float32 [n], replaces the convolution's bias.
        steps: iterations of the solver, 0 if the weights were trained.
    """

    weight: Tensor
    bias: Tensor
    steps: int = 0

    @classmethod
    def pack(cls, U: Tensor, bias: Tensor, keep: Tensor, steps: int = 0) -> SiteRefit:
        """The kept part of U [p*p, n, c]; ``keep`` is bool and broadcastable to it."""
        kept = U.detach()[keep.to(U.device).expand(U.shape)].to("cpu", torch.float32)
        return cls(kept, bias.detach().to("cpu", torch.float32, copy=True), steps)

    def unpack(self, keep: Tensor, shape: tuple[int, int, int]) -> Tensor:
        """U [p*p, n, c] float32 on the CPU, zeros where not kept."""
        U = torch.zeros(shape)
        U[keep.cpu().expand(shape)] = self.weight
        return U

    def check(self, path: str, kept: int, filters: int) -> None:
        """Raise :class:`PlanError` unless there are ``kept`` weights and ``filters`` biases, float32 and finite."""
        for name, tensor, size in (("weight", self.weight, kept), ("bias", self.bias, filters)):
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != (size,):
                fault = f"refitted {name} is {tensor.dtype} {list(tensor.shape)}, not float32 [{size}]"
            elif not bool(tensor.isfinite().all()):
                fault = f"refitted {name} has NaN or infinite values"
            else:
                continue
            raise PlanError(fault, where=path or "the model itself", fix="calibrate this plan again")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SiteRefit):
            return NotImplemented
        pairs = ((self.weight, other.weight), (self.bias, other.bias))
        return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@dataclass(frozen=True, eq=False)
class NormStatistics:
    """Statistics of a BatchNorm2d, re-estimated: float32 [channels] each, on the CPU."""

    mean: Tensor
    variance: Tensor

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NormStatistics):
            return NotImplemented
        return torch.equal(self.mean, other.mean) and torch.equal(self.variance, other.variance)
