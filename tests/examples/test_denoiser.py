"""The example network, its shipped weights, and PSNR."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from examples import photos
from examples.denoiser import WEIGHTS, Denoiser, load_denoiser, psnr


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return load_denoiser()


def crop(name: str) -> torch.Tensor:
    """A part of a photo that starts at a quarter of its height and of its width: [1, 1, 128, 128]."""
    photo = photos.load(name)
    top, left = (side // 4 for side in photo.shape[2:])
    return photo[:, :, top : top + 128, left : left + 128]


def test_the_network_is_a_dncnn():
    convolutions = [module for module in Denoiser().modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 17
    assert all(layer.kernel_size == (3, 3) and layer.padding == (1, 1) for layer in convolutions)
    assert all(layer.stride == (1, 1) for layer in convolutions)
    assert [layer.in_channels for layer in convolutions] == [1] + [64] * 16
    assert [layer.out_channels for layer in convolutions] == [64] * 16 + [1]
    assert sum(isinstance(module, nn.BatchNorm2d) for module in Denoiser().modules()) == 15


def test_the_network_predicts_the_noise():
    model = Denoiser(channels=4, middle_layers=1).eval()
    nn.init.zeros_(model.last.weight)
    nn.init.constant_(model.last.bias, 0.25)
    photo = torch.rand(2, 1, 9, 7)
    torch.testing.assert_close(model(photo), photo - 0.25)


def test_the_network_traces():
    model = Denoiser(channels=4, middle_layers=2).eval()
    photo = torch.rand(1, 1, 11, 13)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(photo), model(photo))


def test_the_shipped_weights_are_small():
    assert WEIGHTS.stat().st_size < 2_500_000


def test_the_shipped_weights_name_the_split_they_were_trained_on():
    with safe_open(WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert tuple(json.loads(metadata["train"])) == photos.TRAIN
    assert tuple(json.loads(metadata["held_out"])) == photos.HELD_OUT
    assert json.loads(metadata["sigma"]) == photos.SIGMA


@pytest.mark.parametrize("name", photos.HELD_OUT)
def test_the_denoiser_gains_seven_decibels_on_photos_it_never_saw(denoiser: Denoiser, name: str):
    assert not denoiser.training
    clean = crop(name)
    noisy = photos.noisy(clean)
    with torch.inference_mode():
        denoised = denoiser(noisy).clamp(0, 1)
    assert psnr(denoised, clean) >= psnr(noisy, clean) + 7


def test_missing_weights_are_an_error_that_says_how_to_make_them(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"python -m examples\.train_denoiser"):
        load_denoiser(tmp_path / "none.safetensors")


def test_psnr():
    black = torch.zeros(1, 1, 4, 4)
    assert psnr(black, black) == math.inf
    assert psnr(black, black + 0.1) == pytest.approx(20)
    assert psnr(black, black + 1) == pytest.approx(0)
    with pytest.raises(ValueError, match="one shape"):
        psnr(black, torch.zeros(4, 4))
