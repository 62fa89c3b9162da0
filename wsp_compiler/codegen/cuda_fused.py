"""CUDA: a whole row-pruned Winograd layer in one kernel, channels_last; V and M never leave the SM.

A block computes ``tiles`` tiles x one group of filters. For every slice of channels its threads load the patches of
the tiles, transform them in registers and store V to swizzled shared memory; then each warp multiplies its positions
with mma.sync: weights (rows) are the A operand, straight from memory in fragment order, tiles the B operand. At the end the
float32 accumulators of all positions go to shared memory, lanes take filters, and the output transform reads the
kept rows through per-filter offsets (a pruned row points at a zero).

Everything is counted in *words* of 32 bits: two channels (or two tiles of M) of a 16-bit type, one of float32. The fragments
of m16n8k16 (16-bit) and m16n8k8 (tf32) are the same in words, so one text serves all precisions. "fp32" splits both
operands into two tf32 parts and multiplies three times, which leaves an error near 2^-21.
"""

from __future__ import annotations

import itertools
from typing import Any

from wsp_compiler.codegen.cuda_arithmetic import (
    arithmetic_for,
    emit_input_transform,
    emit_output_transform,
)
from wsp_compiler.codegen.position_scales import input_scale
from wsp_compiler.codegen.spec import FusedConfig, KernelSpec
from wsp_compiler.codegen.tvm_import import T

MMA = {
    "fp16": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "bf16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "tf32": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
    "fp32": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
}
TF32_BITS = 0xFFFFE000


def _line(buffer: Any, first: Any, step: int, count: int, *rest: Any) -> list[Any]:
    """Elements [first + i * step, *rest] of a register buffer."""
    return [buffer[(first + i * step, *rest)] for i in range(count)]


def _words(buffer: Any, count: int, *index: Any, first: Any = 0) -> list[Any]:
    """Elements [*index, first + i] of a register buffer."""
    return [buffer[(*index, first + i)] for i in range(count)]


def _emit_multiply(name: str, acc: list[Any], a: list[Any], b: list[Any]) -> None:
    """acc += a b, one mma instruction."""
    T.evaluate(T.ptx[name](*acc, *a, *b, *acc))


def _emit_access(name: str, words: list[Any], dtype: str, pointer: Any) -> None:
    """A load or store of 1, 2 or 4 words."""
    width = f".v{len(words)}" if len(words) > 1 else ""
    operands = [pointer, *words] if name.startswith("st") else [*words, pointer]
    T.evaluate(T.ptx[f"{name}{width}.{'f32' if dtype == 'float32' else 'b32'}"](*operands))


