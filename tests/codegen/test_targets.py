"""Targets: what a user's argument means, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from wsp_compiler.codegen import targets
from wsp_compiler.codegen.targets import CodeTarget, cpu_target, host_cpu, resolve_target, vector_lanes
from wsp_compiler.codegen.tvm_import import tvm
from wsp_compiler.errors import TargetError

CPU = torch.device("cpu")
capability = torch.backends.cpu.get_cpu_capability()
x86 = pytest.mark.skipif(capability not in ("AVX2", "AVX512"), reason="needs an x86-64 CPU with AVX2")


def test_the_default_is_this_machine():
    target = cpu_target()
    assert target.device == CPU
    assert not target.is_cuda
    assert target.channel_multiple == 1
    assert target.lanes == {"AVX512": 16, "AVX2": 8}.get(capability, 4)
    assert host_cpu()


@pytest.mark.parametrize("argument", [None, "cpu", "cpu:0", CPU, {"kind": "llvm"}])
def test_ways_to_say_cpu(argument: Any):
    assert resolve_target(argument, CPU) == cpu_target()


@x86
def test_a_tvm_target_and_its_dict_mean_the_same():
    expected = CodeTarget(CPU, "x86-64-v3", 8)
    options = {"kind": "llvm", "mcpu": "x86-64-v3"}
    assert resolve_target(options, CPU) == expected
    assert resolve_target(tvm.target.Target(options), CPU) == expected
    assert resolve_target(tvm.target.Target({"kind": "llvm"}), CPU) == cpu_target()


@pytest.mark.parametrize(
    ("cpu", "lanes"), [("x86-64", 4), ("x86-64-v3", 8), ("x86-64-v4", 16), ("znver3", 8), ("znver4", 16)]
)
@x86
def test_vector_lanes(cpu: str, lanes: int):
    assert vector_lanes(cpu) == lanes


def test_what_llvm_says_of_this_machine_is_kept_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WSP_CACHE_DIR", str(tmp_path))
    asked: list[str] = []

    def ask() -> str:
        asked.append("once")
        return "an answer"

    assert [targets._remembered("a question", ask) for _ in range(2)] == ["an answer"] * 2
    known = targets._machine() is not None  # elsewhere the system does not tell machines apart
    assert len(asked) == (1 if known else 2)
    monkeypatch.setattr(targets, "_machine", lambda: "another CPU")
    assert targets._remembered("a question", ask) == "an answer"
    monkeypatch.setattr(targets, "_machine", lambda: None)
    targets._remembered("a question", ask)
    assert len(asked) == (3 if known else 4)


@x86
def test_dot_products_need_the_model_and_the_machine(monkeypatch: pytest.MonkeyPatch):
    def machine(has: bool, capability: str = "AVX512") -> None:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        targets.has_dot.cache_clear()

    try:
        machine(True)
        assert [targets.has_dot(cpu) for cpu in ("znver4", "znver3", "x86-64-v4")] == [True, False, False]
        machine(False)
        assert not targets.has_dot("znver4")
        machine(True, "AVX2")
        assert not targets.has_dot("znver4")
    finally:
        targets.has_dot.cache_clear()


@x86
def test_unknown_cpus_are_refused_with_near_names():
    with pytest.raises(TargetError, match=r"(?s)no CPU 'znver44'.*near names:.*znver4"):
        cpu_target("znver44")
    with pytest.raises(TargetError, match="no CPU 'native'"):
        cpu_target("native")


@x86
def test_vectors_that_this_machine_lacks(monkeypatch: pytest.MonkeyPatch):
    """A virtual machine may hide AVX-512 of a CPU that has it: the name alone would crash the process."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(targets, "host_cpu", lambda: "znver4")
    assert cpu_target() == CodeTarget(CPU, "x86-64-v3", 8)
    with pytest.raises(TargetError, match=r"(?s)16-lane vectors.*use 'x86-64-v3'"):
        cpu_target("x86-64-v4")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert cpu_target() == CodeTarget(CPU, "x86-64", 4)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("gpu", "unknown target 'gpu'"),
        ("", "unknown target ''"),
        (3.5, "unknown target 3.5"),
        ({"kind": "vulkan"}, "unknown kind 'vulkan'"),
        ({}, "unknown kind None"),
        ("meta", "no kernels for device meta"),
    ],
)
def test_what_is_no_target(argument: Any, message: str):
    with pytest.raises(TargetError, match=f"{message}(?s:.*)\n  fix: "):
        resolve_target(argument, CPU)


def test_cuda_needs_a_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for argument in ("cuda", "cuda:1", torch.device("cuda", 0), {"kind": "cuda", "arch": "sm_90"}):
        with pytest.raises(TargetError, match="no CUDA device"):
            resolve_target(argument, CPU)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As on a machine with one GPU of compute capability 8.9."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return monkeypatch


def test_cuda_devices(one_gpu: pytest.MonkeyPatch):
    target = resolve_target("cuda", CPU)
    assert (target.device, target.arch, target.is_cuda) == (torch.device("cuda", 0), "sm_89", True)
    assert target.channel_multiple == 32
    assert resolve_target(None, torch.device("cuda", 0)) == target
    assert resolve_target({"kind": "cuda", "arch": "sm_80"}, CPU).arch == "sm_80"
    with pytest.raises(TargetError, match=r"target='cuda:1': there are? (only )?1 CUDA device"):
        resolve_target("cuda:1", CPU)


def test_cuda_versions(one_gpu: pytest.MonkeyPatch):
    one_gpu.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(TargetError, match=r"(?s)CUDA 12.8.*CUDA 13"):
        resolve_target("cuda", CPU)
    one_gpu.setattr(torch.version, "cuda", "13.0")
    one_gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(TargetError, match=r"7\.5 is older than 8\.0"):
        resolve_target("cuda", CPU)
