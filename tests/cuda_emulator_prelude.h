// Run-time half of the CUDA emulator (see cuda_emulator.py): everything that the translated text of a kernel
// needs to compile with g++ and to run on an x86-64 CPU.
//
// Threads. Every CUDA thread of a block is a fiber with its own stack. Blocks run one after another; within a
// block a warp runs until all its threads wait for other warps, then the next warp runs. Running warps, lanes
// and blocks in descending instead of ascending order shows most missing barriers.
//
// Shared memory. One arena, filled with 0xff bytes (NaN in every floating-point format) before each block; a
// "shared address" is an offset into it.
//
// Asynchronous copies. They write as late as the program allows: cp.async when its group is waited for,
// copies tied to an mbarrier when no thread can run without them. Until then their destination holds 0xff
// bytes.
//
// Instructions of a whole warp (mma, ldmatrix, shuffles). They take effect when the last lane arrives.

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __restrict__
#define __align__(bytes) alignas(bytes)
#define __CUDA_ARCH__ 900
#define __CUDACC_VER_MAJOR__ 12
#define __CUDACC_VER_MINOR__ 4
#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")
// glibc declares these names itself.
#define __expf expf
#define __exp2f exp2f
#define __logf logf
#define __log2f log2f
#define __powf powf
#define __sinf sinf
#define __cosf cosf

// ----------------------------------------------------------------------------------------------------------
// 16-bit floating-point types
// ----------------------------------------------------------------------------------------------------------

namespace emulator {

struct HalfFormat {
  typedef short Shorts __attribute__((vector_size(16)));
  typedef float Floats __attribute__((vector_size(16)));
  static float decode(uint16_t bits) { return __builtin_ia32_vcvtph2ps(Shorts{(short)bits})[0]; }
  static uint16_t encode(float value) { return __builtin_ia32_vcvtps2ph(Floats{value}, 0)[0]; }
};

template <class To, class From> To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between types of different sizes");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

struct BFloat16Format {
  static float decode(uint16_t bits) { return bit_cast<float>((uint32_t)bits << 16); }
  static uint16_t encode(float value) {
    uint32_t bits = bit_cast<uint32_t>(value);
    if (value != value) return bits >> 16 | 0x40;  // a quiet NaN, whichever payload bits are lost
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
};

// A 16-bit number: arithmetic between two of them rounds every result, mixed arithmetic happens in float.
template <class Format> struct SmallFloat {
  uint16_t bits;
  SmallFloat() = default;
  SmallFloat(float value) : bits(Format::encode(value)) {}
  template <class Number, class = std::enable_if_t<std::is_arithmetic<Number>::value>>
  SmallFloat(Number value) : SmallFloat((float)value) {}
  operator float() const { return Format::decode(bits); }
  template <class Other> SmallFloat& operator+=(Other other) {
    return *this = SmallFloat((float)*this + (float)other);
  }
  template <class Other> SmallFloat& operator-=(Other other) {
    return *this = SmallFloat((float)*this - (float)other);
  }
  template <class Other> SmallFloat& operator*=(Other other) {
    return *this = SmallFloat((float)*this * (float)other);
  }
  template <class Other> SmallFloat& operator/=(Other other) {
    return *this = SmallFloat((float)*this / (float)other);
  }
};

template <class Number> struct alignas(2 * sizeof(Number)) Vector2 {
  Number x, y;
  Vector2() = default;
  Vector2(Number x, Number y) : x(x), y(y) {}
};

}  // namespace emulator

typedef emulator::SmallFloat<emulator::HalfFormat> half;
typedef emulator::SmallFloat<emulator::BFloat16Format> nv_bfloat16;
typedef half __half;
typedef nv_bfloat16 __nv_bfloat16;
typedef emulator::Vector2<half> half2;
typedef emulator::Vector2<nv_bfloat16> nv_bfloat162;
typedef half2 __half2;
typedef nv_bfloat162 __nv_bfloat162;

// Templates on the format: they never take part in mixed expressions such as half + float.
template <class F> emulator::SmallFloat<F> operator+(emulator::SmallFloat<F> a, emulator::SmallFloat<F> b) {
  return (float)a + (float)b;
}
template <class F> emulator::SmallFloat<F> operator-(emulator::SmallFloat<F> a, emulator::SmallFloat<F> b) {
  return (float)a - (float)b;
}
template <class F> emulator::SmallFloat<F> operator*(emulator::SmallFloat<F> a, emulator::SmallFloat<F> b) {
  return (float)a * (float)b;
}
template <class F> emulator::SmallFloat<F> operator/(emulator::SmallFloat<F> a, emulator::SmallFloat<F> b) {
  return (float)a / (float)b;
}
template <class F> emulator::SmallFloat<F> operator-(emulator::SmallFloat<F> a) { return -(float)a; }

// A float product of two 16-bit numbers is exact, so this rounds twice only in the rarest of cases.
template <class F>
emulator::SmallFloat<F> __hfma(emulator::SmallFloat<F> a, emulator::SmallFloat<F> b,
                               emulator::SmallFloat<F> c) {
  return fmaf(a, b, c);
}
template <class Number> Number __hadd(Number a, Number b) { return a + b; }
template <class Number> Number __hsub(Number a, Number b) { return a - b; }
template <class Number> Number __hmul(Number a, Number b) { return a * b; }
template <class Number> Number __hdiv(Number a, Number b) { return a / b; }
template <class Number> Number __hneg(Number a) { return -a; }
template <class Number> Number __habs(Number a) { return Number(fabsf(a)); }
template <class Number> Number __hmax(Number a, Number b) { return Number(fmaxf(a, b)); }
template <class Number> Number __hmin(Number a, Number b) { return Number(fminf(a, b)); }
template <class Number> bool __hgt(Number a, Number b) { return (float)a > (float)b; }
template <class Number> bool __hge(Number a, Number b) { return (float)a >= (float)b; }
template <class Number> bool __hlt(Number a, Number b) { return (float)a < (float)b; }
template <class Number> bool __hle(Number a, Number b) { return (float)a <= (float)b; }
template <class Number> bool __heq(Number a, Number b) { return (float)a == (float)b; }
template <class Number> bool __hne(Number a, Number b) { return (float)a != (float)b; }
template <class Number> bool __hisnan(Number a) { return a != a; }
template <class Number> Number hexp(Number a) { return Number(expf(a)); }
template <class Number> Number hlog(Number a) { return Number(logf(a)); }
template <class Number> Number hsqrt(Number a) { return Number(sqrtf(a)); }
template <class Number> Number hrsqrt(Number a) { return Number(1.0f / sqrtf(a)); }
template <class Number> Number hrcp(Number a) { return Number(1.0f / (float)a); }
template <class Number> Number hfloor(Number a) { return Number(floorf(a)); }
template <class Number> Number hceil(Number a) { return Number(ceilf(a)); }
template <class Number> Number hrint(Number a) { return Number(rintf(a)); }

typedef emulator::Vector2<float> float2;
static inline half __float2half(float a) { return a; }
static inline half __float2half_rn(float a) { return a; }
static inline float __half2float(half a) { return a; }
static inline nv_bfloat16 __float2bfloat16(float a) { return a; }
static inline nv_bfloat16 __float2bfloat16_rn(float a) { return a; }
static inline float __bfloat162float(nv_bfloat16 a) { return a; }
static inline half2 make_half2(half x, half y) { return {x, y}; }
static inline half2 __halves2half2(half x, half y) { return {x, y}; }
static inline half2 __half2half2(half a) { return {a, a}; }
static inline half2 __float2half2_rn(float a) { return {half(a), half(a)}; }
static inline half2 __floats2half2_rn(float x, float y) { return {half(x), half(y)}; }
static inline half2 __float22half2_rn(float2 a) { return {half(a.x), half(a.y)}; }
static inline float2 __half22float2(half2 a) { return {a.x, a.y}; }
static inline nv_bfloat162 make_bfloat162(nv_bfloat16 x, nv_bfloat16 y) { return {x, y}; }
static inline nv_bfloat162 __halves2bfloat162(nv_bfloat16 x, nv_bfloat16 y) { return {x, y}; }
static inline nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {nv_bfloat16(x), nv_bfloat16(y)};
}
static inline float2 __bfloat1622float2(nv_bfloat162 a) { return {a.x, a.y}; }
template <class N> N __low2half(emulator::Vector2<N> a) { return a.x; }
template <class N> N __high2half(emulator::Vector2<N> a) { return a.y; }
template <class N> float __low2float(emulator::Vector2<N> a) { return a.x; }
template <class N> float __high2float(emulator::Vector2<N> a) { return a.y; }

