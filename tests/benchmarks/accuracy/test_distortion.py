"""Distorted digits: shape, range, and that every knob does what it says."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.accuracy.distortion import Distortion

STILL = Distortion(rotation=0, zoom=(1, 1), shear=0, shift=0, clutter=0, noise=0)


def draw(distortion: Distortion, seed: int = 0) -> torch.Tensor:
    digits = torch.zeros(6, 1, 28, 28, dtype=torch.uint8)
    digits[:, :, 8:20, 12:16] = 255
    return distortion(digits, torch.Generator().manual_seed(seed))


def test_views_repeat_with_their_seed() -> None:
    assert draw(Distortion()).shape == (6, 3, 32, 32)
    assert torch.equal(draw(Distortion()), draw(Distortion()))
    assert not torch.equal(draw(Distortion()), draw(Distortion(), seed=1))


def test_without_distortion_the_digit_stands_in_the_middle_and_out() -> None:
    images = draw(STILL)
    bar = images[:, :, 12:20, 15:17].mean((2, 3))
    rest = images[:, :, :, :8]
    assert float(rest.std((2, 3)).max()) < 1e-5  # one colour
    assert bool((bar - rest.mean((2, 3)) > 0.3 / 0.3 - 1e-3).all())  # at least 0.3 brighter, in units of 0.3


def test_each_knob_changes_the_picture() -> None:
    plain = draw(STILL)
    for name, value in (("rotation", 40.0), ("zoom", (0.5, 0.6)), ("shear", 0.5), ("shift", 0.5)):
        moved = draw(replace(STILL, **{name: value}))
        assert not torch.allclose(moved, plain, atol=0.1), name
    assert float(draw(replace(STILL, noise=0.2))[:, :, :, :8].std((2, 3)).min()) > 0.5
    cluttered = draw(replace(STILL, clutter=3))
    assert int((cluttered.std((1, 2, 3)) > plain.std((1, 2, 3))).sum()) >= 4
