"""The shipped example: a photo denoiser, the photos it was trained on, and the job that compiles it.

| file | what it does |
|---|---|
| `photos.py` | names the photos (training, calibration, held out), loads them, adds noise |
| `denoiser.py` | the network, its shipped weights, and PSNR |
| `train_denoiser.py` | trains the shipped weights: `python -m examples.train_denoiser` |
| `finetune_denoiser.py` | prunes and fine-tunes it: `python -m examples.finetune_denoiser` |
| `pruned_file.py` | packed files of fine-tuned networks |
| `denoise_photo.py` | compiles the network and denoises a photo: `python -m examples.denoise_photo` |
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

INSTALL_HINT = "pip install 'wsp_compiler[examples]'"


def optional_module(name: str) -> ModuleType:
    """Import an optional dependency of the examples; say how to install it when it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the examples need the package {name!r}: {INSTALL_HINT}") from error


def optional_package_folder(name: str) -> Path:
    """Folder of an optional dependency, found without importing it (only its data files are wanted)."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the examples need data files of the package {name!r}: {INSTALL_HINT}")
    return Path(spec.origin).parent
