"""Training of pruned networks in the Winograd domain. Needs PyTorch alone: no generated kernels.

| file | what it does |
|---|---|
| `layer.py` | WinogradConv2d: a convolution whose parameters are the kept Winograd weights |
| `prune.py` | prune(model): a trainable copy with such layers; unprune: back to a plan for `compile` |
| `finetune.py` | a training loop: distillation from the dense model, or any loss on labels; resumable |
"""

from __future__ import annotations

from wsp_compiler.training.finetune import finetune
from wsp_compiler.training.layer import WinogradConv2d
from wsp_compiler.training.prune import prune, unprune

__all__ = ["WinogradConv2d", "finetune", "prune", "unprune"]
