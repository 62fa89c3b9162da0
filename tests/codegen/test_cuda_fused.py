"""The fused CUDA kernel against float64 on the emulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from wsp_compiler.codegen.build import lower
from wsp_compiler.codegen.cuda_compiler import compile_cuda
from wsp_compiler.codegen.cuda_fused import make_fused
from wsp_compiler.codegen.cuda_launch import flat_view
from wsp_compiler.codegen.pack import pack_fused, rows_per_group
from wsp_compiler.codegen.spec import FusedConfig
from wsp_compiler.errors import OptionError

from ..cuda_emulator import emulate, is_available
from .emulation import TARGET, Case, assert_close, make_case
from .test_cuda_compiler import has

needs_emulator = pytest.mark.skipif(not is_available(), reason="the emulator needs g++ on x86-64")


def fused_case(**options: Any) -> Case:
    return make_case(dtype="float16", precision="fp16", **options)


def configuration(case: Case, tiles: int = 32, groups: int = 1, **knobs: int) -> FusedConfig:
    rows = -(-rows_per_group(case.site, groups) // 8) * 8
    return FusedConfig(tiles=tiles, groups=groups, rows=rows, **knobs)


def emulate_fused(case: Case, config: FusedConfig, order: str = "forward", edit: Any = None) -> torch.Tensor:
    """y as the kernel computes it; unwritten elements are NaN."""
    spec, w = case.spec, pack_fused(case.site, case.spec, config)
    text = lower(make_fused(spec, config), "winograd_fused", TARGET).cuda_text
    y = torch.full((case.x.shape[0], spec.filters, *spec.output_size), float("nan"), dtype=torch.float16)
    y = y.contiguous(memory_format=torch.channels_last)
    r = y if case.residual is None else case.residual.contiguous(memory_format=torch.channels_last)
    total = case.x.shape[0] * spec.tiles_per_image
    blocks = -(-total // config.tiles)
    values = dict(
        X_ptr=flat_view(case.x), U_ptr=w.U, SLOT_ptr=w.slot, BIAS_ptr=w.bias, SLOPE_ptr=case.slope,
        R_ptr=flat_view(r), Y_ptr=flat_view(y), factor=w.factor, total=total, blocks=blocks,
    )  # fmt: skip
    kernel = emulate(edit(text) if edit else text, "winograd_fused_kernel", order=order)  # type: ignore[arg-type]
    kernel(
        *[values[name] for name in kernel.args], grid=(blocks, config.groups, 1), block=(config.threads, 1, 1)
    )
    return y


CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "64 filters, residual, relu": (
        dict(filters=64, channels=64, pr=0.8, residual=True, activation="relu"),
        {},
    ),
    "96 channels, ragged, prelu": (
        dict(filters=128, channels=96, pr=0.8, activation="prelu", height=13, width=20, batch=1),
        dict(channel_slice=32),
    ),
    "dense in two groups, no vertical padding": (
        dict(filters=128, channels=64, method="dense", padding=(0, 2)),
        dict(tiles=16, groups=2),
    ),
    "unbalanced rows in four groups, relu6": (
        dict(filters=256, channels=32, method="wsp", pr=0.6, activation="relu6", height=5, width=5, batch=1),
        dict(tiles=16, groups=4, channel_slice=32),
    ),
    "96 filters: three 32-filter blocks on eight warps": (
        dict(filters=96, channels=64, pr=0.7, height=9, width=6),
        dict(tiles=16),
    ),
    "288 filters: nine blocks on eight warps": (
        dict(filters=288, channels=32, pr=0.8, height=5, width=4, batch=1),
        dict(tiles=16, channel_slice=32),
    ),
    "filters pruned, one pixel": (
        dict(filters=32, channels=32, method="fp", height=1, width=1, batch=3),
        dict(tiles=16, channel_slice=32),
    ),
}


@needs_emulator
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name: str) -> None:
    options, knobs = CASES[name]
    case = fused_case(**options)
    assert_close(emulate_fused(case, configuration(case, **knobs)), case.truth("output"), 2e-3)


@needs_emulator
def test_order_of_threads_does_not_matter_and_barriers_do() -> None:
    case = fused_case(filters=64, channels=64, pr=0.8, batch=1)
    config = configuration(case)
    forward = emulate_fused(case, config)
    assert torch.equal(forward, emulate_fused(case, config, order="reverse"))

    def remove(text: str) -> str:
        return text.replace("tvm_builtin_cuda_cta_sync();", ";")

    with pytest.raises(RuntimeError, match="address"):  # the patch table is read before it is written
        emulate_fused(case, config, edit=remove)


@needs_emulator
def test_finite_for_the_largest_inputs() -> None:
    case = fused_case(filters=32, channels=32, method="dense", batch=1)
    case.x.fill_(60000.0)
    case.x[:, :, ::2, ::3] *= -1
    case.site.weight.mul_(1e-2)
    y = emulate_fused(case, configuration(case, channel_slice=32))
    assert torch.isfinite(y).all()
    assert_close(y, case.truth("output"), 2e-3)


@pytest.mark.skipif(not has("nvrtc"), reason="nvrtc is not installed")
def test_compiles_with_tensor_cores_for_every_architecture() -> None:
    case = fused_case(filters=64, channels=64, pr=0.8)
    text = lower(make_fused(case.spec, configuration(case)), "winograd_fused", TARGET).cuda_text
    assert "mma.sync.aligned.m16n8k16" in text
    for arch in ("sm_80", "sm_86", "sm_89", "sm_90"):
        assert compile_cuda(text, arch, "nvrtc").startswith(b"\x7fELF")


def test_impossible_configurations_are_errors() -> None:
    with pytest.raises(OptionError, match="2048"):
        FusedConfig(tiles=32, groups=1, rows=104)
    with pytest.raises(OptionError, match="channel_slice"):
        FusedConfig(tiles=32, groups=1, rows=16, channel_slice=48)
