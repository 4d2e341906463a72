/* The final RMSNorm kept in memory, for the ops that have it fused and are asked for it (out_proj, lm_head). */
#pragma once
#include "gemv.cuh"

/* norm_out[m, :] = h[m, :] for all rows [rows, hidden]; every block writes its share. All threads call it. */
template <class E>
DEV void write_norm(E* norm_out, const Normed<E>& h, uint32_t rows, uint32_t hidden, bool vec) {
  SMEM(float, inverse_rms, kRowGroup);
  for (uint32_t row0 = 0; row0 < rows; row0 += kRowGroup) {
    const uint32_t n = rows - row0 < kRowGroup ? rows - row0 : kRowGroup;
    prepare(h, inverse_rms, row0, n, hidden, vec);
    for (uint32_t i = bid_x() * kThreads + tid_x(); i < n * hidden; i += nbid_x() * kThreads) {
      const size_t at = size_t(row0) * hidden + i;
      norm_out[at] = from_f32<E>(normed_value(h, h.x[at], inverse_rms[i / hidden], i % hidden));
    }
  }
}
