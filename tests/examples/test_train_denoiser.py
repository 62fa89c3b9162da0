"""Training of the example denoiser, in miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples import photos, train_denoiser
from examples.denoiser import Denoiser, load_denoiser
from examples.patches import PatchSource

CPU = torch.device("cpu")


def small_model() -> Denoiser:
    torch.manual_seed(0)
    model = Denoiser(channels=8, middle_layers=1)
    train_denoiser.initialise(model)
    return model


def test_an_initialised_network_returns_its_input():
    photo = torch.rand(2, 1, 16, 16)
    assert torch.equal(small_model()(photo), photo)


def test_training_reduces_the_loss_and_repeats():
    messages: list[str] = []
    runs = []
    for _ in range(2):
        source = PatchSource(("brick", "coins"), 24, CPU, scales=(0.5,))
        losses = train_denoiser.train(
            small_model(),
            source,
            steps=45,
            batch=8,
            peak_learning_rate=1e-2,
            report_every=10,
            report=messages.append,
        )
        runs.append(losses)
    losses = runs[0]
    assert len(losses) == 5  # 10, 10, 10, 10 and 5 steps
    assert losses[0] < 1.5
    assert losses[-1] < 0.6
    assert losses[-1] < 0.7 * losses[0]
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)
    assert "gain" in messages[-1]


def test_training_ends_when_its_time_is_up():
    source = PatchSource(("brick",), 24, CPU, scales=(0.5,))
    losses = train_denoiser.train(small_model(), source, seconds=0.05, batch=2, report=lambda message: None)
    assert len(losses) >= 1


def test_training_needs_a_budget():
    source = PatchSource(("brick",), 24, CPU, scales=(0.5,))
    with pytest.raises(ValueError, match="budget"):
        train_denoiser.train(small_model(), source)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [train_denoiser.learning_rate(step / 1000, 1.0) for step in range(1001)]
    assert 0 < rates[0] < 0.1
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 20
    assert rates[-1] == pytest.approx(0)
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_a_file_too_large_to_ship_is_not_written(tmp_path: Path):
    path = tmp_path / "large.safetensors"
    with pytest.raises(ValueError, match="more than the 2500000"):
        train_denoiser.save(Denoiser(channels=72), path, {})
    assert not path.exists()


def test_the_command_writes_weights_and_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(photos, "TRAIN", ("brick", "coins"))
    monkeypatch.setattr(photos, "load", lambda name: torch.full((1, 1, 32, 32), 0.5))
    weights, summary = tmp_path / "new" / "weights.safetensors", tmp_path / "summary.json"
    command = f"--steps 2 --batch 2 --patch 16 --device cpu --out {weights} --json {summary}"
    train_denoiser.main(command.split())
    facts = json.loads(summary.read_text())
    assert facts["train"] == ["brick", "coins"]
    assert facts["bytes"] == weights.stat().st_size < train_denoiser.MAXIMUM_BYTES
    assert facts["parameters"] == 556_097
    assert set(facts["psnr"]) == set(photos.HELD_OUT)
    assert facts["psnr"]["camera"]["noisy"] == pytest.approx(20.17, abs=0.5)
    assert len(facts["losses"]["values"]) == 1
    model = load_denoiser(weights)
    assert not model.training
    assert int(model.middle[0].batch_norm.num_batches_tracked) == 2
    assert "camera" in capsys.readouterr().out
