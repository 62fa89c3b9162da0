"""The distillation job: a tiny run, what it writes, and that the compiler takes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import wsp_compiler
from examples import finetune_denoiser, photos
from examples.denoiser import load_denoiser, psnr
from wsp_compiler.training import WinogradConv2d


@pytest.fixture
def small_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Photos of 48 x 64 pixels: the job is run, its result is not judged."""
    load = photos.load
    monkeypatch.setattr(photos, "load", lambda name: load(name)[:, :, 40:88, 40:104])
    monkeypatch.setattr(photos, "calibration_crops", lambda: photos.noisy(photos.load("chelsea")))
    monkeypatch.setattr(photos, "HELD_OUT", ("camera", "coffee"))
    monkeypatch.setattr(photos, "TRAIN", ("rocket",))


@pytest.mark.usefixtures("small_photos")
@pytest.mark.parametrize(("method", "share"), [("wsp", 0.4), ("fp", 25 / 64)])
def test_a_short_run_writes_a_network_that_compiles(tmp_path: Path, method: str, share: float) -> None:
    out, summary = tmp_path / "new" / "pruned.safetensors", tmp_path / "run.json"
    out.parent.mkdir()
    arguments = [
        "--steps",
        "2",
        "--batch",
        "2",
        "--patch",
        "24",
        "--device",
        "cpu",
        "--pr",
        "0.6",
        "--method",
        method,
    ]
    finetune_denoiser.main([*arguments, "--out", str(out), "--json", str(summary)])
    found = json.loads(summary.read_text())
    assert set(found["psnr"]) == {"dense", "calibrated", "fine-tuned"}
    assert set(found["psnr"]["dense"]) == {"camera", "coffee"}
    assert found["mean_drop"]["dense"] == 0
    model = finetune_denoiser.load_pruned(out)
    layers = [module for module in model.modules() if isinstance(module, WinogradConv2d)]
    assert len(layers) == 15
    kept = sum(float(layer.keep.float().mean()) for layer in layers) / 15
    assert kept == pytest.approx(share, abs=0.001)
    x = photos.noisy(photos.load("camera"))
    compiled = wsp_compiler.compile(model)
    with torch.no_grad():
        expected = model(x)
        assert float((compiled.graph_module(x) - expected).norm() / expected.norm()) < 1e-5
    assert not list(out.parent.glob("*.checkpoint"))


@pytest.mark.parametrize(
    ("name", "pr", "most"),
    [("pr80", 0.8, 0.14), ("filters_pr80", 0.819, 0.16), ("filters_pr90", 0.898, 0.25)],
)
def test_the_shipped_networks_lose_little(name: str, pr: float, most: float) -> None:
    """Read on this machine, compiled; dB on this photo, a little more than where they were trained."""
    clean = photos.load("camera")
    x = photos.noisy(clean)
    path = finetune_denoiser.PRUNED_WEIGHTS.with_name(f"denoiser_{name}.safetensors")
    compiled = wsp_compiler.compile(finetune_denoiser.load_pruned(path))
    assert compiled.achieved_pr == pytest.approx(pr, abs=0.001)
    with torch.no_grad():
        dense, pruned = (psnr(network(x).clamp(0, 1), clean) for network in (load_denoiser(), compiled))
    assert 0 < dense - pruned < most


def test_patches_repeat_with_their_seed() -> None:
    first, second = (next(finetune_denoiser.patches(torch.device("cpu"), 2, 16, seed=3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (2, 1, 16, 16)


def test_mean_drop() -> None:
    assert finetune_denoiser.mean_drop({"a": 30.0, "b": 32.0}, {"a": 29.0, "b": 32.5}) == pytest.approx(0.25)


@pytest.mark.parametrize("arguments", [["--pr", "1"], ["--steps", "5", "--minutes", "1"]])
def test_wrong_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        finetune_denoiser.parse(arguments)


def test_the_loss_is_in_units_of_the_noise() -> None:
    loss = finetune_denoiser.noise_error()
    a = load_denoiser()(torch.zeros(1, 1, 8, 8)).detach()
    assert float(loss(a + photos.SIGMA / 255, a)) == pytest.approx(1.0, rel=1e-4)
