"""A search in a process that is going to be killed; started by test_search.py with the folder of its state."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn
from torch.utils.data import DataLoader

import wsp_compiler
from tests.abwsp.problem import PR, Fidelity, batches, labelled, net, options


class Slow(Fidelity):
    """Leaves time for being killed, and reads random numbers."""

    def __init__(self, dense: nn.Module, seconds: float) -> None:
        super().__init__(dense)
        self.seconds = seconds

    def __call__(self, model: nn.Module) -> float:
        time.sleep(self.seconds)
        return super().__call__(model) + 1e-3 * float(torch.rand(()))


def run(folder: Path | None, seconds: float = 0.0) -> wsp_compiler.SearchResult:
    """Twelve to eighteen candidates and three short fine-tunings on shuffled data."""
    pairs: Any = [pair for x, y in labelled() for pair in zip(x, y, strict=True)]
    loader: Any = DataLoader(pairs, batch_size=16, shuffle=True)
    model = net()
    settings = {
        "data": loader, "steps": 12, "checkpoint_seconds": 0.0,
        "on_step": lambda step, loss, fraction: time.sleep(seconds / 4),
    }  # fmt: skip
    return wsp_compiler.search(
        model,
        PR,
        Slow(model, seconds),
        batches(),
        state=folder,
        finetune=settings,
        **options(samples=6, beta=3),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), float(sys.argv[2]))
