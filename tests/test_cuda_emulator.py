"""The emulator against torch, on kernels that TVM generates and on CUDA text written here."""

from __future__ import annotations

import inspect

import pytest
import torch

from .cuda_emulator import emulate, is_available

# TVM's script parser calls inspect.stack() for each function; for every frame of the import system that walks
# all of sys.modules, and importing TVM's own kernels takes 20 s instead of 3 s.
_getmodule = inspect.getmodule
inspect.getmodule = lambda object_, filename=None: (
    None if filename is not None and filename.startswith("<") else _getmodule(object_, filename)
)

import tvm  # noqa: E402
from tvm.script import tirx as T  # noqa: E402

pytestmark = pytest.mark.skipif(not is_available(), reason="needs g++ on x86-64")
ORDERS = ("forward", "reverse")


def cuda_text(**functions: tvm.tirx.PrimFunc) -> str:
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90a"}, host={"kind": "llvm"})
    with target:
        executable = tvm.compile(tvm.IRModule(functions), target=target, tir_pipeline="tirx")
    return executable.mod.imports[0].inspect_source("cuda")


# --- kernels from TVM ---------------------------------------------------------------------------------------

TILE = 32  # a block computes 32 x 32 outputs in steps of 32 along k
CHUNKS = 4  # of 8 numbers in a row of a tile
STAGES, STAGE_SIZE = 3, 2 * TILE * TILE


