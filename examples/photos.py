"""The photos of the example: where they are, how they are split, and the noise added to them.

All of them are files that the packages scikit-image and scikit-learn install (their licences are told there);
nothing is downloaded. Where those packages are not installed, the environment variable WSP_PHOTOS names a folder with
copies of the files.
The split is named here and nowhere else:

- `TRAIN`: the denoiser's weights were fitted to these. Both halves of the one stereo pair are here.
- `CALIBRATION`: for a compiler that wants sample activations. Neither trained on nor tested on.
- `HELD_OUT`: natural photos that only tests and reports look at.

A photo is a float32 tensor of intensities in [0, 1]: 0 is black and 1 is white. Noise levels are standard
deviations on the usual scale of 0 to 255, so `sigma=25` adds noise of standard deviation 25 / 255.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from examples import INSTALL_HINT, optional_module, optional_package_folder

FOLDER_VARIABLE = "WSP_PHOTOS"
"""Environment variable: a folder with the photos' files, looked into instead of the packages'."""
SIGMA = 25.0
"""Standard deviation of the noise the denoiser is trained for, of 255."""

TRAIN = (
    "motorcycle_left",
    "motorcycle_right",
    "china",
    "rocket",
    "brick",
    "grass",
    "gravel",
    "moon",
    "retina",
    "ihc",
    "hubble_deep_field",
    "page",
    "text",
    "cell",
    "clock_motion",
)
CALIBRATION = ("chelsea", "coins")
HELD_OUT = ("camera", "astronaut", "coffee", "flower")

_SCIKIT_LEARN = {"china": "china.jpg", "flower": "flower.jpg"}
_SCIKIT_IMAGE = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cell": "cell.png",
    "chelsea": "chelsea.png",
    "clock_motion": "clock_motion.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble_deep_field": "hubble_deep_field.jpg",
    "ihc": "ihc.png",
    "moon": "moon.png",
    "motorcycle_left": "motorcycle_left.png",
    "motorcycle_right": "motorcycle_right.png",
    "page": "page.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "text": "text.png",
}


def photo_path(name: str) -> Path:
    """File of one photo; `name` is an entry of `TRAIN`, `CALIBRATION` or `HELD_OUT`."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder and name in _SCIKIT_LEARN | _SCIKIT_IMAGE:
        path = Path(folder) / (_SCIKIT_LEARN | _SCIKIT_IMAGE)[name]
    elif name in _SCIKIT_LEARN:
        path = optional_package_folder("sklearn") / "datasets" / "images" / _SCIKIT_LEARN[name]
    elif name in _SCIKIT_IMAGE:
        path = optional_package_folder("skimage") / "data" / _SCIKIT_IMAGE[name]
    else:
        known = ", ".join(TRAIN + CALIBRATION + HELD_OUT)
        raise ValueError(f"no photo is named {name!r}; the photos are: {known}")
    if not path.is_file():
        raise FileNotFoundError(
            f"photo {name!r} is not at {path}: scikit-image 0.24 and scikit-learn 1.5 or newer install it "
            f"({INSTALL_HINT})"
        )
    return path


def load(name: str) -> Tensor:
    """One photo in grayscale, at full size.

    Returns:
        [1, 1, height, width], float32 in [0, 1], on the CPU. A colour photo gives its luma (ITU-R 601,
        Pillow's mode "L").
    """
    return _read(name, mode="L", scale=1.0).unsqueeze(0)


def load_color(name: str, scale: float = 1.0) -> Tensor:
    """One photo in colour, optionally resized; a grayscale photo has three equal planes.

    Args:
        name: an entry of `TRAIN`, `CALIBRATION` or `HELD_OUT`.
        scale: factor for both sides, at most 1; Lanczos with antialiasing.

    Returns:
        [3, round(height * scale), round(width * scale)], float32 in [0, 1], on the CPU.
    """
    return _read(name, mode="RGB", scale=scale)


def _read(name: str, *, mode: str, scale: float) -> Tensor:
    """Decode one photo in a Pillow mode, [planes, height, width]."""
    numpy = optional_module("numpy")
    pillow = optional_module("PIL.Image")
    with pillow.open(photo_path(name)) as file:
        picture = file.convert(mode)
    if scale != 1.0:
        size = (round(picture.width * scale), round(picture.height * scale))
        picture = picture.resize(size, pillow.Resampling.LANCZOS)
    values = torch.from_numpy(numpy.array(picture, dtype=numpy.float32)) / 255.0
    return values.unsqueeze(0) if mode == "L" else values.permute(2, 0, 1).contiguous()


def calibration_crops(count: int = 8, side: int = 128) -> Tensor:
    """Noisy square crops of the calibration photos, spread evenly over them; the same at every call.

    Args:
        count: of crops, taken from the photos in turn.
        side: in pixels. Small crops are mostly border, which large photos are not: 128 is enough for the denoiser.

    Returns:
        [count, 1, side, side], float32.
    """
    crops: list[Tensor] = []
    for index in range(count):
        photo = load(CALIBRATION[index % len(CALIBRATION)])
        turn, places = index // len(CALIBRATION), -(-count // len(CALIBRATION))
        top, left = (
            int((extent - side) * (turn * step % places + 0.5) / places)
            for extent, step in ((photo.shape[2], 3), (photo.shape[3], 1))
        )
        crops.append(noisy(photo[:, :, top : top + side, left : left + side], seed=100 + index))
    return torch.cat(crops)


def noisy(photo: Tensor, sigma: float = SIGMA, seed: int = 0) -> Tensor:
    """The photo with Gaussian noise added; not clipped to [0, 1], as is usual in the literature.

    The noise is drawn on the CPU, so that one seed gives the same noise whatever device the photo is on.

    Args:
        photo: any shape, intensities in [0, 1].
        sigma: standard deviation of the noise, of 255.
        seed: of the noise's generator.

    Returns:
        A tensor of `photo`'s shape, type and device.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(photo.shape, generator=generator) * (sigma / 255.0)
    return photo + noise.to(device=photo.device, dtype=photo.dtype)
