"""The search as a job: what its row says, with given and with modelled times."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.accuracy import abwsp
from benchmarks.accuracy.experiments import DENSE_EPOCHS, Job, Workplace, run_job
from benchmarks.accuracy.models import make


def test_longest_products() -> None:
    times = abwsp.longest_products(make("resnet20", 10), 0.75)
    assert len(times) == 16
    for entry in times.values():
        assert entry["wsp_us"] >= entry["bwsp_us"]
        assert entry["ratio"] == pytest.approx(entry["wsp_us"] / entry["bwsp_us"])
    assert max(entry["ratio"] for entry in times.values()) > 1.2


def test_the_row(place: Workplace) -> None:
    run_job(Job("dense", "resnet20", 0, epochs=DENSE_EPOCHS), place)
    job = Job("methods", "resnet20", 0, "abwsp", 0.8)
    row = run_job(job, place)
    assert row["failure"] is None
    assert row["times"] == "longest matrix product"
    assert row["balanced_speedup"] >= 1
    assert row["layers"] == 16
    assert len(row["candidates"]) == 2
    assert place.file(job, ".safetensors").is_file()
    flat = {
        path: {"wsp_us": 2.0, "bwsp_us": 2.0, "ratio": 1.0}
        for path in abwsp.longest_products(make("resnet20", 2), 0.8)
    }
    other = replace(place, times={"resnet20/0.8": flat}, folder=place.folder / "other")
    other.folder.mkdir()
    place.file(job.dense).rename(other.file(job.dense))
    row = run_job(job, other)
    assert (row["failure"], row["times"], row["balanced_speedup"]) == (None, "measured", 1.0)
