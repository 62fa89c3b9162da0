"""A folder with train/CLASS/*.jpg and val/CLASS/*.jpg, such as ImageNet's, read as it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from benchmarks.accuracy.tasks import CALIBRATION_IMAGES, SPLIT_SEED, Batch, Task

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 224
VALIDATION_IMAGES = 5000


class LoadedBatches:
    """Batches of a torch DataLoader, moved to the device; started over at its end."""

    def __init__(self, images: Any, device: torch.device, batch: int, workers: int, shuffle: bool) -> None:
        self.images, self.device, self.batch = images, device, batch
        self.workers, self.shuffle = workers, shuffle
        self.seed(0)

    def __len__(self) -> int:
        return len(self.images)

    def seed(self, seed: int) -> None:
        """Begin the order that belongs to `seed`."""
        self.generator = torch.Generator().manual_seed(seed)
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        loader: Any = DataLoader(
            self.images, self.batch, self.shuffle, num_workers=self.workers, generator=self.generator,
            drop_last=self.shuffle, pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        for x, y in loader:
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def sample(self, count: int) -> Batch:
        """The next images, `count` of them (whole batches of the loader)."""
        found: list[Batch] = []
        while sum(len(y) for _, y in found) < count:
            self._batches = self._batches or iter(self)
            batch = next(self._batches, None)
            if batch is None:
                self._batches = None
            else:
                found.append(batch)
        x, y = (torch.cat(parts)[:count] for parts in zip(*found, strict=True))
        return x, y


def class_folders(
    folder: Path | None, device: torch.device, *, side: int = SIDE, workers: int = 8, batch: int = 64
) -> Task:
    """ImageNet or any folder like it: train/ is split into training, calibration and validation, val/ is the test."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    if folder is None or not (folder / "train").is_dir() or not (folder / "val").is_dir():
        raise FileNotFoundError(
            f"no images in {folder}: put them in FOLDER/train/CLASS/ and FOLDER/val/CLASS/ (as ImageNet's are after "
            "its usual preparation) and give --data FOLDER"
        )
    end = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    plain = transforms.Compose([transforms.Resize(side * 8 // 7), transforms.CenterCrop(side), *end])
    varied = transforms.Compose([transforms.RandomResizedCrop(side), transforms.RandomHorizontalFlip(), *end])
    shown = ImageFolder(str(folder / "train"), varied)
    same, test = (ImageFolder(str(folder / part), plain) for part in ("train", "val"))
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(shown), generator=generator).tolist()
    apart = min(VALIDATION_IMAGES, len(order) // 5)
    few = min(CALIBRATION_IMAGES, len(order) // 5)
    parts = order[:apart], order[apart : apart + few], order[apart + few :]

    def batches(images: Any, shuffle: bool = False) -> Any:
        return LoadedBatches(images, device, min(batch, len(images)), workers, shuffle)

    calibration = [x.cpu() for x, _ in batches(Subset(same, parts[1]))]
    return Task(
        "folder", len(shown.classes), side, batches(Subset(shown, parts[2]), shuffle=True), calibration,
        batches(Subset(same, parts[0])), batches(test),
    )  # fmt: skip
