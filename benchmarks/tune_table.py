"""Measures the schedule table that ships with the package: our kernels and the vendor's convolution, shape by shape.

    python -m benchmarks.tune_table --device cuda --budget 1500 --out wsp_compiler/codegen/tables/h100.json
    python -m benchmarks.tune_table --device cpu --threads 2 1 --budget 700 --out wsp_compiler/codegen/tables/cpu16.json

Layers are planned as `compile` plans them: BWSP rows in blocks that fit the kernels, of Kaiming-random weights. The
most important layers come first, and the table is written after each, so that a run may be stopped; run again, it
goes on with what is missing. CUDA kernels are built ahead in processes of their own. A candidate that fails is
recorded with its error and costs only itself.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import math
import multiprocessing
import os
import random
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.arguments import DTYPES, check_device, fraction, positive
from benchmarks.cases import ConvCase, check_name, select
from benchmarks.report import STDERR
from benchmarks.results import environment
from benchmarks.table_summary import kept, summary
from wsp_compiler.codegen.candidates import Candidate, candidate_from_knobs
from wsp_compiler.codegen.layer import DTYPES as DTYPE_NAMES
from wsp_compiler.codegen.layer import make_layer
from wsp_compiler.codegen.pack_fused import fit_rows
from wsp_compiler.codegen.schedule_keys import generator_digest, layer_key, vendor_version
from wsp_compiler.codegen.schedule_records import VENDOR, LayerKey, Record
from wsp_compiler.codegen.schedules import Schedules, load_table, save_table
from wsp_compiler.codegen.spec import FusedConfig, KernelSpec
from wsp_compiler.codegen.targets import CodeTarget, resolve_target
from wsp_compiler.codegen.tuner import Tuner
from wsp_compiler.errors import OptionError
from wsp_compiler.ops import WinogradSite
from wsp_compiler.options import CompileOptions
from wsp_compiler.plan import make_plan
from wsp_compiler.sites import find_sites
from wsp_compiler.winograd import transform_weight

CASES = {
    "cuda": (("twelve", ()), ("eight", (1,))),
    "cpu": (("eight", (1,)), ("networks", (1,)), ("eight", (8,))),
}
"""Cases and their batch sizes by default."""
PRECISIONS = {"cuda": ("fp16", "tf32", "fp32"), "cpu": ("fp32",)}
RATIOS = {"cuda": (0.8, 0.0, 0.6, 0.9), "cpu": (0.8, 0.0, 0.5)}
MOST = {"cuda": 32, "cpu": 5}
"""Candidates of a layer by default."""

CHUNK = 16
"""Candidates measured together, interleaved: each holds a CUDA graph and its packed weights."""
AHEAD = 2
"""Layers whose kernels are built while another is measured."""


@dataclass(frozen=True)
class Job:
    """One layer: convolution + bias + ReLU of a case, pruned."""

    case: ConvCase
    batch: int
    precision: str
    tile: int
    pr: float
    threads: int | None = None

    @property
    def name(self) -> str:
        threads = "" if self.threads is None else f" threads={self.threads}"
        return f"{self.case.name} N={self.batch} {self.precision} F{self.tile} pr={self.pr:g}{threads}"

    def begin(self) -> None:
        """Use the job's number of threads, which is part of a layer's key."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)


def make_jobs(
    cases: Sequence[tuple[ConvCase, int]],
    precisions: Sequence[str],
    tiles: Sequence[int],
    prs: Sequence[float],
    threads: Sequence[int | None] = (None,),
) -> list[Job]:
    """All combinations; the first pruning ratio of all threads, precisions and tiles before the next."""
    found = itertools.product(prs, threads, precisions, tiles, cases)
    return [
        Job(case, batch, precision, tile, pr, count) for pr, count, precision, tile, (case, batch) in found
    ]


def make_site(job: Job) -> WinogradSite:
    """The kept weights of a Kaiming-random convolution under the plan that `compile` makes, on the CPU."""
    conv = nn.Conv2d(job.case.channels_in, job.case.channels_out, 3, padding=1)
    generator = torch.Generator().manual_seed(job.case.channels_out * 1009 + job.case.height)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu", generator=generator)
    model = nn.Sequential(conv).eval().requires_grad_(False)
    method = "bwsp" if job.pr else "dense"
    options = CompileOptions(pr=job.pr, method=method, tile=job.tile, importance="l2", channel_threshold=0)
    entry = make_plan(find_sites(model), {"0": conv}, options)["0"]
    site = WinogradSite(entry.keep)
    site.fill(transform_weight(conv.weight, job.tile), conv.bias)
    return site


def make_spec(job: Job) -> KernelSpec:
    """The layer's kernels: channels_last, bias and ReLU."""
    return KernelSpec(
        filters=job.case.channels_out,
        channels=job.case.channels_in,
        height=job.case.height,
        width=job.case.width,
        padding=(1, 1),
        tile=job.tile,
        dtype=DTYPE_NAMES[DTYPES[job.precision]],
        precision=job.precision,
        input_channels_last=True,
        output_channels_last=True,
        columns_pruned=False,
        rows_pruned=job.pr > 0,
        residual=False,
        activation="relu",
    )


