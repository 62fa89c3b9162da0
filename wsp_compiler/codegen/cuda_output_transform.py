"""CUDA output transform: Y = A^T M A for a range of tiles, then bias, residual and activation.

M of position k is [tiles, rows_k] (rows padded to even, innermost) for channels_last output, so that a warp's
filters lie side by side; for contiguous output it is [rows_k, tiles], so that a warp's tiles do.
"""

from __future__ import annotations

from typing import Any

from wsp_compiler.codegen.expressions import STORAGE, activate, emit_transform, from_float, to_float
from wsp_compiler.codegen.spec import KernelSpec
from wsp_compiler.codegen.tvm_import import T

THREADS = 256


def output_blocks(spec: KernelSpec, count: int) -> int:
    """Thread blocks (the grid's x extent) for ``count`` tiles."""
    return -(-count * (spec.filters if spec.output_channels_last else 1) // THREADS)


def make_output_transform(spec: KernelSpec) -> Any:
    """The PrimFunc: one thread per (tile, filter).

    Kernel arguments: M flat float32; slot int32 [p*p, n], the row of M that holds a filter or -1; base int32
    [p*p + 1], padded rows of M before each position; bias, slope [n] float32; R (residual) and Y flat with their
    strides; factor, what the GEMM's results are multiplied by; first tile, tiles in M, tiles in all,
    thread blocks.
    """
    winograd, m, n = spec.winograd, spec.tile, spec.filters
    P, AT, (HO, WO), (TH, TW) = winograd.positions, winograd.AT, spec.output_size, spec.tiles
    store, io, last, residual = STORAGE[spec.dtype], spec.dtype, spec.output_channels_last, spec.residual
    p, activation = winograd.input_side, spec.activation

    @T.prim_func
    def output_transform(
        mm: T.handle, slot: T.handle, base: T.handle, bias: T.handle, slope: T.handle, r: T.handle, y: T.handle,
        rn: T.int32, rc: T.int32, rh: T.int32, rw: T.int32, yn: T.int32, yc: T.int32, yh: T.int32, yw: T.int32,
        factor: T.float32, first: T.int32, count: T.int32, total: T.int32, blocks: T.int32,
    ):  # fmt: skip
        m_size = T.int32()
        r_size = T.int32()
        y_size = T.int32()
        M = T.match_buffer(mm, (m_size,), "float32", align=16)
        SLOT = T.match_buffer(slot, (P * n,), "int32", align=4)
        BASE = T.match_buffer(base, (P + 1,), "int32", align=4)
        BIAS = T.match_buffer(bias, (n,), "float32", align=4)
        SLOPE = T.match_buffer(slope, (n,), "float32", align=4)
        R = T.match_buffer(r, (r_size,), store, align=2)
        Y = T.match_buffer(y, (y_size,), store, align=2)
        T.device_entry()
        bx, by = T.cta_id([blocks, 1 if last else n])
        tx = T.thread_id([THREADS])
        d = T.alloc_local((P,), "float32")
        t = T.alloc_local((m * p,), "float32")
        o = T.alloc_local((m * m,), "float32")
        item: T.let[T.int32] = bx * THREADS + tx
        tile: T.let[T.int32] = T.truncdiv(item, n) if last else item
        f: T.let[T.int32] = T.truncmod(item, n) if last else by
        if T.And(tile < count, first + tile < total):
            for k in T.unroll(P):
                row: T.let[T.int32] = SLOT[k * n + f]
                d[k] = T.float32(0)
                if row >= 0:
                    if last:
                        d[k] = M[BASE[k] * count + tile * (BASE[k + 1] - BASE[k]) + row] * factor
                    else:
                        d[k] = M[(BASE[k] + row) * count + tile] * factor
            emit_transform(AT, d, t, o)
            image: T.let[T.int32] = T.truncdiv(first + tile, TH * TW)
            top: T.let[T.int32] = T.truncdiv(T.truncmod(first + tile, TH * TW), TW) * m
            left: T.let[T.int32] = T.truncmod(first + tile, TW) * m
            for i in T.unroll(m):
                for j in T.unroll(m):
                    if T.And(top + i < HO, left + j < WO):
                        o[i * m + j] = o[i * m + j] + BIAS[f]
                        if residual:
                            o[i * m + j] = o[i * m + j] + to_float(
                                R[image * rn + f * rc + (top + i) * rh + (left + j) * rw], io
                            )
                        Y[image * yn + f * yc + (top + i) * yh + (left + j) * yw] = from_float(
                            activate(o[i * m + j], activation, SLOPE[f]), io
                        )

    return output_transform