#define EMULATOR_VECTOR2_FUNCTION(name)                                                             \
  template <class N> emulator::Vector2<N> name##2(emulator::Vector2<N> a, emulator::Vector2<N> b) { \
    return {name(a.x, b.x), name(a.y, b.y)};                                                        \
  }
EMULATOR_VECTOR2_FUNCTION(__hadd)
EMULATOR_VECTOR2_FUNCTION(__hsub)
EMULATOR_VECTOR2_FUNCTION(__hmul)
EMULATOR_VECTOR2_FUNCTION(__hmax)
EMULATOR_VECTOR2_FUNCTION(__hmin)
template <class N>
emulator::Vector2<N> __hfma2(emulator::Vector2<N> a, emulator::Vector2<N> b, emulator::Vector2<N> c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}

// ----------------------------------------------------------------------------------------------------------
// CUDA's built-in vector types and scalar functions
// ----------------------------------------------------------------------------------------------------------

#define EMULATOR_VECTOR_TYPES(name, scalar)                                                    \
  struct name##1 { scalar x; };                                                                \
  typedef emulator::Vector2<scalar> name##2;                                                   \
  struct name##3 { scalar x, y, z; };                                                          \
  struct alignas(sizeof(scalar) > 4 ? 16 : 4 * sizeof(scalar)) name##4 { scalar x, y, z, w; }; \
  static inline name##1 make_##name##1(scalar x) { return {x}; }                               \
  static inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                  \
  static inline name##3 make_##name##3(scalar x, scalar y, scalar z) { return {x, y, z}; }     \
  static inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
EMULATOR_VECTOR_TYPES(char, signed char)
EMULATOR_VECTOR_TYPES(uchar, unsigned char)
EMULATOR_VECTOR_TYPES(short, short)
EMULATOR_VECTOR_TYPES(ushort, unsigned short)
EMULATOR_VECTOR_TYPES(int, int)
EMULATOR_VECTOR_TYPES(uint, unsigned int)
EMULATOR_VECTOR_TYPES(longlong, long long)
EMULATOR_VECTOR_TYPES(ulonglong, unsigned long long)
EMULATOR_VECTOR_TYPES(float, float)
EMULATOR_VECTOR_TYPES(double, double)

typedef uint3 dim3;
static uint3 threadIdx, blockIdx, blockDim, gridDim;
static const int warpSize = 32;

