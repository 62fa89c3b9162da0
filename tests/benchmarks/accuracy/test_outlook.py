"""Accuracy as a share, and batch norms that are re-estimated."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.accuracy.outlook import accuracy, adapt_norms
from benchmarks.accuracy.tasks import Task, TrainingImages


def test_accuracy_counts_all_batches() -> None:
    batches = [
        (torch.eye(4).view(4, 4, 1, 1), torch.tensor([0, 1, 2, 0])),
        (torch.eye(4)[:1].view(1, 4, 1, 1), torch.tensor([0])),
    ]
    assert accuracy(nn.Flatten(), batches) == pytest.approx(4 / 5)
    with pytest.raises(ValueError, match="no batch"):
        accuracy(nn.Flatten(), [])


def test_norms_take_the_statistics_of_the_training_images(task: Task) -> None:
    images = torch.randint(
        0, 255, (64, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    source = TrainingImages(images, torch.zeros(64), lambda x, generator: x.float())
    norm = nn.BatchNorm2d(3, momentum=0.3)
    norm.running_mean.fill_(1e6)
    adapt_norms(nn.Sequential(norm), source, 20, 32)
    wanted = images.float()
    assert torch.allclose(norm.running_mean, wanted.mean((0, 2, 3)), rtol=0.05)
    assert torch.allclose(norm.running_var, wanted.var((0, 2, 3)), rtol=0.05)
    assert (norm.momentum, norm.training) == (0.3, False)
    without = nn.Sequential(nn.Conv2d(3, 2, 3))
    assert adapt_norms(without, None) is without  # nothing to adapt: no batch is drawn
