"""Measures the schedule table that ships with the package: our kernels and the vendor's convolution, shape by shape.

    python -m benchmarks.tune_table --device cuda --budget 1500 --out wsp_compiler/codegen/tables/h100.json

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.arguments import DTYPES, check_device, fraction, positive
from benchmarks.cases import ConvCase, check_name, select
from benchmarks.report import STDERR, text_table
from benchmarks.results import environment, geomean
from wsp_compiler.codegen.candidates import Candidate
from wsp_compiler.codegen.cost_model import fit, fit_kind, group_of
from wsp_compiler.codegen.layer import DTYPES as DTYPE_NAMES
from wsp_compiler.codegen.layer import make_layer
from wsp_compiler.codegen.schedule_keys import generator_digest, layer_key, vendor_version
from wsp_compiler.codegen.schedule_records import VENDOR, LayerKey, Record
from wsp_compiler.codegen.schedules import Schedules, load_table, save_table
from wsp_compiler.codegen.spec import KernelSpec
from wsp_compiler.codegen.targets import CodeTarget, resolve_target
from wsp_compiler.codegen.tuner import Tuner
from wsp_compiler.ops import WinogradSite
from wsp_compiler.options import CompileOptions
from wsp_compiler.plan import make_plan
from wsp_compiler.sites import find_sites
from wsp_compiler.winograd import transform_weight

CASES = {"cuda": (("twelve", ()), ("eight", (1,))), "cpu": (("eight", (1,)), ("resnet18", (8,)))}
"""Cases and their batch sizes by default."""
PRECISIONS = {"cuda": ("fp16", "tf32", "fp32"), "cpu": ("fp32",)}


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

    @property
    def name(self) -> str:
        return f"{self.case.name} N={self.batch} {self.precision} F{self.tile} pr={self.pr:g}"


def make_jobs(
    cases: Sequence[tuple[ConvCase, int]],
    precisions: Sequence[str],
    tiles: Sequence[int],
    prs: Sequence[float],
) -> list[Job]:
    """All combinations; the first pruning ratio of all precisions and tiles before the next."""
    found = itertools.product(prs, precisions, tiles, cases)
    return [Job(case, batch, precision, tile, pr) for pr, precision, tile, (case, batch) in found]


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
    tuner: Tuner, key: LayerKey, candidates: Sequence[Candidate], most: int, seed: int
) -> list[Candidate]:
    """At most ``most`` candidates: the default, the best by what was measured so far, and a third by chance."""
    if len(candidates) <= most:
        return list(candidates)
    chosen = tuner.promising(key, candidates, most - most // 3)
    rest = [candidate for candidate in candidates if candidate not in chosen]
    return chosen + random.Random(seed).sample(rest, min(len(rest), most - len(chosen)))


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


def prepare(job: Job, tuner: Tuner, builders: Builders, most: int) -> Prepared:
    """Choose what to measure of a layer and begin to build it."""
    spec, site = make_spec(job), make_site(job)
    layer = make_layer(spec, site.to(tuner.target.device), None, tuner.target)
    key = layer_key(spec, site, job.batch, tuner.target)
    candidates = layer.candidates(job.batch * spec.tiles_per_image)
    known = {record.identity for record in tuner.schedules.records}
    missing = [
        c
        for c in pick(tuner, key, candidates, most, seed=job.batch)
        if Record(key, c.kind, c.knobs(), None).identity not in known
    ]
    return Prepared(job, spec, layer, key, missing, builders.start(job, missing))


def run_job(ready: Prepared, tuner: Tuner, deadline: float) -> int:
    """Measure the vendor and a layer; returns the number of candidates measured."""
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


def kept(records: Sequence[Record], best: int) -> Iterator[Record]:
    """What ships: of every layer the ``best`` fastest and every fourth of the others, for the cost model."""
    layers: dict[LayerKey, list[Record]] = {}
    for record in records:
        layers.setdefault(record.key, []).append(record)
    for members in layers.values():
        good = sorted((r for r in members if r.us is not None), key=lambda r: r.us or math.inf)
        yield from good[:best]
        yield from good[best::4]
        yield from [r for r in members if r.us is None][:2]


def summary(records: Sequence[Record]) -> str:
    """The fastest kernel of every layer beside the vendor's, and how well the cost model fits."""
    vendor = {
        (r.key.filters, r.key.height, r.key.batch, r.key.precision): r.us
        for r in records
        if r.kind == VENDOR and r.us is not None
    }
    rows: list[tuple[str, ...]] = []
    ratios: dict[tuple[str, int, int], list[float]] = {}
    for key in dict.fromkeys(record.key for record in records if record.kind != VENDOR):
        good = [r for r in records if r.key == key and r.us is not None]
        theirs = vendor.get((key.filters, key.height, key.batch, key.precision))
        name = f"{key.filters}@{key.height} N={key.batch} {key.precision} F{key.tile} rows={key.rows[1]}"
        if not good or theirs is None:
            rows.append((name, "-", "-", "-", "no candidate ran" if not good else "vendor unknown"))
            continue
        best = min(good, key=lambda r: r.us or math.inf)
        ours = best.us or math.inf
        knobs = " ".join(f"{k}={v}" for k, v in best.knobs.items())
        rows.append((name, f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}", f"{best.kind} {knobs}"))
        share = round(10 * key.rows[0] / key.filters) * 10
        ratios.setdefault((key.precision, key.tile, share), []).append(theirs / ours)
    lines = [text_table(("layer", "us", "vendor", "ratio", "kernel"), rows), ""]
    for (precision, tile, share), found in ratios.items():
        lines.append(
            f"{precision} F{tile}, about {share}% of the rows: {geomean(found):.2f}x over {len(found)} layers, "
            f"least {min(found):.2f}"
        )
    return "\n".join([*lines, *model_errors(records)])


def model_errors(records: Sequence[Record]) -> list[str]:
    """Root mean square of log(predicted / measured) of every fit, and with each layer left out of it in turn."""
    lines: list[str] = []
    for group, fitted in fit(records).fitted.items():
        members = [r for r in records if r.us is not None and group_of(r.key, r.kind) == group]
        squares: list[float] = []
        for key in dict.fromkeys(r.key for r in members):
            others = fit_kind([r for r in members if r.key != key])
            if others is not None:
                for r in (r for r in members if r.key == key):
                    squares.append(math.log(others.predict(r.key, r.kind, r.knobs) / (r.us or math.inf)) ** 2)
        unseen = f"{math.sqrt(math.fsum(squares) / len(squares)):.3f}" if squares else "unknown"
        lines.append(
            f"cost model {' '.join(group)}: {fitted.records} records, rms log error {fitted.error:.3f}, "
            f"on layers left out {unseen}"
        )
    return lines


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
        "--pr", nargs="+", type=fraction, default=[0.8, 0.0, 0.6, 0.9], help="first ones first"
    )
    parser.add_argument(
        "--most", type=positive, default=32, help="candidates of a layer; default: %(default)s"
    )
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
    jobs = make_jobs(list(dict.fromkeys(cases)), precisions, arguments.tile, arguments.pr)
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
                    waiting.append(prepare(job, tuner, builders, arguments.most))
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
