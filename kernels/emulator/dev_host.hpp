// The host side of dev.cuh: the same primitives, computed by the emulator. Included by dev.cuh only.
#pragma once
#include "emu.hpp"

#define DEV [[maybe_unused]] static inline
// Runs on behalf of other lanes: what it touches is not its own access.
#define EMU_CALLBACK __attribute__((no_sanitize_thread))
// The hidden last argument of a primitive: the line that called it.
#define SITE0 [[maybe_unused]] emu::Site site = {__builtin_FILE(), __builtin_LINE()}
#define SITE_ , SITE0
#define PASS0 site
#define PASS_ , site
#define KERNEL(name, P, threads, blocks)                                                                       \
  static void name##_body(const P& p);                                                                         \
  static const emu::Kernel name##_kernel_entry(#name, __FILE__, sizeof(P), threads,                            \
                                               [](const void* q) { name##_body(*static_cast<const P*>(q)); }); \
  static void name##_body([[maybe_unused]] const P& p)
// The address of `name_key` identifies the array; one per function, and per instantiation of a template.
#define SMEM(T, name, n)            \
  static const char name##_key = 0; \
  T(&name)                          \
  [n] = *static_cast<T(*)[n]>(emu::shared_static(&name##_key, sizeof(T) * (n), alignof(T), {__FILE__, __LINE__}))
#define SMEM_DYN(T, name) T* name = static_cast<T*>(emu::shared_dynamic())

DEV uint32_t tid_x() { return emu::self->tid.x; }
DEV uint32_t tid_y() { return emu::self->tid.y; }
DEV uint32_t tid_z() { return emu::self->tid.z; }
DEV uint32_t ntid_x() { return emu::self->bdim.x; }
DEV uint32_t ntid_y() { return emu::self->bdim.y; }
DEV uint32_t ntid_z() { return emu::self->bdim.z; }
DEV uint32_t bid_x() { return emu::self->bid.x; }
DEV uint32_t bid_y() { return emu::self->bid.y; }
DEV uint32_t bid_z() { return emu::self->bid.z; }
DEV uint32_t nbid_x() { return emu::self->gdim.x; }
DEV uint32_t nbid_y() { return emu::self->gdim.y; }
DEV uint32_t nbid_z() { return emu::self->gdim.z; }
DEV uint32_t lane_id() { return emu::self->lane; }

// ---- synchronisation ----
DEV void block_sync(SITE0) { emu::block_sync(site); }
DEV void warp_sync(uint32_t mask = FULL SITE_) {
  emu::warp_collective(nullptr, nullptr, mask, true, "warp_sync", site);
}
DEV void bar_sync(int id, uint32_t threads SITE_) { emu::bar_sync(id, threads, site); }
DEV void bar_arrive(int id, uint32_t threads SITE_) { emu::bar_arrive(id, threads, site); }
DEV void cluster_sync(SITE0) { emu::cluster_sync(site); }
DEV uint32_t cluster_rank() { return emu::self->cluster_rank; }
DEV uint32_t cluster_size() { return emu::self->cluster_size; }
template <class T>
DEV T* cluster_map(T* p, uint32_t rank SITE_) {
  return static_cast<T*>(emu::cluster_map(p, rank, site));
}
DEV void griddep_wait(SITE0) { emu::griddep_wait(site); }
DEV void griddep_launch() {}
template <int N>
DEV void regs_grow() {}
template <int N>
DEV void regs_shrink() {}

// ---- warp exchange ----
namespace emu {

// One lane's part in a shuffle or ballot. `source` is the lane read from; kNoLane marks one outside the mask.
struct Exchange {
  static constexpr uint32_t kNoLane = 64;
  uint32_t in, out, source;
};
EMU_CALLBACK inline void shuffle_lanes(void* const* arg, uint32_t mask) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    Exchange* mine = static_cast<Exchange*>(arg[__builtin_ctz(rest)]);
    if (mask >> mine->source & 1)
      mine->out = static_cast<Exchange*>(arg[mine->source])->in;
    else
      mine->source |= Exchange::kNoLane;
  }
}
EMU_CALLBACK inline void ballot_lanes(void* const* arg, uint32_t mask) {
  uint32_t votes = 0;
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    const uint32_t lane = __builtin_ctz(rest);
    votes |= static_cast<Exchange*>(arg[lane])->in << lane;
  }
  for (uint32_t rest = mask; rest; rest &= rest - 1) static_cast<Exchange*>(arg[__builtin_ctz(rest)])->out = votes;
}
template <class T>
inline T shuffle(T v, uint32_t source, uint32_t mask, const char* what, Site site) {
  static_assert(sizeof(T) == 4, "shuffles move 32-bit values");
  Exchange mine{0, 0, source};
  memcpy(&mine.in, &v, 4);
  warp_collective(shuffle_lanes, &mine, mask, false, what, site);
  if (mine.source & Exchange::kNoLane)
    fail(site, "%s reads lane %u, which is not in mask 0x%08x", what, mine.source & 31, mask);
  memcpy(&v, &mine.out, 4);
  return v;
}

// A whole butterfly as one collective: 32 fiber switches instead of 160, the same order of additions, the same bits.
template <int W, bool kMax>
EMU_CALLBACK inline void butterfly(void* const* arg, uint32_t) {
  float v[32], next[32];
  for (int i = 0; i < 32; i++) v[i] = *static_cast<float*>(arg[i]);
  for (int o = W / 2; o; o >>= 1) {
    for (int i = 0; i < 32; i++) next[i] = kMax ? fmaxf(v[i], v[i ^ o]) : v[i] + v[i ^ o];
    memcpy(v, next, sizeof v);
  }
  for (int i = 0; i < 32; i++) *static_cast<float*>(arg[i]) = v[i];
}
// N butterflies as one collective: arg[lane] points to the lane's N values.
template <int N>
EMU_CALLBACK inline void butterflies(void* const* arg, uint32_t mask) {
  void* column[32];
  for (int n = 0; n < N; n++) {
    for (int i = 0; i < 32; i++) column[i] = static_cast<float*>(arg[i]) + n;
    butterfly<32, false>(column, mask);
  }
}

}  // namespace emu

