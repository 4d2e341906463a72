/* RMSNorm of rows of the residual stream, for products of many rows: h[m, :] = E(E(x[m, :] / rms(x[m, :])) * norm_w).
 *
 *   x [M, D] float, norm_w [D] E, h [M, D] E
 *
 * Rounded to E: the normalised x and h. The bits are those that qkv and gate_up make of x themselves (mma.cuh); there
 * every block of a prompt's product would read its 128 rows of x twice, as float, where it now reads h once.
 * Bound by latency: 30 KB per row at 14B.
 * Grid: two warps per block, a warp per row, so that a prompt's rows are on all SMs.
 */
#include "packed.cuh"

static constexpr uint32_t kBlockWarps = 2;

template <class E>
DEV void norm_rows(const NormRowsParams& p) {
  griddep_launch();
  griddep_wait();
  const uint32_t row = bid_x() * kBlockWarps + warp_id(), width = p.hidden;
  if (row >= p.rows) return;
  const Normed<E> normed = {ptr<const float>(p.x), ptr<const E>(p.norm_w), nullptr, p.eps};
  E* h = ptr<E>(p.h) + static_cast<size_t>(row) * width;
  const float* x = normed.x + static_cast<size_t>(row) * width;
  const bool vec = width % 8 == 0 && aligned16(p.x | p.norm_w | p.h);
  float sum = 0.0f;
  if (vec) {
    sum = sum_of_squares<256, 10>(x, lane_id() * 8, width);
  } else {
    for (uint32_t k = lane_id(); k < width; k += 32) sum += x[k] * x[k];
  }
  const float inverse_rms = 1.0f / f_sqrt(warp_sum(sum) / static_cast<float>(width) + p.eps);
  if (!vec) {
    for (uint32_t k = lane_id(); k < width; k += 32)
      h[k] = from_f32<E>(activation(normed, &inverse_rms, row, k, width));
    return;
  }
#pragma unroll 4
  for (uint32_t k = lane_id() * 8; k < width; k += 256) {
    float f[8];
    activation8(f, normed, &inverse_rms, row, k, width);
    store8(h + k, f);
  }
}

KERNEL(norm_rows_plain_f32, NormRowsParams, 64, 8) { norm_rows<float>(p); }
KERNEL(norm_rows_plain_bf16, NormRowsParams, 64, 8) { norm_rows<bf16>(p); }
