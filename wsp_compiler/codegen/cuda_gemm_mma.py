"""CUDA batched GEMM on tensor cores: M_k = V_k U_k^T over the kept rows of every position.

Tiles are the rows of mma's A (V, depth innermost), kept filters the columns of B (U, depth innermost): m16n8k16 for
float16 and bfloat16, m16n8k8 for tf32, float32 accumulators. Operands come through a ring of cp.async stages in
swizzled shared memory and ldmatrix; tf32 uses the same 16-byte chunks, since two of them are one mma step for
every type. Blocks beyond a position's kept rows end at once: pruned rows cost nothing.
"""

from __future__ import annotations

from typing import Any

from wsp_compiler.codegen.spec import OPERAND_STORAGE, CudaConfig, KernelSpec
from wsp_compiler.codegen.tvm_import import T

MMA = {
    "fp16": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "bf16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "tf32": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
}


def make_gemm_mma(spec: KernelSpec, config: CudaConfig) -> Any:
    """The PrimFunc.

    Kernel arguments: V flat; U flat, per position [rows_k, depth_k]; row_offset int32 [p*p + 1], kept rows before
    each position; m_base int32 [p*p + 1], the same with padded rows; depth_base int32 [p*p + 1], padded depth before each
    position; u_start int32 [p*p]; M flat float32; max_rows, tiles.
    """
    P, last, storage = spec.winograd.positions, spec.output_channels_last, OPERAND_STORAGE[spec.precision]
    E, by_column, depth_all = spec.depth_alignment, spec.columns_pruned, spec.slot_channels
    BM, BN, CH, STAGES, NT = (
        config.block_tiles,
        config.block_filters,
        config.chunks,
        config.stages,
        config.threads,
    )
    WM, WN = BM // config.warps_tiles, BN // config.warps_filters
    MI, NI, NWN, BK = WM // 16, WN // 8, config.warps_filters, CH * E
    shift = 1 if CH == 4 else 0  # swizzle: chunk ^ (row >> shift): conflict-free for 64- and 128-byte rows
    stage_size, mma = (BM + BN) * BK, MMA[spec.precision]
    loads_v, loads_u = -(-BM * CH // NT), -(-BN * CH // NT)

    def swizzled(row: Any, chunk: Any) -> Any:
        return row * BK + T.bitwise_xor(chunk, T.bitwise_and(T.shift_right(row, shift), CH - 1)) * E

    @T.prim_func
    def sparse_bgemm(
        v: T.handle, u: T.handle, row_offset: T.handle, m_base: T.handle, depth_base: T.handle, u_start: T.handle,
        mm: T.handle, max_rows: T.int32, tiles: T.int32,
    ):  # fmt: skip
        v_size = T.int32()
        u_size = T.int32()
        m_size = T.int32()
        V = T.match_buffer(v, (v_size,), storage, align=16)
        U = T.match_buffer(u, (u_size,), storage, align=16)
        RO = T.match_buffer(row_offset, (P + 1,), "int32", align=4)
        MB = T.match_buffer(m_base, (P + 1,), "int32", align=4)
        DB = T.match_buffer(depth_base, (P + 1,), "int32", align=4)
        US = T.match_buffer(u_start, (P,), "int32", align=4)
        M = T.match_buffer(mm, (m_size,), "float32", align=16)
        T.device_entry()
        bx, by, bz = T.cta_id([T.ceildiv(tiles, BM), T.ceildiv(max_rows, BN), P])
        tid = T.thread_id([NT])
        smem = T.alloc_buffer((STAGES * stage_size,), storage, scope="shared.dyn", align=128)
        acc = T.alloc_local((MI, NI, 4), "float32")
        a = T.alloc_local((MI, 4), "uint32")
        b = T.alloc_local((NI // 2, 4), "uint32")
        warp: T.let[T.int32] = tid // 32
        lane: T.let[T.int32] = tid % 32
        warp_tile: T.let[T.int32] = warp // NWN * WM
        warp_filter: T.let[T.int32] = warp % NWN * WN
        tile0: T.let[T.int32] = bx * BM
        filter0: T.let[T.int32] = by * BN
        rows: T.let[T.int32] = RO[bz + 1] - RO[bz]
        depth: T.let[T.int32] = (DB[bz + 1] - DB[bz]) if by_column else depth_all
        v0: T.let[T.int32] = (DB[bz] if by_column else bz * depth_all) * tiles
        u0: T.let[T.int32] = US[bz]
        steps: T.let[T.int32] = (depth + BK - 1) // BK

        @T.inline
        def load_stage(stage, step):  # rows and depth beyond the operand arrive as zeros
            for i in T.unroll(loads_v):
                item = T.meta_var(tid + i * NT)
                row = T.meta_var(item // CH)
                chunk = T.meta_var(item % CH)
                k = T.meta_var(step * BK + chunk * E)
                ok = T.meta_var(T.And(tile0 + row < tiles, k < depth))
                if (BM * CH) % NT == 0 or item < BM * CH:
                    T.ptx["cp.async.cg.shared.global"](
                        smem.ptr_to([stage * stage_size + swizzled(row, chunk)]),
                        V.ptr_to([T.if_then_else(ok, v0 + (tile0 + row) * depth + k, 0)]),
                        16, T.if_then_else(ok, T.uint32(16), T.uint32(0)),
                    )  # fmt: skip
            for i in T.unroll(loads_u):
                item = T.meta_var(tid + i * NT)
                row = T.meta_var(item // CH)
                chunk = T.meta_var(item % CH)
                k = T.meta_var(step * BK + chunk * E)
                ok = T.meta_var(T.And(filter0 + row < rows, k < depth))
                if (BN * CH) % NT == 0 or item < BN * CH:
                    T.ptx["cp.async.cg.shared.global"](
                        smem.ptr_to([stage * stage_size + BM * BK + swizzled(row, chunk)]),
                        U.ptr_to([T.if_then_else(ok, u0 + (filter0 + row) * depth + k, 0)]),
                        16, T.if_then_else(ok, T.uint32(16), T.uint32(0)),
                    )  # fmt: skip

        if filter0 < rows:
            for i, j, e in T.grid(MI, NI, 4):
                acc[i, j, e] = T.float32(0)
            for s in T.unroll(STAGES - 1):
                if s < steps:
                    load_stage(s, s)
                T.ptx["cp.async.commit_group"]()
            for step in T.serial(steps):
                T.ptx["cp.async.wait_group"](STAGES - 2)
                T.cuda.cta_sync()
                if step + STAGES - 1 < steps:
                    load_stage((step + STAGES - 1) % STAGES, step + STAGES - 1)
                T.ptx["cp.async.commit_group"]()
                stage = T.meta_var(step % STAGES * stage_size)
                for kk in T.unroll(CH // 2):
                    for i in T.unroll(MI):
                        T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](
                            a[i, 0], a[i, 1], a[i, 2], a[i, 3],
                            smem.ptr_to([stage + swizzled(warp_tile + i * 16 + lane % 16, kk * 2 + lane // 16)]),
                        )  # fmt: skip
                    for j in T.unroll(NI // 2):
                        T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](
                            b[j, 0], b[j, 1], b[j, 2], b[j, 3],
                            smem.ptr_to([stage + BM * BK + swizzled(warp_filter + j * 16 + lane % 8 + lane // 16 * 8, kk * 2 + lane // 8 % 2)]),
                        )  # fmt: skip
                    for i, j in T.grid(MI, NI):
                        T.ptx[mma](
                            acc[i, j, 0], acc[i, j, 1], acc[i, j, 2], acc[i, j, 3],
                            a[i, 0], a[i, 1], a[i, 2], a[i, 3], b[j // 2, j % 2 * 2], b[j // 2, j % 2 * 2 + 1],
                            acc[i, j, 0], acc[i, j, 1], acc[i, j, 2], acc[i, j, 3],
                        )  # fmt: skip
            for i, j, h in T.grid(MI, NI, 2):  # accumulators 0, 1: tile lane // 4; 2, 3: eight tiles further
                tile = T.meta_var(tile0 + warp_tile + i * 16 + lane // 4 + h * 8)
                row = T.meta_var(filter0 + warp_filter + j * 8 + lane % 4 * 2)
                if T.And(tile < tiles, row < rows):
                    if last:  # rows are padded to even in M, so both may be stored
                        at = T.meta_var(MB[bz] * tiles + tile * (MB[bz + 1] - MB[bz]) + row)
                        M[at] = acc[i, j, h * 2]
                        M[at + 1] = acc[i, j, h * 2 + 1]
                    else:
                        M[(MB[bz] + row) * tiles + tile] = acc[i, j, h * 2]
                        if row + 1 < rows:
                            M[(MB[bz] + row + 1) * tiles + tile] = acc[i, j, h * 2 + 1]

    return sparse_bgemm
