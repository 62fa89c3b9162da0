"""Compiling CUDA text with nvrtc and nvcc, and what is said when neither is there."""

from __future__ import annotations

import shutil

import pytest

from wsp_compiler.codegen import cuda_compiler
from wsp_compiler.codegen.spec import CudaConfig
from wsp_compiler.errors import BuildError

from .emulation import cuda_text, make_case

KERNEL = 'extern "C" __global__ void copy(float* a, const float* b) { a[threadIdx.x] = b[threadIdx.x]; }'


def has(compiler: str) -> bool:
    try:
        return cuda_compiler.compile_cuda(KERNEL, "sm_90", compiler)[:4] == b"\x7fELF"
    except BuildError:
        return False


@pytest.mark.parametrize("compiler", ["nvrtc", "nvcc"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90"])
def test_all_kernels_compile_for_every_architecture(compiler: str, arch: str) -> None:
    if not has(compiler):
        pytest.skip(f"{compiler} is not installed")
    options = {"sm_80": "fp16", "sm_86": "bf16", "sm_89": "tf32", "sm_90": "fp32"}
    precision = options[arch]
    dtype = {"fp16": "float16", "bf16": "bfloat16"}.get(precision, "float32")
    spec = make_case(precision=precision, dtype=dtype).spec
    for kind in ("input_transform", "sparse_bgemm", "output_transform"):
        cubin = cuda_compiler.compile_cuda(cuda_text(kind, spec, CudaConfig(), 1), arch, compiler)
        assert cubin.startswith(b"\x7fELF")
        assert f"{kind}_kernel".encode() in cubin


@pytest.mark.parametrize("compiler", ["nvrtc", "nvcc"])
def test_broken_text_is_reported_with_the_compilers_message(compiler: str) -> None:
    if not has(compiler):
        pytest.skip(f"{compiler} is not installed")
    with pytest.raises(BuildError, match="undefined_thing"):
        cuda_compiler.compile_cuda(KERNEL.replace("= b", "= undefined_thing + b"), "sm_90", compiler)


def test_no_compiler_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WSP_CUDA_COMPILER", raising=False)
    monkeypatch.setattr(cuda_compiler, "include_directory", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BuildError, match=r"no CUDA compiler[\s\S]*pip install"):
        cuda_compiler.choose_compiler()


def test_the_choice_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/somewhere/nvcc")
    monkeypatch.setenv("WSP_CUDA_COMPILER", "nvcc")
    assert cuda_compiler.choose_compiler() == "nvcc"
    monkeypatch.setenv("WSP_CUDA_COMPILER", "gcc")
    with pytest.raises(BuildError, match="WSP_CUDA_COMPILER"):
        cuda_compiler.choose_compiler()
