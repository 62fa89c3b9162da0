"""PrimFunc -> BuiltKernel: lower, generate, compile, cache on disk, load in process.

The CPU code and the host side of CUDA kernels are object files loaded by ORC JIT, so no host compiler or linker
is needed. CUDA text is compiled by :mod:`wsp_compiler.codegen.cuda_compiler`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import pathlib
import tempfile
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

from wsp_compiler.codegen.cache import cache_key, load, store
from wsp_compiler.codegen.cpu_threads import openmp_loops
from wsp_compiler.codegen.cuda_compiler import choose_compiler, compile_cuda
from wsp_compiler.codegen.targets import CodeTarget, host_cpu
from wsp_compiler.codegen.tvm_import import tvm
from wsp_compiler.errors import BuildError

_lock = threading.RLock()
"""TVM's parser and pass context are not thread safe; the compiler of CUDA text is."""
_building: dict[tuple[Any, ...], threading.Lock] = {}
_loaded: dict[tuple[Any, ...], BuiltKernel] = {}


@dataclass(frozen=True)
class BuiltKernel:
    """A kernel ready to call: ``function(*tensors_and_scalars)`` and its generated text."""

    function: Callable[..., None]
    text: Callable[[], str]


@cache
def versions() -> str:
    """Versions that a cached kernel depends on."""
    names = ("apache-tvm", "apache-tvm-ffi", "apache-tvm-ffi-orcjit")
    return ",".join(f"{name}={version(name)}" for name in names)


def target_name(target: CodeTarget) -> str:
    """All that :func:`tvm_target` depends on."""
    return f"cuda {target.arch}, host {host_cpu()}" if target.is_cuda else f"llvm {target.arch}"


def tvm_target(target: CodeTarget) -> Any:
    """The tvm.target.Target of a CodeTarget."""
    if target.is_cuda:
        return tvm.target.Target(
            {"kind": "cuda", "arch": target.arch}, host={"kind": "llvm", "mcpu": host_cpu()}
        )
    return tvm.target.Target({"kind": "llvm", "mcpu": target.arch, "opt-level": 3})


@dataclass(frozen=True)
class Lowered:
    """Generated code before compilation of the device side.

    ``host`` is a runtime module (LLVM); ``cuda_text`` and ``launch`` (the metadata of its kernels as JSON) are
    empty for the CPU.
    """

    host: Any
    cuda_text: str = ""
    launch: str = ""


def lower(function: Any, name: str, target: CodeTarget) -> Lowered:
    """Run TVM's TIRx pipeline and code generators on one PrimFunc."""
    # `tvm.tirx.build` names a function that hides its module.
    split: Any = importlib.import_module("tvm.tirx.build").split_host_device_mods
    tvm_kind = tvm_target(target)
    module = tvm.IRModule({name: function.with_attr("global_symbol", name)})
    module = tvm.tirx.transform.BindTarget(tvm_kind.with_host(tvm_kind.host or tvm_kind))(module)
    pipeline, finish_host, finish_device = tvm.tirx.get_tir_pipeline("tirx")
    with tvm_kind:
        host, devices = split(pipeline(module))
        host = finish_host()(host)
        text, launch = "", ""
        for device_target, device_module in devices.items():
            finished = finish_device()(device_module)
            os.environ["TVM_COMPILE_FORCE_FALLBACK"] = "1"  # keep text: we compile it ourselves
            try:
                text = tvm.get_global_func("target.build.cuda")(finished, device_target).inspect_source(
                    "cuda"
                )
            finally:
                del os.environ["TVM_COMPILE_FORCE_FALLBACK"]
            launch = _launch_metadata(finished, dependent="griddepcontrol.wait" in text)
        if target.is_cuda and not text:
            raise BuildError("the kernel has no device code", where=name, fix="please report this")
        return Lowered(
            tvm.get_global_func("target.build.llvm")(host, tvm_kind.host or tvm_kind), text, launch
        )


