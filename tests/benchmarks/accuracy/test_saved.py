"""Networks of a run are read back as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import wsp_compiler
from benchmarks.accuracy.experiments import DENSE_EPOCHS, Job
from benchmarks.accuracy.models import make
from benchmarks.accuracy.saved import job_of, load_dense, load_tuned
from examples.pruned_file import save_pruned


@pytest.mark.parametrize("tile", [2, 4])
def test_tuned_networks(tmp_path: Path, tile: int) -> None:
    job = Job("tiles", "resnet20", 1, "bwsp", 0.7, importance="output", calibrated=True, tile=tile)
    model = wsp_compiler.prune(make("resnet20", 10, seed=4), 0.7, method="bwsp", tile=tile)
    save_pruned(model, tmp_path / "a.safetensors", {"job": job.name})
    assert job_of(tmp_path / "a.safetensors") == job
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_tuned(tmp_path / "a.safetensors")(x), model(x))
    save_pruned(model, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="not written by"):
        job_of(tmp_path / "b.safetensors")


def test_dense_networks(tmp_path: Path) -> None:
    job = Job("methods", "resnet20", 2, "wsp", 0.8)
    with pytest.raises(FileNotFoundError, match="--only dense/resnet20/2"):
        load_dense(tmp_path, job)
    model = make("resnet20", 10, seed=9)
    assert job.dense == Job("dense", "resnet20", 2, epochs=DENSE_EPOCHS)
    torch.save(model.state_dict(), tmp_path / (job.dense.name.replace("/", "_") + ".pt"))
    assert torch.equal(load_dense(tmp_path, job)[0].weight, model[0].weight)