def make_gemm(M: int, N: int, K: int) -> tvm.tirx.PrimFunc:
    """C = A B^T in fp16 with fp32 sums: a ring of cp.async stages, ldmatrix and mma, four warps."""

    def swizzled(row, chunk):
        return row * TILE + T.bitwise_xor(chunk, T.bitwise_and(T.shift_right(row, 1), 3)) * 8

    @T.prim_func
    def gemm(
        A: T.Buffer((M, K), "float16", align=16),
        B: T.Buffer((N, K), "float16", align=16),
        C: T.Buffer((M, N), "float32", align=16),
    ):
        T.device_entry()
        bx, by = T.cta_id([(N + TILE - 1) // TILE, (M + TILE - 1) // TILE])
        tid = T.thread_id([128])
        shared = T.alloc_buffer((STAGES * STAGE_SIZE,), "float16", scope="shared.dyn", align=128)
        sums = T.alloc_local((2, 4), "float32")
        a = T.alloc_local((4,), "uint32")
        b = T.alloc_local((4,), "uint32")
        lane: T.let[T.int32] = tid % 32
        wm: T.let[T.int32] = tid // 64 * 16
        wn: T.let[T.int32] = tid // 32 % 2 * 16

        @T.inline
        def load_operand(operand, first_row, rows, offset, step):
            row = T.meta_var(first_row + tid // CHUNKS)
            k = T.meta_var(step * TILE + tid % CHUNKS * 8)
            inside = T.meta_var(T.And(row < rows, k < K))
            T.ptx["cp.async.cg.shared.global"](
                shared.ptr_to([offset + swizzled(tid // CHUNKS, tid % CHUNKS)]),
                operand.ptr_to([T.if_then_else(inside, row, 0), T.if_then_else(inside, k, 0)]),
                16,
                T.if_then_else(inside, T.uint32(16), T.uint32(0)),
            )

        @T.inline
        def load_stage(step):
            if step * TILE < K:
                load_operand(A, by * TILE, M, step % STAGES * STAGE_SIZE, step)
                load_operand(B, bx * TILE, N, step % STAGES * STAGE_SIZE + TILE * TILE, step)
            T.ptx["cp.async.commit_group"]()

        for j, e in T.grid(2, 4):
            sums[j, e] = T.float32(0)
        for step in T.unroll(STAGES - 1):
            load_stage(step)
        for step in T.serial((K + TILE - 1) // TILE):
            T.ptx["cp.async.wait_group"](STAGES - 2)
            T.cuda.cta_sync()
            load_stage(step + STAGES - 1)
            stage = T.meta_var(step % STAGES * STAGE_SIZE)
            column = T.meta_var(wn + lane % 8 + lane // 16 * 8)
            for kk in T.unroll(TILE // 16):
                T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](
                    *[a[i] for i in range(4)],
                    shared.ptr_to([stage + swizzled(wm + lane % 16, kk * 2 + lane // 16)]),
                )
                T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](
                    *[b[i] for i in range(4)],
                    shared.ptr_to([stage + TILE * TILE + swizzled(column, kk * 2 + lane // 8 % 2)]),
                )
                for j in T.unroll(2):
                    T.ptx["mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"](
                        *[sums[j, e] for e in range(4)],
                        *[a[i] for i in range(4)],
                        b[j * 2],
                        b[j * 2 + 1],
                        *[sums[j, e] for e in range(4)],
                    )
        for j, e in T.grid(2, 4):
            row = T.meta_var(by * TILE + wm + lane // 4 + e // 2 * 8)
            col = T.meta_var(bx * TILE + wn + j * 8 + lane % 4 * 2 + e % 2)
            if T.And(row < M, col < N):
                C[row, col] = sums[j, e]

    return gemm


def run_gemm(text: str, order: str) -> float:
    """The largest error; NaN counts as infinite."""
    torch.manual_seed(0)
    A, B, C = torch.randn(50, 136).half(), torch.randn(40, 136).half(), torch.full((50, 40), torch.nan)
    kernel = emulate(text, "gemm_kernel", order=order)
    assert kernel.args == ("A_ptr", "B_ptr", "C_ptr")
    kernel(A, B, C, grid=(2, 2), block=(128,), dynamic_shared_bytes=STAGES * STAGE_SIZE * 2)
    return (C - A.float() @ B.float().T).abs().nan_to_num(nan=torch.inf).max().item()


@pytest.fixture(scope="module")
def gemm_text() -> str:
    return cuda_text(gemm=make_gemm(50, 40, 136))


@pytest.mark.parametrize("order", ORDERS)
def test_gemm(gemm_text: str, order: str) -> None:
    assert run_gemm(gemm_text, order) < 1e-4


@pytest.mark.parametrize(
    ("old", "new"),
    [("cp.async.wait_group 1;", "cp.async.wait_group 2;"), ("__syncthreads();", "")],
    ids=["wait_group", "barrier"],
)
def test_gemm_without_waiting_is_wrong(gemm_text: str, old: str, new: str) -> None:
    assert old in gemm_text
    assert max(run_gemm(gemm_text.replace(old, new), order) for order in ORDERS) > 0.1


def make_mma(opcode: str) -> tvm.tirx.PrimFunc:
    """One mma of one warp; the operands are given as 32-bit words, rows of 8."""

    @T.prim_func
    def mma(A: T.Buffer((16, 8), "uint32"), B: T.Buffer((8, 8), "uint32"), C: T.Buffer((16, 8), "float32")):
        T.device_entry()
        T.cta_id([1])
        lane = T.thread_id([32])
        sums = T.alloc_local((4,), "float32")
        g: T.let[T.int32] = lane // 4
        t: T.let[T.int32] = lane % 4
        for e in T.unroll(4):
            sums[e] = C[g + e // 2 * 8, t * 2 + e % 2]
        T.ptx[opcode](
            *[sums[e] for e in range(4)],
            *[A[g + i % 2 * 8, t + i // 2 * 4] for i in range(4)],
            *[B[g, t + i * 4] for i in range(2)],
            *[sums[e] for e in range(4)],
        )
        for e in T.unroll(4):
            C[g + e // 2 * 8, t * 2 + e % 2] = sums[e]

    return mma


@pytest.mark.parametrize(
    ("opcode", "dtype"),
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", torch.float16),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", torch.bfloat16),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", torch.float32),
    ],
    ids=["f16", "bf16", "tf32"],
)
def test_mma(opcode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    k = 32 // dtype.itemsize
    A, B, C = torch.randn(16, k).to(dtype), torch.randn(8, k).to(dtype), torch.randn(16, 8)
    exact_A, exact_B = A.double(), B.double()
    if dtype == torch.float32:  # the tensor core ignores 13 bits
        exact_A, exact_B = ((x.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for x in (A, B))
        assert (exact_A - A).abs().max() > 1e-4
    expected = exact_A @ exact_B.T + C
    emulate(cuda_text(mma=make_mma(opcode)), "mma_kernel")(A, B, C, grid=(1,), block=(32,))
    torch.testing.assert_close(C.double(), expected, rtol=0, atol=4e-6)


def test_mma_with_half_sums() -> None:
    torch.manual_seed(0)
    A, B, C = torch.randn(16, 16).half(), torch.randn(8, 16).half(), torch.randn(16, 8).half()
    expected = (A.float() @ B.float().T + C.float()).half()
    emulate(TEXT, "half_sums_kernel")(A, B, C, grid=(1,), block=(32,))
    torch.testing.assert_close(C, expected, rtol=2**-10, atol=0)


def test_asynchronous_copies() -> None:
    x, y = torch.arange(1.0, 65), torch.zeros(18)
    emulate(TEXT, "copies_kernel")(x, y, grid=(1,), block=(1,))
    assert y[:9].isnan().all()
    assert y[9:].tolist() == [1, 2, 3, 4, 5, 0, 7, 0, 64]


def test_static_shared_and_shuffle() -> None:
    @T.prim_func
    def reverse(X: T.Buffer((64,), "float32"), Y: T.Buffer((64,), "float32"), count: T.Buffer((1,), "int32")):
        T.device_entry()
        T.cta_id([1])
        tid = T.thread_id([64])
        shared = T.alloc_shared((64,), "float32")
        shared[tid] = X[tid]
        T.cuda.cta_sync()
        Y[tid] = T.cuda.warp_sum(shared[63 - tid]) + shared[63 - tid]
        T.cuda.atomic_add(T.address_of(count[0]), tid)

    X, Y, count = torch.randn(64), torch.zeros(64), torch.zeros(1, dtype=torch.int32)
    emulate(cuda_text(reverse=reverse), "reverse_kernel")(X, Y, count, grid=(1,), block=(64,))
    expected = X.flip(0) + X.flip(0).view(2, 32).sum(1).repeat_interleave(32)
    torch.testing.assert_close(Y, expected)
    assert count.item() == 64 * 63 // 2


# --- kernels written here -----------------------------------------------------------------------------------

TEXT = r"""
#include <cuda_fp16.h>
extern "C" __global__ void previous_kernel(const float* __restrict__ x, float* __restrict__ y) {
  __shared__ float values[64];
  values[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = threadIdx.x ? values[threadIdx.x - 1] : 0.0f;
}
extern "C" __global__ void __launch_bounds__(32) scalars_kernel(
    double* y, int a, unsigned int b, long long c, float d) {
  y[0] = a;
  y[1] = b;
  y[2] = (double)(c + ((int64_t)a << 33));
  y[3] = d;
}
extern "C" __global__ void shuffles_kernel(int* y) {
  int lane = threadIdx.x, width = blockDim.y == 1 ? 8 : 32;
  y[lane] = __shfl_sync(0xffffffff, lane, 3, width);
  y[lane + 32] = __shfl_up_sync(0xffffffff, lane, 2, width);
  y[lane + 64] = __shfl_down_sync(0xffffffff, lane, 3, width);
  y[lane + 96] = __shfl_xor_sync(0xffffffff, lane, 5, width);
}
extern "C" __global__ void matrices_kernel(uint4* x, uint4* y, uint4* z) {
  __shared__ alignas(128) half matrix[32 * 8];
  ((uint4*)matrix)[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  unsigned address = __cvta_generic_to_shared(matrix + threadIdx.x * 8), r[4], s[4];
  __asm__ __volatile__("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"
    "{%0, %1, %2, %3}, [%4];\n" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
  for (int i = 0; i < 4; ++i) asm("add.f16x2 %0, %1, %2;" : "=r"(s[i]) : "r"(r[i]), "r"(r[i]));
  for (int i = 0; i < 4; ++i) asm("fma.rn.f16x2 %0, %1, %2, %1;" : "=r"(s[i]) : "r"(r[i]), "r"(s[i]));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
    :: "r"(address), "r"(s[0]), "r"(s[1]), "r"(s[2]), "r"(s[3]) : "memory");
  __syncwarp();
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
    : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %5, 0; @p st.global.v4.b32 [%0], {%1, %2, %3, %4}; }"
    :: "l"(y + threadIdx.x), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "r"(threadIdx.x < 24));
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
    : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "l"(x + threadIdx.x));
  z[threadIdx.x] = make_uint4(r[0], r[1], r[2], r[3]);
}
// Warp 0 copies rows of 32 floats into two stages, guarded by mbarriers; warps 1 and 2 add them up.
extern "C" __global__ void pipeline_kernel(const float* x, float* y, int rows) {
  extern __shared__ __align__(16) float stages[];
  __shared__ uint64_t full[2];
  __shared__ uint64_t empty[2];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto address = [](void* p) { return (unsigned)__cvta_generic_to_shared(p); };
  auto wait = [](unsigned barrier, int parity) {
    asm volatile("{\n.reg .pred P1;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 P1, [%0], %1;\n"
      "@P1 bra.uni DONE;\nbra.uni WAIT;\nDONE:\n}\n" :: "r"(barrier), "r"(parity) : "memory");
  };
  if (threadIdx.x < 2) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(address(full + lane)), "r"(32));
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(address(empty + lane)), "r"(64));
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (warp == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    for (int row = 0; row < rows; ++row) {
      wait(address(empty + row % 2), row / 2 % 2 ^ 1);
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
        :: "r"(address(stages + row % 2 * 32 + lane)), "l"(x + row * 32 + lane), "n"(4));
      asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" :: "r"(address(full + row % 2)));
    }
  } else {
    float sum = 0;
    for (int row = 0; row < rows; ++row) {
      wait(address(full + row % 2), row / 2 % 2);
      sum += stages[row % 2 * 32 + 31 - lane];
      asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(address(empty + row % 2)) : "memory");
    }
    asm volatile("bar.sync %0, %1;" :: "r"(1), "r"(64) : "memory");
    atomicAdd(y + lane, sum);
  }
}
extern "C" __global__ void half_sums_kernel(const unsigned* a, const unsigned* b, unsigned* c) {
  int t = threadIdx.x % 4;
  a += threadIdx.x / 4 * 8 + t;
  b += threadIdx.x / 4 * 8 + t;
  c += threadIdx.x / 4 * 4 + t;
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 "
    "{%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
    : "+r"(c[0]), "+r"(c[32]) : "r"(a[0]), "r"(a[64]), "r"(a[4]), "r"(a[68]), "r"(b[0]), "r"(b[4]));
}
extern "C" __global__ void copies_kernel(const float* x, float* y) {
  __shared__ alignas(16) float values[8];
  __shared__ alignas(16) float more[64];
  __shared__ uint64_t barrier;
  unsigned address = __cvta_generic_to_shared(values), size = 4, count = 256, complete;
  unsigned more_address = __cvta_generic_to_shared(more);
  unsigned barrier_address = __cvta_generic_to_shared(&barrier);
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(barrier_address));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier_address), "r"(count));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
    :: "r"(more_address), "l"(x), "r"(count), "r"(barrier_address));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" :: "r"(address), "l"(x));
  asm volatile("cp.async.ca.shared.global [%0 + 16], [%1 + 16], 8, %2;" :: "r"(address), "l"(x), "r"(size));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(address + 24), "l"(x + 6));
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; cp.async.ca.shared.global [%0], [%1], 4, p; }"
    :: "r"(address + 28), "l"(x + 7), "r"(1));
  for (int i = 0; i < 8; ++i) y[i] = values[i];
  y[8] = more[63];
  asm volatile("cp.async.wait_all;" ::: "memory");
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.b32 %0, 1, 0, p; }"
    : "=r"(complete) : "r"(barrier_address));
  for (int i = 0; i < 8; ++i) y[9 + i] = values[i];
  y[17] = more[63] * complete;
}
extern "C" __global__ void cvt_kernel(const float* x, unsigned* y, __nv_bfloat16* z, __half* h) {
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y[threadIdx.x]) : "f"(x[threadIdx.x]));
  z[threadIdx.x] = __float2bfloat16(x[threadIdx.x]);
  h[threadIdx.x] = __float2half_rn(x[threadIdx.x]);
}
"""


@pytest.mark.parametrize("order", ORDERS)
def test_barrier_matters_in_reverse_order(order: str) -> None:
    x = torch.randn(64)
    expected = torch.cat((torch.zeros(1), x[:-1]))
    for text, right in ((TEXT, True), (TEXT.replace("__syncthreads();", ""), order == "forward")):
        y = torch.zeros(64)
        emulate(text, "previous_kernel", order=order)(x, y, grid=(1,), block=(64,))
        assert torch.equal(y, expected) == right


def test_scalar_arguments() -> None:
    y = torch.zeros(4, dtype=torch.float64)
    kernel = emulate(TEXT, "scalars_kernel")
    kernel(y, -3, 2**32 - 1, 2**40 + 1, 0.1, grid=(1,), block=(1,))
    assert y.tolist() == [-3, 2**32 - 1, 2**40 + 1 - 3 * 2**33, torch.tensor(0.1).item()]
    with pytest.raises(OverflowError, match="a"):
        kernel(y, 2**31, 0, 0, 0.0, grid=(1,), block=(1,))
    with pytest.raises(TypeError, match="takes"):
        kernel(y, grid=(1,), block=(1,))


@pytest.mark.parametrize("width", [8, 32])
def test_shuffles(width: int) -> None:
    y = torch.zeros(4, 32, dtype=torch.int32)
    lane = torch.arange(32)
    first = lane - lane % width
    # blockDim.y selects the width; the second row of threads is a second warp that writes the same.
    emulate(TEXT, "shuffles_kernel")(y, grid=(1,), block=(32, 1 if width == 8 else 2))
    assert torch.equal(y[0].long(), first + 3)
    assert torch.equal(y[1].long(), torch.where(lane % width >= 2, lane - 2, lane))
    assert torch.equal(y[2].long(), torch.where(lane % width + 3 < width, lane + 3, lane))
    assert torch.equal(y[3].long(), lane ^ 5)


def test_matrices_and_packed_halves() -> None:
    x = torch.randn(4, 8, 8).half()
    y, z = torch.zeros_like(x), torch.zeros_like(x)
    emulate(TEXT, "matrices_kernel")(x, y, z, grid=(1,), block=(32,))
    transposed = x.transpose(1, 2).float()
    expected = (transposed * (2 * transposed) + transposed).half()
    assert torch.equal(y[:3], expected[:3])
    assert not y[3].any()
    assert torch.equal(z, x)


@pytest.mark.parametrize("order", ORDERS)
def test_mbarrier_pipeline(order: str) -> None:
    x, y = torch.randn(7, 32), torch.zeros(32)
    kernel = emulate(TEXT, "pipeline_kernel", order=order)
    kernel(x, y, 7, grid=(1,), block=(96,), dynamic_shared_bytes=256)
    torch.testing.assert_close(y, 2 * x.sum(0).flip(0))


def test_conversions() -> None:
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 65519.0, 65520.0, 1e-7])
    x = torch.cat((torch.randn(24), special))
    tf32, bf16, half = torch.zeros(32), torch.zeros(32).bfloat16(), torch.zeros(32).half()
    emulate(TEXT, "cvt_kernel")(x, tf32, bf16, half, grid=(1,), block=(32,))
    for got, expected in ((bf16, x.bfloat16()), (half, x.half())):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert not (tf32[:24].view(torch.int32) & 0x1FFF).any()
    torch.testing.assert_close(tf32, x, rtol=2**-11, atol=0, equal_nan=True)


KERNEL = r'extern "C" __global__ void bad_kernel(float* x) {{ __shared__ float s[64]; {body} }}'
STORE = r'asm volatile("st.shared.b32 [%0], %1;" :: "r"(address), "f"(0.f));'


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (threadIdx.x) __syncthreads();", "deadlock, 63 of 64 threads wait, this one at: barrier"),
        ("x[64 + threadIdx.x] = 0;", "wrote outside of x"),
        ("s[threadIdx.x + 1] = 0;", "shared memory beyond the 256 bytes"),
        ("unsigned address = 256;" + STORE, "st: shared address 256"),
        ("unsigned address = 2;" + STORE, "not a multiple of 4"),
        ("*(float4*)(x + threadIdx.x) = {};", "misaligned"),
        ("if (threadIdx.x % 2) __syncwarp(); else __shfl_sync(~0u, 0, 0);", "diverged"),
    ],
)
def test_faulty_kernels_are_reported(body: str, message: str) -> None:
    kernel = emulate(KERNEL.format(body=body), "bad_kernel")
    with pytest.raises(RuntimeError, match=message):
        kernel(torch.zeros(64), grid=(1,), block=(64,))


def test_shared_memory_is_poisoned() -> None:
    x = torch.zeros(64)
    emulate(KERNEL.format(body="x[threadIdx.x] = s[threadIdx.x]; s[0] = 0;"), "bad_kernel")(
        x, grid=(2,), block=(64,)
    )
    assert x.isnan().all()


def test_unknown_instructions_and_names() -> None:
    unknown = KERNEL.format(body='asm volatile("wgmma.fence.sync.aligned;" ::: "memory");')
    with pytest.raises(NotImplementedError, match=r"wgmma\.fence\.sync\.aligned"):
        emulate(unknown, "bad_kernel")
    with pytest.raises(ValueError, match="bad_kernel"):
        emulate(KERNEL.format(body=""), "good_kernel")
