"""Times of single pruned convolutions against the vendors', shape by shape.

    python -m benchmarks.conv_layers --device cuda --dtype fp16 --pr 0.8 --cases twelve --json FILE

Ours is conv + bias + ReLU, compiled; the vendors' is the convolution alone. The strongest baseline of a case
is the fastest that is no less precise than ours. The relative error is against the same kept weights in
float64.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy import check, float64_error
from benchmarks.arguments import (
    DTYPES,
    add_common,
    check_device,
    fraction,
    no_less_precise,
    positive,
    prepare,
)
from benchmarks.cases import ConvCase, check_name, select
from benchmarks.conv_baselines import FORMATS, Variant, variants
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
OURS = "ours"


@dataclass(frozen=True)
class Options:
    """What is compiled, the same for all cases."""

    device: str
    dtype: str
    pr: float
    method: str
    tile: int
    layout: str


def conv_relu(case: ConvCase, options: Options) -> nn.Sequential:
    """Conv2d(c, k, 3, padding=1) + ReLU with Kaiming-normal weights and normal bias, seeded by the shape."""
    model = nn.Sequential(nn.Conv2d(case.channels_in, case.channels_out, 3, padding=1), nn.ReLU())
    generator = torch.Generator().manual_seed(case.channels_out * 1009 + case.height)
    nn.init.kaiming_normal_(model[0].weight, nonlinearity="relu", generator=generator)
    nn.init.normal_(model[0].bias, generator=generator)
    return model.to(options.device, DTYPES[options.dtype]).eval().requires_grad_(False)


class _Inputs:
    """Rotating inputs [n, c, h, w], made once per (dtype, memory format) and shared by the candidates."""

    def __init__(self, shape: tuple[int, int, int, int], device: str) -> None:
        self.shape, self.device = shape, device
        self.made: dict[tuple[torch.dtype, str], list[Tensor]] = {}

    def get(self, dtype: torch.dtype, layout: str) -> list[Tensor]:
        key = (dtype, layout)
        if key not in self.made:
            self.made[key] = rotating_inputs(self.shape, dtype, self.device, FORMATS[layout])
        return self.made[key]


def _usable(variant: Variant, inputs: _Inputs) -> tuple[Call, list[Tensor]]:
    """The baseline's callable, called once, and its inputs; raises where this machine cannot run it."""
    xs = inputs.get(variant.dtype, variant.memory_format)
    call = variant.make(xs[0])
    call(xs[0])
    if inputs.device == "cuda":
        torch.cuda.synchronize()
    return call, xs


def run_case(case: ConvCase, batch: int, options: Options, compile_function: CompileFunction) -> Row:
    """Times of one shape; microseconds, ratios (theirs / ours), relative error, and what could not run."""
    inputs = _Inputs(case.input_shape(batch), options.device)
    xs = inputs.get(DTYPES[options.dtype], options.layout)
    model = conv_relu(case, options)
    weight = model[0].weight.detach().float().clone()  # [k, c, 3, 3]
    compiled = compile_function(
        model,
        pr=options.pr,
        method=options.method,
        tile=options.tile,
        precision="tf32" if options.dtype == "tf32" else None,
        example_inputs=(xs[0],),
    )
    error = float64_error(compiled, compiled.graph_module, xs[0])
    check(error, options.dtype)

    calls: dict[str, Call] = {OURS: compiled}
    given: dict[str, Sequence[Tensor]] = {OURS: xs}
    timed: list[Variant] = []
    unavailable: dict[str, str] = {}
    with torch.no_grad():
        for variant in variants(options.device, options.dtype, weight):
            try:
                calls[variant.label], given[variant.label] = _usable(variant, inputs)
                timed.append(variant)
            except Exception as problem:  # one baseline less, with its reason in the row
                unavailable[variant.label] = f"{type(problem).__name__}: {problem}"
    times = measure(calls, given)

    best: dict[str, float] = {}
    for variant in timed:
        best[variant.baseline] = min(times[variant.label], best.get(variant.baseline, float("inf")))
    ratios = {name: microseconds / times[OURS] for name, microseconds in best.items()}
    precisions = {variant.baseline: variant.precision for variant in timed}
    rivals = [name for name in ratios if no_less_precise(precisions[name], options.dtype)]
    if not rivals:
        raise RuntimeError(f"no baseline of {options.dtype} or better could run: {unavailable}")
    strongest = min(rivals, key=lambda name: ratios[name])
    return {
        "ours_us": times[OURS],
        "baselines_us": best,
        "ratios": ratios,
        "strongest": strongest,
        "strongest_ratio": ratios[strongest],
        "relative_error": error,
        "direct_multiplies": case.direct_multiplies(batch),
        "times_us": dict(times),
        "how": times.how,
        "unavailable": unavailable,
        "report": str(compiled.report()),
        "failure": None,
    }


def run(
    jobs: Sequence[tuple[ConvCase, int]],
    options: Options,
    compile_function: CompileFunction,
    done: Callable[[Row], None],
) -> None:
    """Runs the jobs in order, each row to `done`; a job that raises becomes a row with its failure."""
    with progress(len(jobs)) as begin:
        for case, batch in jobs:
            name = f"{case.name} N={batch}"
            begin(name)
            row: Row = {"name": name, "case": case.name, "group": case.group, "batch": batch, **vars(options)}
            try:
                row |= run_case(case, batch, options, compile_function)
            except Exception as problem:
                STDERR.print(traceback.format_exc(), markup=False)
                row["failure"] = f"{type(problem).__name__}: {problem}"
            done(row)
            STDERR.print(row_line(row), markup=False, highlight=False)
            if options.device == "cuda":
                torch.cuda.empty_cache()


def table(rows: Sequence[Row]) -> str:
    """One line per case: our time, each baseline's time and ratio, our error."""
    good = [row for row in rows if not row["failure"]]
    names = list(dict.fromkeys(name for row in good for name in row["baselines_us"]))
    lines = [
        [
            row["name"],
            time_cell(row["ours_us"]),
            *(time_cell(row["baselines_us"].get(name), row["ratios"].get(name)) for name in names),
            f"{row['strongest_ratio']:.2f}x",
            f"{row['relative_error']:.1e}",
        ]
        for row in good
    ]
    return text_table(["microseconds", OURS, *names, "strongest", "error"], lines)


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
    made.add_argument("--pr", type=fraction, default=0.8, help="pruning ratio; default: %(default)s")
    made.add_argument("--method", default="bwsp", help="pruning pattern; default: %(default)s")
    made.add_argument("--tile", type=int, choices=(2, 4), default=2, help="outputs per tile side")
    made.add_argument("--batch", type=positive, nargs="+", default=[1], help="default: 1; twelve has its own")
    made.add_argument(
        "--cases",
        type=case_name,
        nargs="+",
        default=["resnet18"],
        help="groups (resnet18, vgg16, superres, twelve) or single cases (64@56); default: resnet18",
    )
    made.add_argument(
        "--layout", choices=tuple(FORMATS), default="channels_last", help="of our input; default: %(default)s"
    )
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

    options = Options(given.device, given.dtype, given.pr, given.method, given.tile, given.layout)
    record = new_record("benchmarks.conv_layers", arguments, given.device)

    def done(row: Row) -> None:
        record.rows.append(row)
        if given.json:
            record.save(given.json)

    run(select(given.cases, given.batch), options, compile_function, done)
    print(table(record.rows))
    for line in (*failure_lines(record.rows), *baseline_lines(record.rows), *verdict_lines(record.rows)):
        print(line)
    return int(any(row["failure"] for row in record.rows))


if __name__ == "__main__":
    sys.exit(main())
