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
  bool vec;         /* as for gemv */
  uint64_t w;       /* [units, 2, K] E as stored, or packed [tiles, K / 32, 512] bf16 */
  uint64_t partial, arrivals; /* stream.cuh */
};

/* low and high: the lane's 16 bytes of the step's first and second multiplication. */
DEV void multiply_step(float (&sum)[4], v4u low, v4u high, v4u h SITE_) {
  const uint32_t a[4] = {low.x, low.y, low.z, low.w}, b[4] = {high.x, high.y, high.z, high.w};
  const uint32_t h_low[2] = {h.x, h.y}, h_high[2] = {h.z, h.w};
  mma_bf16_16816(sum, a, h_low PASS_);
  mma_bf16_16816(sum, b, h_high PASS_);
}

/* The epilogue of one tile's sums for the rows row0 .. row0+7: a lane has both halves of unit g for two rows. */
template <class Emit>
DEV void emit_tile(const float (&sum)[4], uint32_t tile, uint32_t units, uint32_t row0, uint32_t rows, Emit emit) {
  const uint32_t unit = tile * kUnitsPerTile + lane_id() / 4, row = row0 + lane_id() % 4 * 2;
  if (unit >= units) return;
  if (row < rows) emit(row, unit, sum[0], sum[2]);
  if (row + 1 < rows) emit(row + 1, unit, sum[1], sum[3]);
}
