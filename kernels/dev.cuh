// The device primitives: the only place where PTX and emulation differ.
//
// Kernels include this file and params.h, nothing else, and are plain C++20 around these calls: no inline assembly,
// no threadIdx, no __shared__, no CUDA headers. nvcc then compiles them for sm_90a, and the host compiler for the
// emulated device (kernels/emulator), which checks what a GPU leaves unchecked.
//
// Rules that keep both sides true:
//  - Spinning goes through ld_acquire, poll_relaxed, poll_relaxed_v4 or mbar_wait: a bare `while (*flag)` never ends on
//    one core.
//  - ld_nc_* and load_vec only for data that nobody writes while the launch lives: weights. A dependent launch begins
//    while its predecessors still write. ld_cg_* for what another block or an earlier launch wrote. Weights that are to
//    be on their way before griddep_wait: ld_stream_v4, cp_async16, bulk_g2s or prefetch_l2 (tests/fast_kernels.rs
//    looks).
//  - A shuffle or ballot orders no memory; warp_sync does.
//  - A function that calls primitives on a kernel's behalf ends its parameters with SITE_ (SITE0 if it has none)
//    and hands them on with PASS_ (PASS0), so that reports name the kernel's line.
//  - Blocks are whole warps; kernels own nothing with a destructor.
#pragma once
#include <stdint.h>

#include "params.h"

// A bfloat16 as stored. Arithmetic is in float: to_f32, to_bf16.
struct bf16 {
  uint16_t bits;
};
struct alignas(16) v4u {
  uint32_t x, y, z, w;
};
struct alignas(8) v2u {
  uint32_t x, y;
};
static constexpr uint32_t FULL = 0xffffffffu;  // the mask of a whole warp

#if defined(__CUDACC__)

#define DEV static __device__ __forceinline__
#define SITE0
#define SITE_
#define PASS0
#define PASS_
// KERNEL(name, ParamsType, max threads per block, min resident blocks per SM) { body; `p` is the parameter struct }
#define KERNEL(name, P, threads, blocks) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ P p)
// A static shared array, and the launch's dynamic shared memory seen as T[].
#define SMEM(T, name, n) __shared__ __align__(128) T name[n]
#define SMEM_DYN(T, name)                                         \
  extern __shared__ __align__(1024) unsigned char dynamic_smem[]; \
  T* name = reinterpret_cast<T*>(dynamic_smem)

// Which params.h an image was compiled with. Nobody reads it but src/device/cuda/modules.rs, in the image's bytes.
extern "C" {
__device__ char warpstep_params[] = "warpstep params.h " WARPSTEP_PARAMS_HASH;
}

DEV uint32_t tid_x() { return threadIdx.x; }
DEV uint32_t tid_y() { return threadIdx.y; }
DEV uint32_t tid_z() { return threadIdx.z; }
DEV uint32_t ntid_x() { return blockDim.x; }
DEV uint32_t ntid_y() { return blockDim.y; }
DEV uint32_t ntid_z() { return blockDim.z; }
DEV uint32_t bid_x() { return blockIdx.x; }
DEV uint32_t bid_y() { return blockIdx.y; }
DEV uint32_t bid_z() { return blockIdx.z; }
DEV uint32_t nbid_x() { return gridDim.x; }
DEV uint32_t nbid_y() { return gridDim.y; }
DEV uint32_t nbid_z() { return gridDim.z; }
DEV uint32_t lane_id() {
  uint32_t r;
  asm("mov.u32 %0, %%laneid;" : "=r"(r));
  return r;
}

