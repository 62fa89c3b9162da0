"""Jobs side by side in processes that share one device, until they are done or the time is up.

Networks this small do not fill a GPU. Each process keeps its device context and its images from job to job; one that
dies costs its job alone and is replaced.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from benchmarks.accuracy.experiments import Job
from benchmarks.results import Row

Start = Callable[[], Callable[[Job], Row]]
"""Called once in every process; returns what does a job. Has to be picklable."""


def _work(pipe: Connection, start: Start) -> None:
    run = start()
    try:
        pipe.send("ready")
        while True:
            pipe.send(run(pipe.recv()))
    except (EOFError, ConnectionError):  # the process that gives the jobs is gone
        return


class _Worker:
    def __init__(self, start: Start) -> None:
        context: Any = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, start))
        self.process.start()
        other.close()
        self.job: Job | None = None
        self.ready = False

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def next_job(waiting: list[Job], done: set[str]) -> Job | None:
    """Takes the first job whose dense network is trained off the list."""
    for index, job in enumerate(waiting):
        if job == job.dense or job.dense.name in done:
            return waiting.pop(index)
    return None


def run_jobs(
    jobs: Sequence[Job],
    start: Start,
    *,
    workers: int,
    seconds: float,
    done: set[str],
    on_row: Callable[[Row], None],
    most_deaths: int = 5,
) -> int:
    """Run jobs in order of the list as far as what they need allows.

    Args:
        jobs: most important first; those whose name is in `done` are left out.
        start: see :data:`Start`.
        workers: processes.
        seconds: after these, processes are ended wherever they are.
        done: names of jobs that succeeded; grows.
        on_row: called with every row as it comes in.
        most_deaths: processes that may die before the run is given up.

    Returns:
        How many jobs were not finished.
    """
    end = time.monotonic() + seconds
    waiting = [job for job in jobs if job.name not in done]
    crew = [_Worker(start) for _ in range(min(workers, len(waiting)))]
    deaths = 0
    try:
        while time.monotonic() < end and deaths <= most_deaths:
            for worker in crew:
                if worker.ready and worker.job is None and (job := next_job(waiting, done)) is not None:
                    worker.job = job
                    worker.pipe.send(job)
            if all(worker.ready and worker.job is None for worker in crew):
                break  # nothing runs, and nothing that waits can
            for found in wait(
                [worker.pipe for worker in crew], timeout=min(1.0, max(0.0, end - time.monotonic()))
            ):
                worker = next(worker for worker in crew if worker.pipe is found)
                try:
                    answer = worker.pipe.recv()
                except (EOFError, ConnectionError):
                    deaths += 1
                    worker.process.join()
                    if worker.job is not None:
                        on_row(
                            {
                                "name": worker.job.name,
                                "failure": f"its process died ({worker.process.exitcode})",
                            }
                        )
                    worker.stop()
                    crew[crew.index(worker)] = _Worker(start)
                    continue
                if answer == "ready":
                    worker.ready = True
                    continue
                worker.job = None
                if not answer["failure"]:
                    done.add(answer["name"])
                on_row(answer)
    finally:
        running = sum(worker.job is not None for worker in crew)
        for worker in crew:
            worker.stop()
    return len(waiting) + running
