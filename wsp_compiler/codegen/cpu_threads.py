"""Run the kernels' parallel loops on the OpenMP threads that PyTorch itself uses.

TVM brings a thread pool of its own. Next to PyTorch's operators it is slow: OpenMP workers spin for a while after
each parallel region and take the cores from TVM's. So a kernel's loops are started by ``GOMP_parallel`` of the OpenMP
library that PyTorch is linked to, on the very threads that ran the operator before, and as many of them as
``torch.set_num_threads`` says.
"""

from __future__ import annotations

import contextlib
import ctypes
import pathlib
import sys
import tempfile
from collections.abc import Generator
from functools import cache

import torch

from wsp_compiler.codegen.tvm_import import tvm

CONTEXT_SYMBOL = b"__TVMBackendParallelLaunch"

LAUNCHER = """
%loop = type {{ ptr, ptr }}         ; the loop's body, what it captured
%group = type {{ ptr, i32 }}        ; TVMParallelGroupEnv: barrier (unused), number of threads

define internal void @run(ptr %task) {{
  %group = alloca %group
  %thread = call i32 inttoptr (i64 {omp_get_thread_num} to ptr)()
  %threads = call i32 inttoptr (i64 {omp_get_num_threads} to ptr)()
  store ptr null, ptr %group
  %count = getelementptr %group, ptr %group, i32 0, i32 1
  store i32 %threads, ptr %count
  %body = load ptr, ptr %task
  %capture_field = getelementptr %loop, ptr %task, i32 0, i32 1
  %captured = load ptr, ptr %capture_field
  %status = call i32 %body(i32 %thread, ptr %group, ptr %captured)
  ret void
}}

define i32 @parallel_launch(ptr %body, ptr %captured, i32 %threads) {{
  %task = alloca %loop
  store ptr %body, ptr %task
  %capture_field = getelementptr %loop, ptr %task, i32 0, i32 1
  store ptr %captured, ptr %capture_field
  call void inttoptr (i64 {GOMP_parallel} to ptr)(ptr @run, ptr %task, i32 %threads, i32 0)
  ret i32 0
}}

; A function of TVM's calling convention that returns the launcher's address as an integer.
define i32 @__tvm_ffi_address(ptr %self, ptr %arguments, i32 %count, ptr %result) {{
  store i64 1, ptr %result
  %value = getelementptr i8, ptr %result, i64 8
  store i64 ptrtoint (ptr @parallel_launch to i64), ptr %value
  ret i32 0
}}
"""


def openmp_addresses() -> dict[str, int] | None:
    """Addresses of the OpenMP functions in the library that PyTorch uses, or None if it has no such library."""
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    if not sys.platform.startswith("linux") or not torch.backends.openmp.is_available():
        return None
    try:
        library = ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return {name: int(ctypes.cast(library[name], ctypes.c_void_p).value or 0) for name in names}
    except (OSError, AttributeError):
        return None


@cache
def _launcher() -> tuple[object, int] | None:
    """The launcher's module (which must stay alive) and its address."""
    import tvm_ffi_orcjit

    addresses = openmp_addresses()
    if addresses is None or not all(addresses.values()):
        return None
    with tempfile.TemporaryDirectory() as folder:
        text, binary = pathlib.Path(folder) / "launcher.ll", pathlib.Path(folder) / "launcher.o"
        text.write_text(LAUNCHER.format(**addresses), encoding="utf-8")
        tvm.get_global_func("ffi.Module.load_from_file.ll")(str(text), "ll").write_to_file(str(binary))
        module = tvm_ffi_orcjit.default_session().load_module(binary.read_bytes())
    return module, int(module.get_function("address")())


def uses_openmp() -> bool:
    """True if kernels run on PyTorch's OpenMP threads; False if on TVM's pool."""
    return _launcher() is not None


@contextlib.contextmanager
def openmp_loops() -> Generator[None, None, None]:
    """Kernels that are loaded inside start their parallel loops on PyTorch's threads."""
    import tvm_ffi

    launcher = _launcher()
    if launcher is None:
        yield
        return
    api = tvm_ffi.libinfo.load_lib_ctypes("apache-tvm-ffi", "tvm_ffi", "RTLD_GLOBAL")
    register = api.TVMFFIEnvModRegisterContextSymbol
    register.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    runtime = ctypes.CDLL(str(_runtime_library()))
    own = ctypes.cast(runtime.TVMBackendParallelLaunch, ctypes.c_void_p)
    register(CONTEXT_SYMBOL, launcher[1])
    try:
        yield
    finally:
        register(CONTEXT_SYMBOL, own)


def _runtime_library() -> pathlib.Path:
    return pathlib.Path(tvm.__file__).parent / "lib" / "libtvm_runtime.so"
