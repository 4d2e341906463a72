/* The final RMSNorm kept in memory, for the ops that have it fused and are asked for it (out_proj, lm_head). */
#pragma once
#include "gemv.cuh"

/* norm_out[m, :] = h[m, :] for all rows [rows, hidden], if there is a norm_out; every block of the grid's two axes
 * writes its share. All threads call it. */
template <class E>
DEV void write_norm(E* norm_out, const Normed<E>& h, uint32_t rows, uint32_t hidden) {
  SMEM(float, inverse_rms, kRowGroup);
  if (!norm_out) return;
  const bool vec = hidden % 8 == 0 && aligned16(reinterpret_cast<uint64_t>(h.x));
  const uint32_t block = bid_y() * nbid_x() + bid_x(), blocks = nbid_x() * nbid_y();
  for (uint32_t row0 = 0; row0 < rows; row0 += kRowGroup) {
    const uint32_t n = rows - row0 < kRowGroup ? rows - row0 : kRowGroup;
    prepare(h, inverse_rms, row0, n, hidden, vec);
    for (uint32_t i = block * kThreads + tid_x(); i < n * hidden; i += blocks * kThreads) {
      const size_t at = size_t(row0) * hidden + i;
      norm_out[at] = from_f32<E>(normed_value(h, h.x[at], inverse_rms[i / hidden], i % hidden));
    }
  }
}