// ---- synchronisation ----
DEV void block_sync() { __syncthreads(); }
DEV void warp_sync(uint32_t mask = FULL) { __syncwarp(mask); }
// Named barriers 1..15 among `threads` threads of the block, whole warps at a time.
DEV void bar_sync(int id, uint32_t threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEV void bar_arrive(int id, uint32_t threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEV void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEV uint32_t cluster_rank() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
DEV uint32_t cluster_size() {
  uint32_t r;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
}
// The same shared variable in block `rank` of the cluster.
template <class T>
DEV T* cluster_map(T* p, uint32_t rank) {
  uint64_t r;
  asm("mapa.u64 %0, %1, %2;" : "=l"(r) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(r);
}
// Programmatic dependent launch: wait for what the predecessors wrote; let the successors start.
DEV void griddep_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEV void griddep_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// Registers of each of this warp's threads from here on, a multiple of 8: four neighbouring warps from the fourth,
// eighth or so on call it together. Who grows waits until others have shrunk. The kernel begins with what its block
// leaves for every thread, so that all warps of a block take part.
template <int N>
DEV void regs_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEV void regs_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- warp exchange: 32-bit values ----
template <class T>
DEV T shfl_xor(T v, uint32_t lane_mask, uint32_t mask = FULL) {
  return __shfl_xor_sync(mask, v, lane_mask);
}
template <class T>
DEV T shfl_down(T v, uint32_t delta, uint32_t mask = FULL) {
  return __shfl_down_sync(mask, v, delta);
}
template <class T>
DEV T shfl_up(T v, uint32_t delta, uint32_t mask = FULL) {
  return __shfl_up_sync(mask, v, delta);
}
template <class T>
DEV T shfl_idx(T v, uint32_t lane, uint32_t mask = FULL) {
  return __shfl_sync(mask, v, lane);
}
DEV uint32_t warp_ballot(bool b, uint32_t mask = FULL) { return __ballot_sync(mask, b); }

// ---- global memory ----
DEV v4u ld_nc_v4(const void* p) {
  v4u r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
}
DEV v2u ld_nc_v2(const void* p) {
  v2u r;
  asm volatile("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(p));
  return r;
}
// Weights that are read once. As ld_nc_v4, but it stays above a griddep_wait that follows it: nothing orders loads of
// the read-only path, so that ptxas moves them below the wait, to where their values are first used.
DEV v4u ld_stream_v4(const void* p) {
  v4u r;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
}
DEV float ld_cg_f32(const float* p) {
  float r;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(r) : "l"(p) : "memory");
  return r;
}
DEV v4u ld_cg_v4(const void* p) {
  v4u r;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p)
               : "memory");
  return r;
}
// 16 aligned bytes by plain access, global or shared.
DEV v4u ld_v4(const void* p) { return *static_cast<const v4u*>(p); }
DEV void st_v4(void* p, v4u v) { *static_cast<v4u*>(p) = v; }
// Asks for the 128-byte line of `p`. The only access that may precede griddep_wait whatever `p` is: it returns nothing.
DEV void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
DEV uint32_t atom_add_relaxed(uint32_t* p, uint32_t v) { return atomicAdd(p, v); }
DEV uint32_t atom_max_relaxed(uint32_t* p, uint32_t v) { return atomicMax(p, v); }
DEV uint32_t atom_add_acqrel(uint32_t* p, uint32_t v) {
  uint32_t r;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(r) : "l"(p), "r"(v) : "memory");
  return r;
}
DEV void red_add_f32(float* p, float v) { atomicAdd(p, v); }
DEV uint32_t ld_acquire(const uint32_t* p) {
  uint32_t r;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(r) : "l"(p) : "memory");
  return r;
}
DEV void st_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
// A 64-bit word that carries its own data (value and epoch together), so that it needs no ordering.
DEV uint64_t poll_relaxed(const uint64_t* p) {
  uint64_t r;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(r) : "l"(p) : "memory");
  return r;
}
DEV void st_relaxed(uint64_t* p, uint64_t v) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
// The same of 128 bits in one piece: a b128 is one scalar, where a vector of four words would be four.
DEV v4u poll_relaxed_v4(const v4u* p) {
  uint64_t lo, hi;
  asm volatile("{\n .reg .b128 both;\n ld.relaxed.gpu.global.b128 both, [%2];\n mov.b128 {%0, %1}, both;\n}"
               : "=l"(lo), "=l"(hi)
               : "l"(p)
               : "memory");
  return v4u{static_cast<uint32_t>(lo), static_cast<uint32_t>(lo >> 32), static_cast<uint32_t>(hi),
             static_cast<uint32_t>(hi >> 32)};
}
DEV void st_relaxed_v4(v4u* p, v4u v) {
  const uint64_t lo = static_cast<uint64_t>(v.y) << 32 | v.x, hi = static_cast<uint64_t>(v.w) << 32 | v.z;
  asm volatile("{\n .reg .b128 both;\n mov.b128 both, {%1, %2};\n st.relaxed.gpu.global.b128 [%0], both;\n}" ::"l"(p),
               "l"(lo), "l"(hi)
               : "memory");
}

