"""Every family of CUDA kernels under NVIDIA's compute-sanitizer, on ragged shapes.

    python -m benchmarks.sanitize --json FILE

Runs memcheck, racecheck and synccheck, each in a process of its own that calls the fused kernel in four precisions and
both tile sizes, and the three kernels with rows, columns and both memory formats; results are compared with float64.
PyTorch's caching allocator is off, so that reads beyond a tensor are seen. Needs compute-sanitizer on PATH.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

import wsp_compiler
from benchmarks.arguments import DTYPES
from benchmarks.errors import check, float64_errors
from benchmarks.report import text_table
from benchmarks.results import ROOT, Row, new_record

TOOLS = ("memcheck", "racecheck", "synccheck")
KERNELS = ("winograd_fused", "input_transform", "sparse_bgemm", "output_transform")


@dataclass(frozen=True)
class Family:
    """One layer: batch, c, n, H, W of a convolution, and how it is compiled."""

    precision: str
    tile: int
    shape: tuple[int, int, int, int, int]
    method: str = "bwsp"
    direction: str = "row"
    channels_last: bool = True
    shortcut: bool = False

    @property
    def name(self) -> str:
        size = "x".join(map(str, self.shape))
        layout = "NHWC" if self.channels_last else "NCHW"
        return (
            f"{self.precision} F{self.tile} {self.method}-{self.direction} {size} {layout}"
            + " +x" * self.shortcut
        )


def families() -> list[Family]:
    """The fused kernel with and without a residual, and the three kernels where it does not apply."""
    found: list[Family] = []
    for precision in ("fp16", "bf16", "tf32", "fp32"):
        for tile in (2, 4):
            found += [
                Family(precision, tile, (3, 64, 96, 7, 7)),
                Family(precision, tile, (1, 128, 128, 13, 20), shortcut=True),
                Family(precision, tile, (2, 40, 36, 13, 20), channels_last=False),
                Family(precision, tile, (2, 64, 64, 9, 5), method="wsp", direction="column", shortcut=True),
                Family(precision, tile, (1, 3, 1, 3, 5), method="dense"),
            ]
    return found


class Layer(nn.Module):
    """relu(conv(x)), or relu(conv(x) + x)."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        _, c, n, *_ = family.shape
        self.conv, self.shortcut = nn.Conv2d(c, n, 3, padding=1), family.shortcut
        nn.init.normal_(self.conv.weight, std=(1 / (9 * c)) ** 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return torch.relu(y + x if self.shortcut else y)


def run_family(family: Family) -> str:
    """Compiles and calls one layer; its kernels, or what is wrong with the result."""
    n, c, _, h, w = family.shape
    layout = torch.channels_last if family.channels_last else torch.contiguous_format
    x = torch.randn(n, c, h, w, device="cuda").to(DTYPES[family.precision]).contiguous(memory_format=layout)
    model = Layer(family).to(x.device, x.dtype, memory_format=layout).eval().requires_grad_(False)
    compiled = wsp_compiler.compile(
        model, 0.8, method=family.method, direction=family.direction, tile=family.tile, precision=family.precision,
        rules=[wsp_compiler.PruneRule(".*")], keep_slower=True, example_inputs=x,
    )  # fmt: skip
    try:
        check(float64_errors(compiled, compiled.graph_module, x), family.precision, family.tile)
    except ArithmeticError as problem:
        return f"failed: {problem}"
    sources = [text for layer in compiled.layers() for text in layer.sources()]
    return ", ".join(name for name in KERNELS if any(f"{name}_kernel" in text for text in sources))


def run_all() -> dict[str, str]:
    """What every family ran."""
    torch.backends.cudnn.enabled = False  # its own kernels are not what is looked at
    return {family.name: run_family(family) for family in families()}


def fill_cache(processes: int) -> None:
    """Build all kernels before the sanitizer slows everything down."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(run_family, families())


def command(tool: str, options: str) -> list[str]:
    """compute-sanitizer around this module's own process; ``options`` is its help text."""
    names = [word for name in KERNELS for word in ("--kernel-name", f"kns={name}")]
    known = names if "--kernel-name" in options else []
    return [
        "compute-sanitizer",
        "--tool",
        tool,
        *known,
        sys.executable,
        "-m",
        "benchmarks.sanitize",
        "--child",
    ]


def sanitize(tool: str, options: str) -> Row:
    """One tool over all families; any finding is a failure, those that name our kernels are listed apart."""
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path}
    done = subprocess.run(
        command(tool, options), capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    findings = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("=========")]
    summary = [line.partition("SUMMARY: ")[2] for line in findings if "SUMMARY: " in line]
    own = [line for line in findings if any(name in line for name in KERNELS)]
    ran = next((json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")), {})
    bad = [f"{name}: {what}" for name, what in ran.items() if what.startswith("failed")]
    row: Row = {"name": tool, "summary": summary, "own_findings": own[:50], "families": ran, "failure": None}
    if not summary or not all(line.startswith("0 ") for line in summary) or not ran or bad:
        told = [*bad, *findings[:200], *done.stderr.splitlines()[-40:]]
        row["failure"] = f"{summary or 'no summary'}: " + "\n".join(told)
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0 if every tool found nothing, else 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    made = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--json", metavar="FILE", help="write the record there, after every tool")
    made.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    made.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = made.parse_args(arguments)
    if given.child:
        print(json.dumps(run_all()))
        return 0
    if not torch.cuda.is_available() or shutil.which("compute-sanitizer") is None:
        made.error("needs a CUDA GPU and compute-sanitizer on PATH (it comes with the CUDA toolkit)")
    fill_cache(processes=8)
    shown = subprocess.run(["compute-sanitizer", "--help"], capture_output=True, text=True, check=False)
    record = new_record("benchmarks.sanitize", arguments, "cuda")
    for tool in given.tools:
        record.rows.append(sanitize(tool, shown.stdout + shown.stderr))
        if given.json:
            record.save(given.json)
    cells = [[row["name"], "; ".join(row["summary"]), str(len(row["families"]))] for row in record.rows]
    print(text_table(["tool", "summary", "families"], cells))
    for row in record.rows:
        if row["failure"]:
            print(f"{row['name']}: {row['failure']}")
    return int(any(row["failure"] for row in record.rows))


if __name__ == "__main__":
    sys.exit(main())
