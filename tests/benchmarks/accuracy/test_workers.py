"""Processes that take jobs: order, dependencies, deaths, and the end of the time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from benchmarks.accuracy.experiments import Job
from benchmarks.accuracy.workers import next_job, run_jobs
from benchmarks.results import Row

DENSE = Job("dense", "resnet20", 0, epochs=200)


def pruned(pr: float) -> Job:
    return Job("methods", "resnet20", 0, "wsp", pr)


class Fake:
    """Jobs at pr 0.5 kill their process, at 0.6 fail, at 0.9 never end."""

    def __call__(self) -> Callable[[Job], Row]:
        return self.run

    @staticmethod
    def run(job: Job) -> Row:
        if job.pr == 0.5:
            os._exit(3)
        if job.pr == 0.9:
            time.sleep(60)
        return {"name": job.name, "failure": "no" if job.pr == 0.6 else None, "pid": os.getpid()}


def test_what_is_pruned_waits_for_its_dense_network() -> None:
    waiting = [pruned(0.1), DENSE, pruned(0.2)]
    assert next_job(waiting, set()) == DENSE
    assert next_job(waiting, set()) is None
    assert next_job(waiting, {DENSE.name}) == pruned(0.1)
    assert waiting == [pruned(0.2)]


def test_rows_failures_and_deaths() -> None:
    rows: list[Row] = []
    done = {pruned(0.4).name}
    jobs = [pruned(pr) for pr in (0.1, 0.4, 0.5, 0.6)] + [DENSE]
    left = run_jobs(jobs, Fake(), workers=2, seconds=60, done=done, on_row=rows.append)
    found = {row["name"]: row for row in rows}
    assert left == 0
    assert set(found) == {job.name for job in jobs} - {pruned(0.4).name}
    assert "process died (3)" in found[pruned(0.5).name]["failure"]
    assert found[pruned(0.6).name]["failure"] == "no"
    assert done == {DENSE.name, pruned(0.1).name, pruned(0.4).name}


def test_the_time_is_kept() -> None:
    begin = time.monotonic()
    rows: list[Row] = []
    jobs = [DENSE, pruned(0.9), pruned(0.2)]
    left = run_jobs(jobs, Fake(), workers=1, seconds=8, done=set(), on_row=rows.append)
    assert time.monotonic() - begin < 30
    assert [row["name"] for row in rows] == [DENSE.name][: len(rows)]  # a busy machine may not come so far
    assert left == 3 - len(rows)
