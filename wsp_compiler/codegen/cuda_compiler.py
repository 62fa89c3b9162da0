"""CUDA C text -> cubin, by nvrtc from PyTorch's own pip dependencies, or by nvcc.

``WSP_CUDA_COMPILER`` chooses "nvrtc" or "nvcc"; by default nvrtc is used where it can be loaded. Fast math is
off: denormals, NaN and Inf behave as in PyTorch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import tempfile
from typing import Any

from wsp_compiler.errors import BuildError

# What TVM's text needs of libcu++, which PyTorch's dependencies do not bring.
CSTDINT = """#pragma once
namespace cuda { namespace std {
typedef signed char int8_t; typedef unsigned char uint8_t; typedef short int16_t; typedef unsigned short uint16_t;
typedef int int32_t; typedef unsigned int uint32_t; typedef long long int64_t; typedef unsigned long long uint64_t;
} }
"""
TYPE_TRAITS = """#pragma once
namespace cuda { namespace std {
template <class A, class B> struct is_same { static constexpr bool value = false; };
template <class A> struct is_same<A, A> { static constexpr bool value = true; };
template <class A, class B> constexpr bool is_same_v = is_same<A, B>::value;
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { typedef T type; };
template <bool B, class T, class F> struct conditional { typedef T type; };
template <class T, class F> struct conditional<false, T, F> { typedef F type; };
template <class T> struct is_integral { static constexpr bool value = T(1) / T(2) == T(0); };
template <class T> struct is_signed { static constexpr bool value = T(-1) < T(0); };
template <class T> struct is_unsigned { static constexpr bool value = !is_signed<T>::value; };
template <class T> struct is_floating_point { static constexpr bool value = !is_integral<T>::value; };
} }
"""
HEADERS = {"cuda/std/cstdint": CSTDINT, "cuda/std/type_traits": TYPE_TRAITS}


def include_directory() -> pathlib.Path | None:
    """The folder with cuda_fp16.h: of PyTorch's pip dependencies, else of CUDA_PATH or CUDA_HOME."""
    candidates: list[pathlib.Path] = []
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        candidates += [
            pathlib.Path(root) / "cu13" / "include",
            pathlib.Path(root) / "cuda_runtime" / "include",
        ]
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        if os.environ.get(variable):
            candidates.append(pathlib.Path(os.environ[variable]) / "include")
    candidates.append(pathlib.Path("/usr/local/cuda/include"))
    return next((path for path in candidates if (path / "cuda_fp16.h").is_file()), None)


def choose_compiler() -> str:
    """ "nvrtc" or "nvcc".

    Raises:
        BuildError: neither is there.
    """
    wanted = os.environ.get("WSP_CUDA_COMPILER", "")
    if wanted not in ("", "nvrtc", "nvcc"):
        raise BuildError(
            f"unknown compiler {wanted!r}",
            where="WSP_CUDA_COMPILER",
            fix="set it to nvrtc or nvcc, or unset it",
        )
    has_nvrtc = importlib.util.find_spec("cuda") is not None and (
        importlib.util.find_spec("cuda.bindings") is not None and include_directory() is not None
    )
    has_nvcc = shutil.which("nvcc") is not None
    if (wanted or "nvrtc") == "nvrtc" and has_nvrtc:
        return "nvrtc"
    if (wanted or "nvcc") == "nvcc" and has_nvcc:
        return "nvcc"
    raise BuildError(
        f"no CUDA compiler ({wanted or 'neither nvrtc nor nvcc'} not found)",
        where="CUDA code generation",
        fix="pip install 'cuda-bindings<14' nvidia-cuda-nvrtc nvidia-cuda-runtime, or put nvcc on PATH",
    )


def compile_cuda(text: str, arch: str, compiler: str | None = None) -> bytes:
    """Compile CUDA C ``text`` for ``arch`` ("sm_90") to a cubin.

    Raises:
        BuildError: no compiler, or it reports an error.
    """
    chosen = compiler or choose_compiler()
    return _nvrtc(text, arch) if chosen == "nvrtc" else _nvcc(text, arch)


def _nvrtc(text: str, arch: str) -> bytes:
    try:
        api: Any = importlib.import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        raise BuildError(
            f"nvrtc cannot be loaded ({error})", where="nvrtc", fix="pip install 'cuda-bindings>=13,<14'"
        ) from error
    include = include_directory()
    text = "\n".join(line for line in text.splitlines() if line.strip() != "#include <cuda.h>")
    options = [f"--gpu-architecture={arch}", "--std=c++17", "-default-device", f"-I{include}"]
    names = [name.encode() for name in HEADERS]
    contents = [header.encode() for header in HEADERS.values()]
    status, program = api.nvrtcCreateProgram(text.encode(), b"kernel.cu", len(names), contents, names)
    if int(status) != 0:
        raise BuildError(f"nvrtc error {int(status)}", where="nvrtc", fix="reinstall nvidia-cuda-nvrtc")
    (status,) = api.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(status) != 0:
        _, size = api.nvrtcGetProgramLogSize(program)
        log = bytearray(size)
        api.nvrtcGetProgramLog(program, log)
        raise BuildError(
            f"the generated code does not compile:\n{bytes(log).decode(errors='replace')[:2000]}",
            where=f"nvrtc, {arch}",
            fix="please report this with the model's layer shapes",
        )
    _, size = api.nvrtcGetCUBINSize(program)
    cubin = bytearray(size)
    api.nvrtcGetCUBIN(program, cubin)
    api.nvrtcDestroyProgram(program)
    return bytes(cubin)


def _nvcc(text: str, arch: str) -> bytes:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise BuildError("nvcc is not on PATH", where="nvcc", fix="install the CUDA 13 toolkit, or use nvrtc")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = pathlib.Path(folder) / "kernel.cu", pathlib.Path(folder) / "kernel.cubin"
        source.write_text(text, encoding="utf-8")
        command = [nvcc, "-cubin", "-O3", "-std=c++17", f"-arch={arch}", "-o", str(cubin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildError(
                f"the generated code does not compile:\n{done.stderr[:2000]}",
                where=f"nvcc, {arch}",
                fix="check that nvcc is CUDA 13 and works by itself",
            )
        return cubin.read_bytes()