def _launch_metadata(module: Any, *, dependent: bool) -> str:
    """How TVM's runtime launches the kernels; ``dependent`` ones may start before the kernel before has ended."""
    infos: dict[str, Any] = {}
    for variable, function in module.functions.items():
        name = variable.name_hint
        types = ["handle" if type(p.ty).__name__ == "PointerType" else str(p.ty) for p in function.params]
        tags = [str(tag) for tag in function.attrs["tirx.kernel_launch_params"]]
        if dependent:
            last = [tag for tag in tags if tag == "tirx.use_dyn_shared_memory"]  # has to stay the last
            tags = [tag for tag in tags if tag not in last] + ["tirx.use_programtic_dependent_launch", *last]
        infos[name] = {"name": name, "arg_types": types, "launch_param_tags": tags}
    return json.dumps({"tvm_version": tvm.__version__, "func_info": infos})


def _object_file(module: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.o"
        module.write_to_file(str(path))
        return path.read_bytes()


def _load(entry: dict[str, bytes], name: str) -> Any:
    import tvm_ffi_orcjit

    with openmp_loops():
        module = tvm_ffi_orcjit.default_session().load_module(entry["object"])
    if "cubin" in entry:  # functions of TVM's runtime for CUDA, which importing tvm loads
        metadata = tvm.get_global_func("runtime.LoadMetaDataFromJSON")(entry["launch"].decode())
        create = tvm.get_global_func("ffi.Module.create.cuda")
        module.import_module(create(entry["cubin"], "cubin", metadata, {}))
    return module.get_function(name)


@cache
def generator_hash(file: str) -> str:
    """Digest of the source of a kernel generator: ``file`` and all of this package that it imports."""
    package = pathlib.Path(__file__).resolve().parents[1]
    sources: dict[pathlib.Path, str] = {}
    pending = [pathlib.Path(file)]
    while pending:
        path = pending.pop()
        if path in sources or not path.is_file():  # the last part of a dotted name may be no module
            continue
        sources[path] = path.read_text(encoding="utf-8")
        names: list[str] = []
        for node in ast.walk(ast.parse(sources[path])):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for top, *rest in (name.split(".") for name in names):
            if top == package.name and rest:
                pending.append(package.joinpath(*rest).with_suffix(".py"))
    return cache_key(*(part for path in sorted(sources) for part in (path.name, sources[path])))


def build(
    make: Callable[..., Any], name: str, target: CodeTarget, arguments: tuple[Hashable, ...]
) -> BuiltKernel:
    """The callable kernel of the PrimFunc ``make(*arguments)``, from memory, from disk, or compiled now.

    A kernel is known by its generator's source, the arguments, the target and the versions of TVM, so that one
    in memory or on disk is used without making its TensorIR, which takes most of the time.

    Args:
        make: a function of this package that returns the PrimFunc and depends on its arguments only.
        name: the symbol to give it.
        target: what to generate for.
        arguments: of ``make``; hashable, with a repr that says all of them (frozen dataclasses).

    Raises:
        BuildError: the generated code does not compile or load.
    """
    known = (make, arguments, name, target)
    if known in _loaded:
        return _loaded[known]
    with _lock:
        own = _building.setdefault(known, threading.Lock())
    with own:  # one thread builds a kernel, several build different ones
        if known not in _loaded:
            _loaded[known] = _build(lambda: make(*arguments), name, target, make, arguments)
    return _loaded[known]


def _build(
    make: Callable[[], Any],
    name: str,
    target: CodeTarget,
    generator: Callable[..., Any],
    arguments: tuple[Hashable, ...],
) -> BuiltKernel:
    compiler = choose_compiler() if target.is_cuda else "llvm"
    source = generator_hash(inspect.getfile(generator))
    kind = f"{generator.__qualname__}{arguments!r}"
    key = cache_key(name, source, kind, target_name(target), versions(), compiler)
    entry = load(key)
    symbol = None
    if entry is not None:
        try:
            with _lock:
                symbol = _load(entry, name)
        except Exception:  # a stale or foreign entry: rebuild it
            entry = None
    if entry is None or symbol is None:
        with _lock:
            lowered = lower(make(), name, target)
            entry = {"object": _object_file(lowered.host)}
        if target.is_cuda:
            entry["text"] = lowered.cuda_text.encode()
            entry["launch"] = lowered.launch.encode()
            entry["cubin"] = compile_cuda(lowered.cuda_text, target.arch, compiler)
        store(key, entry)
        with _lock:
            symbol = _load(entry, name)
    text = entry.get("text")

    def generated() -> str:
        if text is not None:
            return text.decode()
        with _lock:
            return str(lower(make(), name, target).host.inspect_source("ll"))

    return BuiltKernel(symbol, generated)
