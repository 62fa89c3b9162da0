"""Every family of CUDA kernels under NVIDIA's compute-sanitizer, on ragged shapes.

    python -m benchmarks.sanitize --json FILE

Runs memcheck, racecheck and synccheck on the fused kernel in four precisions and both tile sizes, and on the three
kernels with rows, columns and both memory formats; results are compared with float64 on the CPU. Each tool's families
are dealt out to processes, all tools run side by side. PyTorch's caching allocator is off, so that reads beyond a
tensor are seen. Needs compute-sanitizer on PATH.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
SHARES = 4
"""Processes of each tool."""


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
    exact = copy.deepcopy(compiled.graph_module).cpu()  # no kernels of others under the tools
    try:
        check(float64_errors(compiled, exact, x), family.precision, family.tile)
    except ArithmeticError as problem:
        return f"failed: {problem}"
    sources = [text for layer in compiled.layers() for text in layer.sources()]
    return ", ".join(name for name in KERNELS if any(f"{name}_kernel" in text for text in sources))


def run_share(number: int) -> None:
    """Every SHARES-th family from `number`: a line of JSON for each, with what it ran."""
    torch.backends.cudnn.enabled = False  # its own kernels are not what is looked at
    for family in families()[number::SHARES]:
        print(f"{family.name} begins", file=sys.stderr, flush=True)
        print(json.dumps({family.name: run_family(family)}), flush=True)


def fill_cache(processes: int) -> None:
    """Build all kernels before the sanitizer slows everything down."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(run_family, families())


def command(tool: str, share: int, options: str) -> list[str]:
    """compute-sanitizer around one process of this module; ``options`` is its help text."""
    filters = [word for name in KERNELS for word in ("--kernel-name", f"kns={name}")]
    known = filters if "--kernel-name" in options else []
    child = [sys.executable, "-m", "benchmarks.sanitize", "--share", str(share)]
    return ["compute-sanitizer", "--tool", tool, *known, *child]


def _sanitize_share(tool: str, share: int, options: str) -> tuple[dict[str, str], list[str], str]:
    """Families and what they ran, the tool's summaries, and what is wrong, empty if nothing is."""
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path}
    done = subprocess.run(
        command(tool, share, options), capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    findings = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("=========")]
    summary = [line.partition("SUMMARY: ")[2] for line in findings if "SUMMARY: " in line]
    ran: dict[str, str] = {}
    for line in done.stdout.splitlines():
        ran |= json.loads(line) if line.startswith("{") else {}
    wrong = [f"{name}: {what}" for name, what in ran.items() if what.startswith("failed")]
    wrong += [f"{family.name}: did not run" for family in families()[share::SHARES] if family.name not in ran]
    if wrong or not summary or not all(line.startswith("0 ") for line in summary):
        told = [*wrong, *findings[:100], *done.stderr.splitlines()[-40:]]
        return ran, summary, f"process {share}, {summary or 'no summary'}: " + "\n".join(told)
    return ran, summary, ""


def sanitize(tool: str, options: str) -> Row:
    """One tool over all families; any finding is a failure, whatever kernel it is in."""
    with ThreadPoolExecutor(SHARES) as pool:
        found = list(pool.map(lambda share: _sanitize_share(tool, share, options), range(SHARES)))
    families_run = {name: what for ran, _, _ in found for name, what in ran.items()}
    summary = [line for _, lines, _ in found for line in lines]
    failures = [wrong for _, _, wrong in found if wrong]
    return {
        "name": tool,
        "summary": summary,
        "kernels": "named ones" if "--kernel-name" in options else "all",
        "families": families_run,
        "failure": "\n".join(failures) or None,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0 if every tool found nothing, else 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    made = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--json", metavar="FILE", help="write the record there")
    made.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    made.add_argument("--share", type=int, help=argparse.SUPPRESS)
    given = made.parse_args(arguments)
    if given.share is not None:
        run_share(given.share)
        return 0
    if not torch.cuda.is_available() or shutil.which("compute-sanitizer") is None:
        made.error("needs a CUDA GPU and compute-sanitizer on PATH (it comes with the CUDA toolkit)")
    fill_cache(processes=8)
    shown = subprocess.run(["compute-sanitizer", "--help"], capture_output=True, text=True, check=False)
    record = new_record("benchmarks.sanitize", arguments, "cuda")
    with ThreadPoolExecutor(len(given.tools)) as pool:
        record.rows += pool.map(lambda tool: sanitize(tool, shown.stdout + shown.stderr), given.tools)
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
