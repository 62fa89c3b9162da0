"""Folders of classes: splits, batches on demand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.accuracy.folder import class_folders

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from PIL import Image

    for part, count in (("train", 10), ("val", 3)):
        for shade, name in enumerate(("dark", "light")):
            place = tmp_path / part / name
            place.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40 + number, 36), (200 * shade,) * 3).save(place / f"{number}.png")
    return tmp_path


def test_batches_of_all_splits(folder: Path) -> None:
    task = class_folders(folder, CPU, side=28, workers=0, batch=4)
    assert (task.classes, task.side) == (2, 28)
    assert (len(task.train), len(task.validation), len(task.test)) == (12, 4, 6)
    assert sum(len(x) for x in task.calibration) == 4
    for _ in range(2):  # evaluation data can be read again
        found = list(task.test)
        assert sum(len(y) for _, y in found) == 6
        for x, y in found:
            assert x.shape[1:] == (3, 28, 28)
            assert torch.equal(y, (x.mean((1, 2, 3)) > 0).long())


def test_training_batches_go_on_for_ever_and_repeat_with_their_seed(folder: Path) -> None:
    task = class_folders(folder, CPU, side=28, workers=0, batch=4)
    task.train.seed(5)
    first = [task.train.sample(6) for _ in range(4)]
    assert all(x.shape == (6, 3, 28, 28) and y.shape == (6,) for x, y in first)
    task.train.seed(5)
    assert torch.equal(task.train.sample(6)[1], first[0][1])
