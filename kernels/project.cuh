/* Product added into the residual stream: the body that o_proj and down share.
 *
 *   x[m, n] += E(w[n, :] in[m, :] + bias[n])                           in [M, K] E, w [D, K] E, x [M, D] float
 *
 * The product is rounded to E before the addition, as a Linear stores it; the sum stays float. Each element of x
 * has one owner, so the in-place addition needs no atomics and gives the same bits every time.
 */
#pragma once
#include "product.cuh"

template <class E, Loop LOOP>
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

  const Product shape = {p.rows, p.inner, (p.hidden + 1) / 2, p.inner % 8 == 0 && aligned16(p.in | p.w),
                         p.w,    p.partial, p.arrivals};
  auto activations = [&] { return Raw<E>{ptr<const E>(p.in)}; };
  product<LOOP, E>(shape, activations, weight, emit);
}
