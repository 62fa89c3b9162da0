"""CUDA: a whole F(2x2, 3x3) layer in one kernel, float16, channels_last; V and M never leave the SM.

A block computes ``tiles`` tiles x one group of filters. For every slice of channels its threads load 4x4 patches (16 bytes
= 8 channels at a time), transform them in half2 arithmetic and store V to swizzled shared memory; then each warp
multiplies its two positions with mma.sync, the weights coming straight from memory in fragment order. At the end the
float32 accumulators of all positions go to shared memory, lanes take filters, and the output transform reads the
kept rows through per-filter offsets (a pruned row points at a zero). Inputs are divided by 4 while they are transformed,
so that V is finite wherever the input is.
"""

from __future__ import annotations

from typing import Any

from wsp_compiler.codegen.expressions import activate, emit_transform
from wsp_compiler.codegen.spec import FusedConfig, KernelSpec
from wsp_compiler.codegen.tvm_import import T

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
HALF2_QUARTER, HALF2_MINUS_QUARTER = 0x34003400, 0xB400B400


def make_fused(spec: KernelSpec, config: FusedConfig) -> Any:
    """The PrimFunc.

    Kernel arguments: X, R (residual) and Y flat, all dense channels_last; U in fragment order and slot int32
    [p*p * n], the element of a tile's row of M that holds a filter (see :func:`wsp_compiler.codegen.pack.pack_fused`);
    bias, slope [n] float32; factor, what the GEMM's results are multiplied by; tiles in all.
    """
    c, n, (H, W), (HO, WO), (TH, TW) = (
        spec.channels,
        spec.filters,
        (spec.height, spec.width),
        spec.output_size,
        spec.tiles,
    )
    (pad_h, pad_w), AT, activation, residual = spec.padding, spec.winograd.AT, spec.activation, spec.residual
    P, CC, G, NT, rows = config.tiles, config.channel_slice, config.groups, config.threads, config.rows
    KG, NB, MT, CH, SLICES, S = n // G, rows // 8, P // 16, CC // 8, c // CC, config.row_stride
    V_HALVES, M_FLOATS = 16 * P * CC, 16 * P * S
    WARPS, FB = NT // 32, KG // 32
    TILE_GROUPS = WARPS // min(FB, WARPS)
    mask = CH - 1
    shift = 0 if CH == 8 else 1

    @T.prim_func
    def winograd_fused(
        x: T.handle, u: T.handle, slot: T.handle, bias: T.handle, slope: T.handle, r: T.handle, y: T.handle,
        factor: T.float32, total: T.int32, blocks: T.int32,
    ):  # fmt: skip
        x_size = T.int32()
        u_size = T.int32()
        r_size = T.int32()
        y_size = T.int32()
        X = T.match_buffer(x, (x_size,), "float16", align=16)
        U = T.match_buffer(u, (u_size,), "float16", align=16)
        SLOT = T.match_buffer(slot, (16 * n,), "int32", align=4)
        BIAS = T.match_buffer(bias, (n,), "float32", align=4)
        SLOPE = T.match_buffer(slope, (n,), "float32", align=4)
        R = T.match_buffer(r, (r_size,), "float16", align=2)
        Y = T.match_buffer(y, (y_size,), "float16", align=2)
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": config.blocks_per_sm})
        bx, g = T.cta_id([blocks, G])
        tid = T.thread_id([NT])
        arena = T.alloc_buffer((max(V_HALVES // 2, M_FLOATS),), "float32", scope="shared.dyn", align=128)
        V = T.decl_buffer((max(V_HALVES, 2 * M_FLOATS),), "float16", data=arena.data, scope="shared.dyn")
        corner = T.alloc_shared((P,), "int32")
        inside = T.alloc_shared((P,), "int32")
        target = T.alloc_shared((P,), "int32")
        covers = T.alloc_shared((P,), "int32")
        d = T.alloc_local((16, 4), "uint32")
        t = T.alloc_local((16,), "uint32")
        acc = T.alloc_local((2, MT, NB, 4), "float32")
        a = T.alloc_local((2, 4), "uint32")
        b = T.alloc_local((NB, 4), "uint32")
        warp: T.let[T.int32] = tid // 32
        lane: T.let[T.int32] = tid % 32
        if tid < P:  # where the tile's patch starts, which of its pixels exist, where its outputs go
            tile: T.let[T.int32] = bx * P + tid
            image: T.let[T.int32] = T.truncdiv(tile, TH * TW)
            top: T.let[T.int32] = T.truncdiv(T.truncmod(tile, TH * TW), TW) * 2
            left: T.let[T.int32] = T.truncmod(tile, TW) * 2
            corner[tid] = ((image * H + top - pad_h) * W + left - pad_w) * c
            bits: T.int32 = 0
            for i in T.unroll(4):
                for j in T.unroll(4):
                    row_ok = T.meta_var(T.And(top + i - pad_h >= 0, top + i - pad_h < H))
                    col_ok = T.meta_var(T.And(left + j - pad_w >= 0, left + j - pad_w < W))
                    if T.And(T.And(row_ok, col_ok), tile < total):
                        bits = bits + (1 << (i * 4 + j))
            inside[tid] = bits
            target[tid] = ((image * HO + top) * WO + left) * n
            covers[tid] = T.if_then_else(
                tile < total,
                1 + T.if_then_else(left + 1 < WO, 2, 0) + T.if_then_else(top + 1 < HO, 4, 0),
                0,
            )
        T.cuda.cta_sync()
        for pp, mt, nb, e in T.grid(2, MT, NB, 4):
            acc[pp, mt, nb, e] = T.float32(0)
        for s in T.serial(SLICES):
            for item0 in T.serial(-(-P * CH // NT)):
                item = T.meta_var(item0 * NT + tid)
                if (P * CH) % NT == 0 or item < P * CH:
                    tl: T.let[T.int32] = item // CH
                    chunk: T.let[T.int32] = item % CH
                    valid: T.let[T.int32] = inside[tl]
                    start: T.let[T.int32] = corner[tl] + s * CC + chunk * 8
                    for k in T.unroll(16):
                        for q in T.unroll(4):
                            d[k, q] = T.uint32(0)
                        # A branch, not a predicate: a predicated load leaves its outputs undefined.
                        if T.bitwise_and(T.shift_right(valid, k), 1) == 1:
                            T.ptx["ld.global.nc.v4.b32"](
                                d[k, 0],
                                d[k, 1],
                                d[k, 2],
                                d[k, 3],
                                X.ptr_to([start + (k // 4 * W + k % 4) * c]),
                            )
                    for q in T.unroll(4):
                        for j in T.unroll(4):  # B^T d / 4: exact scaling, one rounding
                            T.ptx["mul.f16x2"](t[j], d[8 + j, q], T.uint32(HALF2_MINUS_QUARTER))
                            T.ptx["fma.rn.f16x2"](t[j], d[j, q], T.uint32(HALF2_QUARTER), t[j])
                            T.ptx["mul.f16x2"](t[12 + j], d[4 + j, q], T.uint32(HALF2_MINUS_QUARTER))
                            T.ptx["fma.rn.f16x2"](t[12 + j], d[12 + j, q], T.uint32(HALF2_QUARTER), t[12 + j])
                            T.ptx["mul.f16x2"](t[8 + j], d[8 + j, q], T.uint32(HALF2_QUARTER))
                            T.ptx["fma.rn.f16x2"](t[4 + j], d[4 + j, q], T.uint32(HALF2_QUARTER), t[8 + j])
                            T.ptx["fma.rn.f16x2"](
                                t[8 + j], d[4 + j, q], T.uint32(HALF2_MINUS_QUARTER), t[8 + j]
                            )
                        for i in T.unroll(4):
                            T.ptx["sub.f16x2"](d[i * 4, q], t[i * 4], t[i * 4 + 2])
                            T.ptx["add.f16x2"](d[i * 4 + 1, q], t[i * 4 + 1], t[i * 4 + 2])
                            T.ptx["sub.f16x2"](d[i * 4 + 2, q], t[i * 4 + 2], t[i * 4 + 1])
                            T.ptx["sub.f16x2"](d[i * 4 + 3, q], t[i * 4 + 3], t[i * 4 + 1])
                    place: T.let[T.int32] = (
                        tl * CC + T.bitwise_xor(chunk, T.bitwise_and(T.shift_right(tl, shift), mask)) * 8
                    )
                    for k in T.unroll(16):
                        T.ptx["st.shared.v4.b32"](
                            V.ptr_to([k * P * CC + place]), d[k, 0], d[k, 1], d[k, 2], d[k, 3]
                        )
            T.cuda.cta_sync()
            for kk in T.unroll(CC // 32):
                for pp in T.unroll(2):
                    for nb in T.unroll(NB):
                        part = T.meta_var(
                            (((g * (c // 32) + s * (CC // 32) + kk) * 16 + warp * 2 + pp) * NB + nb) * 256
                            + lane * 8
                        )
                        T.ptx["ld.global.nc.v4.b32"](b[nb, 0], b[nb, 1], b[nb, 2], b[nb, 3], U.ptr_to([part]))
                    for mt in T.unroll(MT):
                        row = T.meta_var(mt * 16 + lane % 16)
                        for ks in T.unroll(2):
                            piece = T.meta_var(
                                T.bitwise_xor(
                                    kk * 4 + ks * 2 + lane // 16,
                                    T.bitwise_and(T.shift_right(row, shift), mask),
                                )
                            )
                            T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](
                                a[ks, 0], a[ks, 1], a[ks, 2], a[ks, 3],
                                V.ptr_to([(warp * 2 + pp) * P * CC + row * CC + piece * 8]),
                            )  # fmt: skip
                        for nb in T.unroll(NB):
                            for ks in T.unroll(2):
                                T.ptx[MMA](
                                    acc[pp, mt, nb, 0], acc[pp, mt, nb, 1], acc[pp, mt, nb, 2], acc[pp, mt, nb, 3],
                                    a[ks, 0], a[ks, 1], a[ks, 2], a[ks, 3], b[nb, ks * 2], b[nb, ks * 2 + 1],
                                    acc[pp, mt, nb, 0], acc[pp, mt, nb, 1], acc[pp, mt, nb, 2], acc[pp, mt, nb, 3],
                                )  # fmt: skip
            T.cuda.cta_sync()
        for pp, mt, h in T.grid(2, MT, 2):  # M[position][tile][row], and the zero that pruned rows point at
            line = T.meta_var(((warp * 2 + pp) * P + mt * 16 + h * 8 + lane // 4) * S)
            for nb in T.unroll(NB):
                for e in T.unroll(2):
                    arena[line + nb * 8 + lane % 4 * 2 + e] = acc[pp, mt, nb, h * 2 + e]
            if lane % 4 == 0:
                arena[line + rows] = T.float32(0)
        T.cuda.cta_sync()
        for fb in T.serial(-(-FB // WARPS)):
            f: T.let[T.int32] = g * KG + (fb * WARPS + T.truncmod(warp, min(FB, WARPS))) * 32 + lane
            offset = T.alloc_local((16,), "int32")
            m = T.alloc_local((16,), "float32")
            half = T.alloc_local((8,), "float32")
            o = T.alloc_local((4,), "float32")
            # Where 32-filter blocks do not divide the warps evenly, the warps left over idle.
            if T.And(T.truncdiv(warp, min(FB, WARPS)) < TILE_GROUPS, f < g * KG + KG):
                for k in T.unroll(16):
                    offset[k] = k * P * S + SLOT[k * n + f]
                shift_by: T.let[T.float32] = BIAS[f]
                slope_of: T.let[T.float32] = SLOPE[f]
                for i0 in T.serial(P // TILE_GROUPS):
                    tl: T.let[T.int32] = T.truncdiv(warp, min(FB, WARPS)) * (P // TILE_GROUPS) + i0
                    for k in T.unroll(16):
                        m[k] = arena[offset[k] + tl * S]
                    emit_transform(AT, m, half, o)
                    to: T.let[T.int32] = target[tl] + f
                    which: T.let[T.int32] = covers[tl]
                    for i in T.unroll(2):
                        for j in T.unroll(2):
                            need = T.meta_var(1 + j * 2 + i * 4)
                            if T.bitwise_and(which, need) == need:
                                o[i * 2 + j] = o[i * 2 + j] * factor + shift_by
                                if residual:
                                    o[i * 2 + j] = o[i * 2 + j] + T.cast(R[to + (i * WO + j) * n], "float32")
                                Y[to + (i * WO + j) * n] = T.cast(
                                    activate(o[i * 2 + j], activation, slope_of), "float16"
                                )

    return winograd_fused