template <class T>
DEV T shfl_xor(T v, uint32_t lane_mask, uint32_t mask = FULL SITE_) {
  return emu::shuffle(v, (lane_id() ^ lane_mask) & 31, mask, "shfl_xor", site);
}
template <class T>
DEV T shfl_down(T v, uint32_t delta, uint32_t mask = FULL SITE_) {
  const uint32_t lane = lane_id() + delta;
  return emu::shuffle(v, lane > 31 ? lane_id() : lane, mask, "shfl_down", site);
}
template <class T>
DEV T shfl_up(T v, uint32_t delta, uint32_t mask = FULL SITE_) {
  return emu::shuffle(v, delta > lane_id() ? lane_id() : lane_id() - delta, mask, "shfl_up", site);
}
template <class T>
DEV T shfl_idx(T v, uint32_t lane, uint32_t mask = FULL SITE_) {
  return emu::shuffle(v, lane & 31, mask, "shfl_idx", site);
}
DEV uint32_t warp_ballot(bool b, uint32_t mask = FULL SITE_) {
  emu::Exchange mine{b, 0, 0};
  emu::warp_collective(emu::ballot_lanes, &mine, mask, false, "warp_ballot", site);
  return mine.out;
}
template <int W = 32>
DEV float warp_sum(float v SITE_) {
  emu::warp_collective(emu::butterfly<W, false>, &v, FULL, false, "warp_sum", site);
  return v;
}
template <int N>
DEV void warp_sum_all(float (&v)[N] SITE_) {
  emu::warp_collective(emu::butterflies<N>, v, FULL, false, "warp_sum_all", site);
}
template <int W = 32>
DEV float warp_max(float v SITE_) {
  emu::warp_collective(emu::butterfly<W, true>, &v, FULL, false, "warp_max", site);
  return v;
}

