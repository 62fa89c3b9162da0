"""What code is generated for: the host's CPU, or one CUDA device."""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import torch

from wsp_compiler.codegen.cache import cache_key, load, store
from wsp_compiler.errors import TargetError


@dataclass(frozen=True)
class CodeTarget:
    """A device to run on and the TVM target to generate for.

    Attributes:
        device: where inputs live and kernels run.
        arch: CUDA architecture ("sm_90") or LLVM CPU name ("znver4").
        lanes: float32 values per CPU vector (0 on CUDA).
        dot: the CPU has bfloat16 dot products (AVX512_BF16).
    """

    device: torch.device
    arch: str
    lanes: int
    dot: bool = False

    @property
    def is_cuda(self) -> bool:
        """True for a CUDA target."""
        return self.device.type == "cuda"

    @property
    def channel_multiple(self) -> int:
        """Channels and filters should be multiples of it, for the fused CUDA kernel (`fused_applies`) to run them."""
        return 32 if self.is_cuda else 1


def _llvm() -> Any:
    """TVM's questions to LLVM; imported late, since importing TVM takes seconds."""
    from wsp_compiler.codegen.tvm_import import tvm

    return tvm.target.codegen


def _machine() -> str | None:
    """What tells this kind of CPU from others; None where the system does not say."""
    names = (
        "vendor_id",
        "cpu family",
        "model",
        "stepping",
        "flags",
        "CPU implementer",
        "CPU part",
        "Features",
    )
    try:
        first = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return None
    lines = [line for line in first.splitlines() if line.partition(":")[0].strip() in names]
    return "\n".join(lines) or None


def _remembered(question: str, ask: Callable[[], str]) -> str:
    """LLVM's answer, kept beside the kernels: asking takes importing TVM."""
    machine = _machine()
    if machine is None:
        return ask()
    key = "llvm-" + cache_key(question, machine, version("apache-tvm"))
    entry = load(key)
    if entry is not None and "answer" in entry:
        return entry["answer"].decode()
    answer = ask()
    store(key, {"answer": answer.encode()})
    return answer


@cache
def host_cpu() -> str:
    """LLVM's name of this machine's CPU."""
    return _remembered("host", lambda: str(_llvm().llvm_get_system_cpu()))


@cache
def _has_feature(cpu: str, feature: str) -> bool:
    def ask() -> str:
        from wsp_compiler.codegen.tvm_import import tvm

        target = tvm.target.Target({"kind": "llvm", "mcpu": cpu})
        return str(int(_llvm().target_has_features(feature, target)))

    return _remembered(f"{cpu} {feature}", ask) == "1"


@cache
def vector_lanes(cpu: str) -> int:
    """float32 lanes of the widest vectors that LLVM's CPU model ``cpu`` has."""
    for feature, lanes in (("avx512f", 16), ("avx2", 8)):
        if _has_feature(cpu, feature):
            return lanes
    return 4


@cache
def has_dot(cpu: str) -> bool:
    """True if LLVM's CPU model ``cpu`` and this machine have bfloat16 dot products of 16 lanes."""
    found: Any = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    here = usable_lanes() == 16 and found is not None and bool(found())
    return here and _has_feature(cpu, "avx512bf16")


def usable_lanes() -> int:
    """float32 lanes of the widest vectors that this machine runs, as PyTorch found them.

    The CPU's name alone is not enough: a virtual machine may hide instructions of the CPU it runs on.
    """
    return {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)


