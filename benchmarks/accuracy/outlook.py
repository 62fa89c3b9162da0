"""Accuracy, and the accuracy to be expected of a pruned network before it is fine-tuned ("outlook accuracy").

Li, Wu, Su, Wang: EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning (ECCV 2020): the statistics
of batch norm are re-estimated, forward only, before the pruned network is judged (adaptive batch norm).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

ITERATIONS = 100
"""Forward passes that statistics are taken from, as in the ABWSP paper (section 4.3)."""


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of images whose largest output is their label, in [0, 1]; the model runs as it is, in eval mode."""
    model.eval()
    right = total = None
    for x, y in batches:
        hits = (model(x.contiguous(memory_format=torch.channels_last)).argmax(1) == y).sum()
        right = hits if right is None else right + hits
        total = len(y) if total is None else total + len(y)
    if right is None or total is None:
        raise ValueError("no batch to evaluate on")
    return float(right) / total


@torch.no_grad()
def adapt_norms(model: nn.Module, source: Any, iterations: int = ITERATIONS, batch: int = 128) -> nn.Module:
    """Set the statistics of every BatchNorm2d to those of `iterations` training batches, in place; eval mode."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    for _ in range(iterations if norms else 0):
        model(source.sample(batch)[0].contiguous(memory_format=torch.channels_last))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()
