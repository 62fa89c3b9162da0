"""Whole networks against dense Winograd, as in the paper's tables 2 and 3.

    python -m benchmarks.paper_tables --dtype fp16 --networks resnet18 --batch 32 --json FILE
    python -m benchmarks.paper_tables --dtype fp16 --networks resnet20 resnet32 resnet56 --batch 128 --size 32

The baseline is the same network with every convolution that ours lowers on cuDNN's WINOGRAD_NONFUSED, batch norm
folded, compiled by torch.compile with frozen weights and captured as one CUDA graph; NCHW as that algorithm demands,
the rest of the network in NCHW or channels_last, whichever is faster. Ours is compiled the same way
(rest="inductor", cuda_graph=True), every eligible convolution lowered (keep_slower=True).
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import wsp_compiler
from benchmarks.arguments import DTYPES, add_common, check_device, fraction, positive, prepare
from benchmarks.conv_baselines import FORMATS
from benchmarks.errors import relative_l2
from benchmarks.network_models import build, check_network
from benchmarks.nonfused_network import nonfused_network
from benchmarks.report import STDERR, failure_lines, progress, row_line, text_table, time_cell
from benchmarks.results import Row, new_record
from benchmarks.timing import Call, measure, rotating_inputs
from wsp_compiler.cuda_graph import CudaGraphs

CompileFunction = Callable[..., Any]
BASELINE = "dense_winograd"
DENSE_PR = 0.0
WRONG = 0.1  # relative L2 error that no rounding of a whole network gives


def compile_baseline(model: nn.Module, paths: Sequence[str], layout: str, x: Tensor) -> Call:
    """The dense Winograd network, compiled and captured for inputs like x: [n, 3, h, w]."""
    import torch._inductor.config

    network = nonfused_network(model.to(memory_format=FORMATS[layout]), paths)
    compiled: Any = torch.compile(network, dynamic=False)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        compiled(x.contiguous(memory_format=FORMATS[layout]))
    if not x.is_cuda:
        return compiled
    graphs = CudaGraphs(compiled, x.device)
    return lambda x: graphs((x,), {})


def _reason(problem: Exception) -> str:
    return f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0]}"


class NetworkRun:
    """One network at one batch size: the dense Winograd baseline and ours at every pruning ratio."""

    def __init__(self, name: str, given: argparse.Namespace, compile_function: CompileFunction) -> None:
        self.name, self.given, self.compile_function = name, given, compile_function
        dtype = DTYPES[given.dtype]
        torch.compiler.reset()
        self.model = build(name, size=min(96, given.size)).to(given.device, dtype)
        shape = (given.batch, 3, given.size, given.size)
        self.xs = rotating_inputs(shape, dtype, given.device, torch.channels_last, count=4)
        self.calls: dict[str, Call] = {}
        self.inputs: dict[str, list[Tensor]] = {}
        self.problems: dict[str, str] = {}
        with torch.no_grad():
            self.expected = self.model(self.xs[0])

    def _add(self, label: str, make: Callable[[], Call], xs: list[Tensor], exact: bool) -> None:
        try:
            with torch.no_grad():
                call = make()
                error = relative_l2(call(xs[0]), self.expected)
            if exact and not error < WRONG:
                raise ArithmeticError(f"relative error against eager is {error:.2e}")
            self.calls[label], self.inputs[label] = call, xs
        except Exception as problem:
            STDERR.print(traceback.format_exc(limit=-6), markup=False)
            self.problems[label] = _reason(problem)

    def ours(self, pr: float) -> Any:
        """Ours at `pr`."""
        given = self.given
        return self.compile_function(
            self.model.to(memory_format=torch.channels_last),
            pr=pr,
            method="bwsp" if pr else "dense",
            tile=given.tile,
            precision="tf32" if given.dtype == "tf32" else None,
            tune=given.tune,
            keep_slower=True,
            rest=given.rest,
            cuda_graph=given.device == "cuda",
            example_inputs=(self.xs[0],),
        )

    def rows(self) -> list[Row]:
        """One row per pruning ratio."""
        least = wsp_compiler.CompileOptions().channel_threshold
        eligible = [site for site in wsp_compiler.find_sites(self.model, self.xs[0]) if site.reject is None]
        paths = [site.path for site in eligible if min(site.filters, site.channels) >= least]
        for pr in self.given.pr:
            self._add(f"ours pr={pr:g}", lambda pr=pr: self.ours(pr), self.xs, exact=pr == DENSE_PR)
        for layout in FORMATS:
            xs = [x.contiguous(memory_format=FORMATS[layout]) for x in self.xs]
            label = f"{BASELINE}/{layout}"
            self._add(
                label, lambda c=layout: compile_baseline(self.model, paths, c, self.xs[0]), xs, exact=True
            )
        graphs = list(self.calls) if self.given.device == "cuda" else []
        times = measure(self.calls, self.inputs, uncaptured=graphs) if self.calls else {}
        baselines = [us for label, us in times.items() if label.startswith(BASELINE)]
        rows: list[Row] = []
        for pr in self.given.pr:
            label, row = f"ours pr={pr:g}", _about(self.name, pr, self.given)
            missing = "; ".join(f"{name}: {why}" for name, why in self.problems.items() if name == label or
                                (name.startswith(BASELINE) and not baselines))  # fmt: skip
            if label in times and baselines:
                ours, theirs = times[label], min(baselines)
                ratios = {BASELINE: theirs / ours}
                row |= {"ours_us": ours, "baselines_us": {BASELINE: theirs}, "ratios": ratios}
                row |= {"strongest": BASELINE, "strongest_ratio": theirs / ours, "times_us": dict(times)}
                row |= {"how": times.how, "lowered": len(paths), "failure": None}
            rows.append({**row, "failure": missing or "not measured"} if "ours_us" not in row else row)
        return [row | {"problems": self.problems} for row in rows]


def _about(name: str, pr: float, given: argparse.Namespace) -> Row:
    keys = ("batch", "size", "dtype", "tile", "rest", "device")
    about = {key: getattr(given, key) for key in keys}
    return {"name": f"{name} N={given.batch} pr={pr:g}", "network": name, "pr": pr, **about}


def rows_of(name: str, given: argparse.Namespace, compile_function: CompileFunction) -> list[Row]:
    """The rows of one network; where something outside the candidates raises, failed rows."""
    try:
        return NetworkRun(name, given, compile_function).rows()
    except Exception as problem:
        STDERR.print(traceback.format_exc(), markup=False)
        return [_about(name, pr, given) | {"failure": _reason(problem)} for pr in given.pr]


def table(rows: Sequence[Row]) -> str:
    """Networks down, pruning ratios across: speedup over dense Winograd, and our time."""
    ratios = list(dict.fromkeys(row["pr"] for row in rows))
    lines: list[list[str]] = []
    for network in dict.fromkeys(row["network"] for row in rows):
        found = {row["pr"]: row for row in rows if row["network"] == network and not row["failure"]}
        if not found:
            continue
        theirs = next(iter(found.values()))["baselines_us"][BASELINE]
        cells = [
            time_cell(found[pr]["ours_us"], found[pr]["strongest_ratio"]) if pr in found else "-"
            for pr in ratios
        ]
        lines.append([network, time_cell(theirs), *cells])
    return text_table(["microseconds", BASELINE, *(f"PR {100 * pr:g}%" for pr in ratios)], lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.paper_tables", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    add_common(made, ("fp32", "tf32", "fp16"))
    made.add_argument("--networks", nargs="+", default=["resnet18"], help="default: resnet18")
    made.add_argument("--batch", type=positive, default=32, help="default: %(default)s")
    made.add_argument("--size", type=positive, default=224, help="pixels; default: %(default)s")
    made.add_argument(
        "--pr", type=fraction, nargs="+", default=[0.4, 0.6, 0.7, 0.84], help="default: table 3's"
    )
    made.add_argument("--tile", choices=("2", "4", "auto"), default="2", help="outputs per tile side")
    made.add_argument(
        "--rest", choices=("eager", "inductor"), default="inductor", help="default: %(default)s"
    )
    made.add_argument(
        "--tune", choices=("off", "fast", "full"), default="off", help="as in wsp_compiler.compile"
    )
    made.add_argument("--budget", type=float, help="start no network after so many seconds")
    return made


def main(arguments: Sequence[str] | None = None, compile_function: CompileFunction | None = None) -> int:
    """Runs the command; 0 if every network succeeded at every pruning ratio, else 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    made = parser()
    given = made.parse_args(arguments)
    check_device(made, given.device, given.dtype, on_cpu=("fp32",))
    try:
        for name in given.networks:
            check_network(name)
    except ValueError as problem:
        made.error(str(problem))
    prepare(given.device, given.threads)
    given.tile = given.tile if given.tile == "auto" else int(given.tile)
    if given.device == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = given.dtype == "tf32"
    compile_function = compile_function or wsp_compiler.compile
    record = new_record("benchmarks.paper_tables", arguments, given.device)
    start = time.monotonic()
    with progress(len(given.networks)) as begin:
        for name in given.networks:
            if given.budget is not None and time.monotonic() - start > given.budget:
                print(f"the budget of {given.budget:g} s was spent before {name}")
                break
            begin(name)
            for row in rows_of(name, given, compile_function):
                record.rows.append(row)
                STDERR.print(row_line(row), markup=False, highlight=False)
            if given.json:
                record.save(given.json)
            if given.device == "cuda":
                torch.cuda.empty_cache()
    print(table(record.rows))
    for line in failure_lines(record.rows):
        print(line)
    return int(any(row["failure"] for row in record.rows))


if __name__ == "__main__":
    sys.exit(main())
