"""Run the kernels' parallel loops on the OpenMP threads that PyTorch itself uses.

TVM brings a thread pool of its own. Next to PyTorch's operators it is slow: OpenMP workers spin for a while after
each parallel region and take the cores from TVM's. So a kernel's loops are started by ``GOMP_parallel`` of the OpenMP
library that PyTorch is linked to, on the very threads that ran the operator before, and as many of them as
``torch.set_num_threads`` says.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import pathlib
import platform
import sys
import tempfile
from collections.abc import Generator
from functools import cache
from importlib.metadata import version

import torch

from wsp_compiler.codegen.cache import cache_key, load, store
from wsp_compiler.codegen.tvm_import import tvm

CONTEXT_SYMBOL = b"__TVMBackendParallelLaunch"

FUNCTIONS = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
LAUNCHER = """
%loop = type { ptr, ptr }         ; the loop's body, what it captured
%group = type { ptr, i32 }        ; TVMParallelGroupEnv: barrier (unused), number of threads

@GOMP_parallel = internal global ptr null       ; other addresses in every process: the code can be kept on disk
@omp_get_thread_num = internal global ptr null
@omp_get_num_threads = internal global ptr null

define internal void @run(ptr %task) {
  %group = alloca %group
  %get_thread = load ptr, ptr @omp_get_thread_num
  %thread = call i32 %get_thread()
  %get_threads = load ptr, ptr @omp_get_num_threads
  %threads = call i32 %get_threads()
  store ptr null, ptr %group
  %count = getelementptr %group, ptr %group, i32 0, i32 1
  store i32 %threads, ptr %count
  %body = load ptr, ptr %task
  %capture_field = getelementptr %loop, ptr %task, i32 0, i32 1
  %captured = load ptr, ptr %capture_field
  %status = call i32 %body(i32 %thread, ptr %group, ptr %captured)
  ret void
}

define i32 @parallel_launch(ptr %body, ptr %captured, i32 %threads) {
  %task = alloca %loop
  store ptr %body, ptr %task
  %capture_field = getelementptr %loop, ptr %task, i32 0, i32 1
  store ptr %captured, ptr %capture_field
  %parallel = load ptr, ptr @GOMP_parallel
  call void %parallel(ptr @run, ptr %task, i32 %threads, i32 0)
  ret i32 0
}

; A function of TVM's calling convention that takes three addresses as integers (each after 8 bytes that say its type)
; and returns the launcher's.
define i32 @__tvm_ffi_set_up(ptr %self, ptr %arguments, i32 %count, ptr %result) {
  %first = getelementptr i8, ptr %arguments, i64 8
  %parallel = load ptr, ptr %first
  store ptr %parallel, ptr @GOMP_parallel
  %second = getelementptr i8, ptr %arguments, i64 24
  %get_thread = load ptr, ptr %second
  store ptr %get_thread, ptr @omp_get_thread_num
  %third = getelementptr i8, ptr %arguments, i64 40
  %get_threads = load ptr, ptr %third
  store ptr %get_threads, ptr @omp_get_num_threads
  store i64 1, ptr %result
  %value = getelementptr i8, ptr %result, i64 8
  store i64 ptrtoint (ptr @parallel_launch to i64), ptr %value
  ret i32 0
}
"""


def openmp_addresses() -> dict[str, int] | None:
    """Addresses of the OpenMP functions in the library that PyTorch uses, or None if it has no such library."""
    if not sys.platform.startswith("linux") or not torch.backends.openmp.is_available():
        return None
    try:
        library = ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return {name: int(ctypes.cast(library[name], ctypes.c_void_p).value or 0) for name in FUNCTIONS}
    except (OSError, AttributeError):
        return None


@cache
def _launcher() -> tuple[object, int] | None:
    """The launcher's module (which must stay alive) and its address."""
    import tvm_ffi_orcjit

    addresses = openmp_addresses()
    if addresses is None or not all(addresses.values()):
        return None
    module = tvm_ffi_orcjit.default_session().load_module(_object())
    return module, int(module.get_function("set_up")(*(addresses[name] for name in FUNCTIONS)))


def _object() -> bytes:
    """The launcher's code, kept beside the kernels: compiling it takes importing TVM."""
    key = "launcher-" + cache_key(LAUNCHER, version("apache-tvm"), platform.machine())
    entry = load(key)
    if entry is not None and "object" in entry:
        return entry["object"]
    with tempfile.TemporaryDirectory() as folder:
        text, binary = pathlib.Path(folder) / "launcher.ll", pathlib.Path(folder) / "launcher.o"
        text.write_text(LAUNCHER, encoding="utf-8")
        tvm.get_global_func("ffi.Module.load_from_file.ll")(str(text), "ll").write_to_file(str(binary))
        made = binary.read_bytes()
    store(key, {"object": made})
    return made


def uses_openmp() -> bool:
    """True if kernels run on PyTorch's OpenMP threads; False if on TVM's pool."""
    return _launcher() is not None


@contextlib.contextmanager
def openmp_loops() -> Generator[None, None, None]:
    """Kernels that are loaded inside start their parallel loops on PyTorch's threads."""
    import tvm_ffi

    launcher = _launcher()
    if launcher is None:
        assert tvm.__version__  # imported: its pool runs the loops
        yield
        return
    api = tvm_ffi.libinfo.load_lib_ctypes("apache-tvm-ffi", "tvm_ffi", "RTLD_GLOBAL")
    register = api.TVMFFIEnvModRegisterContextSymbol
    register.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
    own = ctypes.cast(_runtime().TVMBackendParallelLaunch, ctypes.c_void_p)
    register(CONTEXT_SYMBOL, launcher[1])
    try:
        yield
    finally:
        register(CONTEXT_SYMBOL, own)


@cache
def _runtime() -> ctypes.CDLL:
    """TVM's runtime library, 3 MB, without importing TVM."""
    import tvm_ffi

    found = importlib.util.find_spec("tvm")
    assert found is not None
    assert found.origin is not None
    assert tvm_ffi.__file__  # imported: it loads the library that this one needs
    return ctypes.CDLL(str(pathlib.Path(found.origin).parent / "lib" / "libtvm_runtime.so"))
