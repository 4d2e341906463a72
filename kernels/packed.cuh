/* Weights in the order "tiles" (src/weights/pack.rs), and one step of multiplication with them.
 *
 *   sum[16 weight rows, 8 activation rows] += w[16, 32 of K] h[8, 32 of K]^T        w, h bf16, sum float
 *
 * Tile t holds the units 8t .. 8t+7 (gemv.cuh): its row g is half 0 of unit 8t+g, its row g+8 half 1. A step is 32 of
 * K. Steps follow one another along K, tiles along the units: the matrix is one linear stream of 1024-byte steps.
 * Within a step, lane l = 4g + c owns k = 8c .. 8c+7 of the rows g and g+8: 16 bytes for each of two
 * mma.m16n8k16, which then multiply k = 8c + {0,1 | 2,3} and 8c + {4,5 | 6,7}. K is permuted alike in both operands,
 * so that the other one is 16 contiguous bytes of a row-major activation.
 */
#pragma once
#include "gemv.cuh"

static constexpr uint32_t kStepK = 32;
static constexpr uint32_t kStepBytes = 1024;
/* Units, and so half the weight rows, of a tile. */
static constexpr uint32_t kUnitsPerTile = 8;
/* Activation rows of a step. */
static constexpr uint32_t kStepRows = 8;

/* Which of the products' loops (product.cuh) a kernel runs. */
enum class Loop { kPlain, kTile, kStream, kRing, kMma };

/* What a loop over packed weights is given beside its activations and its epilogue. */
struct Product {
  uint32_t rows, inner, units;
  bool vec;                   /* as for gemv */
  uint64_t w;                 /* [units, 2, K] E as stored, or packed [tiles, K / 32, 512] bf16 */
  uint64_t partial, arrivals; /* stream.cuh */
  NextWeights next;           /* stream.cuh */
};

/* Squares of x[k .. k + 7] and of every eight APART further, below n, in this order. AHEAD times eight are asked for
 * before the first is used: unrolled, a loop with an unknown end waits at every turn. */
template <uint32_t APART, uint32_t AHEAD>
DEV float sum_of_squares(const float* x, uint32_t k, uint32_t n) {
  float sum = 0.0f;
#pragma unroll 1
  for (; k < n; k += AHEAD * APART) {
    float f[AHEAD][8] = {};
#pragma unroll
    for (uint32_t u = 0; u < AHEAD; u++)
      if (k + u * APART < n) load8(f[u], x + k + u * APART);
#pragma unroll
    for (uint32_t u = 0; u < AHEAD; u++)
#pragma unroll
      for (int i = 0; i < 8; i++) sum += f[u][i] * f[u][i];
  }
  return sum;
}

/* normalise8 (gemv.cuh) packed, w being norm_w from k on: two elements per rounding, and what is rounded stays so. */
DEV v4u normalise8_packed(const float (&x)[8], const Normed<bf16>& h, v4u w, float inverse_rms, uint32_t k) {
  const uint32_t weight[4] = {w.x, w.y, w.z, w.w};
  uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t unit = pack_bf16(x[2 * i] * inverse_rms, x[2 * i + 1] * inverse_rms);
    out[i] = pack_bf16(bf_lo(unit) * bf_lo(weight[i]), bf_hi(unit) * bf_hi(weight[i]));
  }
  if (h.add) {
    const v4u u = ld_v4(h.add + k);
    const uint32_t add[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
    for (int i = 0; i < 4; i++) out[i] = pack_bf16(bf_lo(out[i]) + bf_lo(add[i]), bf_hi(out[i]) + bf_hi(add[i]));
  }
  return {out[0], out[1], out[2], out[3]};
}

/* w: the lane's 16 bytes of the step's first or second multiplication, whose part of h is the first or second half. */
DEV void multiply_half(float (&sum)[4], v4u w, v4u h, uint32_t half SITE_) {
  const uint32_t a[4] = {w.x, w.y, w.z, w.w}, b[2] = {half ? h.z : h.x, half ? h.w : h.y};
  mma_bf16_16816(sum, a, b PASS_);
}
DEV void multiply_step(float (&sum)[4], v4u low, v4u high, v4u h SITE_) {
  multiply_half(sum, low, h, 0 PASS_);
  multiply_half(sum, high, h, 1 PASS_);
}

/* The epilogue of one tile's sums for the rows row0 .. row0+7: a lane has both halves of unit g for two rows. WHOLE:
 * all of them exist. Between two tests a lane's results would wait for one another. */
template <bool WHOLE = false, class Emit>
DEV void emit_tile(const float (&sum)[4], uint32_t tile, uint32_t units, uint32_t row0, uint32_t rows, Emit emit) {
  const uint32_t unit = tile * kUnitsPerTile + lane_id() / 4, row = row0 + lane_id() % 4 * 2;
  if (!WHOLE && unit >= units) return;
  if (WHOLE || row < rows) emit(row, unit, sum[0], sum[2]);
  if (WHOLE || row + 1 < rows) emit(row + 1, unit, sum[1], sum[3]);
}
