"""Jobs: unique names, dependencies first, and every kind of job runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.accuracy.experiments import DENSE_EPOCHS, Job, Workplace, all_jobs, run_job

DENSE = Job("dense", "resnet20", 0, epochs=DENSE_EPOCHS)


def test_the_list() -> None:
    jobs = all_jobs()
    assert len({job.name for job in jobs}) == len(jobs)
    places = {job: index for index, job in enumerate(jobs)}
    assert all(places[job.dense] <= index for job, index in places.items())
    found = {(job.experiment, job.method) for job in jobs}
    assert {("methods", "abwsp"), ("methods", "wwp"), ("epochs", "fp"), ("outlook", "mixed")} <= found
    three = {job.seed for job in jobs if job.network == "resnet20" and job.experiment == "methods"}
    assert three == {0, 1, 2}


def test_jobs_end_to_end(place: Workplace) -> None:
    row = run_job(DENSE, place)
    assert row["failure"] is None
    assert 0 <= row["accuracy"] <= 1
    assert place.file(DENSE).is_file()
    jobs = [
        Job("methods", "resnet20", 0, "bwsp", 0.8),
        Job("outlook", "resnet20", 0, "mixed", 0.8, candidate=3),
        Job("tiles", "resnet20", 0, "wsp", 0.5, importance="output", tile=4),
    ]
    for job in jobs:
        row = run_job(job, place)
        assert row["failure"] is None
        assert row["name"] == job.name
        assert all(0 <= row[key] <= 1 for key in ("one_shot", "outlook", "outlook_test", "accuracy", "kept"))
    assert place.file(jobs[0], ".safetensors").is_file()
    assert not place.file(jobs[1], ".safetensors").exists()


def test_a_failure_is_a_row(place: Workplace) -> None:
    row = run_job(Job("methods", "resnet20", 7, "wsp", 0.8), place)
    assert "FileNotFoundError" in row["failure"]
    assert row["seconds"] >= 0


def test_epochs_are_of_the_training_images(place: Workplace) -> None:
    recipe = replace(place, shorten=1).recipe(40, 1e-3)
    assert (recipe.steps, recipe.batch, recipe.learning_rate) == (40 * 24 // 4, 4, 1e-3)
    with pytest.raises(AttributeError):
        place.device = torch.device("cpu")  # type: ignore[misc]