def pick(
    tuner: Tuner,
    key: LayerKey,
    candidates: Sequence[Candidate],
    most: int,
    seed: int,
    earlier: Sequence[Candidate] = (),
) -> list[Candidate]:
    """At most ``most`` candidates, a third of them by chance.

    The others are half of the best of an earlier version of the kernels, half the default and the best by what was
    measured so far.
    """
    if len(candidates) <= most:
        return list(candidates)
    by_rule = most - most // 3
    chosen = list(earlier[: by_rule // 2])
    for candidate in tuner.promising(key, candidates, by_rule):
        if len(chosen) < by_rule and candidate not in chosen:
            chosen.append(candidate)
    rest = [candidate for candidate in candidates if candidate not in chosen]
    return chosen + random.Random(seed).sample(rest, min(len(rest), most - len(chosen)))


def earlier_best(old: Sequence[Record], key: LayerKey) -> list[Candidate]:
    """Fastest first, the candidates of a layer in a table of an earlier version, with every order of tiles."""
    wanted = replace(key, generator="")
    good = [
        r for r in old if r.us is not None and replace(r.key, generator="") == wanted and r.kind != VENDOR
    ]
    found: list[Candidate] = []
    for record in sorted(good, key=lambda r: r.us or math.inf):
        try:
            candidate = candidate_from_knobs(record.kind, record.knobs)
        except ValueError:  # a knob that no longer exists
            continue
        config = candidate.config
        strips = (1, 7) if isinstance(config, FusedConfig) else ()
        found += [Candidate("fused", replace(config, strip=strip)) for strip in strips] or [candidate]
    return list(dict.fromkeys(found))


@cache
def _worker_layer(job: Job, target: CodeTarget) -> Any:
    return make_layer(make_spec(job), make_site(job), None, target)


def _build(job: Job, target: CodeTarget, candidate: Candidate) -> str:
    """Runs in a worker: builds into the kernel cache; returns the error, if any, which measuring meets again."""
    try:
        torch.set_num_threads(1)
        _worker_layer(job, target).prepare(candidate)
    except Exception as error:  # whatever a kernel that does not build raises
        return f"{type(error).__name__}: {error}"
    return ""


class Builders:
    """Worker processes that fill the kernel cache; on the CPU target there are none."""

    def __init__(self, target: CodeTarget, workers: int) -> None:
        self.target, self.pool = target, None
        if target.is_cuda and workers > 1:
            context = multiprocessing.get_context("spawn")
            self.pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)

    def start(self, job: Job, candidates: Sequence[Candidate]) -> list[concurrent.futures.Future[str]]:
        """Begin to build the candidates side by side."""
        if self.pool is None:
            return []
        try:
            return [self.pool.submit(_build, job, self.target, candidate) for candidate in candidates]
        except (
            concurrent.futures.BrokenExecutor
        ):  # a worker was killed: kernels are built where they are measured
            self.pool = None
            return []

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)


@dataclass
class Prepared:
    """A layer whose candidates are chosen and on their way to be built."""

    job: Job
    spec: KernelSpec
    layer: Any
    key: LayerKey
    missing: list[Candidate]
    builds: list[concurrent.futures.Future[str]]


def neighbours_best(records: Sequence[Record], key: LayerKey, layer: Any) -> list[Candidate]:
    """The fused configurations that were fastest for the layer at other pruning ratios, with its own number of rows.

    A configuration that serves more rows serves fewer: so measured, a layer is not slower at a higher ratio.
    """

    def apart_from_rows(key: LayerKey) -> LayerKey:
        return replace(key, rows=(0, 0), block=0)

    fused = [r for r in records if r.kind == "fused" and r.us is not None and r.key != key]
    near = [r for r in fused if apart_from_rows(r.key) == apart_from_rows(key)]
    found: list[Candidate] = []
    for record in sorted(near, key=lambda r: (abs(r.key.rows[0] - key.rows[0]), r.us or math.inf)):
        try:
            candidate = Candidate("fused", fit_rows(FusedConfig(**record.knobs), layer.site))
        except (OptionError, TypeError):
            continue
        if layer.accepts(candidate):
            found.append(candidate)
    return list(dict.fromkeys(found))


