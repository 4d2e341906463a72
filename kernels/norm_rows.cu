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
static constexpr uint32_t kApart = 256; /* elements between two octets of a lane */
/* Octets of a lane: of x asked for at once, of norm_w on their way before the wait. */
static constexpr uint32_t kAhead = 10, kHeld = 20;

/* A row from 16-byte accesses. The weights come from memory, which has read a layer since they were last here: they are
 * asked for before the wait, all of them up to 5120. */
DEV void norm_row(const NormRowsParams& p, uint32_t row) {
  const uint32_t width = p.hidden;
  const Normed<bf16> normed = {ptr<const float>(p.x), ptr<const bf16>(p.norm_w), nullptr, p.eps};
  const float* x = normed.x + static_cast<size_t>(row) * width;
  bf16* h = ptr<bf16>(p.h) + static_cast<size_t>(row) * width;
  v4u w[kHeld] = {};
  const auto ask = [&](uint32_t k) {
#pragma unroll
    for (uint32_t u = 0; u < kHeld; u++)
      if (k + u * kApart < width) w[u] = ld_stream_v4(normed.norm_w + k + u * kApart);
  };
  ask(lane_id() * 8);
  griddep_wait();
  const float sum = sum_of_squares<kApart, kAhead>(x, lane_id() * 8, width);
  const float inverse_rms = 1.0f / f_sqrt(warp_sum(sum) / static_cast<float>(width) + p.eps);
#pragma unroll 1
  for (uint32_t first = lane_id() * 8; first < width; first += kHeld * kApart) {
    if (first >= kHeld * kApart) ask(first);
#pragma unroll
    for (uint32_t half = 0; half < kHeld; half += kAhead) {
      float f[kAhead][8] = {};
#pragma unroll
      for (uint32_t u = 0; u < kAhead; u++)
        if (first + (half + u) * kApart < width) load8(f[u], x + first + (half + u) * kApart);
#pragma unroll
      for (uint32_t u = 0; u < kAhead; u++) {
        const uint32_t k = first + (half + u) * kApart;
        if (k < width) st_v4(h + k, normalise8_packed(f[u], normed, w[half + u], inverse_rms, k));
      }
    }
  }
}

template <class E>
DEV void norm_rows(const NormRowsParams& p) {
  griddep_launch();
  const uint32_t row = bid_x() * kBlockWarps + warp_id(), width = p.hidden;
  if (row >= p.rows) return;
  if constexpr (sizeof(E) == 2)
    if (width % 8 == 0 && aligned16(p.x | p.norm_w | p.h)) return norm_row(p, row);
  griddep_wait();
  const Normed<E> normed = {ptr<const float>(p.x), ptr<const E>(p.norm_w), nullptr, p.eps};
  const float* x = normed.x + static_cast<size_t>(row) * width;
  float sum = 0.0f;
  for (uint32_t k = lane_id(); k < width; k += 32) sum += x[k] * x[k];
  const float inverse_rms = 1.0f / f_sqrt(warp_sum(sum) / static_cast<float>(width) + p.eps);
  for (uint32_t k = lane_id(); k < width; k += 32)
    ptr<E>(p.h)[static_cast<size_t>(row) * width + k] = from_f32<E>(activation(normed, &inverse_rms, row, k, width));
}

KERNEL(norm_rows_plain_f32, NormRowsParams, 64, 8) { norm_rows<float>(p); }
KERNEL(norm_rows_plain_bf16, NormRowsParams, 64, 4) { norm_rows<bf16>(p); }
