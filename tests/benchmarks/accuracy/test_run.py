"""The command: what it chooses, what it writes, and that it goes on with its own record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import run
from benchmarks.accuracy.experiments import Job
from benchmarks.accuracy.tasks import Task
from benchmarks.results import load


def in_process(jobs: Sequence[Job], start: Any, *, done: set[str], on_row: Any, **_: Any) -> int:
    run_one = start()
    for job in jobs:
        if job.name not in done:
            on_row(run_one(job))
    return 0


def test_the_record_grows_from_call_to_call(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "run_jobs", in_process)
    monkeypatch.setattr(run, "load_task", lambda name, folder, device: task)
    shared = ["--device", "cpu", "--batch", "4", "--shorten", "1000000", "--folder", str(tmp_path / "nets")]
    path = tmp_path / "record.json"
    only = "dense/resnet20/0/|methods/resnet20/0/wsp/0.8"
    for _ in range(2):
        assert run.main([*shared, "--only", only, "--json", str(path)]) == 0
    rows = load(path).rows
    assert [row["experiment"] for row in rows] == ["dense", "methods"]
    assert not any(row["failure"] for row in rows)
    assert "2 jobs done, 0 failed" in capsys.readouterr().out
    assert run.main([*shared, "--only", "methods/resnet20/0/fp/0.8", "--json", str(path)]) == 0
    assert len(load(path).rows) == 3
    next((tmp_path / "nets").glob("dense*.pt")).unlink()  # the dense network has to be trained again
    assert run.main([*shared, "--only", "methods/resnet20/0/fp/0.8", "--json", str(path)]) == 0
    assert len(load(path).rows) == 3


def test_choice_includes_what_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = run.chosen("methods/vgg16/0/wsp/0.8")
    assert [job.experiment for job in jobs] == ["dense", "methods"]
    assert run.main(["--list", "--only", "tiles", "--folder", str(tmp_path), "--json", "x.json"]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == 9
    assert len(run.chosen("")) > 200


def test_a_process_reads_measured_times(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "times.json"
    path.write_text('{"rows": [{"times": {"resnet20/0.8": {}}}]}')
    seen: list[Any] = []
    monkeypatch.setattr(run, "load_task", lambda name, folder, device: task)
    monkeypatch.setattr(run, "run_job", lambda job, place: seen.append(place.times))
    run.Start("digits", None, tmp_path, "cpu", 4, 1, path)()(Job("dense", "resnet20", 0))
    assert seen == [{"resnet20/0.8": {}}]