// ---- global memory ----
namespace emu {
inline void require_aligned(const void* p, size_t bytes, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail(site, "misaligned %zu-byte access at %p", bytes, p);
}
}  // namespace emu
DEV void prefetch_l2(const void* p SITE_) { emu::prefetch(p, site); }
DEV v4u ld_nc_v4(const void* p SITE_) {
  emu::require_aligned(p, 16, site);
  v4u v;
  emu::load_nc(&v, p, 16, site);
  return v;
}
DEV v2u ld_nc_v2(const void* p SITE_) {
  emu::require_aligned(p, 8, site);
  v2u v;
  emu::load_nc(&v, p, 8, site);
  return v;
}
DEV float ld_cg_f32(const float* p) { return *p; }
DEV v4u ld_v4(const void* p SITE_) {
  emu::require_aligned(p, 16, site);
  return *static_cast<const v4u*>(p);
}
DEV v4u ld_cg_v4(const void* p SITE_) { return ld_v4(p PASS_); }
DEV v4u ld_stream_v4(const void* p SITE_) { return ld_v4(p PASS_); }
DEV void st_v4(void* p, v4u v SITE_) {
  emu::require_aligned(p, 16, site);
  *static_cast<v4u*>(p) = v;
}
DEV uint32_t atom_add_relaxed(uint32_t* p, uint32_t v SITE_) { return emu::atomic_add(p, v, false, site); }
DEV uint32_t atom_add_acqrel(uint32_t* p, uint32_t v SITE_) { return emu::atomic_add(p, v, true, site); }
DEV uint32_t atom_max_relaxed(uint32_t* p, uint32_t v SITE_) { return emu::atomic_max(p, v, site); }
DEV void red_add_f32(float* p, float v SITE_) { emu::atomic_add(p, v, site); }
DEV uint32_t ld_acquire(const uint32_t* p SITE_) { return emu::load_acquire(p, site); }
DEV void st_release(uint32_t* p, uint32_t v SITE_) { emu::store_release(p, v, site); }
DEV uint64_t poll_relaxed(const uint64_t* p SITE_) { return emu::poll_relaxed(p, site); }
DEV void st_relaxed(uint64_t* p, uint64_t v SITE_) { emu::store_relaxed(p, v, site); }
DEV v4u poll_relaxed_v4(const v4u* p SITE_) {
  v4u v;
  emu::poll_relaxed16(&v, p, site);
  return v;
}
DEV void st_relaxed_v4(v4u* p, v4u v SITE_) { emu::store_relaxed16(p, &v, site); }

// ---- asynchronous copies into shared memory ----
DEV uint32_t smem_u32(const void* p SITE_) { return emu::shared_offset(p, site); }
DEV void cp_async16(void* dst, const void* src, bool full = true SITE_) {
  emu::cp_async(dst, src, 16, full ? 16 : 0, site);
}
DEV void cp_async_commit() { emu::cp_async_commit(); }
template <int N>
DEV void cp_async_wait() {
  emu::cp_async_wait(N);
}
DEV void mbar_init(uint64_t* bar, uint32_t arrivals SITE_) { emu::mbar_init(bar, arrivals, site); }
DEV void mbar_init_fence() {}
DEV void mbar_arrive(uint64_t* bar SITE_) { emu::mbar_arrive(bar, 0, site); }
DEV void mbar_arrive_tx(uint64_t* bar, uint32_t bytes SITE_) { emu::mbar_arrive(bar, bytes, site); }
DEV void mbar_wait(uint64_t* bar, uint32_t parity SITE_) { emu::mbar_wait(bar, parity, site); }
DEV void bulk_g2s(void* dst, const void* src, uint32_t bytes, uint64_t* bar SITE_) {
  emu::bulk_g2s(dst, src, bytes, bar, site);
}
DEV uint64_t l2_evict_first() { return 0; }
DEV uint64_t l2_evict_last() { return 0; }
DEV void bulk_g2s_hint(void* dst, const void* src, uint32_t bytes, uint64_t* bar, uint64_t SITE_) {
  emu::bulk_g2s(dst, src, bytes, bar, site);
}