// ---- asynchronous copies into shared memory ----
DEV uint32_t smem_u32(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
// 16 bytes; with full == false the target is zeroed and `src` is not read.
DEV void cp_async16(void* dst, const void* src, bool full = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem_u32(dst)), "l"(src), "r"(full ? 16 : 0)
               : "memory");
}
DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of this thread's newest groups are in flight.
template <int N>
DEV void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
DEV void mbar_init(uint64_t* bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_u32(bar)), "r"(arrivals) : "memory");
}
DEV void mbar_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEV void mbar_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_u32(bar)) : "memory");
}
// Arrives and expects `bytes` more from bulk copies before the phase ends.
DEV void mbar_arrive_tx(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_u32(bar)), "r"(bytes) : "memory");
}
// Until the phase of this parity has ended: 0 for the first, then alternating.
DEV void mbar_wait(uint64_t* bar, uint32_t parity) {
  asm volatile(
      "{\n .reg .pred done;\nTRY_%=:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      " @!done bra TRY_%=;\n}" ::"r"(smem_u32(bar)),
      "r"(parity)
      : "memory");
}
// `bytes` bytes, a multiple of 16, both addresses 16-byte aligned; completes on `bar`.
DEV void bulk_g2s(void* dst, const void* src, uint32_t bytes, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem_u32(dst)),
      "l"(src), "r"(bytes), "r"(smem_u32(bar))
      : "memory");
}
// Policies for the L2 lines of a bulk copy: the first, or the last, to make room for others. Hints: no value changes.
DEV uint64_t l2_evict_first() {
  uint64_t r;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(r));
  return r;
}
DEV uint64_t l2_evict_last() {
  uint64_t r;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(r));
  return r;
}
// bulk_g2s with a policy.
DEV void bulk_g2s_hint(void* dst, const void* src, uint32_t bytes, uint64_t* bar, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(smem_u32(dst)),
      "l"(src), "r"(bytes), "r"(smem_u32(bar)), "l"(policy)
      : "memory");
}

// ---- tensor cores ----
// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
DEV void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_u32(row))
               : "memory");
}
DEV void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_u32(row))
               : "memory");
}
// c[16,8] += a[16,16] b[16,8]
DEV void mma_bf16_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// N * W / 4 of them in a row, the next one `stride` elements further on: what a warp loads between two products.
template <int N, int W>
DEV void ldmatrix_x4_all(uint32_t (&r)[N][W], const bf16* row, uint32_t stride) {
#pragma unroll
  for (int i = 0; i < N * W; i += 4) {
    uint32_t four[4];
    ldmatrix_x4(four, row + i / 4 * stride);
#pragma unroll
    for (int j = i; j < i + 4; j++) r[j / W][j % W] = four[j - i];
  }
}
template <int N, int W>
DEV void ldmatrix_x4_trans_all(uint32_t (&r)[N][W], const bf16* row, uint32_t stride) {
#pragma unroll
  for (int i = 0; i < N * W; i += 4) {
    uint32_t four[4];
    ldmatrix_x4_trans(four, row + i / 4 * stride);
#pragma unroll
    for (int j = i; j < i + 4; j++) r[j / W][j % W] = four[j - i];
  }
}
// c[m][n] += a[m] b[n] for all pairs of fragments: what a warp does between two loads of them.
template <int M, int N>
DEV void mma_bf16_all(float (&c)[M][N][4], const uint32_t (&a)[M][4], const uint32_t (&b)[N][2]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++) mma_bf16_16816(c[m][n], a[m], b[n]);
}

