"""CPU kernels in TensorIR: input transform, batched GEMM over kept rows, output transform, fused or apart.

Work is cut into slices of whole tile rows, so that a slice's V and M stay in one core's L2 cache. The same
loops serve the three separate stages and the fused kernel: fused, a worker reuses one slice's scratch; apart,
every slice has its own. Vectors run over channels in the input transform, over filters in the other two.

Layouts inside a slice of ``ts`` tiles (padded to the register block): V [p*p][ts][c_pad],
M [row block][ts][row_block], U as packed by :func:`wsp_compiler.codegen.pack.pack_cpu`.
"""

from __future__ import annotations

from typing import Any

from wsp_compiler.codegen.expressions import (
    STORAGE,
    activate,
    bfloat16_values,
    emit_transform,
    from_float,
    splat,
    to_float,
)
from wsp_compiler.codegen.spec import CpuConfig, KernelSpec
from wsp_compiler.codegen.tvm_import import T

ALL_STAGES = ("input", "gemm", "output")
IN_REGISTERS = {"disable_lower_builtin": True}
"""Annotation that keeps small vector buffers in registers instead of a heap workspace."""


def make_cpu_kernel(spec: KernelSpec, config: CpuConfig, stages: tuple[str, ...] = ALL_STAGES) -> Any:
    """The PrimFunc that runs ``stages`` (a subset of :data:`ALL_STAGES`) of a layer."""
    winograd, m, L = spec.winograd, spec.tile, config.lanes
    p, P, BT, AT = winograd.input_side, winograd.positions, winograd.BT, winograd.AT
    n, c, (H, W), (pad_h, pad_w) = spec.filters, spec.channels, (spec.height, spec.width), spec.padding
    (HO, WO), (TH, TW) = spec.output_size, spec.tiles
    CP, NP, RB = -(-c // L) * L, -(-n // L) * L, config.row_block
    MT, NV, WS = config.tile_block, config.vectors, TW * m + 2
    vec, io, store_io = f"float32x{L}", spec.dtype, STORAGE[spec.dtype]
    fused = stages == ALL_STAGES
    do_input, do_gemm, do_output = (stage in stages for stage in ALL_STAGES)
    x_last, y_last, by_column = spec.input_channels_last, spec.output_channels_last, spec.columns_pruned
    rounds, pruned, residual, activation = (
        spec.precision == "bf16",
        spec.rows_pruned,
        spec.residual,
        spec.activation,
    )

    @T.prim_func
    def winograd_cpu(
        x: T.handle, u: T.handle, u_start: T.handle, block_offset: T.handle, destination: T.handle,
        columns: T.handle, column_offset: T.handle, bias: T.handle, slope: T.handle, r: T.handle, y: T.handle,
        v_scratch: T.handle, m_scratch: T.handle, stage_scratch: T.handle, full_scratch: T.handle,
        xn: T.int64, xc: T.int64, xh: T.int64, xw: T.int64, rn: T.int64, rc: T.int64, rh: T.int64, rw: T.int64,
        yn: T.int64, yc: T.int64, yh: T.int64, yw: T.int64,
        images: T.int32, slice_rows: T.int32, workers: T.int32,
    ):  # fmt: skip
        x_size = T.int64()
        r_size = T.int64()
        y_size = T.int64()
        u_size = T.int64()
        blocks = T.int32()
        column_count = T.int32()
        parts = T.int32()
        helpers = T.int32()
        v_size = T.int64()
        m_size = T.int64()
        s_size = T.int64()
        f_size = T.int64()
        X = T.match_buffer(x, (x_size,), store_io, align=2)
        R = T.match_buffer(r, (r_size,), store_io, align=2)
        Y = T.match_buffer(y, (y_size,), store_io, align=2)
        U = T.match_buffer(u, (u_size,), "float32", align=64)
        US = T.match_buffer(u_start, (P,), "int64", align=8)
        BO = T.match_buffer(block_offset, (P + 1,), "int32", align=4)
        D = T.match_buffer(destination, (blocks,), "int32", align=4)
        CI = T.match_buffer(columns, (column_count,), "int32", align=4)
        CO = T.match_buffer(column_offset, (P + 1,), "int32", align=4)
        BI = T.match_buffer(bias, (NP,), "float32", align=64)
        SL = T.match_buffer(slope, (NP,), "float32", align=64)
        SV = T.match_buffer(v_scratch, (parts, v_size), "float32", align=64)
        SM = T.match_buffer(m_scratch, (parts, m_size), "float32", align=64)
        SS = T.match_buffer(stage_scratch, (helpers, s_size), "float32", align=64)
        SF = T.match_buffer(full_scratch, (helpers, f_size), "float32", align=64)
        for w in T.parallel(workers):
            tile_rows: T.let[T.int32] = images * TH
            slices: T.let[T.int32] = (tile_rows + slice_rows - 1) // slice_rows
            if do_output and pruned:
                for z in T.serial(P * NP + 1):
                    SF[w, z] = T.float32(0)
            for i_slice in T.serial((slices - w + workers - 1) // workers):
                s: T.let[T.int32] = i_slice * workers + w
                part: T.let[T.int32] = w if fused else s
                row0: T.let[T.int32] = s * slice_rows
                rows: T.let[T.int32] = T.min(slice_rows, tile_rows - row0)
                ts: T.let[T.int32] = (slice_rows * TW + MT - 1) // MT * MT
                if do_input:
                    for row in T.serial(rows):
                        image: T.let[T.int64] = T.cast((row0 + row) // TH, "int64")
                        top: T.let[T.int32] = (row0 + row) % TH * m - pad_h
                        # Stage the p input lines of this tile row, zero padded, channels innermost, as float32.
                        for i in T.serial(p):
                            for j in T.serial(WS):
                                line: T.let[T.int32] = top + i
                                col: T.let[T.int32] = j - pad_w
                                base: T.let[T.int64] = (
                                    image * xn + T.cast(line, "int64") * xh + T.cast(col, "int64") * xw
                                )
                                if T.And(T.And(line >= 0, line < H), T.And(col >= 0, col < W)):
                                    if x_last:
                                        for cv in T.serial(c // L):
                                            SS.vstore(
                                                [w, (i * WS + j) * CP + cv * L],
                                                to_float(
                                                    X.vload(
                                                        [base + T.cast(cv * L, "int64")],
                                                        dtype=f"{store_io}x{L}",
                                                    ),
                                                    io,
                                                    L,
                                                ),
                                            )
                                        for cc in T.serial(c % L):
                                            SS[w, (i * WS + j) * CP + c // L * L + cc] = to_float(
                                                X[base + T.cast(c // L * L + cc, "int64")], io
                                            )
                                    else:
                                        for cc in T.serial(c):
                                            SS[w, (i * WS + j) * CP + cc] = to_float(
                                                X[base + T.cast(cc, "int64") * xc], io
                                            )
                                else:
                                    for cv in T.serial(CP // L):
                                        SS.vstore([w, (i * WS + j) * CP + cv * L], splat(0.0, L))
                        for tw in T.serial(TW):
                            for cv in T.serial(CP // L):
                                d = T.alloc_buffer((P,), vec, scope="local", annotations=IN_REGISTERS)
                                t = T.alloc_buffer((P,), vec, scope="local", annotations=IN_REGISTERS)
                                o = T.alloc_buffer((P,), vec, scope="local", annotations=IN_REGISTERS)
                                for i in T.unroll(p):
                                    for j in T.unroll(p):
                                        d[i * p + j] = SS.vload(
                                            [w, (i * WS + tw * m + j) * CP + cv * L], dtype=vec
                                        )
                                emit_transform(BT, d, t, o, L)
                                for k in T.unroll(P):
                                    if rounds:
                                        o[k] = bfloat16_values(o[k], L)
                                    if by_column:
                                        SF.vstore([w, k * CP + cv * L], o[k])
                                    else:
                                        SV.vstore([part, (k * ts + row * TW + tw) * CP + cv * L], o[k])
                            if by_column:
                                for k in T.serial(P):
                                    for j in T.serial(CO[k + 1] - CO[k]):
                                        SV[part, (k * ts + row * TW + tw) * CP + j] = SF[
                                            w, k * CP + CI[CO[k] + j]
                                        ]
                if do_gemm:
                    for k in T.serial(P):
                        depth: T.let[T.int32] = (CO[k + 1] - CO[k]) if by_column else c
                        for b in T.serial(BO[k + 1] - BO[k]):
                            for tb in T.serial((rows * TW + MT - 1) // MT):
                                acc = T.alloc_buffer((MT * NV,), vec, scope="local", annotations=IN_REGISTERS)
                                uv = T.alloc_buffer((NV,), vec, scope="local", annotations=IN_REGISTERS)
                                for i in T.unroll(MT * NV):
                                    acc[i] = splat(0.0, L)
                                for cc in T.serial(depth):
                                    for v in T.unroll(NV):
                                        uv[v] = U.vload(
                                            [
                                                US[k]
                                                + T.cast(b * depth + cc, "int64") * T.int64(RB)
                                                + T.cast(v * L, "int64")
                                            ],
                                            dtype=vec,
                                        )
                                    for i in T.unroll(MT):
                                        for v in T.unroll(NV):
                                            acc[i * NV + v] = acc[i * NV + v] + (
                                                T.Broadcast(SV[part, (k * ts + tb * MT + i) * CP + cc], L)
                                                * uv[v]
                                            )
                                for i in T.unroll(MT):
                                    for v in T.unroll(NV):
                                        SM.vstore(
                                            [part, ((BO[k] + b) * ts + tb * MT + i) * RB + v * L],
                                            acc[i * NV + v],
                                        )
                if do_output:
                    for row in T.serial(rows):
                        image: T.let[T.int64] = T.cast((row0 + row) // TH, "int64")
                        top: T.let[T.int32] = (row0 + row) % TH * m
                        for tw in T.serial(TW):
                            tile: T.let[T.int32] = row * TW + tw
                            if pruned:  # spread the kept rows; the others' places in SF stay zero
                                for b in T.serial(BO[P]):
                                    for j in T.unroll(RB):
                                        SF[w, D[b * RB + j]] = SM[part, (b * ts + tile) * RB + j]
                            for fv in T.serial(NP // L):
                                d = T.alloc_buffer((P,), vec, scope="local", annotations=IN_REGISTERS)
                                t = T.alloc_buffer((P,), vec, scope="local", annotations=IN_REGISTERS)
                                o = T.alloc_buffer((m * m,), vec, scope="local", annotations=IN_REGISTERS)
                                for k in T.unroll(P):
                                    if pruned:
                                        d[k] = SF.vload([w, k * NP + fv * L], dtype=vec)
                                    else:
                                        d[k] = SM.vload(
                                            [part, ((BO[k] + fv // NV) * ts + tile) * RB + fv % NV * L],
                                            dtype=vec,
                                        )
                                emit_transform(AT, d, t, o, L)
                                for i in T.unroll(m):
                                    for j in T.unroll(m):
                                        o[i * m + j] = o[i * m + j] + BI.vload([fv * L], dtype=vec)
                                        out_h: T.let[T.int32] = top + i
                                        out_w: T.let[T.int32] = tw * m + j
                                        if y_last:
                                            to: T.let[T.int64] = (
                                                image * yn
                                                + T.cast(out_h, "int64") * yh
                                                + T.cast(out_w, "int64") * yw
                                            )
                                            via: T.let[T.int64] = (
                                                image * rn
                                                + T.cast(out_h, "int64") * rh
                                                + T.cast(out_w, "int64") * rw
                                            )
                                            if T.And(out_h < HO, out_w < WO):
                                                if fv < n // L:
                                                    if residual:
                                                        o[i * m + j] = o[i * m + j] + to_float(
                                                            R.vload(
                                                                [via + T.cast(fv * L, "int64")],
                                                                dtype=f"{store_io}x{L}",
                                                            ),
                                                            io,
                                                            L,
                                                        )
                                                    o[i * m + j] = activate(
                                                        o[i * m + j],
                                                        activation,
                                                        SL.vload([fv * L], dtype=vec),
                                                        L,
                                                    )
                                                    Y.vstore(
                                                        [to + T.cast(fv * L, "int64")],
                                                        from_float(o[i * m + j], io, L),
                                                    )
                                                else:
                                                    SS.vstore([w, 0], o[i * m + j])
                                                    for f in T.serial(n % L):
                                                        e = T.alloc_buffer(
                                                            (1,),
                                                            "float32",
                                                            scope="local",
                                                            annotations=IN_REGISTERS,
                                                        )
                                                        e[0] = SS[w, f]
                                                        if residual:
                                                            e[0] = e[0] + to_float(
                                                                R[via + T.cast(n // L * L + f, "int64")], io
                                                            )
                                                        Y[to + T.cast(n // L * L + f, "int64")] = from_float(
                                                            activate(e[0], activation, SL[n // L * L + f]), io
                                                        )
                                        else:
                                            SS.vstore([w, (i * TW * m + out_w) * NP + fv * L], o[i * m + j])
                        if (
                            not y_last
                        ):  # the finished lines are copied out filter by filter, 16 pixels at a time
                            for i in T.serial(m):
                                out_h: T.let[T.int32] = top + i
                                if out_h < HO:
                                    for wb in T.serial((WO + 15) // 16):
                                        for f in T.serial(n):
                                            to: T.let[T.int64] = (
                                                image * yn
                                                + T.cast(out_h, "int64") * yh
                                                + T.cast(f, "int64") * yc
                                            )
                                            via: T.let[T.int64] = (
                                                image * rn
                                                + T.cast(out_h, "int64") * rh
                                                + T.cast(f, "int64") * rc
                                            )
                                            for j in T.unroll(16):
                                                out_w: T.let[T.int32] = wb * 16 + j
                                                if out_w < WO:
                                                    e = T.alloc_buffer(
                                                        (1,),
                                                        "float32",
                                                        scope="local",
                                                        annotations=IN_REGISTERS,
                                                    )
                                                    e[0] = SS[w, (i * TW * m + out_w) * NP + f]
                                                    if residual:
                                                        e[0] = e[0] + to_float(
                                                            R[via + T.cast(out_w, "int64") * rw], io
                                                        )
                                                    Y[to + T.cast(out_w, "int64") * yw] = from_float(
                                                        activate(e[0], activation, SL[f]), io
                                                    )

    return winograd_cpu
