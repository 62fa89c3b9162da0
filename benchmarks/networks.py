"""Times of whole networks: ours against PyTorch eager and against torch.compile with frozen weights.

    python -m benchmarks.networks --device cuda --dtype fp16 --networks resnet18 vgg16 resnet50 --batch 1 32

All candidates of a network and batch size run interleaved in one process, channels_last. On CUDA, ours is compiled
with cuda_graph=True, torch.compile makes the graphs of its mode, and eager is captured; on the CPU there are no
graphs. pr 0 is compiled with method="dense" (Winograd, nothing pruned), the only one whose error against eager
means anything. `--rest` chooses how ours runs the rest of the network; the faster one of each ratio is the verdict's.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.arguments import DTYPES, add_common, check_device, fraction, positive, prepare
from benchmarks.errors import relative_l2
from benchmarks.network_models import build, check_network
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
from benchmarks.results import Row, new_record
from benchmarks.timing import Call, measure, rotating_inputs

CompileFunction = Callable[..., Any]
EAGER, INDUCTOR = "eager", "torch_compile"
INPUTS = 4  # a network's own activations and weights pass through the caches; its input is a small part


def compile_inductor(model: nn.Module, x: Tensor, mode: str) -> Call:
    """torch.compile of a copy of `model`, weights frozen, built by three calls on x: [n, 3, h, w]."""
    import torch._inductor.config

    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        compiled = torch.compile(copy.deepcopy(model), mode=mode, dynamic=False)

        def call(x: Tensor) -> object:
            if x.is_cuda:
                torch.compiler.cudagraph_mark_step_begin()
            return compiled(x)

        for _ in range(3):
            call(x)
    return call


def _reason(problem: Exception) -> str:
    return f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}"


def _row(name: str, batch: int, pr: float, rest: str, given: argparse.Namespace) -> Row:
    """What identifies a row: the network, the batch size, and what was asked of the compiler."""
    asked = {"method": given.method if pr else "dense", "tile": given.tile, "torch_compile_mode": given.mode}
    about = {
        "network": name,
        "batch": batch,
        "pr": pr,
        "rest": rest,
        "dtype": given.dtype,
        "size": given.size,
    }
    return {"name": f"{name} N={batch} pr={pr:g} {rest}", **about, **asked}


def _compiled_row(
    row: Row, model: nn.Module, x: Tensor, given: argparse.Namespace, compile_function: CompileFunction
) -> Call | None:
    """Compiles for `row`, and enters error and report, or the failure, into it; x: [n, 3, h, w]."""
    try:
        compiled = compile_function(
            model,
            pr=row["pr"],
            method=row["method"],
            tile=row["tile"],
            precision="tf32" if row["dtype"] == "tf32" else None,
            tune=given.tune,
            keep_slower=given.keep_slower,
            rest=row["rest"],
            cuda_graph=x.is_cuda,
            example_inputs=(x,),
        )
        error = relative_l2(compiled(x), model(x))
        if not math.isfinite(error):
            raise ArithmeticError(f"relative error against eager is {error}")
        report = str(compiled.report())
    except Exception as problem:
        STDERR.print(traceback.format_exc(), markup=False)
        row["failure"] = _reason(problem)
        return None
    row |= {"failure": None, "relative_error": None if row["pr"] else error, "report": report}
    return compiled


def run_network(
    name: str, batch: int, given: argparse.Namespace, compile_function: CompileFunction
) -> list[Row]:
    """One row per pruning ratio and `rest`; eager and torch.compile are timed once, in the rounds of all of ours."""
    dtype, device = DTYPES[given.dtype], given.device
    torch.compiler.reset()
    model = build(name).to(device, dtype, memory_format=torch.channels_last)
    shape = (batch, 3, given.size, given.size)
    xs = rotating_inputs(shape, dtype, device, torch.channels_last, count=INPUTS)
    rows = [_row(name, batch, pr, rest, given) for pr in given.pr for rest in given.rest]
    calls: dict[str, Call] = {EAGER: model}
    skipped = "--no-torch-compile" if given.no_torch_compile else None
    with torch.no_grad():
        for row in rows:
            compiled = _compiled_row(row, model, xs[0], given, compile_function)
            if compiled is not None:
                calls[row["name"]] = compiled
        if not skipped:
            try:
                calls[INDUCTOR] = compile_inductor(model, xs[0], given.mode)
            except Exception as problem:
                skipped = f"torch.compile failed: {_reason(problem)}"
    own_graphs = [row["name"] for row in rows] if device == "cuda" else []
    if given.mode in ("reduce-overhead", "max-autotune"):
        own_graphs.append(INDUCTOR)
    times = measure(calls, xs, uncaptured=own_graphs)

    baselines = {rival: times[rival] for rival in (EAGER, INDUCTOR) if rival in times}
    strongest = min(baselines, key=lambda rival: baselines[rival])
    for row in rows:
        row |= {"baselines_us": baselines, "strongest": strongest, "torch_compile_skipped": skipped}
        row["how"] = times.how
        if not row["failure"]:
            ours = times[row["name"]]
            row |= {"ours_us": ours, "ratios": {rival: us / ours for rival, us in baselines.items()}}
            row["strongest_ratio"] = row["ratios"][strongest]
    return rows


def rows_of(name: str, batch: int, given: argparse.Namespace, compile_function: CompileFunction) -> list[Row]:
    """`run_network`; where it raises, failed rows."""
    try:
        return run_network(name, batch, given, compile_function)
    except Exception as problem:
        STDERR.print(traceback.format_exc(), markup=False)
        failed = {"failure": _reason(problem)}
        return [_row(name, batch, pr, rest, given) | failed for pr in given.pr for rest in given.rest]


def table(rows: Sequence[Row]) -> str:
    """One line per network, batch size and pruning ratio that succeeded."""
    lines = []
    for row in (row for row in rows if not row["failure"]):
        rivals = [time_cell(row["baselines_us"].get(r), row["ratios"].get(r)) for r in (EAGER, INDUCTOR)]
        error = "-" if row["relative_error"] is None else f"{row['relative_error']:.1e}"
        lines.append([row["name"], time_cell(row["ours_us"]), *rivals, error])
    return text_table(["microseconds", "ours", EAGER, INDUCTOR, "error"], lines)


def best_rest(rows: Sequence[Row]) -> list[Row]:
    """Of the rows that differ in `rest` alone, the fastest that succeeded, or the first."""
    found: dict[tuple[str, int, float], Row] = {}
    for row in rows:
        key = (row["network"], row["batch"], row["pr"])
        known = found.get(key)
        if known is None or (not row["failure"] and (known["failure"] or row["ours_us"] < known["ours_us"])):
            found[key] = row
    return list(found.values())


def summary_lines(rows: Sequence[Row]) -> list[str]:
    """Failures and skips, then every pruning ratio's lines, then the verdict at the highest one."""
    lines = failure_lines(rows)
    skipped = {f"{row['network']} N={row['batch']}": row.get("torch_compile_skipped") for row in rows}
    lines += [f"torch_compile skipped for {name}: {reason}" for name, reason in skipped.items() if reason]
    rows = best_rest(rows)
    ratios = sorted({row["pr"] for row in rows})
    for pr in ratios:
        found = [row for row in rows if row["pr"] == pr]
        lines += [f"pr={pr:g} {line}" for line in baseline_lines(found)]
        lines += [f"pr={pr:g} {line}" for line in verdict_lines(found)] if pr != ratios[-1] else []
    highest = [row for row in rows if row["pr"] == ratios[-1]]
    return lines + verdict_lines(highest, f" at pr={ratios[-1]:g}")