// ---- tensor cores ----
namespace emu {

inline float bf16_bits_to_f32(uint32_t bits) {
  bits <<= 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

struct LdmatrixArg {
  uint32_t* r;
  const uint16_t* row;
  uint32_t stride;
};
// kCount loads in one collective. Lane 4r+c gets elements 2c and 2c+1 of row r of each matrix (of column r with
// .trans).
template <bool kTrans, int kCount>
EMU_CALLBACK inline void ldmatrix_lanes(void* const* arg, uint32_t) {
  for (int matrix = 0; matrix < 4 * kCount; matrix++) {
    const uint16_t* rows[8];
    for (int i = 0; i < 8; i++) {
      const LdmatrixArg& from = *static_cast<LdmatrixArg*>(arg[matrix % 4 * 8 + i]);
      rows[i] = from.row + static_cast<size_t>(matrix / 4) * from.stride;
    }
    for (int lane = 0; lane < 32; lane++) {
      const int r = lane >> 2, c = (lane & 3) * 2;
      const uint32_t lo = kTrans ? rows[c][r] : rows[r][c], hi = kTrans ? rows[c + 1][r] : rows[r][c + 1];
      static_cast<LdmatrixArg*>(arg[lane])->r[matrix] = lo | hi << 16;
    }
  }
}
template <bool kTrans, int kCount>
inline void ldmatrix(uint32_t* r, const void* first, uint32_t stride, const char* what, Site site) {
  const uint16_t* row = static_cast<const uint16_t*>(first);
  for (int i = 0; i < kCount; i++) {
    const uint16_t* at = row + static_cast<size_t>(i) * stride;
    shared_offset(at, site);
    require_aligned(at, 16, site);
    observe_read(at, 16, site);
  }
  LdmatrixArg mine{r, row, stride};
  warp_collective(ldmatrix_lanes<kTrans, kCount>, &mine, FULL, false, what, site);
}

struct MmaArg {
  float* c;
  const uint32_t *a, *b;
};
// Eight results of a row, in one register. With loops over floats, which are slow here at -O2 and slower where asan
// checks every element, products were 29 % of the samples of a demo picture.
typedef float Row8 __attribute__((vector_size(32)));
// M x N products in one collective, the same bits as one after another. Fragment layout of mma.m16n8k16: lane = 4 *
// group + pair; see the PTX manual, "Matrix fragments for m16n8k16".
template <int M, int N>
EMU_CALLBACK inline void mma_lanes(void* const* arg, uint32_t) {
  float a[M * 16][16];
  Row8 b[16][N];
  for (int lane = 0; lane < 32; lane++) {
    const MmaArg& mine = *static_cast<MmaArg*>(arg[lane]);
    const int group = lane >> 2, pair = (lane & 3) * 2;
    for (int m = 0; m < M; m++)
      for (int i = 0; i < 4; i++) {
        const uint32_t word = mine.a[m * 4 + i];
        float* row = &a[m * 16 + group + (i & 1) * 8][pair + (i >> 1) * 8];
        row[0] = bf16_bits_to_f32(word & 0xffff), row[1] = bf16_bits_to_f32(word >> 16);
      }
    for (int n = 0; n < N; n++)
      for (int i = 0; i < 2; i++) {
        const uint32_t word = mine.b[n * 2 + i];
        b[pair + i * 8][n][group] = bf16_bits_to_f32(word & 0xffff);
        b[pair + i * 8 + 1][n][group] = bf16_bits_to_f32(word >> 16);
      }
  }
  // As many sums at once as there are registers: each waits for its own last addition only.
  constexpr int kCols = N % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1, kRows = kCols == 4 ? 2 : 4;
  for (int first = 0; first < M * 16; first += kRows)
    for (int left = 0; left < N; left += kCols) {
      Row8 sum[kRows][kCols] = {};
#pragma GCC unroll 16
      for (int k = 0; k < 16; k++)
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++)
#pragma GCC unroll 4
          for (int n = 0; n < kCols; n++) sum[r][n] += a[first + r][k] * b[k][left + n];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        const int row = first + r, block = row / 16 * N + left, half = (row >> 3 & 1) * 2;
#pragma GCC unroll 4
        for (int n = 0; n < kCols; n++)
#pragma GCC unroll 4
          for (int pair = 0; pair < 4; pair++) {
            float* c = static_cast<MmaArg*>(arg[(row & 7) * 4 + pair])->c + (block + n) * 4 + half;
            c[0] += sum[r][n][pair * 2], c[1] += sum[r][n][pair * 2 + 1];
          }
      }
    }
}

}  // namespace emu
DEV void ldmatrix_x4(uint32_t (&r)[4], const void* row SITE_) {
  emu::ldmatrix<false, 1>(r, row, 0, "ldmatrix_x4", site);
}
DEV void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row SITE_) {
  emu::ldmatrix<true, 1>(r, row, 0, "ldmatrix_x4_trans", site);
}
template <int N, int W>
DEV void ldmatrix_x4_all(uint32_t (&r)[N][W], const bf16* row, uint32_t stride SITE_) {
  emu::ldmatrix<false, N * W / 4>(r[0], row, stride, "ldmatrix_x4_all", site);
}
template <int N, int W>
DEV void ldmatrix_x4_trans_all(uint32_t (&r)[N][W], const bf16* row, uint32_t stride SITE_) {
  emu::ldmatrix<true, N * W / 4>(r[0], row, stride, "ldmatrix_x4_trans_all", site);
}
template <int M, int N>
DEV void mma_bf16_all(float (&c)[M][N][4], const uint32_t (&a)[M][4], const uint32_t (&b)[N][2] SITE_) {
  emu::MmaArg mine{c[0][0], a[0], b[0]};
  emu::warp_collective(emu::mma_lanes<M, N>, &mine, FULL, false, "mma_bf16_all", site);
}
DEV void mma_bf16_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] SITE_) {
  emu::MmaArg mine{c, a, b};
  emu::warp_collective(emu::mma_lanes<1, 1>, &mine, FULL, false, "mma_bf16_16816", site);
}

