"""Run the generated CUDA text of one layer's three kernels on the CPU emulator, and the float64 truth beside it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wsp_compiler import ops
from wsp_compiler.codegen.build import lower
from wsp_compiler.codegen.cuda_gemm_ffma import make_gemm_ffma
from wsp_compiler.codegen.cuda_gemm_mma import make_gemm_mma
from wsp_compiler.codegen.cuda_input_transform import input_blocks, make_input_transform
from wsp_compiler.codegen.cuda_launch import TORCH_STORAGE, choose_cuda_config, flat_view, input_lanes
from wsp_compiler.codegen.cuda_output_transform import make_output_transform, output_blocks
from wsp_compiler.codegen.pack import pack_cuda
from wsp_compiler.codegen.spec import OPERAND_STORAGE, CudaConfig, KernelSpec
from wsp_compiler.codegen.targets import CodeTarget
from wsp_compiler.pruning import IMPORTANCES, PATTERNS
from wsp_compiler.winograd import transform_weight

from ..cuda_emulator import emulate

TARGET = CodeTarget(torch.device("cuda", 0), "sm_90", 0)
TOLERANCE = {
    ("fp32", 2): 1e-5,
    ("fp32", 4): 1e-4,
    ("tf32", 2): 2e-3,
    ("tf32", 4): 1e-2,
    ("fp16", 2): 2e-3,
    ("fp16", 4): 1e-2,
    ("bf16", 2): 2e-2,
    ("bf16", 4): 1e-1,
}
TORCH_DTYPE = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Case:
    """One layer with random weights and input, pruned by ``method``."""

    spec: KernelSpec
    site: ops.WinogradSite
    x: Tensor  # [N, c, H, W]
    residual: Tensor | None
    slope: Tensor

    def operands(self) -> tuple[Tensor, Tensor]:
        """(x, weight of the site) in float64."""
        return self.x.double(), self.site.weight.double()

    def truth(self, stage: str) -> Tensor:
        """Float64 V [C, T], M [R, T] or y [N, n, H_out, W_out] of the kept weights."""
        x, weight = self.operands()
        site, spec = self.site, self.spec
        V = ops.input_transform(x, site.columns, site.column_offset, list(spec.padding), spec.tile)
        if stage == "input":
            return V
        M = ops.sparse_bgemm(V, weight, site.rows, site.row_offset, site.column_offset)
        if stage == "gemm":
            return M
        residual = None if self.residual is None else self.residual.double()
        return ops.output_transform(
            M, x, site.rows, site.row_offset, site.bias.double(), residual, self.slope.double(),
            list(spec.padding), spec.tile, spec.activation, False,
        )  # fmt: skip


def make_case(
    *,
    method: str = "bwsp",
    direction: str = "row",
    pr: float = 0.5,
    batch: int = 2,
    filters: int = 20,
    channels: int = 24,
    height: int = 7,
    width: int = 9,
    padding: tuple[int, int] = (1, 1),
    tile: int = 2,
    dtype: str = "float32",
    precision: str = "fp32",
    input_last: bool = True,
    output_last: bool = True,
    residual: bool = False,
    activation: str = "none",
) -> Case:
    """A random layer."""
    weight = torch.randn(filters, channels, 3, 3) / (3 * channels**0.5)
    U = transform_weight(weight, tile)
    site = ops.WinogradSite(PATTERNS[method].keep(U, pr, direction, IMPORTANCES["l2"]))
    site.fill(U, torch.randn(filters))
    positions = U.shape[0]
    spec = KernelSpec(
        filters=filters, channels=channels, height=height, width=width, padding=padding, tile=tile, dtype=dtype,
        precision=precision, input_channels_last=input_last, output_channels_last=output_last,
        columns_pruned=site.columns.numel() != positions * channels,
        rows_pruned=site.rows.numel() != positions * filters, residual=residual, activation=activation,
    )  # fmt: skip
    layout = torch.channels_last if input_last else torch.contiguous_format
    x = torch.randn(batch, channels, height, width).to(TORCH_DTYPE[dtype]).contiguous(memory_format=layout)
    r = torch.randn(batch, filters, *spec.output_size).to(TORCH_DTYPE[dtype]) if residual else None
    return Case(spec, site, x, r, torch.rand(filters))


@cache
def cuda_text(kind: str, spec: KernelSpec, config: CudaConfig | None, lanes: int) -> str:
    """CUDA C of one kernel."""
    if kind == "input_transform":
        function = make_input_transform(spec, lanes)
    elif kind == "output_transform":
        function = make_output_transform(spec)
    else:
        make = make_gemm_ffma if spec.precision == "fp32" else make_gemm_mma
        assert config is not None
        function = make(spec, config)
    return lower(function, kind, TARGET).cuda_text


def _run(
    text: str, kind: str, values: dict[str, Any], grid: tuple[int, ...], threads: int, order: str
) -> None:
    kernel = emulate(text, f"{kind}_kernel", order=order)  # type: ignore[arg-type]
    values = {**values, "blocks": grid[0]}
    kernel(
        *[values[name] for name in kernel.args], grid=(*grid, *(1,) * (3 - len(grid))), block=(threads, 1, 1)
    )


def _strides(prefix: str, tensor: Tensor) -> dict[str, int]:
    return {f"{prefix}{axis}": stride for axis, stride in zip("nchw", tensor.stride(), strict=True)}


def emulate_layer(
    case: Case, *, config: CudaConfig | None = None, order: str = "forward", edit: Any = None
) -> dict[str, Tensor]:
    """V, M and y of a layer as its CUDA kernels compute them; unwritten elements are NaN.

    ``edit(kind, text) -> text`` may damage the text, for negative controls.
    """
    spec, w = case.spec, pack_cuda(case.site, case.spec)
    config, lanes = config or choose_cuda_config(w.max_rows), input_lanes(spec)
    change = edit or (lambda kind, text: text)
    total = case.x.shape[0] * spec.tiles_per_image
    count = -(-total // 32) * 32
    storage = TORCH_STORAGE[OPERAND_STORAGE[spec.precision]]
    V = torch.full(
        (count * int(w.depth_base[-1]),), 0x7FFF if storage == torch.uint16 else float("nan"), dtype=storage
    )
    M = torch.full((count * int(w.m_base[-1]),), float("nan"))
    layout = torch.channels_last if spec.output_channels_last else torch.contiguous_format
    y = torch.full((case.x.shape[0], spec.filters, *spec.output_size), float("nan"), dtype=case.x.dtype)
    y = y.contiguous(memory_format=layout)
    r = y if case.residual is None else case.residual
    x_flat = flat_view(case.x)
    common = dict(first=0, count=count, total=total, tiles=count, max_rows=w.max_rows, factor=w.factor)
    common |= dict(x_size=x_flat.numel(), v_size=V.numel(), m_size=M.numel(), u_size=w.U.numel())
    values: dict[str, Any] = {
        **common, "X_ptr": x_flat, "V_ptr": V, "M_ptr": M, "U_ptr": w.U, "RO_ptr": w.row_offset, "MB_ptr": w.m_base,
        "DB_ptr": w.depth_base, "US_ptr": w.u_start, "BIAS_ptr": w.bias, "SLOPE_ptr": case.slope,
        "R_ptr": flat_view(r), "Y_ptr": flat_view(y), "r_size": y.numel(), "y_size": y.numel(),
        **_strides("x", case.x), **_strides("r", r), **_strides("y", y),
    }  # fmt: skip
    kind = "input_transform"
    text = change(kind, cuda_text(kind, spec, None, lanes))
    blocks = input_blocks(spec, lanes, count)
    per_pass = 8 if OPERAND_STORAGE[spec.precision] == "float32" else 16
    grid: tuple[int, ...] = (blocks, 1 if spec.input_channels_last else -(-spec.slot_channels // per_pass))
    _run(text, kind, {**values, "SLOT_ptr": w.column_slot, "BASE_ptr": w.depth_base}, grid, 256, order)
    kind = "sparse_bgemm"
    text = change(kind, cuda_text(kind, spec, config, 1))
    threads, block_tiles = (256, 128) if spec.precision == "fp32" else (config.threads, config.block_tiles)
    grid = (-(-count // block_tiles), -(-w.max_rows // config.block_filters), spec.winograd.positions)
    _run(text, kind, values, grid, threads, order)
    kind = "output_transform"
    text = change(kind, cuda_text(kind, spec, None, 1))
    grid = (output_blocks(spec, count), 1 if spec.output_channels_last else spec.filters)
    _run(text, kind, {**values, "SLOT_ptr": w.row_slot, "BASE_ptr": w.m_base}, grid, 256, order)
    return {"V": V, "M": M, "y": y}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative L2 under ``tolerance``, and no single element off by 8 times that of the rms."""
    difference = actual.double() - expected.double()
    relative = float(difference.norm() / expected.double().norm())
    rms = float(expected.double().square().mean().sqrt())
    assert relative < tolerance, f"relative error {relative:.2e}, allowed {tolerance:.0e}"
    assert float(difference.abs().max()) < 8 * tolerance * rms