def parser() -> argparse.ArgumentParser:
    """The command line."""

    def network(text: str) -> str:
        try:
            return check_network(text)
        except ValueError as problem:
            raise argparse.ArgumentTypeError(str(problem)) from None

    made = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    add_common(made, ("fp32", "tf32", "fp16"))
    made.add_argument("--networks", type=network, nargs="+", default=["resnet18"], help="default: resnet18")
    made.add_argument("--batch", type=positive, nargs="+", default=[1], help="default: 1")
    made.add_argument("--pr", type=fraction, nargs="+", default=[0.0, 0.8], help="default: 0 0.8")
    made.add_argument("--method", default="bwsp", help="pruning pattern where pr > 0; default: %(default)s")
    made.add_argument("--tile", choices=("2", "4", "auto"), default="2", help="outputs per tile side")
    made.add_argument(
        "--rest", choices=("eager", "inductor"), nargs="+", help="default: both on CUDA, else eager"
    )
    made.add_argument(
        "--tune", choices=("off", "fast", "full"), default="off", help="as in wsp_compiler.compile"
    )
    made.add_argument("--keep-slower", action="store_true", help="lower layers that are faster dense, too")
    made.add_argument("--budget", type=float, help="start no network after so many seconds")
    made.add_argument("--size", type=positive, default=224, help="pixels; default: %(default)s")
    made.add_argument("--no-torch-compile", action="store_true", help="leave that baseline out")
    made.add_argument(
        "--mode",
        choices=("default", "reduce-overhead", "max-autotune"),
        help="of torch.compile; default: reduce-overhead on CUDA, default on the CPU",
    )
    return made


def main(arguments: Sequence[str] | None = None, compile_function: CompileFunction | None = None) -> int:
    """Runs the command; 0 if every network succeeded at every pruning ratio, else 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    made = parser()
    given = made.parse_args(arguments)
    check_device(made, given.device, given.dtype, on_cpu=("fp32",))
    prepare(given.device, given.threads)
    given.mode = given.mode or ("reduce-overhead" if given.device == "cuda" else "default")
    if given.device == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = given.dtype == "tf32"
    if compile_function is None:
        from wsp_compiler import compile as compile_function

    record = new_record("benchmarks.networks", arguments, given.device)
    jobs = [(name, batch) for name in dict.fromkeys(given.networks) for batch in dict.fromkeys(given.batch)]
    given.pr = list(dict.fromkeys(given.pr))
    given.rest = list(
        dict.fromkeys(given.rest or (("eager", "inductor") if given.device == "cuda" else ("eager",)))
    )
    given.tile = given.tile if given.tile == "auto" else int(given.tile)
    start = time.monotonic()
    with progress(len(jobs)) as begin:
        for number, (name, batch) in enumerate(jobs):
            if given.budget is not None and time.monotonic() - start > given.budget:
                print(
                    f"the budget of {given.budget:g} s was spent: {len(jobs) - number} networks were not started"
                )
                break
            begin(f"{name} N={batch}")
            for row in rows_of(name, batch, given, compile_function):
                record.rows.append(row)
                STDERR.print(row_line(row), markup=False, highlight=False)
            if given.json:
                record.save(given.json)
            if given.device == "cuda":
                torch.cuda.empty_cache()
    if record.rows:
        print(table(record.rows))
        for line in summary_lines(record.rows):
            print(line)
    return int(any(row["failure"] for row in record.rows))


if __name__ == "__main__":
    sys.exit(main())