// ---- arithmetic: the exact functions where the device has approximations ----
DEV float as_f32(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
DEV uint32_t as_u32(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
DEV float fast_exp2(float x) { return exp2f(x); }
DEV float fast_exp(float x) { return expf(x); }
DEV float fast_rsqrt(float x) { return 1.0f / sqrtf(x); }
DEV float fast_div(float a, float b) { return a / b; }
DEV void fast_sincos(float x, float* s, float* c) { *s = sinf(x), *c = cosf(x); }
DEV float f_min(float a, float b) { return fminf(a, b); }
DEV float f_max(float a, float b) { return fmaxf(a, b); }
DEV float f_fma(float a, float b, float c) { return fmaf(a, b, c); }
DEV float f_sqrt(float x) { return sqrtf(x); }
DEV float f_exp(float x) { return expf(x); }
DEV float f_log(float x) { return logf(x); }
DEV float f_rint(float x) { return rintf(x); }
DEV float f_abs(float x) { return fabsf(x); }
namespace emu {
// Round to nearest even; every NaN becomes the one that cvt.rn.bf16x2 gives.
inline uint32_t bf16_bits(float f) {
  const uint32_t u = as_u32(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
}  // namespace emu
DEV uint32_t pack_bf16(float lo, float hi) { return emu::bf16_bits(lo) | emu::bf16_bits(hi) << 16; }
namespace emu {
// The number whose code has no sign: mantissa / 8 * 2^(exponent - 7), without the leading one below 2^-6.
inline float e4m3_magnitude(uint32_t code) {
  const int exponent = static_cast<int>(code >> 3), mantissa = static_cast<int>(code & 7);
  return exponent ? ldexpf(8.0f + mantissa, exponent - 10) : ldexpf(mantissa, -9);
}
}  // namespace emu
DEV uint8_t f32_to_e4m3(float f) {
  if (f != f) return 0x7f;
  const uint32_t sign = as_u32(f) >> 24 & 0x80u;
  const float size = fabsf(f);
  if (size >= 448.0f) return static_cast<uint8_t>(sign | 0x7e);
  // Below 2^-6 the steps are 2^-9 wide; a size that rounds up to 2^-6 gets that number's code.
  if (size < 0.015625f) return static_cast<uint8_t>(sign | static_cast<uint32_t>(rintf(size * 512.0f)));
  const uint32_t bits = as_u32(size), rounded = (bits + 0x7ffff + (bits >> 20 & 1)) >> 20;
  const uint32_t code = rounded - ((127 - 7) << 3);
  return static_cast<uint8_t>(sign | (code < 0x7e ? code : 0x7e));
}
DEV float e4m3_to_f32(uint8_t code) {
  if ((code & 0x7f) == 0x7f) return as_f32(0x7fffffffu);
  const float size = emu::e4m3_magnitude(code & 0x7fu);
  return code & 0x80 ? -size : size;
}
