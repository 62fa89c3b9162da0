"""The split of the example's photos, their loading, and the noise added to them."""

from __future__ import annotations

import pytest
import torch

from examples import optional_module, optional_package_folder, photos
from examples.denoiser import psnr

EVERY_PHOTO = photos.TRAIN + photos.CALIBRATION + photos.HELD_OUT


def test_no_photo_is_on_two_sides_of_the_split():
    assert len(set(EVERY_PHOTO)) == len(EVERY_PHOTO)
    assert len(photos.CALIBRATION) == 2
    assert len(photos.HELD_OUT) == 4


def test_the_stereo_pair_is_on_one_side():
    pair = {"motorcycle_left", "motorcycle_right"}
    assert any(pair <= set(side) for side in (photos.TRAIN, photos.CALIBRATION, photos.HELD_OUT))


def test_no_two_names_are_one_file():
    assert len({photos.photo_path(name) for name in EVERY_PHOTO}) == len(EVERY_PHOTO)


@pytest.mark.parametrize("name", EVERY_PHOTO)
def test_every_photo_loads(name: str):
    photo = photos.load(name)
    assert photo.dtype == torch.float32
    assert photo.dim() == 4
    assert photo.shape[:2] == (1, 1)
    assert min(photo.shape[2:]) >= 128
    assert 0 <= photo.min() < 0.5 < photo.max() <= 1


def test_color_and_grayscale_agree():
    luma = torch.tensor([0.299, 0.587, 0.114])
    gray = torch.einsum("chw,c->hw", photos.load_color("coffee"), luma)
    torch.testing.assert_close(gray, photos.load("coffee")[0, 0], atol=1 / 255, rtol=0)


def test_a_gray_photo_has_three_equal_planes():
    color = photos.load_color("camera")
    assert color.shape == (3, 512, 512)
    assert torch.equal(color[0], color[2])
    assert torch.equal(color[:1], photos.load("camera")[0])


def test_a_photo_is_resized():
    assert photos.load_color("chelsea", 0.5).shape == (3, 150, 226)


@pytest.mark.parametrize("name", photos.HELD_OUT)
def test_the_noise_has_the_level_it_says(name: str):
    clean = photos.load(name)
    assert psnr(photos.noisy(clean), clean) == pytest.approx(20.17, abs=0.05)  # 20 log10(255 / 25)
    assert psnr(photos.noisy(clean, sigma=50), clean) == pytest.approx(14.15, abs=0.05)


def test_the_noise_is_fixed_by_its_seed():
    clean = photos.load("camera")
    assert torch.equal(photos.noisy(clean, seed=3), photos.noisy(clean, seed=3))
    assert not torch.equal(photos.noisy(clean, seed=3), photos.noisy(clean, seed=4))


def test_an_unknown_photo_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'lena'.*camera"):
        photos.load("lena")


def test_a_photo_that_is_not_installed_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setattr(photos, "optional_package_folder", lambda name: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"camera.*wsp_compiler\[examples\]"):
        photos.load("camera")


def test_photos_can_lie_in_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path):
    (tmp_path / "camera.png").write_bytes(photos.photo_path("camera").read_bytes())
    expected = photos.load("camera")
    monkeypatch.setenv(photos.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(photos, "optional_package_folder", lambda name: pytest.fail(f"looked for {name}"))
    assert torch.equal(photos.load("camera"), expected)
    with pytest.raises(FileNotFoundError, match=r"coffee.*wsp_compiler\[examples\]"):
        photos.load("coffee")
    with pytest.raises(ValueError, match="lena"):
        photos.load("lena")


def test_a_missing_package_is_an_error_that_says_how_to_install_it():
    with pytest.raises(ModuleNotFoundError, match=r"no_such_package.*wsp_compiler\[examples\]"):
        optional_module("no_such_package")
    with pytest.raises(ModuleNotFoundError, match=r"no_such_package.*wsp_compiler\[examples\]"):
        optional_package_folder("no_such_package")


def test_calibration_crops_are_spread_and_repeat():
    crops = photos.calibration_crops(4, 64)
    assert crops.shape == (4, 1, 64, 64)
    assert torch.equal(crops, photos.calibration_crops(4, 64))
    assert len({float(crop.mean()) for crop in crops}) == 4
    chelsea = photos.load("chelsea")  # 300 x 451: the first crop is a quarter down what is left, and left
    top, left = int((300 - 64) * 0.25), int((451 - 64) * 0.25)
    noise = crops[0] - chelsea[0, :, top : top + 64, left : left + 64]
    assert float(noise.std()) == pytest.approx(photos.SIGMA / 255, rel=0.05)
