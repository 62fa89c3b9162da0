"""Seconds from compile to the first result, imports aside: with an empty kernel cache, then with that cache.

    python -m benchmarks.first_call --device cuda --dtype fp16 --networks resnet18 --batch 32 --json FILE

Every measurement is a process of its own. The first CUDA call of the process (its context, cuDNN's start) is made
before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from benchmarks.arguments import add_common, check_device, positive
from benchmarks.network_models import NETWORKS
from benchmarks.report import STDERR, text_table
from benchmarks.results import ROOT, Row, new_record

CHILD = """
import json, sys, time
import torch
import wsp_compiler, wsp_compiler.runtime
from benchmarks.arguments import DTYPES, prepare
from benchmarks.network_models import build
from wsp_compiler.codegen import cpu_launch, cuda_launch
from wsp_compiler.codegen.tvm_import import tvm
tvm.__version__  # imported at its first use
given = json.loads(sys.argv[1])
if given["threads"]: torch.set_num_threads(given["threads"])
x = torch.randn(given["batch"], 3, given["size"], given["size"], device=given["device"], dtype=DTYPES[given["dtype"]])
x = x.contiguous(memory_format=torch.channels_last)
model = build(given["network"]).to(x.device, x.dtype, memory_format=torch.channels_last)
with torch.no_grad():
    model(x)
    if x.is_cuda: torch.cuda.synchronize()
    start = time.perf_counter()
    compiled = wsp_compiler.compile(model, given["pr"], example_inputs=x, keep_slower=True)
    middle = time.perf_counter()
    compiled(x)
    if x.is_cuda: torch.cuda.synchronize()
print(json.dumps({"compile_s": middle - start, "first_result_s": time.perf_counter() - start}))
"""


def measure_once(about: Row, cache: str) -> Row:
    """Seconds of one process that uses the kernel cache in `cache`, or its failure."""
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "WSP_CACHE_DIR": cache, "PYTHONPATH": path}
    command = [sys.executable, "-c", CHILD, json.dumps(about)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"failure": lines[-1]}
    return {**json.loads(done.stdout.splitlines()[-1]), "failure": None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0 if every process succeeded, else 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    made = argparse.ArgumentParser(prog="python -m benchmarks.first_call", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    add_common(made, ("fp32", "tf32", "fp16"))
    made.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=["resnet18"])
    made.add_argument("--batch", type=positive, default=1, help="default: %(default)s")
    made.add_argument("--size", type=positive, default=224, help="pixels; default: %(default)s")
    made.add_argument("--pr", type=float, default=0.8, help="default: %(default)s")
    given = made.parse_args(arguments)
    check_device(made, given.device, given.dtype, on_cpu=("fp32",))
    record = new_record("benchmarks.first_call", arguments, given.device)
    keys = ("device", "dtype", "batch", "size", "pr", "threads")
    for network in given.networks:
        about = {"network": network, **{key: getattr(given, key) for key in keys}}
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm"):
                row = {"name": f"{network} {state}", "cache": state, **about, **measure_once(about, cache)}
                record.rows.append(row)
                STDERR.print(f"{row['name']}: {row.get('first_result_s', row['failure'])}", markup=False)
                if given.json:
                    record.save(given.json)
    good = [row for row in record.rows if not row["failure"]]
    cells = [[row["name"], f"{row['compile_s']:.2f}", f"{row['first_result_s']:.2f}"] for row in good]
    print(text_table(["seconds", "compile", "to the first result"], cells))
    return int(len(good) < len(record.rows))


if __name__ == "__main__":
    sys.exit(main())