def prepare(job: Job, tuner: Tuner, builders: Builders, most: int, old: Sequence[Record] = ()) -> Prepared:
    """Choose what to measure of a layer and begin to build it."""
    job.begin()
    spec, site = make_spec(job), make_site(job)
    layer = make_layer(spec, site.to(tuner.target.device), None, tuner.target)
    key = layer_key(spec, site, job.batch, tuner.target)
    candidates = layer.candidates(job.batch * spec.tiles_per_image)
    earlier = [candidate for candidate in earlier_best(old, key) if layer.accepts(candidate)]
    if tuner.target.is_cuda:
        near = neighbours_best(tuner.schedules.records, key, layer)[:2]
        earlier = list(dict.fromkeys([*near, *earlier]))
    known = {record.identity for record in tuner.schedules.records}
    missing = [
        c
        for c in pick(tuner, key, candidates, most, job.batch, earlier)
        if Record(key, c.kind, c.knobs(), None).identity not in known
    ]
    return Prepared(job, spec, layer, key, missing, builders.start(job, missing))


def run_job(ready: Prepared, tuner: Tuner, deadline: float) -> int:
    """Measure the vendor and a layer; returns the number of candidates measured."""
    ready.job.begin()
    tuner.dense(ready.spec, ready.job.batch)
    done = 0
    for start in range(0, len(ready.missing), CHUNK):
        part, builds = ready.missing[start : start + CHUNK], ready.builds[start : start + CHUNK]
        concurrent.futures.wait(builds, timeout=max(deadline - time.monotonic(), 0.0))
        if time.monotonic() > deadline:
            break
        tuner.measure_candidates(ready.layer, ready.key, part)
        done += len(part)
    return done


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_table", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default, help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, help="the table; an existing one is continued")
    parser.add_argument(
        "--budget", type=positive, default=1500, metavar="SECONDS", help="default: %(default)s"
    )
    parser.add_argument("--cases", nargs="+", help="groups or cases; by default those of the benchmarks")
    parser.add_argument("--batch", nargs="+", type=positive, default=[1], help="for --cases; default: 1")
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), help="default: all that have kernels")
    parser.add_argument("--tile", nargs="+", type=int, choices=(2, 4), default=[2, 4], help="default: 2 4")
    parser.add_argument(
        "--pr", nargs="+", type=fraction, help="first ones first; default: those of the device"
    )
    parser.add_argument("--threads", nargs="+", type=positive, help="on the CPU; default: PyTorch's number")
    parser.add_argument("--most", type=positive, help="candidates of a layer; default: 32, on the CPU 5")
    parser.add_argument(
        "--best", type=positive, default=8, help="fastest records to keep; default: %(default)s"
    )
    parser.add_argument(
        "--workers", type=positive, default=max(1, (os.cpu_count() or 1) - 2), help="builders on CUDA"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    precisions = arguments.dtype or PRECISIONS[arguments.device]
    for precision in precisions:
        check_device(parser, arguments.device, precision, PRECISIONS["cpu"])
    try:
        chosen = [(check_name(name), arguments.batch) for name in arguments.cases or ()]
    except ValueError as error:
        parser.error(str(error))
    cases: list[tuple[ConvCase, int]] = []
    for name, batches in chosen or CASES[arguments.device]:
        cases += select([name], batches)
    if arguments.threads and arguments.device != "cpu":
        parser.error("--threads is for --device cpu")
    prs, most = arguments.pr or RATIOS[arguments.device], arguments.most or MOST[arguments.device]
    threads = arguments.threads or (None,)
    jobs = make_jobs(list(dict.fromkeys(cases)), precisions, arguments.tile, prs, threads)
    target = resolve_target(arguments.device, torch.device(arguments.device))
    schedules = Schedules(None, None)
    generators = (generator_digest(target.device.type), vendor_version(target))
    old = load_table(arguments.out) if arguments.out.exists() else []
    schedules.add([record for record in old if record.key.generator in generators])
    tuner, builders = Tuner(target, "fast", schedules), Builders(target, arguments.workers)
    notes = {"command": ["python", "-m", "benchmarks.tune_table", *(argv or sys.argv[1:])]}
    notes["environment"] = environment(arguments.device)  # type: ignore[assignment]
    deadline, done = time.monotonic() + arguments.budget, 0
    waiting: deque[Prepared | str] = deque()
    ahead = iter(jobs)
    try:
        while time.monotonic() < deadline:
            for job in itertools.islice(ahead, AHEAD + 1 - len(waiting)):
                try:
                    waiting.append(prepare(job, tuner, builders, most, old))
                except Exception as error:  # a layer that cannot be planned or packed costs only itself
                    waiting.append(f"{job.name}: failed, {type(error).__name__}: {error}")
            if not waiting:
                break
            ready, start, done = waiting.popleft(), time.monotonic(), done + 1
            said = ready if isinstance(ready, str) else f"{ready.job.name}: "
            if isinstance(ready, Prepared):
                said += f"{run_job(ready, tuner, deadline)} candidates, {time.monotonic() - start:.1f} s"
            STDERR.print(f"{done}/{len(jobs)} {said}", highlight=False)
            save_table(arguments.out, kept(schedules.records, arguments.best), notes)
    finally:
        builders.close()
    print(summary(schedules.records))
    if done < len(jobs):
        print(f"the budget was spent after {done} of {len(jobs)} layers; run again to go on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
