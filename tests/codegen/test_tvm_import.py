"""Importing tvm: once, fast, quietly, and only by the code generator."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

from wsp_compiler.codegen import tvm_import

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )


def test_the_package_imports_tvm_only_when_it_compiles():
    code = """
import sys, torch, wsp_compiler
from torch import nn
model = nn.Sequential(nn.Conv2d(16, 16, 3)).eval()
sites = wsp_compiler.find_sites(model, torch.randn(1, 16, 8, 8))
plan = wsp_compiler.PruningPlan.from_json(wsp_compiler.PruningPlan().to_json())
assert sites[0].reject is None
assert "tvm" not in sys.modules, "find_sites imported tvm"
wsp_compiler.CompiledModule
assert "tvm" not in sys.modules, "the runtime imported tvm"
"""
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_process_whose_kernels_are_cached_does_not_import_tvm(tmp_path: Path):
    """Not for the host's name, the launcher of parallel loops or the kernels themselves."""
    code = """
import sys, torch, wsp_compiler
from wsp_compiler.codegen.cpu_threads import uses_openmp
torch.set_num_threads(2)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=1)).eval()
compiled = wsp_compiler.compile(model, 0.5, example_inputs=torch.randn(1, 16, 20, 20))
imported = "tvm" in sys.modules
x = torch.randn(2, 16, 20, 20)
with torch.no_grad():
    torch.testing.assert_close(compiled(x), compiled.graph_module(x), rtol=1e-4, atol=1e-5)
print(imported, uses_openmp())
"""
    cold, warm = (python(code, WSP_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert (cold.returncode, cold.stderr) == (warm.returncode, warm.stderr) == (0, "")
    imported, openmp = warm.stdout.split()
    assert cold.stdout.split() == ["True", openmp]
    if openmp == "True":  # else TVM's own threads run the loops
        assert imported == "False"


def test_source_lookup_still_works_with_the_patch():
    """Frames of the frozen importer are answered at once; everything else as before."""
    assert inspect.getmodule(os.path) is os.path
    assert inspect.getmodule(test_source_lookup_still_works_with_the_patch) is sys.modules[__name__]
    assert inspect.getmodule(object(), "<frozen importlib._bootstrap>") is None
    assert inspect.getsource(python).startswith("def python(")
    assert any(frame.function == "test_source_lookup_still_works_with_the_patch" for frame in inspect.stack())


def test_names():
    assert tvm_import.tvm.__name__ == "tvm"
    assert hasattr(tvm_import.T, "prim_func")
    assert hasattr(tvm_import.B, "prim_func")
    assert type(tvm_import.IRBuilder()).__name__ == "IRBuilder"
