"""Times of single pruned convolutions against the vendors', shape by shape.

    python -m benchmarks.conv_layers --device cuda --dtype fp16 --cases twelve eight --batch 1 --json FILE

Ours is conv + bias + ReLU, compiled with `keep_slower=True`; the vendors' is the convolution alone. The strongest
baseline of a case is the fastest that is no less precise than ours. Errors are against the same kept weights
in float64, over all images, with outputs poisoned before. A case that a plan would leave dense, because the
vendor's convolution with bias and ReLU is faster, is marked with *.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import traceback
from collections.abc import Callable, Sequence

import torch

from benchmarks.arguments import DTYPES, add_common, check_device, fraction, positive, prepare
from benchmarks.cases import ConvCase, check_name, select
from benchmarks.conv_baselines import FORMATS
from benchmarks.conv_case import CompileFunction, Options, run_case
from benchmarks.report import (
    STDERR,
    baseline_lines,
    failure_lines,
    progress,
    row_line,
    text_table,
    time_cell,
    verdict_lines,
)
from benchmarks.results import Row, geomean, new_record

VARIANTS = ("wsp", "column")


def run(
    jobs: Sequence[tuple[ConvCase, int]],
    options: Options,
    compile_function: CompileFunction,
    done: Callable[[Row], None],
    budget: float | None = None,
) -> int:
    """Runs the jobs in order, each row to `done`; a job that raises becomes a row with its failure.

    Returns the number of jobs that were not started because `budget` seconds had passed.
    """
    start = time.monotonic()
    with progress(len(jobs)) as begin:
        for number, (case, batch) in enumerate(jobs):
            if budget is not None and time.monotonic() - start > budget:
                return len(jobs) - number
            begin(f"{case.name} N={batch}")
            try:
                found = run_case(case, batch, options, compile_function)
            except Exception as problem:
                STDERR.print(traceback.format_exc(), markup=False)
                found = [{"failure": f"{type(problem).__name__}: {problem}"} for _ in options.pr]
            for pr, measured in zip(options.pr, found, strict=True):
                suffix = f" pr={pr:g}" if len(options.pr) > 1 else ""
                row: Row = {"name": f"{case.name} N={batch}{suffix}", "case": case.name, "group": case.group}
                row |= {"batch": batch, **vars(options), "pr": pr, **measured}
                done(row)
                STDERR.print(row_line(row), markup=False, highlight=False)
            if options.device == "cuda":
                torch.cuda.empty_cache()
    return 0


def table(rows: Sequence[Row]) -> str:
    """One line per row: our time, each baseline's and variant's time and ratio, the vendor's epilogue, errors."""
    good = [row for row in rows if not row["failure"]]
    names = list(dict.fromkeys(name for row in good for name in row["baselines_us"]))
    kinds = [kind for kind in VARIANTS if any(f"{kind}_us" in row for row in good)]
    lines = [
        [
            row["name"],
            time_cell(row["ours_us"]) + "*" * row["a_plan_leaves_it_dense"],
            f"F{row['chosen_tile']}",
            *(time_cell(row["baselines_us"].get(name), row["ratios"].get(name)) for name in names),
            *(time_cell(row.get(f"{kind}_us"), row.get(f"{kind}_over_ours")) for kind in kinds),
            time_cell(row["dense_epilogue_us"]),
            f"{row['strongest_ratio']:.2f}x",
            f"{row['relative_error']:.1e}",
            f"{row['largest_error_over_rms']:.1e}",
        ]
        for row in good
    ]
    head = ["microseconds", "ours", "tile", *names, *kinds, "dense+epilogue", "strongest"]
    return text_table([*head, "error", "max error"], lines)


def sweep_line(rows: Sequence[Row]) -> str | None:
    """How much slower ours gets anywhere when more is pruned; None unless a case has several ratios."""
    worst: tuple[float, str] | None = None
    for key in dict.fromkeys((row["case"], row["batch"]) for row in rows if not row["failure"]):
        found = [row for row in rows if not row["failure"] and (row["case"], row["batch"]) == key]
        found.sort(key=lambda row: row["pr"])
        for before, after in itertools.pairwise(found):
            where = f"{key[0]} N={key[1]}, pr {before['pr']:g} to {after['pr']:g}"
            rise = after["ours_us"] / before["ours_us"] - 1
            worst = (rise, where) if worst is None or rise > worst[0] else worst
    return None if worst is None else f"sweep: our time rises by at most {100 * worst[0]:.1f}% ({worst[1]})"


