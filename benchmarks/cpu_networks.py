"""Whole networks on the CPU, float32, batch size 1, against every runtime of :mod:`benchmarks.cpu_peers`.

    python -m benchmarks.cpu_networks --networks vgg16_features resnet18 denoiser --threads 2 --json FILE

Ours is compiled at one pruning ratio with tile 2 and with tile 4; the faster counts, both are listed. Peak memory is
that of a fresh process with everything in it (imports, compilation, three calls), ours over eager PyTorch's.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import re
import resource
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.arguments import fraction, positive, prepare
from benchmarks.cpu_exports import to_ncnn, to_onnx
from benchmarks.cpu_peers import inductor, ncnn_network, onnx_runtime, openvino, result
from benchmarks.network_models import build
from benchmarks.report import STDERR, failure_lines, row_line, text_table, time_cell, verdict_lines
from benchmarks.results import Row, new_record
from benchmarks.timing import Call, measure

INPUTS = 4


def _denoiser() -> nn.Module:
    from examples.denoiser import load_denoiser

    return load_denoiser()


def _features() -> nn.Module:
    features: Any = build("vgg16").features
    return features


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int, int]]] = {
    "vgg16_features": (_features, (1, 3, 224, 224)),
    "vgg16": (lambda: build("vgg16"), (1, 3, 224, 224)),
    "resnet18": (lambda: build("resnet18"), (1, 3, 224, 224)),
    "denoiser": (_denoiser, (1, 1, 512, 512)),
}
"""Name -> (makes the network, shape of its input)."""


def peers(model: nn.Module, x: Tensor) -> dict[str, Callable[[], Call]]:
    """Name -> a function that makes its call for inputs like x."""
    last = {"memory_format": torch.channels_last}

    def channels_last() -> Call:
        converted: nn.Module = build_copy(model).to(**last)
        return lambda x: converted(x)

    return {
        "torch": lambda: lambda x: model(x),
        "torch_channels_last": channels_last,
        "torch_compile": lambda: inductor(build_copy(model).to(**last), x.contiguous(**last)),
        "onnxruntime": lambda: onnx_runtime(to_onnx(model, x), x),
        "openvino": lambda: openvino(to_onnx(model, x), x),
        "ncnn": lambda: ncnn_network(*to_ncnn(model, x), x),
    }


def build_copy(model: nn.Module) -> nn.Module:
    """A copy whose layout may be changed."""
    return copy.deepcopy(model).requires_grad_(False)


def _peak_bytes(name: str, pr: float | None, threads: int, answer: Any) -> None:
    torch.set_num_threads(threads)
    make, shape = NETWORKS[name]
    model, x = make().requires_grad_(False), torch.randn(shape)
    call: Any = model
    with torch.no_grad():
        if pr is not None:
            import wsp_compiler

            call = wsp_compiler.compile(model, pr, keep_slower=True)
            del model
        for _ in range(3):
            call(x)
    answer.put(own_peak())


def own_peak() -> int:
    """Peak resident bytes of this process. Linux counts those of the parent in ru_maxrss, but not in VmHWM."""
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found.group(1)) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_memory(name: str, pr: float | None, threads: int) -> int:
    """Peak resident bytes of a fresh process that compiles (at ``pr``; None: eager) and runs the network."""
    context = multiprocessing.get_context("spawn")
    answer: Any = context.Queue()
    process = context.Process(target=_peak_bytes, args=(name, pr, threads, answer))
    process.start()
    peak = answer.get(timeout=600)
    process.join()
    return int(peak)


def run_network(name: str, pr: float, compile_function: Callable[..., Any]) -> Row:
    """Times, ratios and errors of one network."""
    make, shape = NETWORKS[name]
    model = make().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    plain = [torch.randn(shape, generator=generator) for _ in range(INPUTS)]
    last = [x.contiguous(memory_format=torch.channels_last) for x in plain]
    calls: dict[str, Call] = {}
    given: dict[str, Sequence[Tensor]] = {}
    unavailable: dict[str, str] = {}
    errors: dict[str, float] = {}
    with torch.no_grad():
        expected = model(plain[0])
        for label, start in peers(model, plain[0]).items():
            xs = last if label in ("torch_channels_last", "torch_compile") else plain
            try:
                call = start()
                made = result(call, xs[0]).reshape(expected.shape)
                errors[label] = float((made - expected).norm() / expected.norm())
                calls[label], given[label] = call, xs
            except Exception as problem:
                unavailable[label] = f"{type(problem).__name__}: {problem}".partition("\n")[0]
        for tile in (2, 4):
            label = f"ours F{tile}"
            own = build_copy(model).to(memory_format=torch.channels_last)
            compiled = compile_function(own, pr, tile=tile, keep_slower=True, example_inputs=(last[0],))
            reference = build_copy(compiled.graph_module).double()(last[0].double())
            made = compiled(last[0])
            errors[label] = float((made - reference).norm() / reference.norm())
            calls[label], given[label] = compiled, last
    times = measure(calls, given)
    rivals = {label: times[label] for label in calls if not label.startswith("ours")}
    ours = min(times["ours F2"], times["ours F4"])
    strongest = min(rivals, key=lambda label: rivals[label])
    return {
        "name": name,
        "pr": pr,
        "ours_us": ours,
        "tiles_us": {"F2": times["ours F2"], "F4": times["ours F4"]},
        "baselines_us": rivals,
        "ratios": {label: microseconds / ours for label, microseconds in rivals.items()},
        "strongest": strongest,
        "strongest_ratio": rivals[strongest] / ours,
        "least_us": dict(times.least),
        "relative_errors": errors,
        "how": times.how,
        "unavailable": unavailable,
        "failure": None,
    }


def table(rows: Sequence[Row]) -> str:
    """One line per network: ours at both tiles, every rival with its ratio."""
    good = [row for row in rows if not row["failure"]]
    names = list(dict.fromkeys(name for row in good for name in row["baselines_us"]))
    lines = [
        [
            row["name"],
            time_cell(row["tiles_us"]["F2"]),
            time_cell(row["tiles_us"]["F4"]),
            *(time_cell(row["baselines_us"].get(name), row["ratios"].get(name)) for name in names),
            f"{row['strongest_ratio']:.2f}x",
            f"{row['peak_memory_ratio']:.2f}x" if "peak_memory_ratio" in row else "-",
        ]
        for row in good
    ]
    return text_table(["microseconds", "ours F2", "ours F4", *names, "strongest", "peak memory"], lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.cpu_networks", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    made.add_argument("--pr", type=fraction, default=0.8, help="pruning ratio; default: %(default)s")
    made.add_argument("--threads", type=positive, help="default: torch.get_num_threads()")
    made.add_argument("--memory", action="store_true", help="measure peak memory too, in fresh processes")
    made.add_argument("--json", metavar="FILE", help="write the record there, after every network")
    return made


def main(arguments: Sequence[str] | None = None, compile_function: Callable[..., Any] | None = None) -> int:
    """Runs the command; 0 if every network succeeded, else 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parser().parse_args(arguments)
    prepare("cpu", given.threads)
    if compile_function is None:
        from wsp_compiler import compile as compile_function
    record = new_record("benchmarks.cpu_networks", arguments, "cpu")
    for name in given.networks:
        try:
            row = run_network(name, given.pr, compile_function)
            if given.memory:
                threads = torch.get_num_threads()
                own, eager = (peak_memory(name, pr, threads) for pr in (given.pr, None))
                row |= {"peak_bytes": own, "eager_peak_bytes": eager, "peak_memory_ratio": own / eager}
        except Exception as problem:
            STDERR.print(traceback.format_exc(), markup=False)
            row = {"name": name, "failure": f"{type(problem).__name__}: {problem}"}
        record.rows.append(row)
        STDERR.print(row_line(row), markup=False, highlight=False)
        if given.json:
            record.save(given.json)
    print(table(record.rows))
    for line in (*failure_lines(record.rows), *verdict_lines(record.rows)):
        print(line)
    return int(any(row["failure"] for row in record.rows))


if __name__ == "__main__":
    sys.exit(main())
