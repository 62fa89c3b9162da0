"""The tensor-core GEMM: M against float64 on the emulator, for blocks, stages and swizzles other than the default."""

from __future__ import annotations

import pytest
import torch

from wsp_compiler.codegen.pack import pack_cuda
from wsp_compiler.codegen.spec import CudaConfig
from wsp_compiler.errors import OptionError

from ..cuda_emulator import is_available
from .emulation import Case, assert_close, cuda_text, emulate_layer, make_case

needs_emulator = pytest.mark.skipif(not is_available(), reason="the emulator needs g++ on x86-64")


def unpack_M(case: Case, M: torch.Tensor) -> torch.Tensor:
    """The kernel's M as [R, T] float64."""
    w, spec = pack_cuda(case.site, case.spec), case.spec
    total = case.x.shape[0] * spec.tiles_per_image
    count = -(-total // 32) * 32
    parts = []
    for k in range(spec.winograd.positions):
        start, end = int(w.m_base[k]), int(w.m_base[k + 1])
        kept = int(w.row_offset[k + 1] - w.row_offset[k])
        block = M[start * count : end * count]
        if spec.output_channels_last:
            parts.append(block.view(count, end - start)[:total, :kept].T)
        else:
            parts.append(block.view(end - start, count)[:kept, :total])
    return torch.cat(parts).double() * w.factor


@needs_emulator
@pytest.mark.parametrize(
    ("options", "config"),
    [
        (dict(precision="fp16", dtype="float16", filters=40, channels=72), CudaConfig(64, 16, 2, 1, 2, 8)),
        (dict(precision="tf32", filters=40, channels=29, method="wsp"), CudaConfig(64, 64, 2, 2, 4, 4)),
        (dict(precision="bf16", dtype="bfloat16", direction="column", method="wsp", output_last=False), None),
    ],
)
def test_kept_rows_times_V(options: dict[str, object], config: CudaConfig | None) -> None:
    case = make_case(**options)  # type: ignore[arg-type]
    M = unpack_M(case, emulate_layer(case, config=config)["M"])
    assert_close(M, case.truth("gemm"), 1e-2 if case.spec.precision == "bf16" else 2e-3)


@pytest.mark.parametrize(
    ("precision", "instruction"),
    [
        ("fp16", "m16n8k16.row.col.f32.f16"),
        ("bf16", "m16n8k16.row.col.f32.bf16"),
        ("tf32", "m16n8k8.row.col.f32.tf32"),
    ],
)
def test_uses_tensor_cores(precision: str, instruction: str) -> None:
    spec = make_case(
        precision=precision, dtype={"fp16": "float16", "bf16": "bfloat16"}.get(precision, "float32")
    ).spec
    text = cuda_text("sparse_bgemm", spec, CudaConfig(), 1)
    for expected in (instruction, "ldmatrix.sync.aligned.m8n8.x4", "cp.async.cg.shared.global", "wait_group"):
        assert expected in text


def test_impossible_blocks_are_errors() -> None:
    with pytest.raises(OptionError, match="multiple of 16"):
        CudaConfig(block_tiles=40)
    with pytest.raises(OptionError, match="227 KiB"):
        CudaConfig(block_tiles=256, block_filters=256, warps_filters=4, stages=8, chunks=8)