def summary_lines(rows: Sequence[Row]) -> list[str]:
    """Failures, then for batch size 1 and for the others, and every pruning ratio: baselines and verdict."""
    lines = failure_lines(rows)
    swept = sweep_line(rows)
    lines += [swept] if swept else []
    scopes = [("N=1", [r for r in rows if r["batch"] == 1]), ("N>1", [r for r in rows if r["batch"] > 1])]
    scopes = [(name, found) for name, found in scopes if found]
    for name, found in scopes:
        for pr in dict.fromkeys(row["pr"] for row in found):
            same = [row for row in found if row["pr"] == pr]
            scope = f"{name} pr={pr:g}"
            lines += [f"{scope} {line}" for line in baseline_lines(same)]
            for kind in VARIANTS:
                ratios = [row[f"{kind}_over_ours"] for row in same if f"{kind}_over_ours" in row]
                if ratios:
                    lines.append(f"{scope} {kind} takes {geomean(ratios):.3f}x our time (geomean)")
            dense = [row["name"] for row in same if row.get("a_plan_leaves_it_dense")]
            lines += [f"{scope} a plan leaves dense: {', '.join(dense)}"] if dense else []
            lines += verdict_lines(same, f", {scope}")
    return lines


def parser() -> argparse.ArgumentParser:
    """The command line."""

    def case_name(text: str) -> str:
        try:
            return check_name(text)
        except ValueError as problem:
            raise argparse.ArgumentTypeError(str(problem)) from None

    made = argparse.ArgumentParser(prog="python -m benchmarks.conv_layers", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    add_common(made, tuple(DTYPES))
    made.add_argument("--pr", type=fraction, nargs="+", default=[0.8], help="pruning ratios; default: 0.8")
    made.add_argument("--method", default="bwsp", help="pruning pattern; default: %(default)s")
    made.add_argument(
        "--tile", choices=("2", "4", "auto"), default="auto", help="default: the faster of both"
    )
    made.add_argument("--batch", type=positive, nargs="+", default=[1], help="default: 1; twelve has its own")
    made.add_argument(
        "--cases",
        type=case_name,
        nargs="+",
        help="groups (resnet18, vgg16, eight, superres, networks, twelve) or single cases (64@56); default: "
        "resnet18, on the CPU eight",
    )
    made.add_argument(
        "--layout", choices=tuple(FORMATS), default="channels_last", help="of our input; default: %(default)s"
    )
    made.add_argument("--wsp", action="store_true", help="also time method='wsp' at the same pruning ratios")
    made.add_argument("--column", action="store_true", help="also time direction='column'")
    made.add_argument(
        "--baselines", choices=("own", "all"), default="own", help="all: of other precisions too"
    )
    made.add_argument(
        "--tune", choices=("off", "fast", "full"), default="off", help="as in wsp_compiler.compile"
    )
    made.add_argument("--budget", type=float, help="start no case after so many seconds")
    return made


def main(arguments: Sequence[str] | None = None, compile_function: CompileFunction | None = None) -> int:
    """Runs the command; 0 if every case succeeded, else 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    made = parser()
    given = made.parse_args(arguments)
    check_device(made, given.device, given.dtype, on_cpu=("fp32", "bf16"))
    prepare(given.device, given.threads)
    if compile_function is None:
        from wsp_compiler import compile as compile_function

    tile = given.tile if given.tile == "auto" else int(given.tile)
    options = Options(
        given.device, given.dtype, tuple(dict.fromkeys(given.pr)), given.method, tile, given.layout,
        given.wsp, given.column, given.baselines, given.tune,
    )  # fmt: skip
    record = new_record("benchmarks.conv_layers", arguments, given.device)

    def done(row: Row) -> None:
        record.rows.append(row)
        if given.json:
            record.save(given.json)

    cases = given.cases or ["eight" if given.device == "cpu" else "resnet18"]
    left = run(select(cases, given.batch), options, compile_function, done, given.budget)
    print(table(record.rows))
    if left:
        print(f"the budget of {given.budget:g} s was spent: {left} cases were not started")
    for line in summary_lines(record.rows):
        print(line)
    return int(any(row["failure"] for row in record.rows))


if __name__ == "__main__":
    sys.exit(main())