def make_fused(spec: KernelSpec, config: FusedConfig) -> Any:
    """The PrimFunc.

    Kernel arguments: X flat words, R (residual) and Y flat elements, all dense channels_last; U in fragment order
    and slot, two word offsets per uint32 (see :func:`wsp_compiler.codegen.pack_fused.pack_fused`); bias, slope, factor [n]
    float32; factor: what the output transform's results are multiplied by; tiles in all; thread blocks of tiles.
    """
    m, p, POS = spec.tile, spec.tile + 2, spec.winograd.positions
    n, (H, W), (HO, WO), (TH, TW) = spec.filters, (spec.height, spec.width), spec.output_size, spec.tiles
    (pad_h, pad_w), activation, residual = spec.padding, spec.activation, spec.residual
    ops, scale = arithmetic_for(spec.precision), input_scale(m, spec.precision)
    packed, split, round_tf32 = ops.dtype == "uint32", spec.precision == "fp32", spec.precision == "tf32"
    E = 2 if packed else 1  # elements per word
    c, SW, Q = spec.channels // E, config.slice_words, config.words
    P, G, NT, WARPS, rows = config.tiles, config.groups, config.threads, config.warps, config.rows
    KG, MR, N8, PW, PARTS = n // G, rows // 16, P // 8, POS // WARPS, 2 if split else 1
    ITEMS, PER_TILE, SLICES, PAIRS = P * (SW // Q), SW // Q, c // SW, SW // 16
    MASK, SHIFT = (7, 0) if SW == 32 else (3, 1)
    PT, S = P // E, config.row_stride(packed=packed)  # words of tiles, and between them, in M
    FB = KG // 32
    TILE_GROUPS = max(g for g in range(1, WARPS // min(FB, WARPS) + 1) if PT % g == 0)
    PER_WARP = PT // TILE_GROUPS
    UNROLL = max(u for u in (1, 2, 3, 4) if PER_WARP % u == 0)
    STEPS, AHEAD, STRIP = PW * PAIRS, config.prefetch, config.strip
    element, mma = "uint16" if packed else "float32", MMA[spec.precision]
    narrow = f"cvt.rn.{'bf16x2' if spec.precision == 'bf16' else 'f16x2'}.f32"
    register, all_inside, all_covered = ops.dtype, (1 << 2 * p) - 1, (1 << m * m) - 1

    def load_weights(U: Any, a: Any, g: Any, s: Any, step: Any, warp: Any, lane: Any) -> None:
        """Emit the loads of one step's A fragments."""
        for mr, half in itertools.product(range(MR), range(2 * PARTS)):
            word = g * (c // 8) + s * (SW // 8) + step % PAIRS * 2 + half % 2  # of the group's
            tile = (word * POS + warp * PW + step // PAIRS) * MR + mr
            pointer = U.ptr_to([(tile * PARTS + half // 2) * 128 + lane * 4])
            _emit_access("ld.global.nc", _words(a, 4, step % AHEAD, mr, half), "uint32", pointer)

    @T.prim_func
    def winograd_fused(
        x: T.handle, u: T.handle, slot: T.handle, bias: T.handle, slope: T.handle, r: T.handle, y: T.handle,
        factor: T.handle, total: T.int32, blocks: T.int32,
    ):  # fmt: skip
        x_size = T.int32()
        u_size = T.int32()
        r_size = T.int32()
        y_size = T.int32()
        X = T.match_buffer(x, (x_size,), "float32", align=16)
        U = T.match_buffer(u, (u_size,), "uint32", align=16)
        SLOT = T.match_buffer(slot, (POS // 2 * n,), "uint32", align=4)
        BIAS = T.match_buffer(bias, (n,), "float32", align=4)
        SLOPE = T.match_buffer(slope, (n,), "float32", align=4)
        FACTOR = T.match_buffer(factor, (n,), "float32", align=4)
        R = T.match_buffer(r, (r_size,), element, align=2)
        Y = T.match_buffer(y, (y_size,), element, align=2)
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": config.blocks_per_sm})
        cta = T.cta_id([blocks])
        tid = T.thread_id([NT])
        arena = T.alloc_buffer(
            (config.shared_bytes(packed=packed) // 4,), register, scope="shared.dyn", align=128
        )
        corner = T.alloc_shared((P,), "int32")
        inside = T.alloc_shared((P,), "int32")
        target = T.alloc_shared((P,), "int32")
        covers = T.alloc_shared((P,), "int32")
        acc = T.alloc_local((PW, MR, N8, 4), "float32")
        a = T.alloc_local((AHEAD, MR, 2 * PARTS, 4), "uint32")
        b = T.alloc_local((4,), "uint32")
        low = T.alloc_local((4,), "uint32")
        d = T.alloc_local((p * p, Q), register)
        t = T.alloc_local((5,), register)
        warp: T.let[T.int32] = tid // 32
        lane: T.let[T.int32] = tid % 32
        g: T.let[T.int32] = T.truncmod(cta, G)
        first: T.let[T.int32] = T.truncdiv(cta, G) * P
        if config.dependent_launch:
            T.ptx["griddepcontrol.launch_dependents"]()
        if tid < P:  # where the tile's patch starts, which of its pixels exist, where its outputs go
            tile: T.let[T.int32] = first + tid
            image: T.let[T.int32] = T.truncdiv(tile, TH * TW)
            band: T.let[T.int32] = T.truncdiv(T.truncmod(tile, TH * TW), STRIP * TW) * STRIP
            in_band: T.let[T.int32] = T.truncmod(tile, STRIP * TW)
            top: T.let[T.int32] = (band + T.truncmod(in_band, STRIP)) * m
            left: T.let[T.int32] = T.truncdiv(in_band, STRIP) * m
            corner[tid] = ((image * H + top - pad_h) * W + left - pad_w) * c
            bits: T.int32 = 0
            cover: T.int32 = 0
            for i in T.unroll(p):
                if T.And(T.And(top + i - pad_h >= 0, top + i - pad_h < H), tile < total):
                    bits = bits + (1 << i)
                if T.And(T.And(left + i - pad_w >= 0, left + i - pad_w < W), tile < total):
                    bits = bits + (1 << (p + i))
            for i in T.unroll(m):
                for j in T.unroll(m):
                    if T.And(T.And(top + i < HO, left + j < WO), tile < total):
                        cover = cover + (1 << (i * m + j))
            inside[tid] = bits
            target[tid] = ((image * HO + top) * WO + left) * n
            covers[tid] = cover
        T.cuda.cta_sync()
        if config.dependent_launch:  # nothing that another kernel writes is read before, nothing is written
            T.ptx["griddepcontrol.wait"]()
        for pp, mr, nb, e in T.grid(PW, MR, N8, 4):
            acc[pp, mr, nb, e] = T.float32(0)

        @T.inline
        def load_patch(item, s):
            tl: T.let[T.int32] = item // PER_TILE
            valid: T.let[T.int32] = inside[tl]
            start: T.let[T.int32] = corner[tl] + s * SW + item % PER_TILE * Q
            if valid == all_inside:
                for k in T.unroll(p * p):
                    pixel = T.meta_var(X.ptr_to([start + (k // p * W + k % p) * c]))
                    _emit_access("ld.global.nc", _words(d, Q, k), register, pixel)
            else:
                for k in T.unroll(p * p):
                    for q in T.unroll(Q):
                        d[k, q] = ops.constant(0.0)
                    need = T.meta_var((1 << (k // p)) + (1 << (p + k % p)))
                    # A branch, not a predicate: a predicated load leaves its outputs undefined.
                    if T.bitwise_and(valid, need) == need:
                        pixel = T.meta_var(X.ptr_to([start + (k // p * W + k % p) * c]))
                        _emit_access("ld.global.nc", _words(d, Q, k), register, pixel)

        @T.inline
        def transform_patch(item):
            for q in T.unroll(Q):
                for j in T.unroll(p):
                    emit_input_transform(ops, m, _line(d, j, p, p, q), scale, t)
                for i in T.unroll(p):
                    emit_input_transform(ops, m, _line(d, i * p, 1, p, q), 1.0, t)
            place: T.let[T.int32] = item // PER_TILE * SW + T.bitwise_xor(
                item % PER_TILE * Q, T.bitwise_and(T.shift_right(item // PER_TILE, SHIFT), MASK) * 4
            )
            for k in T.unroll(p * p):
                if round_tf32:
                    for q in T.unroll(Q):
                        T.ptx["cvt.rna.tf32.f32"](b[0], d[k, q])
                        d[k, q] = T.reinterpret("float32", b[0])
                _emit_access("st.shared", _words(d, Q, k), register, arena.ptr_to([k * P * SW + place]))

        for s in T.serial(SLICES):
            for item0 in T.serial(-(-ITEMS // NT)):
                if ITEMS % NT == 0 or item0 * NT + tid < ITEMS:
                    load_patch(item0 * NT + tid, s)
                    transform_patch(item0 * NT + tid)
            for step in T.unroll(min(AHEAD, STEPS)):
                load_weights(U, a, g, s, step, warp, lane)
            T.cuda.cta_sync()
            for step in T.unroll(STEPS):
                pp = T.meta_var(step // PAIRS)
                pair = T.meta_var(step % PAIRS)
                now = T.meta_var(step % AHEAD)
                for nb in T.unroll(N8):
                    row = T.meta_var(nb * 8 + lane % 8)
                    chunk = T.meta_var(
                        T.bitwise_xor(pair * 4 + lane // 8, T.bitwise_and(T.shift_right(row, SHIFT), MASK))
                    )
                    T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](
                        b[0], b[1], b[2], b[3],
                        arena.ptr_to([((warp * PW + pp) * P + row) * SW + chunk * 4]),
                    )  # fmt: skip
                    if split:
                        for e in T.unroll(4):
                            low[e] = T.reinterpret(
                                "uint32",
                                T.reinterpret("float32", b[e])
                                - T.reinterpret("float32", T.bitwise_and(b[e], T.uint32(TF32_BITS))),
                            )
                            b[e] = T.bitwise_and(b[e], T.uint32(TF32_BITS))
                    for mr in T.unroll(MR):
                        for half in T.unroll(2):
                            if split:  # small products first
                                _emit_multiply(
                                    mma,
                                    _words(acc, 4, pp, mr, nb),
                                    _words(a, 4, now, mr, 2 + half),
                                    _words(b, 2, first=2 * half),
                                )
                                _emit_multiply(
                                    mma,
                                    _words(acc, 4, pp, mr, nb),
                                    _words(a, 4, now, mr, half),
                                    _words(low, 2, first=2 * half),
                                )
                            _emit_multiply(
                                mma,
                                _words(acc, 4, pp, mr, nb),
                                _words(a, 4, now, mr, half),
                                _words(b, 2, first=2 * half),
                            )
                if step + AHEAD < STEPS:
                    load_weights(U, a, g, s, step + AHEAD, warp, lane)
            T.cuda.cta_sync()
        for pp, mr, nb, h in T.grid(PW, MR, N8, 2):  # M[position][tile][row], and a zero for pruned rows
            line = T.meta_var((warp * PW + pp) * PT * S + mr * 16 + h * 8 + lane // 4)
            if packed:
                T.ptx[narrow](b[0], acc[pp, mr, nb, h * 2 + 1], acc[pp, mr, nb, h * 2])
                arena[line + (nb * 4 + lane % 4) * S] = b[0]
            else:
                for e in T.unroll(2):
                    arena[line + (nb * 8 + lane % 4 * 2 + e) * S] = acc[pp, mr, nb, h * 2 + e]
        for z in T.serial(-(-PW * PT // 32)):
            if PW * PT % 32 == 0 or z * 32 + lane < PW * PT:
                arena[(warp * PW * PT + z * 32 + lane) * S + rows] = ops.constant(0.0)
        T.cuda.cta_sync()
        for fb in T.serial(-(-FB // WARPS)):
            block = T.meta_var(fb * WARPS + T.truncmod(warp, min(FB, WARPS)))
            # Where 32-filter blocks do not divide the warps evenly, the warps left over idle.
            if T.And(T.truncdiv(warp, min(FB, WARPS)) < TILE_GROUPS, block < FB):
                f: T.let[T.int32] = g * KG + block * 32 + lane
                own: T.let[T.int32] = T.truncdiv(warp, min(FB, WARPS)) * PER_WARP
                offset = T.alloc_local((POS,), "int32")
                for k in T.unroll(POS // 2):
                    pair_of: T.let[T.uint32] = SLOT[k * n + f]
                    offset[2 * k] = (2 * k * PT + own) * S + T.cast(
                        T.bitwise_and(pair_of, T.uint32(0xFFFF)), "int32"
                    )
                    offset[2 * k + 1] = ((2 * k + 1) * PT + own) * S + T.cast(
                        T.shift_right(pair_of, T.uint32(16)), "int32"
                    )
                constants = T.alloc_local((3,), register)
                if packed:
                    T.ptx[narrow](constants[0], FACTOR[f], FACTOR[f])
                    T.ptx[narrow](constants[1], BIAS[f], BIAS[f])
                    T.ptx[narrow](constants[2], SLOPE[f], SLOPE[f])
                else:
                    constants[0] = FACTOR[f]
                    constants[1] = BIAS[f]
                    constants[2] = SLOPE[f]
                for i0 in T.serial(PER_WARP // UNROLL):
                    for i1 in T.unroll(UNROLL):
                        pt = T.meta_var(i0 * UNROLL + i1)
                        w = T.alloc_local((p * p,), register)
                        o = T.alloc_local((m * m,), register)
                        t2 = T.alloc_local((4,), register)
                        for k in T.unroll(p * p):
                            w[k] = arena[offset[k] + pt * S]
                        for j in T.unroll(p):
                            emit_output_transform(ops, m, _line(w, j, p, p), _line(w, j, p, m), t2)
                        for i in T.unroll(m):
                            emit_output_transform(ops, m, _line(w, i * p, 1, p), _line(o, i * m, 1, m), t2)
                        for k in T.unroll(m * m):
                            ops.fma(o[k], o[k], constants[0], constants[1])
                        which = T.alloc_local((E,), "int32")
                        to = T.alloc_local((E,), "int32")
                        for e in T.unroll(E):
                            which[e] = covers[(own + pt) * E + e]
                            to[e] = target[(own + pt) * E + e] + f
                        if residual:
                            for k in T.unroll(m * m):
                                w[k] = ops.constant(0.0)
                            for e in T.unroll(E):
                                for k in T.unroll(m * m):
                                    if T.bitwise_and(which[e], 1 << k) != 0:
                                        place = T.meta_var(to[e] + (k // m * WO + k % m) * n)
                                        if packed:
                                            w[k] = T.bitwise_or(
                                                w[k],
                                                T.shift_left(T.cast(R[place], "uint32"), T.uint32(16) * e),
                                            )
                                        else:
                                            w[k] = R[place]
                            for k in T.unroll(m * m):
                                ops.add(o[k], o[k], w[k])
                        for k in T.unroll(m * m):
                            ops.activate(o[k], activation, constants[2])
                        for e in T.unroll(E):
                            if which[e] == all_covered:
                                for k in T.unroll(m * m):
                                    value = T.meta_var(
                                        T.cast(T.shift_right(o[k], T.uint32(16) * e), "uint16")
                                        if packed
                                        else o[k]
                                    )
                                    Y[to[e] + (k // m * WO + k % m) * n] = value
                            else:
                                for k in T.unroll(m * m):
                                    value = T.meta_var(
                                        T.cast(T.shift_right(o[k], T.uint32(16) * e), "uint16")
                                        if packed
                                        else o[k]
                                    )
                                    if T.bitwise_and(which[e], 1 << k) != 0:
                                        Y[to[e] + (k // m * WO + k % m) * n] = value

    return winograd_fused
