"""CUDA batched GEMM on the float32 units (FFMA): M_k = V_k U_k^T over the kept rows, for precision "fp32".

A block of 256 threads computes 128 tiles x ``block_filters`` filters; each thread 8 tiles x block_filters / 16
filters from shared memory, where both operands are transposed so that the reduction dimension is outermost.
"""

from __future__ import annotations

from typing import Any

from wsp_compiler.codegen.spec import CudaConfig, KernelSpec
from wsp_compiler.codegen.tvm_import import T

THREADS, BLOCK_TILES, BLOCK_DEPTH = 256, 128, 16


def make_gemm_ffma(spec: KernelSpec, config: CudaConfig) -> Any:
    """The PrimFunc; kernel arguments as in :func:`wsp_compiler.codegen.cuda_gemm_mma.make_gemm_mma`."""
    P, last, by_column, depth_all = (
        spec.winograd.positions,
        spec.output_channels_last,
        spec.columns_pruned,
        spec.slot_channels,
    )
    BM, BN, BK = BLOCK_TILES, config.block_filters, BLOCK_DEPTH
    TN, SA, SB = BN // 16, BLOCK_TILES + 4, config.block_filters + 4
    loads_v, loads_u = BM * BK // 4 // THREADS, -(-BN * BK // 4 // THREADS)
    u_vectors = BN * BK // 4

    @T.prim_func
    def sparse_bgemm(
        v: T.handle, u: T.handle, row_offset: T.handle, m_base: T.handle, depth_base: T.handle, u_start: T.handle,
        mm: T.handle, max_rows: T.int32, tiles: T.int32,
    ):  # fmt: skip
        v_size = T.int32()
        u_size = T.int32()
        m_size = T.int32()
        V = T.match_buffer(v, (v_size,), "float32", align=16)
        U = T.match_buffer(u, (u_size,), "float32", align=16)
        RO = T.match_buffer(row_offset, (P + 1,), "int32", align=4)
        MB = T.match_buffer(m_base, (P + 1,), "int32", align=4)
        DB = T.match_buffer(depth_base, (P + 1,), "int32", align=4)
        US = T.match_buffer(u_start, (P,), "int32", align=4)
        M = T.match_buffer(mm, (m_size,), "float32", align=16)
        T.device_entry()
        bx, by, bz = T.cta_id([T.ceildiv(tiles, BM), T.ceildiv(max_rows, BN), P])
        tid = T.thread_id([THREADS])
        smem = T.alloc_buffer((BK * (SA + SB),), "float32", scope="shared.dyn", align=128)
        acc = T.alloc_local((8, TN), "float32")
        a = T.alloc_local((8,), "float32")
        b = T.alloc_local((TN,), "float32")
        next_v = T.alloc_local((loads_v, 4), "float32")
        next_u = T.alloc_local((loads_u, 4), "float32")
        tx: T.let[T.int32] = tid % 16
        ty: T.let[T.int32] = tid // 16
        tile0: T.let[T.int32] = bx * BM
        filter0: T.let[T.int32] = by * BN
        rows: T.let[T.int32] = RO[bz + 1] - RO[bz]
        depth: T.let[T.int32] = (DB[bz + 1] - DB[bz]) if by_column else depth_all
        v0: T.let[T.int32] = (DB[bz] if by_column else bz * depth_all) * tiles
        u0: T.let[T.int32] = US[bz]
        steps: T.let[T.int32] = (depth + BK - 1) // BK

        @T.inline
        def fetch(step):
            for i in T.unroll(loads_v):
                item = T.meta_var(tid + i * THREADS)
                row = T.meta_var(tile0 + item // (BK // 4))
                k = T.meta_var(step * BK + item % (BK // 4) * 4)
                for e in T.unroll(4):
                    next_v[i, e] = T.float32(0)
                if T.And(row < tiles, k < depth):
                    for e in T.vectorized(4):
                        next_v[i, e] = V[v0 + row * depth + k + e]
            for i in T.unroll(loads_u):
                item = T.meta_var(tid + i * THREADS)
                row = T.meta_var(filter0 + item // (BK // 4))
                k = T.meta_var(step * BK + item % (BK // 4) * 4)
                for e in T.unroll(4):
                    next_u[i, e] = T.float32(0)
                if T.And(T.And(row < rows, k < depth), item < u_vectors):
                    for e in T.vectorized(4):
                        next_u[i, e] = U[u0 + row * depth + k + e]

        if filter0 < rows:
            for i, j in T.grid(8, TN):
                acc[i, j] = T.float32(0)
            fetch(0)
            for step in T.serial(steps):
                T.cuda.cta_sync()
                for i in T.unroll(loads_v):
                    item = T.meta_var(tid + i * THREADS)
                    for e in T.unroll(4):
                        smem[(item % (BK // 4) * 4 + e) * SA + item // (BK // 4)] = next_v[i, e]
                for i in T.unroll(loads_u):
                    item = T.meta_var(tid + i * THREADS)
                    if item < u_vectors:
                        for e in T.unroll(4):
                            smem[BK * SA + (item % (BK // 4) * 4 + e) * SB + item // (BK // 4)] = next_u[i, e]
                T.cuda.cta_sync()
                if step + 1 < steps:
                    fetch(step + 1)
                for kk in T.unroll(BK):
                    for h in T.unroll(2):
                        for e in T.vectorized(4):
                            a[h * 4 + e] = smem[kk * SA + h * 64 + tx * 4 + e]
                    for j in T.unroll(TN):
                        b[j] = smem[BK * SA + kk * SB + ty * TN + j]
                    for i, j in T.grid(8, TN):
                        acc[i, j] = acc[i, j] + a[i] * b[j]
            for i, j in T.grid(8, TN):
                tile = T.meta_var(tile0 + i // 4 * 64 + tx * 4 + i % 4)
                row = T.meta_var(filter0 + ty * TN + j)
                if T.And(tile < tiles, row < rows):
                    if last:
                        M[MB[bz] * tiles + tile * (MB[bz + 1] - MB[bz]) + row] = acc[i, j]
                    else:
                        M[(MB[bz] + row) * tiles + tile] = acc[i, j]

    return sparse_bgemm