def cpu_target(cpu: str | None = None) -> CodeTarget:
    """The CPU target; ``cpu`` is an LLVM CPU name, by default this machine's.

    Raises:
        TargetError: LLVM does not know the CPU, or its vectors are wider than this machine's.
    """
    name, where = cpu or host_cpu(), f"target={{'kind': 'llvm', 'mcpu': {cpu!r}}}"
    if cpu is not None and not _llvm().llvm_is_valid_cpu(cpu, _llvm().llvm_get_system_triple()):
        from wsp_compiler.codegen.tvm_import import tvm

        known = [str(entry) for entry in _llvm().llvm_get_cpu_archlist(tvm.target.Target({"kind": "llvm"}))]
        near = ", ".join(difflib.get_close_matches(cpu, known, n=3)) or "x86-64-v3, x86-64-v4"
        raise TargetError(f"LLVM knows no CPU {cpu!r}", where=where, fix=f"near names: {near}")
    lanes = vector_lanes(name)
    if lanes > usable_lanes():
        generic = {8: "x86-64-v3", 4: "x86-64"}[usable_lanes()]
        if cpu is not None:
            raise TargetError(
                f"this machine does not run {lanes}-lane vectors",
                where=where,
                fix=f"use {generic!r} or target='cpu'",
            )
        name, lanes = generic, usable_lanes()
    return CodeTarget(torch.device("cpu"), name, lanes, has_dot(name))


def cuda_target(index: int | None = None, arch: str | None = None) -> CodeTarget:
    """The CUDA target for one device; ``arch`` defaults to the device's own.

    Raises:
        TargetError: no usable CUDA device, or one older than sm_80.
    """
    if not torch.cuda.is_available():
        raise TargetError(
            "PyTorch sees no CUDA device",
            where="target='cuda'",
            fix="use target='cpu', or install a CUDA build of torch",
        )
    if torch.version.cuda is None or int(torch.version.cuda.split(".")[0]) != 13:
        raise TargetError(
            f"PyTorch was built for CUDA {torch.version.cuda}, the kernels need CUDA 13",
            where="target='cuda'",
            fix="install a CUDA 13 build of torch, or use target='cpu'",
        )
    count = torch.cuda.device_count()
    device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    if device.index >= count:
        raise TargetError(
            f"there are {count} CUDA devices",
            where=f"target='{device}'",
            fix=f"use cuda:0 to cuda:{count - 1}",
        )
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        raise TargetError(
            f"compute capability {major}.{minor} is older than 8.0",
            where=f"target='{device}'",
            fix="use target='cpu'",
        )
    return CodeTarget(device, arch or f"sm_{major}{minor}", 0)


def resolve_target(target: Any, device: torch.device) -> CodeTarget:
    """The target that a user's ``target`` argument means for a model on ``device``.

    Args:
        target: None (follow ``device``), "cpu", "cuda", "cuda:N", a torch.device, a ``tvm.target.Target`` or
            its dict form such as {"kind": "llvm", "mcpu": "x86-64-v3"} or {"kind": "cuda", "arch": "sm_80"}.
        device: where the model's tensors are.

    Raises:
        TargetError: unknown, or not usable here.
    """
    kind = getattr(getattr(target, "kind", None), "name", None)
    if kind is not None:  # a tvm.target.Target
        attributes: Mapping[str, Any] = dict(target.attrs)
        target = {
            "kind": kind,
            **{key: str(attributes[key]) for key in ("mcpu", "arch") if key in attributes},
        }
    if isinstance(target, Mapping):
        options: dict[str, Any] = dict(target)  # pyright: ignore[reportUnknownArgumentType]
        if options.get("kind") == "llvm":
            return cpu_target(options.get("mcpu"))
        if options.get("kind") == "cuda":
            return cuda_target(arch=options.get("arch"))
        raise TargetError(
            f"unknown kind {options.get('kind')!r}", where="target", fix="use kind 'llvm' or 'cuda'"
        )
    try:
        chosen = device if target is None else torch.device(target)
    except (RuntimeError, TypeError) as error:
        raise TargetError(
            f"unknown target {target!r}", where="target", fix="use 'cpu', 'cuda' or 'cuda:N'"
        ) from error
    if chosen.type == "cpu":
        return cpu_target()
    if chosen.type == "cuda":
        return cuda_target(chosen.index)
    raise TargetError(
        f"no kernels for device {chosen}", where="target", fix="move the model to the CPU or to CUDA"
    )
