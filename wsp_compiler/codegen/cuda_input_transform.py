"""CUDA input transform: V = B^T d B for a range of tiles, written in the batched GEMM's operand order.

V of position k is a [tiles, depth_k] matrix, depth (kept input channels, zero padded to 16 bytes) innermost; the
positions follow one another. Values are rounded to the GEMM's operand type; float16 operands are divided by
:func:`fp16_scale`, so that V is finite wherever the input is.
"""

from __future__ import annotations

from typing import Any

from wsp_compiler.codegen.expressions import (
    STORAGE,
    emit_transform,
    from_float,
    splat,
    tf32_values,
    to_float,
    vector,
)
from wsp_compiler.codegen.spec import OPERAND_STORAGE, KernelSpec
from wsp_compiler.codegen.tvm_import import T

THREADS, BLOCK_TILES = 256, 32


def input_blocks(spec: KernelSpec, lanes: int, count: int) -> int:
    """Thread blocks (the grid's x extent) for ``count`` tiles."""
    if spec.input_channels_last:
        return -(-count * -(-spec.slot_channels // lanes) // THREADS)
    return -(-count // BLOCK_TILES)


def to_operand(value: Any, precision: str, scale: float, lanes: int) -> Any:
    """float32 as an element of the GEMM's operand type."""
    if precision == "fp16":
        return from_float(value * splat(1.0 / scale, lanes), "float16", lanes)
    if precision == "bf16":
        return from_float(value, "bfloat16", lanes)
    return tf32_values(value, lanes) if precision == "tf32" else value


def make_input_transform(spec: KernelSpec, lanes: int = 1) -> Any:
    """The PrimFunc: one thread per (tile, ``lanes`` channels) for channels_last input, else a staged transpose.

    Kernel arguments: X flat; V flat; slot [p*p, channels + extra] int32, the column of V that a channel goes to or
    -1 (``extra`` virtual channels hold the zero padding); base int32 [p*p + 1], columns of V before each position;
    the strides of X; first tile, tiles in V, tiles in all, thread blocks.

    All indices are non-negative, so divisions truncate: floor division would cost sign corrections.
    """
    return _channels_last(spec, lanes) if spec.input_channels_last else _transposing(spec)


def _channels_last(spec: KernelSpec, lanes: int) -> Any:
    winograd, m, c = spec.winograd, spec.tile, spec.channels
    p, P, BT, H, W = winograd.input_side, winograd.positions, winograd.BT, spec.height, spec.width
    (pad_h, pad_w), (TH, TW), precision, scale = spec.padding, spec.tiles, spec.precision, spec.operand_scale
    wide, groups = spec.slot_channels, -(-spec.slot_channels // lanes)
    store_x, store_v, io, by_column = (
        STORAGE[spec.dtype],
        OPERAND_STORAGE[precision],
        spec.dtype,
        spec.columns_pruned,
    )
    vec = vector("float32", lanes)

    @T.prim_func
    def input_transform(
        x: T.handle, v: T.handle, slot: T.handle, base: T.handle,
        xn: T.int32, xc: T.int32, xh: T.int32, xw: T.int32, first: T.int32, count: T.int32, total: T.int32, blocks: T.int32,
    ):  # fmt: skip
        x_size = T.int32()
        v_size = T.int32()
        X = T.match_buffer(x, (x_size,), store_x, align=4)
        V = T.match_buffer(v, (v_size,), store_v, align=16)
        SLOT = T.match_buffer(slot, (P * wide,), "int32", align=4)
        BASE = T.match_buffer(base, (P + 1,), "int32", align=4)
        T.device_entry()
        bx = T.cta_id([blocks])
        tx = T.thread_id([THREADS])
        d = T.alloc_local((P,), vec)
        t = T.alloc_local((P,), vec)
        o = T.alloc_local((P,), vec)
        item: T.let[T.int32] = bx * THREADS + tx
        tile: T.let[T.int32] = T.truncdiv(item, groups)
        channel: T.let[T.int32] = T.truncmod(item, groups) * lanes
        if tile < count:
            image: T.let[T.int32] = T.truncdiv(first + tile, TH * TW)
            top: T.let[T.int32] = T.truncdiv(T.truncmod(first + tile, TH * TW), TW) * m - pad_h
            left: T.let[T.int32] = T.truncmod(first + tile, TW) * m - pad_w
            corner: T.let[T.int32] = image * xn + top * xh + left * xw + channel
            for i in T.unroll(p):
                for j in T.unroll(p):
                    d[i * p + j] = splat(0.0, lanes)
                    inside = T.And(T.And(top + i >= 0, top + i < H), T.And(left + j >= 0, left + j < W))
                    if T.And(T.And(inside, channel < c), first + tile < total):
                        d[i * p + j] = to_float(
                            X.vload([corner + i * xh + j * xw], dtype=vector(store_x, lanes)), io, lanes
                        )
            emit_transform(BT, d, t, o, lanes)
            for k in T.unroll(P):
                if by_column:
                    target: T.let[T.int32] = SLOT[k * wide + channel]
                    if target >= 0:
                        V[BASE[k] * count + tile * (BASE[k + 1] - BASE[k]) + target] = to_operand(
                            o[k], precision, scale, 1
                        )
                else:
                    V.vstore([(k * count + tile) * wide + channel], to_operand(o[k], precision, scale, lanes))

    return input_transform


def _transposing(spec: KernelSpec) -> Any:
    """Threads of a warp run along tiles for the loads, along channels for the stores."""
    winograd, m, c = spec.winograd, spec.tile, spec.channels
    p, P, BT, H, W = winograd.input_side, winograd.positions, winograd.BT, spec.height, spec.width
    (pad_h, pad_w), (TH, TW), precision, scale = spec.padding, spec.tiles, spec.precision, spec.operand_scale
    wide, by_column = spec.slot_channels, spec.columns_pruned
    store_x, store_v, io = STORAGE[spec.dtype], OPERAND_STORAGE[precision], spec.dtype
    CH = 8 if store_v == "float32" else 16  # 32 bytes of every row of V per pass
    TILES, ROW = BLOCK_TILES, CH + 1 if store_v == "float32" else CH + 2

    @T.prim_func
    def input_transform(
        x: T.handle, v: T.handle, slot: T.handle, base: T.handle,
        xn: T.int32, xc: T.int32, xh: T.int32, xw: T.int32, first: T.int32, count: T.int32, total: T.int32, blocks: T.int32,
    ):  # fmt: skip
        x_size = T.int32()
        v_size = T.int32()
        X = T.match_buffer(x, (x_size,), store_x, align=2)
        V = T.match_buffer(v, (v_size,), store_v, align=16)
        SLOT = T.match_buffer(slot, (P * wide,), "int32", align=4)
        BASE = T.match_buffer(base, (P + 1,), "int32", align=4)
        T.device_entry()
        bx, by = T.cta_id([blocks, -(-wide // CH)])
        tx = T.thread_id([THREADS])
        S = T.alloc_buffer((P * TILES * ROW,), store_v, scope="shared.dyn", align=128)
        d = T.alloc_local((P,), "float32")
        t = T.alloc_local((P,), "float32")
        o = T.alloc_local((P,), "float32")
        tile: T.let[T.int32] = first + bx * TILES + tx % TILES
        image: T.let[T.int32] = T.truncdiv(tile, TH * TW)
        top: T.let[T.int32] = T.truncdiv(T.truncmod(tile, TH * TW), TW) * m - pad_h
        left: T.let[T.int32] = T.truncmod(tile, TW) * m - pad_w
        for q in T.serial(CH // (THREADS // TILES)):
            own: T.let[T.int32] = q * (THREADS // TILES) + tx // TILES
            channel: T.let[T.int32] = by * CH + own
            for i in T.unroll(p):
                for j in T.unroll(p):
                    d[i * p + j] = T.float32(0)
                    inside = T.And(T.And(top + i >= 0, top + i < H), T.And(left + j >= 0, left + j < W))
                    if T.And(T.And(inside, channel < c), tile < total):
                        d[i * p + j] = to_float(
                            X[image * xn + channel * xc + (top + i) * xh + (left + j) * xw], io
                        )
            emit_transform(BT, d, t, o)
            for k in T.unroll(P):
                S[(k * TILES + tx % TILES) * ROW + own] = to_operand(o[k], precision, scale, 1)
        T.cuda.cta_sync()
        for e in T.serial(P * TILES * CH // THREADS):
            item: T.let[T.int32] = e * THREADS + tx
            k: T.let[T.int32] = item // (TILES * CH)
            row: T.let[T.int32] = item // CH % TILES
            channel_out: T.let[T.int32] = by * CH + item % CH
            if T.And(bx * TILES + row < count, channel_out < wide):
                if by_column:
                    target: T.let[T.int32] = SLOT[k * wide + channel_out]
                    if target >= 0:
                        V[BASE[k] * count + (bx * TILES + row) * (BASE[k + 1] - BASE[k]) + target] = S[
                            (k * TILES + row) * ROW + item % CH
                        ]
                else:
                    V[(k * count + bx * TILES + row) * wide + channel_out] = S[
                        (k * TILES + row) * ROW + item % CH
                    ]

    return input_transform
