"""A tiny task of the experiments' kind, and a place to run jobs in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.accuracy.experiments import Workplace
from benchmarks.accuracy.tasks import Task, TrainingImages


def to_float(images: torch.Tensor, _: torch.Generator) -> torch.Tensor:
    return images.float() / 255.0 - 0.5


@pytest.fixture
def task() -> Task:
    """Two classes, told apart by which half of the picture is bright."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % 2
    images = torch.randint(0, 60, (48, 3, 32, 32), generator=generator)
    images[labels == 0, :, :16] += 150
    images[labels == 1, :, 16:] += 150
    images = images.to(torch.uint8)
    batches = [
        (to_float(images[start : start + 12], generator), labels[start : start + 12]) for start in (0, 12)
    ]
    source = TrainingImages(images[24:], labels[24:], to_float)
    return Task("halves", 2, 32, source, [batches[0][0][:4]], batches[:1], batches)


@pytest.fixture
def place(task: Task, tmp_path: Path) -> Workplace:
    return Workplace(task, tmp_path, torch.device("cpu"), batch=4, shorten=10**6)
