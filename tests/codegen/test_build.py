"""Building kernels: memory, disk, damage, other processes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from wsp_compiler.codegen import build as module
from wsp_compiler.codegen import cache
from wsp_compiler.codegen.build import BuiltKernel, build, generator_hash, lower, versions
from wsp_compiler.codegen.cpu_threads import uses_openmp
from wsp_compiler.codegen.targets import CodeTarget, cpu_target
from wsp_compiler.codegen.tvm_import import T

ROOT = Path(__file__).resolve().parents[2]


def make_add(amount: float) -> Any:
    """A kernel that adds ``amount`` to 16 numbers."""

    @T.prim_func
    def kernel(
        a: T.Buffer((16,), "float32", align=4),  # type: ignore[valid-type]
        b: T.Buffer((16,), "float32", align=4),  # type: ignore[valid-type]
    ):
        for i in T.serial(16):
            b[i] = a[i] + T.float32(amount)

    return kernel


def add(amount: float, name: str = "add", target: CodeTarget | None = None) -> BuiltKernel:
    """The built :func:`make_add`."""
    return build(make_add, name, target or cpu_target(), (amount,))


def run(kernel: BuiltKernel) -> float:
    """What the kernel adds."""
    y = torch.full((16,), torch.nan)
    kernel.function(torch.zeros(16), y)
    assert bool((y == y[0]).all())
    return float(y[0])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty kernel cache, on disk and in the process; what is known of the machine is known already."""
    for cpu in (None, "generic" if os.uname().machine == "aarch64" else "x86-64"):
        cpu_target(cpu)
    uses_openmp()
    monkeypatch.setenv("WSP_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(module, "_loaded", {})
    return tmp_path / "kernels"


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were really lowered."""
    names: list[str] = []

    def spy(function: Any, name: str, target: Any) -> Any:
        names.append(name)
        return lower(function, name, target)

    monkeypatch.setattr(module, "lower", spy)
    return names


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(module, "_loaded", {})


def test_a_kernel_is_built_once_per_process(folder: Path, lowered: list[str]):
    first, second = (add(1) for _ in range(2))
    assert first is second
    assert run(first) == 1
    assert lowered == ["add"]
    assert len(list(folder.iterdir())) == 1


def test_different_code_names_and_targets_are_different_kernels(folder: Path, lowered: list[str]):
    kernels = [
        add(1),
        add(2),
        add(1, "plus"),
        add(1, target=cpu_target("generic" if os.uname().machine == "aarch64" else "x86-64")),
    ]
    assert [run(kernel) for kernel in kernels] == [1, 2, 1, 1]
    assert len(lowered) == 4
    assert len(list(folder.iterdir())) == 4


def test_versions_are_part_of_the_key(folder: Path, lowered: list[str], monkeypatch: pytest.MonkeyPatch):
    assert "apache-tvm=0." in versions()
    add(1)
    forget(monkeypatch)
    monkeypatch.setattr(module, "versions", lambda: "another TVM")
    assert run(add(1)) == 1
    assert len(list(folder.iterdir())) == 2


def test_a_new_process_loads_from_disk(folder: Path, lowered: list[str], monkeypatch: pytest.MonkeyPatch):
    add(3)
    forget(monkeypatch)
    assert run(add(3)) == 3
    assert lowered == ["add"]


def test_what_is_known_needs_no_tensor_ir(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither in the process nor from disk: making it takes longer than loading the object."""

    def refuse(make: Any) -> Any:
        raise AssertionError("TensorIR made again")

    add(8)
    monkeypatch.setattr(make_add, "__code__", refuse.__code__)
    assert run(add(8)) == 8
    forget(monkeypatch)
    assert run(add(8)) == 8
    with pytest.raises(AssertionError, match="made again"):
        add(9)


def test_the_generators_source_is_part_of_the_key(folder: Path, lowered: list[str], tmp_path: Path):
    """Of its own module and of what that imports of this package, not of others."""
    package = Path(module.__file__).parents[1]
    fused = generator_hash(str(package / "codegen" / "cpu_winograd.py"))
    assert fused != generator_hash(str(package / "codegen" / "cuda_input_transform.py"))
    file = tmp_path / "generator.py"
    hashes: list[str] = []
    for text in ("a = 1\n", "a = 2\n", "from wsp_compiler.winograd import transform\na = 1\n"):
        file.write_text(text)
        generator_hash.cache_clear()
        hashes.append(generator_hash(str(file)))
    assert len(set(hashes)) == 3


DAMAGE: dict[str, Callable[[Path], object]] = {
    "changed": lambda file: file.write_bytes(file.read_bytes()[:-4] + b"abcd"),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "empty": lambda file: file.write_bytes(b""),
    "another object": lambda file: file.write_bytes(cache.encode({"object": b"no object file"})),
    "no object": lambda file: file.write_bytes(cache.encode({"text": b""})),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_costs_a_rebuild(
    damage: str, folder: Path, lowered: list[str], monkeypatch: pytest.MonkeyPatch, capfd: Any
):
    add(4)
    file = next(folder.iterdir())
    good = file.read_bytes()
    DAMAGE[damage](file)
    forget(monkeypatch)
    assert run(add(4)) == 4
    assert lowered == ["add", "add"]
    assert cache.decode(file.read_bytes()).keys() == cache.decode(good).keys()
    forget(monkeypatch)
    assert run(add(4)) == 4
    assert len(lowered) == 2


def test_without_a_usable_directory_kernels_still_run(
    folder: Path, lowered: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError("refused")

    monkeypatch.setattr(cache.tempfile, "mkstemp", refuse)
    assert run(add(5)) == 5
    assert "not writable" in caplog.text
    monkeypatch.setenv("WSP_CACHE_DIR", "")
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        assert run(add(6)) == 6
    assert caplog.text == ""
    assert lowered == ["add", "add"]
    assert not list(folder.iterdir())


def test_text_is_made_again_for_a_kernel_from_disk(folder: Path, monkeypatch: pytest.MonkeyPatch):
    text = add(7).text()
    assert "define" in text
    assert "7.000000e+00" in text
    forget(monkeypatch)
    assert add(7).text() == text


def test_many_threads_build_and_read_text_at_once(folder: Path, lowered: list[str]):
    def work(number: int) -> tuple[float, bool]:
        kernel = add(number % 3)
        return run(kernel), "define" in kernel.text()

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(24)))
    assert results == [(number % 3, True) for number in range(24)]


PROCESS = """
import sys
import torch
from torch import nn
import wsp_compiler
from wsp_compiler.codegen import build

if sys.argv[1] == "from disk":
    def lower(*arguments):
        raise AssertionError("the kernel was built again")
    build.lower = lower
torch.manual_seed(0)
convolution = nn.Conv2d(16, 24, 3, padding=1).eval()
x = torch.randn(2, 16, 9, 9)
compiled = wsp_compiler.compile(convolution, 0.5, example_inputs=x)
y = compiled(x)
assert torch.allclose(y, compiled.graph_module(x), atol=1e-5)
print(float(y.double().sum()).hex())
"""


@pytest.mark.slow
def test_processes_share_one_cache(tmp_path: Path):
    """Two build the same kernel at once; a third finds it and builds nothing."""
    folder = tmp_path / "kernels"
    environment = {**os.environ, "WSP_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}

    def start(mode: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PROCESS, mode],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tmp_path,
        )

    racing = [start("build") for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in racing]
    assert [process.returncode for process in racing] == [0, 0], outputs
    names = [entry.name for entry in folder.iterdir()]
    assert len([name for name in names if "-" not in name]) == 1  # others say what LLVM knows of the machine
    assert not any(name.startswith(".") for name in names)
    third = start("from disk")
    outputs.append(third.communicate(timeout=120))
    assert third.returncode == 0, outputs[2]
    assert len({out for out, _ in outputs}) == 1
