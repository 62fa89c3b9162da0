"""The float32 GEMM without tensor cores: M against float64 on the emulator."""

from __future__ import annotations

import pytest

from wsp_compiler.codegen.spec import CudaConfig

from ..cuda_emulator import is_available
from .emulation import assert_close, cuda_text, emulate_layer, make_case
from .test_cuda_gemm_mma import unpack_M


@pytest.mark.skipif(not is_available(), reason="the emulator needs g++ on x86-64")
@pytest.mark.parametrize(
    "options",
    [
        dict(filters=40, channels=37, method="wsp"),
        dict(filters=12, channels=50, direction="column", method="wsp", output_last=False),
        dict(filters=70, channels=16, method="dense", tile=4, height=5, width=5),
    ],
)
def test_kept_rows_times_V(options: dict[str, object]) -> None:
    case = make_case(**options)  # type: ignore[arg-type]
    assert_close(unpack_M(case, emulate_layer(case)["M"]), case.truth("gemm"), 2e-6)


def test_uses_no_tensor_cores() -> None:
    text = cuda_text("sparse_bgemm", make_case().spec, CudaConfig(), 1)
    assert "mma" not in text.replace("mma_", "")
    assert "__syncthreads" in text
