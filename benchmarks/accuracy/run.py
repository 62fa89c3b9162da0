"""Run the experiments, most important first, within a time budget; rows are written as they come.

    python -m benchmarks.accuracy.run --device cuda --budget 500 --workers 6 --folder work --json accuracy.json

A second call with the same --json and --folder leaves out what is done. Without a GPU the whole list takes days; choose
with --only (a regular expression on the jobs' names, which --list prints).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.accuracy.experiments import Job, Workplace, all_jobs, run_job
from benchmarks.accuracy.tasks import load_task
from benchmarks.accuracy.workers import run_jobs
from benchmarks.arguments import positive
from benchmarks.results import Record, Row, load, new_record

TASKS = ("digits", "cifar10", "folder")


@dataclass(frozen=True)
class Start:
    """What a process does before its first job: one CPU thread, its own copy of the images."""

    task: str
    data: Path | None
    folder: Path
    device: str
    batch: int
    shorten: int
    times: Path | None

    def __call__(self) -> Callable[[Job], Row]:
        torch.set_num_threads(1)
        device = torch.device(self.device)
        times = {} if self.times is None else json.loads(self.times.read_text())["rows"][0]["times"]
        task = load_task(self.task, self.data, device)
        place = Workplace(task, self.folder, device, self.batch, self.shorten, times)
        return lambda job: run_job(job, place)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.run", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    default = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--task", choices=TASKS, default="digits", help="images; default: %(default)s")
    made.add_argument("--data", type=Path, help="folder with the task's files")
    made.add_argument("--device", choices=("cuda", "cpu"), default=default, help="default: %(default)s")
    made.add_argument("--budget", type=float, default=540.0, help="seconds; default: %(default)g")
    made.add_argument("--workers", type=positive, default=4, help="processes; default: %(default)s")
    made.add_argument("--batch", type=positive, default=128, help="images of a step; default: %(default)s")
    made.add_argument("--folder", type=Path, required=True, help="for weights and checkpoints")
    made.add_argument(
        "--times", type=Path, help="layer times for ABWSP: benchmarks.accuracy.balance's record"
    )
    made.add_argument("--json", type=Path, required=True, help="the record, written after every job")
    made.add_argument("--only", default="", help="regular expression on jobs' names")
    made.add_argument("--shorten", type=positive, default=1, help="divide the length of every training")
    made.add_argument("--list", action="store_true", help="print the jobs' names and stop")
    return made


def chosen(only: str) -> list[Job]:
    """The jobs whose name matches, and the dense ones that they need."""
    jobs = [job for job in all_jobs() if re.search(only, job.name)]
    return list(dict.fromkeys([job.dense for job in jobs] + jobs)) if only else jobs


def started(given: argparse.Namespace, arguments: Sequence[str]) -> tuple[Record, set[str]]:
    """The record to go on with, without the rows that failed, and the names of jobs that are done."""
    record = new_record("benchmarks.accuracy.run", arguments, given.device)
    if given.json.is_file():
        record.rows = [row for row in load(given.json).rows if not row["failure"]]
    have = {job.name: given.folder / (job.name.replace("/", "_") + ".pt") for job in all_jobs()}
    # without its weights, a dense network has to be trained again
    record.rows = [
        row for row in record.rows if row.get("experiment") != "dense" or have[row["name"]].is_file()
    ]
    return record, {row["name"] for row in record.rows}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0 if every job succeeded."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parser().parse_args(arguments)
    jobs = chosen(given.only)
    if given.list:
        print("\n".join(job.name for job in jobs))
        return 0
    given.folder.mkdir(parents=True, exist_ok=True)
    record, done = started(given, arguments)
    begin = time.monotonic()
    count = 0

    def on_row(row: Row) -> None:
        nonlocal count
        count += 1
        record.rows.append(row)
        record.save(given.json)
        about = row["failure"] or f"accuracy {row['accuracy']:.4f} in {row['seconds']:.1f} s"
        print(f"{time.monotonic() - begin:6.0f} s  {count:4d}  {row['name']}: {about}", flush=True)

    start = Start(given.task, given.data, given.folder, given.device, given.batch, given.shorten, given.times)
    left = run_jobs(jobs, start, workers=given.workers, seconds=given.budget, done=done, on_row=on_row)
    failed = sum(bool(row["failure"]) for row in record.rows)
    print(
        f"{len(record.rows) - failed} jobs done, {failed} failed, {left} not finished in {given.budget:g} s"
    )
    return int(bool(failed or left))


if __name__ == "__main__":
    sys.exit(main())
