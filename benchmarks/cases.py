"""The convolutions that are timed, as data. All are 3x3, stride 1, padding 1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TWELVE = "twelve"


@dataclass(frozen=True)
class ConvCase:
    """One 3x3, stride 1, padding 1 convolution; sizes in pixels, without the batch."""

    name: str
    channels_in: int
    channels_out: int
    height: int
    width: int
    group: str

    def input_shape(self, batch: int) -> tuple[int, int, int, int]:
        """[n, c, h, w]"""
        return (batch, self.channels_in, self.height, self.width)

    def direct_multiplies(self, batch: int) -> int:
        """Multiplications of the dense, direct convolution (no Winograd, no pruning)."""
        return batch * self.height * self.width * self.channels_in * self.channels_out * 9


def _square(group: str, sizes: Iterable[tuple[int, int]]) -> tuple[ConvCase, ...]:
    """Cases of equal channels in and out on square images, from pairs (channels, height)."""
    return tuple(ConvCase(f"{c}@{h}", c, c, h, h, group) for c, h in sizes)


RESNET18 = _square("resnet18", [(64, 56), (128, 28), (256, 14), (512, 7)])
VGG16 = _square("vgg16", [(64, 224), (128, 112), (256, 56), (512, 28)])
SUPERRES = (ConvCase("64@360x640", 64, 64, 360, 640, "superres"),)
NETWORKS = (
    ConvCase("64-128@112", 64, 128, 112, 112, "networks"),
    ConvCase("128-256@56", 128, 256, 56, 56, "networks"),
    ConvCase("256-512@28", 256, 512, 28, 28, "networks"),
    ConvCase("512@14", 512, 512, 14, 14, "networks"),
    ConvCase("64@512", 64, 64, 512, 512, "networks"),
)
"""What is left of VGG-16, and the example denoiser on its photo."""

GROUPS: dict[str, tuple[ConvCase, ...]] = {
    "resnet18": RESNET18,
    "vgg16": VGG16,
    "eight": (*RESNET18, *VGG16),
    "superres": SUPERRES,
    "networks": NETWORKS,
}
CASES: dict[str, ConvCase] = {case.name: case for cases in GROUPS.values() for case in cases}

# The set the kernels were designed on: its batch sizes belong to it.
TWELVE_JOBS: tuple[tuple[ConvCase, int], ...] = (
    *((case, 32) for case in RESNET18),
    *((case, 32) for case in VGG16),
    *((case, 128) for case in RESNET18),
)


def known_names() -> tuple[str, ...]:
    """Everything that `select` takes: the groups, the twelve, and each case by itself."""
    return (*GROUPS, TWELVE, *CASES)


def check_name(name: str) -> str:
    """`name` itself; ValueError with all known names if it is not one of them."""
    if name not in known_names():
        raise ValueError(f"unknown case {name!r}; known: {', '.join(known_names())}")
    return name


def select(names: Sequence[str], batches: Sequence[int]) -> tuple[tuple[ConvCase, int], ...]:
    """Pairs (case, batch) of the named groups and cases, each pair once, in the order asked for.

    Groups and single cases run at every batch size of `batches`; `twelve` has its own batch sizes.
    """
    jobs: list[tuple[ConvCase, int]] = []
    for name in names:
        if check_name(name) == TWELVE:
            jobs.extend(TWELVE_JOBS)
            continue
        cases = GROUPS[name] if name in GROUPS else (CASES[name],)
        jobs.extend((case, batch) for batch in batches for case in cases)
    return tuple(dict.fromkeys(jobs))