// As in CUDA, a NaN loses against a number.
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline float min(float a, float b) { return fminf(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
template <class A, class B,
          class = std::enable_if_t<std::is_integral<A>::value && std::is_integral<B>::value>>
std::common_type_t<A, B> max(A a, B b) {
  typedef std::common_type_t<A, B> Common;
  return (Common)a > (Common)b ? a : b;
}
template <class A, class B,
          class = std::enable_if_t<std::is_integral<A>::value && std::is_integral<B>::value>>
std::common_type_t<A, B> min(A a, B b) {
  typedef std::common_type_t<A, B> Common;
  return (Common)a < (Common)b ? a : b;
}
template <class Value> Value __ldg(const Value* address) { return *address; }
static inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline int __float_as_int(float a) { return emulator::bit_cast<int>(a); }
static inline unsigned __float_as_uint(float a) { return emulator::bit_cast<unsigned>(a); }
static inline float __int_as_float(int a) { return emulator::bit_cast<float>(a); }
static inline float __uint_as_float(unsigned a) { return emulator::bit_cast<float>(a); }
static inline int __popc(unsigned a) { return __builtin_popcount(a); }
static inline int __clz(int a) { return a ? __builtin_clz(a) : 32; }
static inline int __ffs(int a) { return __builtin_ffs(a); }
static inline int __mulhi(int a, int b) { return (long long)a * b >> 32; }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __nanosleep(unsigned) {}

// Threads are switched only where they wait, so a plain read-modify-write is atomic.
template <class Value, class Operand> Value atomicAdd(Value* address, Operand value) {
  Value old = *address;
  *address = old + (Value)value;
  return old;
}
template <class Value, class Operand> Value atomicMax(Value* address, Operand value) {
  Value old = *address;
  *address = max(old, (Value)value);
  return old;
}
template <class Value, class Operand> Value atomicMin(Value* address, Operand value) {
  Value old = *address;
  *address = min(old, (Value)value);
  return old;
}
template <class Value, class Operand> Value atomicExch(Value* address, Operand value) {
  Value old = *address;
  *address = (Value)value;
  return old;
}
template <class Value, class Operand> Value atomicCAS(Value* address, Operand expected, Operand value) {
  Value old = *address;
  if (old == (Value)expected) *address = (Value)value;
  return old;
}

// ----------------------------------------------------------------------------------------------------------
// Fibers
// ----------------------------------------------------------------------------------------------------------

// Pushes the callee-saved registers, stores the stack pointer in *save and continues on the stack `load`.
extern "C" __attribute__((visibility("hidden"))) void emulator_switch_stack(void** save, void* load);
asm(R"(
    .text
    .hidden emulator_switch_stack
    .globl emulator_switch_stack
    .type emulator_switch_stack, @function
emulator_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulator_switch_stack, .-emulator_switch_stack
)");

namespace emulator {

constexpr uint32_t max_threads = 1024, lanes = 32, max_warps = max_threads / lanes;
constexpr size_t stack_bytes = 256 * 1024;
constexpr uint32_t all_lanes = 0xffffffff;

// What a fiber waits for: that some of the bits of a word change.
struct Wait {
  const char* reason;
  const uint32_t* word;
  uint32_t mask, value;
  bool is_over() const { return !word || (*word & mask) != value; }
};

struct AsyncCopy {
  uint32_t destination;
  const char* source;
  uint32_t bytes, source_bytes;  // the rest of the destination is filled with zeros
  uint32_t group;
};

struct Fiber {
  void* stack_pointer;
  uint3 index;
  bool finished;
  Wait wait;
  uint32_t open_group;            // number of cp.async groups committed so far
  std::vector<AsyncCopy> copies;  // not yet visible
};

static Fiber fibers[max_threads];
static char* stacks;
static void* scheduler_stack_pointer;
static uint32_t thread_count, current;  // current: index of the fiber that runs, or ran last
static bool in_fiber;
static void (*kernel_body)(void**);
static void** kernel_arguments;
static char failure[512];  // the first error; empty while there is none

static inline uint32_t current_warp() { return current / lanes; }
static inline uint32_t current_lane() { return current % lanes; }
static inline void leave_fiber() {
  emulator_switch_stack(&fibers[current].stack_pointer, scheduler_stack_pointer);
}

struct Failure {};  // thrown to launch()

// Reports an error of the kernel. A fiber that fails never runs again.
[[noreturn]] static void fail(const char* format, ...) {
  int length = snprintf(failure, sizeof failure, "block (%u, %u, %u) thread (%u, %u, %u): ", blockIdx.x,
                        blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
  va_list values;
  va_start(values, format);
  vsnprintf(failure + length, sizeof failure - length, format, values);
  va_end(values);
  while (in_fiber) leave_fiber();
  throw Failure();
}

// Suspends the fiber until one of the masked bits of *word differs from its present value.
static inline void wait_for_change(const char* reason, const uint32_t* word, uint32_t mask = ~0u) {
  fibers[current].wait = {reason, word, mask, *word & mask};
  leave_fiber();
}

static void fiber_main() {
  kernel_body(kernel_arguments);
  fibers[current].finished = true;
  leave_fiber();
}

}  // namespace emulator

// Called by code that -fsanitize=alignment adds to each memory access.
extern "C" __attribute__((visibility("hidden"), used)) void __ubsan_handle_type_mismatch_v1_abort(
    void*, void* address) {
  emulator::fail("misaligned access at address %p", address);
}

namespace emulator {

// ----------------------------------------------------------------------------------------------------------
// Shared memory and asynchronous copies
// ----------------------------------------------------------------------------------------------------------

constexpr uint32_t arena_bytes = 256 * 1024, max_static_shared_bytes = 48 * 1024,
                   max_shared_bytes = 227 * 1024;
constexpr uint32_t dynamic_alignment = 1024;
alignas(1024) static char arena[arena_bytes];
static uint32_t dynamic_offset, shared_limit;

static inline char* dynamic_shared() { return arena + dynamic_offset; }

// A register of an address expression: PTX counts bytes, whatever a pointer points to.
template <class Register> auto byte_address(Register value) {
  if constexpr (std::is_pointer<Register>::value)
    return (uintptr_t)value;
  else
    return value;
}

struct SharedSpace {
  static char* at(uint32_t address, uint32_t bytes, const char* user) {
    if (address > shared_limit || bytes > shared_limit - address)
      fail("%s: shared address %u + %u bytes is beyond the %u bytes in use", user, address, bytes,
           shared_limit);
    if (address % bytes) fail("%s: shared address %u is not a multiple of %u", user, address, bytes);
    return arena + address;
  }
};

struct GlobalSpace {
  template <class Address> static char* at(Address address, uint32_t bytes, const char* user) {
    if ((uintptr_t)address % bytes)
      fail("%s: global address %p is not a multiple of %u", user, (void*)address, bytes);
    return (char*)address;
  }
};

static inline void finish_copy(const AsyncCopy& copy) {
  char* destination = arena + copy.destination;
  memcpy(destination, copy.source, copy.source_bytes);
  memset(destination + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
}

// The last operand of cp.async is a number of bytes or (a PTX predicate) whether to ignore the source.
template <class Address, class Last>
void cp_async(uint32_t destination, Address source, uint32_t bytes, Last last) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async of %u bytes", bytes);
  uint32_t source_bytes = std::is_same<Last, bool>::value ? (last ? 0 : bytes) : (uint32_t)last;
  if (source_bytes > bytes) fail("cp.async reads %u bytes for %u", source_bytes, bytes);
  memset(SharedSpace::at(destination, bytes, "cp.async"), 0xff, bytes);
  const char* checked_source = GlobalSpace::at(source, bytes, "cp.async");
  Fiber& fiber = fibers[current];
  fiber.copies.push_back({destination, checked_source, bytes, source_bytes, fiber.open_group});
}
template <class Address> void cp_async(uint32_t destination, Address source, uint32_t bytes) {
  cp_async(destination, source, bytes, bytes);
}

static inline void cp_async_commit_group() { ++fibers[current].open_group; }

// Finishes all committed groups but the newest `allowed` ones.
static inline void cp_async_wait_group(uint32_t allowed) {
  Fiber& fiber = fibers[current];
  size_t kept = 0;
  for (const AsyncCopy& copy : fiber.copies) {
    if (copy.group + allowed < fiber.open_group)
      finish_copy(copy);
    else
      fiber.copies[kept++] = copy;
  }
  fiber.copies.resize(kept);
}

static inline void cp_async_wait_all() {
  cp_async_commit_group();
  cp_async_wait_group(0);
}

// ----------------------------------------------------------------------------------------------------------
// Barriers
// ----------------------------------------------------------------------------------------------------------

struct NamedBarrier {
  uint32_t arrived, expected, phase;
};
static NamedBarrier named_barriers[16];

static inline void bar_arrive(uint32_t id, uint32_t count) {
  if (id >= 16) fail("barrier %u does not exist", id);
  NamedBarrier& barrier = named_barriers[id];
  if (barrier.arrived == 0) barrier.expected = count;
  if (barrier.expected != count)
    fail("barrier %u: some threads expect %u, some %u", id, barrier.expected, count);
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.phase;
  }
}
static inline void bar_sync(uint32_t id, uint32_t count) {
  uint32_t phase = named_barriers[id % 16].phase;
  bar_arrive(id, count);
  if (named_barriers[id].phase == phase) wait_for_change("barrier", &named_barriers[id].phase);
}
static inline void bar_sync(uint32_t id) { bar_sync(id, thread_count); }

// The 64 bits of an mbarrier in shared memory (the hardware's layout is opaque, too).
struct MBarrier {
  uint16_t expected, pending;
  uint32_t phase : 1;
  int32_t transaction_bytes : 31;
};
static_assert(sizeof(MBarrier) == 8, "an mbarrier object has 64 bits");

// Copies whose end an mbarrier counts: `arrivals` and `bytes` are what it then receives.
struct TrackedCopies {
  std::vector<AsyncCopy> copies;
  uint32_t mbarrier, arrivals, bytes;
};
static std::vector<TrackedCopies> tracked_copies;

static inline MBarrier& mbarrier_at(uint32_t address) {
  MBarrier& barrier = *(MBarrier*)SharedSpace::at(address, 8, "mbarrier");
  if (barrier.expected == 0xffff || barrier.expected == 0) fail("mbarrier at %u is not initialised", address);
  return barrier;
}
static inline void mbarrier_init(uint32_t address, uint32_t count) {
  if (count == 0 || count >= 0xffff) fail("mbarrier.init: count %u", count);
  *(MBarrier*)SharedSpace::at(address, 8, "mbarrier.init") = {(uint16_t)count, (uint16_t)count, 0, 0};
}
static inline void mbarrier_update(uint32_t address, uint32_t arrivals, int32_t transaction_bytes) {
  MBarrier& barrier = mbarrier_at(address);
  if (arrivals > barrier.pending) fail("mbarrier at %u: more arrivals than expected", address);
  barrier.pending -= arrivals;
  barrier.transaction_bytes += transaction_bytes;
  if (barrier.pending == 0 && barrier.transaction_bytes == 0) {
    barrier.phase ^= 1;
    barrier.pending = barrier.expected;
  }
}
template <class State> void mbarrier_arrive(uint32_t address, State&& state, uint32_t count = 1) {
  state = mbarrier_at(address).phase;
  mbarrier_update(address, count, 0);
}
template <class State> void mbarrier_arrive_expect_tx(uint32_t address, State&& state, uint32_t bytes) {
  state = mbarrier_at(address).phase;
  mbarrier_at(address).transaction_bytes += bytes;
  mbarrier_update(address, 1, 0);
}
static inline void mbarrier_expect_tx(uint32_t address, uint32_t bytes) {
  mbarrier_at(address).transaction_bytes += bytes;
}
static inline void mbarrier_complete_tx(uint32_t address, uint32_t bytes) {
  mbarrier_update(address, 0, -(int32_t)bytes);
}

// try_wait may suspend the thread; here it does so until the phase is complete.
template <class Predicate>
void mbarrier_try_wait(uint32_t address, Predicate& complete, uint32_t parity, uint32_t time_limit = 0) {
  const MBarrier& barrier = mbarrier_at(address);
  if (barrier.phase == (parity & 1)) wait_for_change("mbarrier", (const uint32_t*)&barrier + 1, 1);
  complete = true;
}

// The fiber's copies so far become visible, then arrive at the mbarrier.
static inline void cp_async_mbarrier_arrive_noinc(uint32_t address) {
  mbarrier_at(address);
  tracked_copies.push_back({fibers[current].copies, address, 1, 0});
  fibers[current].copies.clear();
}
static inline void cp_async_mbarrier_arrive(uint32_t address) {
  ++mbarrier_at(address).pending;
  cp_async_mbarrier_arrive_noinc(address);
}
template <class Address>
void cp_async_bulk(uint32_t destination, Address source, uint32_t mbarrier, uint32_t bytes) {
  if (bytes % 16) fail("cp.async.bulk of %u bytes", bytes);
  SharedSpace::at(destination, 16, "cp.async.bulk");
  if (bytes > shared_limit - destination) fail("cp.async.bulk writes beyond shared memory");
  const char* checked_source = GlobalSpace::at(source, 16, "cp.async.bulk");
  memset(arena + destination, 0xff, bytes);
  tracked_copies.push_back({{{destination, checked_source, bytes, bytes, 0}}, mbarrier, 0, bytes});
}

// Ends the oldest tracked copies; false if there are none.
static bool finish_tracked_copies() {
  if (tracked_copies.empty()) return false;
  TrackedCopies oldest = tracked_copies.front();
  tracked_copies.erase(tracked_copies.begin());
  for (const AsyncCopy& copy : oldest.copies) finish_copy(copy);
  mbarrier_update(oldest.mbarrier, oldest.arrivals, -(int32_t)oldest.bytes);
  return true;
}

// ----------------------------------------------------------------------------------------------------------
// Instructions that the lanes of a warp execute together
// ----------------------------------------------------------------------------------------------------------

struct Collective {
  const char* name;
  uint32_t mask, arrived, phase;
  uint32_t input[lanes][10], output[lanes][4];
};
constexpr uint32_t max_masks = 8;  // different lane masks used by one warp in one block
static Collective collectives[max_warps][max_masks];

static inline Collective& find_collective(const char* name, uint32_t mask) {
  uint32_t warp_threads = thread_count - current_warp() * lanes;
  if (warp_threads < lanes) mask &= (1u << warp_threads) - 1;
  if (!(mask >> current_lane() & 1)) fail("%s: lane %u is not in its mask 0x%x", name, current_lane(), mask);
  for (Collective& collective : collectives[current_warp()]) {
    if (collective.mask == 0) collective.mask = mask;
    if (collective.mask == mask) return collective;
  }
  fail("%s: more than %u lane masks", name, max_masks);
}

// Hands `inputs` over, waits for the other lanes in `mask`; the last one computes all lanes' outputs by
// execute(collective). Returns this lane's outputs, valid until the lane's next collective.
template <class Execute>
const uint32_t* run_collective(const char* name, uint32_t mask, std::initializer_list<uint32_t> inputs,
                               Execute execute) {
  Collective& collective = find_collective(name, mask);
  if (collective.arrived == 0) collective.name = name;
  if (collective.name != name && strcmp(collective.name, name))
    fail("lanes of a warp diverged: %s and %s", collective.name, name);
  uint32_t* input = collective.input[current_lane()];
  for (uint32_t value : inputs) *input++ = value;
  if (++collective.arrived == (uint32_t)__builtin_popcount(collective.mask)) {
    collective.arrived = 0;
    execute(collective);
    ++collective.phase;
  } else {
    wait_for_change(name, &collective.phase);
  }
  return collective.output[current_lane()];
}

static inline void sync_warp(uint32_t mask) {
  run_collective("__syncwarp", mask, {}, [](Collective&) {});
}

// The modes of shfl.sync; returns the lane to read, which is `lane` itself when out of range.
enum class Shuffle { up, down, butterfly, indexed };
static inline uint32_t shuffle_source(Shuffle mode, uint32_t lane, uint32_t b, uint32_t c, bool& in_range) {
  uint32_t segment_mask = c >> 8 & 31, clamp = c & 31;
  uint32_t first = lane & segment_mask, last = first | (clamp & ~segment_mask);
  int source = lane;
  switch (mode) {
    case Shuffle::up:
      source = (int)lane - (int)(b & 31);
      break;
    case Shuffle::down:
      source = lane + (b & 31);
      break;
    case Shuffle::butterfly:
      source = lane ^ (b & 31);
      break;
    case Shuffle::indexed:
      source = first | (b & 31 & ~segment_mask);
      break;
  }
  in_range = mode == Shuffle::up ? source >= (int)last : source <= (int)last;
  return in_range ? source : lane;
}

// Lanes that do not take part deliver poison.
template <Shuffle mode, class Value>
Value shuffle(uint32_t mask, Value value, uint32_t b, uint32_t c, bool* in_range = nullptr) {
  static_assert(sizeof(Value) <= 8, "shuffles move at most 64 bits");
  uint32_t words[2] = {};
  memcpy(words, &value, sizeof value);
  const uint32_t* output =
      run_collective("shfl.sync", mask, {words[0], words[1], b, c}, [](Collective& collective) {
        for (uint32_t lane = 0; lane < lanes; ++lane) {
          const uint32_t* input = collective.input[lane];
          bool valid;
          uint32_t source = shuffle_source(mode, lane, input[2], input[3], valid);
          bool takes_part = collective.mask >> source & 1;
          collective.output[lane][0] = takes_part ? collective.input[source][0] : ~0u;
          collective.output[lane][1] = takes_part ? collective.input[source][1] : ~0u;
          collective.output[lane][2] = valid;
        }
      });
  Value result;
  memcpy(&result, output, sizeof result);
  if (in_range) *in_range = output[2];
  return result;
}

static inline uint32_t ballot(uint32_t mask, bool predicate) {
  return *run_collective("vote", mask, {predicate}, [](Collective& collective) {
    uint32_t votes = 0;
    for (uint32_t lane = 0; lane < lanes; ++lane)
      votes |= (collective.mask >> lane & collective.input[lane][0] & 1) << lane;
    for (auto& output : collective.output) output[0] = votes;
  });
}

template <class Leader> void elect_sync(Leader& leader, bool& elected, uint32_t mask) {
  uint32_t lowest = __builtin_ctz(ballot(mask, true));
  leader = lowest;
  elected = current_lane() == lowest;
}

// Row `row` (16 bytes) of the 8x8 matrix `matrix`; lane 8 * matrix + row gave its address.
static inline uint16_t* matrix_row(const Collective& collective, uint32_t matrix, uint32_t row,
                                   const char* user) {
  return (uint16_t*)SharedSpace::at(collective.input[matrix * 8 + row][0], 16, user);
}

template <bool transposed, class... Registers> void ldmatrix(uint32_t address, Registers&... registers) {
  constexpr uint32_t matrices = sizeof...(Registers);
  const uint32_t* output = run_collective("ldmatrix", all_lanes, {address}, [](Collective& collective) {
    for (uint32_t matrix = 0; matrix < matrices; ++matrix)
      for (uint32_t row = 0; row < 8; ++row) {
        const uint16_t* source = matrix_row(collective, matrix, row, "ldmatrix");
        for (uint32_t column = 0; column < 8; ++column) {
          uint32_t major = transposed ? column : row, minor = transposed ? row : column;
          uint16_t* target = (uint16_t*)&collective.output[major * 4 + minor / 2][matrix];
          target[minor % 2] = source[column];
        }
      }
  });
  ((registers = *output++), ...);
}

template <bool transposed, class... Registers> void stmatrix(uint32_t address, Registers... registers) {
  constexpr uint32_t matrices = sizeof...(Registers);
  run_collective("stmatrix", all_lanes, {address, (uint32_t)registers...}, [](Collective& collective) {
    for (uint32_t matrix = 0; matrix < matrices; ++matrix)
      for (uint32_t row = 0; row < 8; ++row) {
        uint16_t* target = matrix_row(collective, matrix, row, "stmatrix");
        for (uint32_t column = 0; column < 8; ++column) {
          uint32_t major = transposed ? column : row, minor = transposed ? row : column;
          const uint16_t* source = (const uint16_t*)&collective.input[major * 4 + minor / 2][1 + matrix];
          target[column] = source[minor % 2];
        }
      }
  });
}

// Operand elements of an mma: `depth` of them along k, `per_register` in a 32-bit register.
template <class Format> struct Packed16 {
  static constexpr uint32_t depth = 16, per_register = 2;
  static float decode(uint32_t word, uint32_t element) { return Format::decode(word >> (16 * element)); }
};
typedef Packed16<HalfFormat> F16;
typedef Packed16<BFloat16Format> BF16;
struct TF32 {  // the tensor core ignores the 13 low bits
  static constexpr uint32_t depth = 8, per_register = 1;
  static float decode(uint32_t word, uint32_t) { return bit_cast<float>(word & ~0x1fffu); }
};
typedef float Row8 __attribute__((vector_size(32)));

// rows[m] += A[m][k] * B[k], for m16n8k16 (16-bit operands) and m16n8k8 (tf32). Lane 4 g + t holds rows g and
// g + 8 of A in its registers 0..3 (the row in bit 0, the half of k in bit 1) and column g of B in registers
// 4 and 5.
template <class Operand> void multiply_fragments(const Collective& collective, Row8 (&rows)[16]) {
  for (uint32_t k = 0; k < Operand::depth; ++k) {
    uint32_t upper = k / (Operand::depth / 2), in_half = k % (Operand::depth / 2);
    uint32_t t = in_half / Operand::per_register, element = in_half % Operand::per_register;
    Row8 b;
    for (uint32_t n = 0; n < 8; ++n) b[n] = Operand::decode(collective.input[n * 4 + t][4 + upper], element);
    for (uint32_t m = 0; m < 16; ++m)
      rows[m] += Operand::decode(collective.input[m % 8 * 4 + t][upper * 2 + m / 8], element) * b;
  }
}

template <class Operand>
void mma_f32(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
             uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {
  auto bits = bit_cast<uint32_t, float>;
  const uint32_t* output = run_collective(
      "mma.sync", all_lanes, {a0, a1, a2, a3, b0, b1, bits(c0), bits(c1), bits(c2), bits(c3)},
      [](Collective& collective) {
        Row8 rows[16];
        for (uint32_t lane = 0; lane < lanes; ++lane)
          for (uint32_t i = 0; i < 4; ++i)
            rows[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = bit_cast<float>(collective.input[lane][6 + i]);
        multiply_fragments<Operand>(collective, rows);
        for (uint32_t lane = 0; lane < lanes; ++lane)
          for (uint32_t i = 0; i < 4; ++i)
            collective.output[lane][i] =
                bit_cast<uint32_t>((float)rows[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
      });
  d0 = bit_cast<float>(output[0]);
  d1 = bit_cast<float>(output[1]);
  d2 = bit_cast<float>(output[2]);
  d3 = bit_cast<float>(output[3]);
}

// Accumulators in fp16, two in a register.
template <class Operand, class Register>
void mma_f16(Register& d0, Register& d1, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
             uint32_t b1, uint32_t c0, uint32_t c1) {
  const uint32_t* output =
      run_collective("mma.sync", all_lanes, {a0, a1, a2, a3, b0, b1, c0, c1}, [](Collective& collective) {
        Row8 rows[16];
        for (uint32_t lane = 0; lane < lanes; ++lane)
          for (uint32_t i = 0; i < 4; ++i)
            rows[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] =
                F16::decode(collective.input[lane][6 + i / 2], i % 2);
        multiply_fragments<Operand>(collective, rows);
        for (uint32_t lane = 0; lane < lanes; ++lane)
          for (uint32_t i = 0; i < 4; ++i)
            ((uint16_t*)collective.output[lane])[i] =
                HalfFormat::encode(rows[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
      });
  d0 = output[0];
  d1 = output[1];
}

// ----------------------------------------------------------------------------------------------------------
// PTX instructions of one thread
// ----------------------------------------------------------------------------------------------------------

// The PTX operand `_`: accepts any result.
struct Sink {
  template <class Value> void operator=(Value) {}
};
static Sink sink;

// What a register holds after a predicated instruction that did not run and only writes it: anything.
template <class Register> void poison(Register& value) { memset(&value, 0xff, sizeof(Register)); }

template <class... Operands> void no_operation(Operands...) {}
template <class Register, class Value> void mov(Register& d, Value a) { d = a; }
template <class Register, class Value> void selp(Register& d, Value a, Value b, bool p) { d = p ? a : b; }
template <class A, class B> void setp_eq(bool& p, A a, B b) { p = a == b; }
template <class A, class B> void setp_ne(bool& p, A a, B b) { p = a != b; }

template <class Space, uint32_t bytes, class Address, class... Registers>
void load(Address address, Registers&... registers) {
  const char* source = Space::at(address, bytes * sizeof...(Registers), "ld");
  auto read = [&source](auto& value) {
    static_assert(sizeof value >= bytes, "the register is too small");
    memset(&value, 0, sizeof value);
    memcpy(&value, source, bytes);
    source += bytes;
  };
  (read(registers), ...);
}
template <class Space, uint32_t bytes, class Address, class... Registers>
void store(Address address, Registers... registers) {
  char* target = Space::at(address, bytes * sizeof...(Registers), "st");
  auto write = [&target](auto value) {
    static_assert(sizeof value >= bytes, "the register is too small");
    memcpy(target, &value, bytes);
    target += bytes;
  };
  (write(registers), ...);
}

template <Shuffle mode, class Register, class Value>
void shfl_sync(Register& d, Value a, uint32_t b, uint32_t c, uint32_t mask) {
  d = bit_cast<Register>(shuffle<mode>(mask, a, b, c));
}
template <Shuffle mode, class Register, class Value>
void shfl_sync(Register& d, bool& in_range, Value a, uint32_t b, uint32_t c, uint32_t mask) {
  d = bit_cast<Register>(shuffle<mode>(mask, a, b, c, &in_range));
}

template <class Register> void cvt_rna_tf32(Register& d, float a) {
  uint32_t bits = bit_cast<uint32_t>(a);
  if ((bits & 0x7f800000) != 0x7f800000) bits += 0x1000;  // halfway cases away from zero
  d = bit_cast<Register>(bits & ~0x1fffu);
}
template <class Number, class Register> void cvt_pack(Register& d, float upper, float lower) {
  d = bit_cast<Register>(Vector2<Number>{lower, upper});
}

#define EMULATOR_PACKED_HALF(name, function)                                                  \
  template <class Register, class... Operands> void name(Register& d, Operands... operands) { \
    d = bit_cast<Register>(function(bit_cast<half2>(operands)...));                           \
  }
EMULATOR_PACKED_HALF(add_f16x2, __hadd2)
EMULATOR_PACKED_HALF(sub_f16x2, __hsub2)
EMULATOR_PACKED_HALF(mul_f16x2, __hmul2)
EMULATOR_PACKED_HALF(max_f16x2, __hmax2)
EMULATOR_PACKED_HALF(min_f16x2, __hmin2)
EMULATOR_PACKED_HALF(fma_f16x2, __hfma2)
template <class Register> void fma_bf16x2(Register& d, uint32_t a, uint32_t b, uint32_t c) {
  d = bit_cast<Register>(__hfma2(bit_cast<nv_bfloat162>(a), bit_cast<nv_bfloat162>(b), bit_cast<nv_bfloat162>(c)));
}
// NaN if either operand is; max(-0, +0) is +0, as on the device.
inline float max_nan(float a, float b) { return a != a ? a : b != b ? b : a > b || (a == b && !__builtin_signbit(a)) ? a : b; }
inline float min_nan(float a, float b) { return -max_nan(-a, -b); }
template <class Pair, class Register> void max_nan_x2(Register& d, uint32_t a, uint32_t b) {
  Pair x = bit_cast<Pair>(a), y = bit_cast<Pair>(b);
  d = bit_cast<Register>(Pair{decltype(x.x)(max_nan(x.x, y.x)), decltype(x.x)(max_nan(x.y, y.y))});
}
template <class Pair, class Register> void min_nan_x2(Register& d, uint32_t a, uint32_t b) {
  Pair x = bit_cast<Pair>(a), y = bit_cast<Pair>(b);
  d = bit_cast<Register>(Pair{decltype(x.x)(min_nan(x.x, y.x)), decltype(x.x)(min_nan(x.y, y.y))});
}

}  // namespace emulator

// ----------------------------------------------------------------------------------------------------------
// CUDA functions that concern several threads
// ----------------------------------------------------------------------------------------------------------

static inline void __syncthreads() { emulator::bar_sync(0); }
static inline void __syncwarp(unsigned mask = emulator::all_lanes) { emulator::sync_warp(mask); }
static inline size_t __cvta_generic_to_shared(const void* pointer) {
  return (const char*)pointer - emulator::arena;
}
static inline unsigned __ballot_sync(unsigned mask, bool p) { return emulator::ballot(mask, p); }
static inline bool __any_sync(unsigned mask, bool p) { return emulator::ballot(mask, p) != 0; }
static inline bool __all_sync(unsigned mask, bool p) { return emulator::ballot(mask, !p) == 0; }

template <class Value> Value __shfl_sync(unsigned mask, Value value, int source, int width = 32) {
  return emulator::shuffle<emulator::Shuffle::indexed>(mask, value, source, (32 - width) << 8 | 31);
}
template <class Value> Value __shfl_up_sync(unsigned mask, Value value, unsigned delta, int width = 32) {
  return emulator::shuffle<emulator::Shuffle::up>(mask, value, delta, (32 - width) << 8);
}
template <class Value> Value __shfl_down_sync(unsigned mask, Value value, unsigned delta, int width = 32) {
  return emulator::shuffle<emulator::Shuffle::down>(mask, value, delta, (32 - width) << 8 | 31);
}
template <class Value> Value __shfl_xor_sync(unsigned mask, Value value, int lane_mask, int width = 32) {
  return emulator::shuffle<emulator::Shuffle::butterfly>(mask, value, lane_mask, (32 - width) << 8 | 31);
}

// ----------------------------------------------------------------------------------------------------------
// Launch
// ----------------------------------------------------------------------------------------------------------

namespace emulator {

static void prepare_block() {
  memset(arena, 0xff, sizeof arena);
  memset(named_barriers, 0, sizeof named_barriers);
  tracked_copies.clear();
  for (auto& warp : collectives)
    for (Collective& collective : warp) collective.mask = collective.arrived = 0;
  for (uint32_t i = 0; i < thread_count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    fiber.finished = false;
    fiber.wait = {};
    fiber.open_group = 0;
    fiber.copies.clear();
    // What emulator_switch_stack pops: six registers, the entry point; above it fiber_main's unused return
    // address.
    void** top = (void**)(stacks + (i + 1) * stack_bytes) - 1;
    *--top = (void*)fiber_main;
    fiber.stack_pointer = top - 6;
  }
}

// Lets every fiber of the warp run until all wait for other warps; true if any did run.
static bool run_warp(uint32_t warp, bool reverse) {
  bool progress = false;
  for (bool again = true; again;) {
    again = false;
    for (uint32_t step = 0; step < lanes; ++step) {
      uint32_t thread = warp * lanes + (reverse ? lanes - 1 - step : step);
      if (thread >= thread_count) continue;
      Fiber& fiber = fibers[thread];
      if (fiber.finished || !fiber.wait.is_over()) continue;
      current = thread;
      threadIdx = fiber.index;
      fiber.wait = {};
      in_fiber = true;
      emulator_switch_stack(&scheduler_stack_pointer, fiber.stack_pointer);
      in_fiber = false;
      if (*failure) throw Failure();
      again = progress = true;
    }
  }
  return progress;
}

// No thread can run: ends an asynchronous copy that some wait for, or reports the deadlock.
static void resolve_stall() {
  if (finish_tracked_copies()) return;
  uint32_t waiting = 0;
  for (uint32_t i = thread_count; i-- > 0;)
    if (!fibers[i].finished) {
      ++waiting;
      current = i;
    }
  threadIdx = fibers[current].index;
  fail("deadlock, %u of %u threads wait, this one at: %s", waiting, thread_count,
       fibers[current].wait.reason);
}

static bool block_finished() {
  for (uint32_t i = 0; i < thread_count; ++i)
    if (!fibers[i].finished) return false;
  return true;
}

static void run_block(bool reverse) {
  prepare_block();
  uint32_t warps = (thread_count + lanes - 1) / lanes;
  while (!block_finished()) {
    bool progress = false;
    for (uint32_t step = 0; step < warps; ++step)
      progress |= run_warp(reverse ? warps - 1 - step : step, reverse);
    if (!progress) resolve_stall();
  }
  const char* unused = arena + shared_limit;
  if (*unused != (char)0xff || memcmp(unused, unused + 1, arena_bytes - shared_limit - 1))
    fail("a thread of this block wrote to shared memory beyond the %u bytes in use", shared_limit);
}

// Order of the integers in `configuration`: grid x, y, z; block x, y, z; bytes of dynamic shared memory (-1:
// all there is); whether to run in reverse order. Returns an error message or null.
static const char* launch(void (*body)(void**), void** arguments, const int* configuration,
                          uint32_t static_bytes) {
  gridDim = {(unsigned)configuration[0], (unsigned)configuration[1], (unsigned)configuration[2]};
  blockDim = {(unsigned)configuration[3], (unsigned)configuration[4], (unsigned)configuration[5]};
  bool reverse = configuration[7];
  kernel_body = body;
  kernel_arguments = arguments;
  thread_count = blockDim.x * blockDim.y * blockDim.z;
  if (thread_count == 0 || thread_count > max_threads) return "a block has 1 to 1024 threads";
  if (static_bytes > max_static_shared_bytes) return "more than 48 KiB of static shared memory";
  dynamic_offset = (static_bytes + dynamic_alignment - 1) / dynamic_alignment * dynamic_alignment;
  if (configuration[6] > (int)(max_shared_bytes - dynamic_offset))
    return "more than 227 KiB of shared memory";
  shared_limit = dynamic_offset + configuration[6];
  if (configuration[6] < 0) shared_limit = max_shared_bytes;
  if (configuration[6] == 0) shared_limit = static_bytes;
  if (!stacks) stacks = (char*)aligned_alloc(4096, max_threads * stack_bytes);
  if (!stacks) return "no memory for the stacks";
  *failure = 0;
  uint32_t blocks = gridDim.x * gridDim.y * gridDim.z;
  try {
    for (uint32_t step = 0; step < blocks; ++step) {
      uint32_t block = reverse ? blocks - 1 - step : step;
      blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y};
      run_block(reverse);
    }
  } catch (Failure) {
    return failure;
  }
  return nullptr;
}

}  // namespace emulator