// ---- arithmetic ----
DEV float fast_exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
DEV float fast_exp(float x) { return __expf(x); }
DEV float fast_rsqrt(float x) { return rsqrtf(x); }
DEV float fast_div(float a, float b) { return __fdividef(a, b); }
DEV void fast_sincos(float x, float* s, float* c) { __sincosf(x, s, c); }
DEV float f_min(float a, float b) { return fminf(a, b); }
DEV float f_max(float a, float b) { return fmaxf(a, b); }
DEV float f_fma(float a, float b, float c) { return fmaf(a, b, c); }
DEV float f_sqrt(float x) { return sqrtf(x); }
DEV float f_exp(float x) { return expf(x); }
DEV float f_log(float x) { return logf(x); }
DEV float f_rint(float x) { return rintf(x); }
DEV float f_abs(float x) { return fabsf(x); }
DEV float as_f32(uint32_t u) { return __uint_as_float(u); }
DEV uint32_t as_u32(float f) { return __float_as_uint(f); }
// Round to nearest even; lo in the low half.
DEV uint32_t pack_bf16(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
// e4m3: sign, four bits of exponent, three of mantissa; 448 is the largest number, 0x7f and 0xff are NaN, there is no
// infinity. Rounds to nearest even; what lies beyond +-448, infinity too, becomes +-448, every NaN 0x7f.
DEV uint8_t f32_to_e4m3(float f) {
  uint16_t r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(0.0f), "f"(f));
  return static_cast<uint8_t>(r);
}
// Exact: every e4m3 number is a float16, through which the conversion goes.
DEV float e4m3_to_f32(uint8_t code) {
  float r;
  asm("{\n .reg .b32 both;\n .reg .b16 lo, hi;\n cvt.rn.f16x2.e4m3x2 both, %1;\n mov.b32 {lo, hi}, both;\n"
      " cvt.f32.f16 %0, lo;\n}"
      : "=f"(r)
      : "h"(static_cast<uint16_t>(code)));
  return r;
}

// Sum and maximum over the aligned group of W lanes that a lane is in; every lane gets it. Whole warps only.
template <int W = 32>
DEV float warp_sum(float v) {
  for (int o = W / 2; o; o >>= 1) v += shfl_xor(v, o);
  return v;
}
// N independent sums over the warp: their shuffles go side by side.
template <int N>
DEV void warp_sum_all(float (&v)[N]) {
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    float other[N];
#pragma unroll
    for (int i = 0; i < N; i++) other[i] = shfl_xor(v[i], o);
#pragma unroll
    for (int i = 0; i < N; i++) v[i] += other[i];
  }
}
template <int W = 32>
DEV float warp_max(float v) {
  for (int o = W / 2; o; o >>= 1) v = f_max(v, shfl_xor(v, o));
  return v;
}

#else
#include "emulator/dev_host.hpp"
#endif

// ---- common to both sides ----
DEV uint32_t thread_rank() { return (tid_z() * ntid_y() + tid_y()) * ntid_x() + tid_x(); }
DEV uint32_t block_threads() { return ntid_x() * ntid_y() * ntid_z(); }
DEV uint32_t warp_id() { return thread_rank() >> 5; }
DEV uint32_t num_warps() { return block_threads() >> 5; }

// An address of a parameter struct as a pointer.
template <class T>
DEV T* ptr(uint64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}
DEV uint32_t umin(uint32_t a, uint32_t b) { return a < b ? a : b; }
DEV uint32_t umax(uint32_t a, uint32_t b) { return a < b ? b : a; }
DEV bool is_finite(float x) { return (as_u32(x) & 0x7f800000u) != 0x7f800000u; }

DEV float bf_lo(uint32_t u) { return as_f32(u << 16); }
DEV float bf_hi(uint32_t u) { return as_f32(u & 0xffff0000u); }
DEV bf16 to_bf16(float f) { return bf16{static_cast<uint16_t>(pack_bf16(f, 0.0f) & 0xffffu)}; }
// to_f32 and from_f32 let a kernel be written once for E = float and E = bf16.
DEV float to_f32(bf16 b) { return as_f32(static_cast<uint32_t>(b.bits) << 16); }
DEV float to_f32(float f) { return f; }
// Elements of E in 16 bytes.
template <class E>
inline constexpr int kVec = 16 / sizeof(E);
template <class E>
DEV E from_f32(float f) {
  if constexpr (sizeof(E) == 4)
    return f;
  else
    return to_bf16(f);
}
// f as it would come back from storage as E.
template <class E>
DEV float round_to(float f) {
  return to_f32(from_f32<E>(f));
}
// x * sigmoid(x), for a result that is stored as E. Rounding to bf16 is 2^-9 off, the approximations 2^-17 at most; the
// exact division and exp are forty instructions, for each output of a prompt's product. exp2 with the factor in it: of
// exp's own steps two guard numbers that do not matter here, and one value waits for another's at them.
template <class E>
DEV float silu(float x) {
  if constexpr (sizeof(E) == 4)
    return x / (1.0f + f_exp(-x));
  else
    return fast_div(x, 1.0f + fast_exp2(x * -1.4426950408889634f));
}

