/* Product added into the residual stream: the body that o_proj and down share.
 *
 *   x[m, n] += E(w[n, :] in[m, :] + bias[n])                           in [M, K] E, w [D, K] E, x [M, D] float
 *
 * The product is rounded to E before the addition, as a Linear stores it; the sum stays float. Each element of x
 * has one owner, so the in-place addition needs no atomics and gives the same bits every time.
 */
#pragma once
#include "gemm_tile.cuh"
#include "gemv.cuh"

template <class E, bool TILE>
DEV void project(const ProjectParams& p) {
  const E* w = ptr<const E>(p.w);
  const E* bias = ptr<const E>(p.bias);
  float* x = ptr<float>(p.x);
  auto weight = [&](uint32_t unit, uint32_t which) -> const E* {
    const uint32_t out = unit * 2 + which;
    return out < p.hidden ? w + size_t(out) * p.inner : nullptr;
  };
  auto emit = [&](uint32_t row, uint32_t unit, float a, float b) {
    const uint32_t out = unit * 2;
    float* to = x + size_t(row) * p.hidden + out;
    to[0] += round_to<E>(bias ? a + to_f32(bias[out]) : a);
    if (out + 1 < p.hidden) to[1] += round_to<E>(bias ? b + to_f32(bias[out + 1]) : b);
  };

  const uint32_t units = (p.hidden + 1) / 2;
  griddep_launch();
  if (!TILE) gemv_prefetch<E>(p.inner, units, weight);
  griddep_wait();
  const Raw<E> h{ptr<const E>(p.in)};
  const bool vec = p.inner % 8 == 0 && aligned16(p.in | p.w);
  if (TILE) {
    gemm_tile<E>(h, p.rows, p.inner, units, vec, weight, emit);
  } else {
    gemv<E>(h, p.rows, p.inner, units, vec, weight, emit);
  }
}
