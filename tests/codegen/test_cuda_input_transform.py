"""The CUDA input transform's V against float64, element by element, on the emulator."""

from __future__ import annotations

import pytest
import torch

from wsp_compiler.codegen.cuda_input_transform import input_blocks
from wsp_compiler.codegen.pack import pack_cuda

from ..cuda_emulator import is_available
from .emulation import Case, assert_close, cuda_text, emulate_layer, make_case

pytestmark = pytest.mark.skipif(not is_available(), reason="the emulator needs g++ on x86-64")


def unpack_V(case: Case, V: torch.Tensor) -> torch.Tensor:
    """The kernel's V as [C, T] float64, padding checked to be zero."""
    w, spec = pack_cuda(case.site, case.spec), case.spec
    total = case.x.shape[0] * spec.tiles_per_image
    count = -(-total // 32) * 32
    values = (V.to(torch.int32) << 16).view(torch.float32) if V.dtype == torch.uint16 else V
    offsets = case.site.column_offset.tolist()
    parts = []
    for k in range(spec.winograd.positions):
        start, end = int(w.depth_base[k]), int(w.depth_base[k + 1])
        block = values[start * count : end * count].view(count, end - start)[:total].double()
        kept = offsets[k + 1] - offsets[k]
        assert (block[:, kept:] == 0).all()  # the GEMM reads the padding
        parts.append(block[:, :kept].T)
    return torch.cat(parts) * spec.operand_scale


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (dict(channels=5, input_last=True), 1e-6),
        (dict(channels=5, input_last=False, tile=4), 1e-6),
        (dict(channels=21, input_last=True, direction="column", method="wsp"), 1e-6),
        (dict(channels=21, input_last=False, direction="column", precision="fp16", dtype="float16"), 1e-3),
        (dict(channels=18, precision="bf16", dtype="bfloat16"), 8e-3),
        (dict(channels=18, precision="tf32", padding=(0, 2)), 1e-3),
    ],
)
def test_values_and_zero_padding(options: dict[str, object], tolerance: float) -> None:
    case = make_case(**options)  # type: ignore[arg-type]
    V = unpack_V(case, emulate_layer(case)["V"])
    assert_close(V, case.truth("input"), tolerance)


def test_no_asm_and_enough_blocks() -> None:
    spec = make_case().spec
    text = cuda_text("input_transform", spec, None, 2)
    assert "asm" not in text.split('extern "C"')[-1]
    assert input_blocks(spec, 2, 64) * 256 >= 64 * spec.slot_channels // 2