// 16 bytes of E as floats.
template <class E>
DEV void unpack_vec(v4u u, float (&out)[kVec<E>]) {
  if constexpr (kVec<E> == 4) {
    out[0] = as_f32(u.x), out[1] = as_f32(u.y), out[2] = as_f32(u.z), out[3] = as_f32(u.w);
  } else {
    out[0] = bf_lo(u.x), out[1] = bf_hi(u.x), out[2] = bf_lo(u.y), out[3] = bf_hi(u.y);
    out[4] = bf_lo(u.z), out[5] = bf_hi(u.z), out[6] = bf_lo(u.w), out[7] = bf_hi(u.w);
  }
}
// 16 aligned bytes of read-only data (weights), as floats.
template <class E>
DEV void load_vec(const E* src, float (&out)[kVec<E>] SITE_) {
  unpack_vec<E>(ld_nc_v4(src PASS_), out);
}
// The same from anything that a plain load may read: shared memory, or what an earlier launch wrote.
template <class E>
DEV void load_vec_plain(const E* src, float (&out)[kVec<E>] SITE_) {
  unpack_vec<E>(ld_v4(src PASS_), out);
}
// The same past L1, for what another block wrote in this launch.
template <class E>
DEV void load_vec_cg(const E* src, float (&out)[kVec<E>] SITE_) {
  unpack_vec<E>(ld_cg_v4(src PASS_), out);
}
// 16 aligned bytes to global or shared memory, rounded to E.
template <class E>
DEV void store_vec(E* dst, const float (&in)[kVec<E>] SITE_) {
  v4u u;
  if constexpr (kVec<E> == 4)
    u = v4u{as_u32(in[0]), as_u32(in[1]), as_u32(in[2]), as_u32(in[3])};
  else
    u = v4u{pack_bf16(in[0], in[1]), pack_bf16(in[2], in[3]), pack_bf16(in[4], in[5]), pack_bf16(in[6], in[7])};
  st_v4(dst, u PASS_);
}

// Sum over the block, in the same order on every thread; scratch is a shared array of num_warps() floats.
DEV float block_sum(float v, float* scratch SITE_) {
  v = warp_sum(v PASS_);
  if (lane_id() == 0) scratch[warp_id()] = v;
  block_sync(PASS0);
  float r = 0.0f;
  for (uint32_t i = 0; i < num_warps(); i++) r += scratch[i];
  block_sync(PASS0);
  return r;
}
DEV float block_max(float v, float* scratch SITE_) {
  v = warp_max(v PASS_);
  if (lane_id() == 0) scratch[warp_id()] = v;
  block_sync(PASS0);
  float r = scratch[0];
  for (uint32_t i = 1; i < num_warps(); i++) r = f_max(r, scratch[i]);
  block_sync(PASS0);
  return r;
}

// All blocks of a cooperative launch. The counter is zeroed once and never reset: in each round block 0 adds what
// makes the total exactly 2^31, so the top bit flips when all have come, for ever.
DEV void grid_sync(GridBarrier* g SITE_) {
  block_sync(PASS0);
  if (thread_rank() == 0) {
    const uint32_t blocks = nbid_x() * nbid_y() * nbid_z();
    const bool first = (bid_x() | bid_y() | bid_z()) == 0;
    const uint32_t before = atom_add_acqrel(&g->count, first ? 0x80000000u - (blocks - 1) : 1u PASS_);
    while (((ld_acquire(&g->count PASS_) ^ before) & 0x80000000u) == 0) {
    }
  }
  block_sync(PASS0);
}
