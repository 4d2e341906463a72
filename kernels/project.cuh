/* Product added into the residual stream: the body that o_proj and down share.
 *
 *   x[m, n] += E(w[n, :] in[m, :] + bias[n])                           in [M, K] E, w [D, K] E, x [M, D] float
 *
 * The product is rounded to E before the addition, as a Linear stores it; the sum stays float. Each element of x
 * has one owner, so the in-place addition gives the same bits every time. From packed weights L2 adds: to load, add and
 * store would be a latency of memory per element of a lane, one behind the other, at the end of every launch. That
 * addition takes operands and sums below 2^-126 for zero.
 */
#pragma once
#include "product.cuh"

template <class E, Loop LOOP>
DEV void project(const ProjectParams& p) {
  const E* bias = ptr<const E>(p.bias);
  float* x = ptr<float>(p.x);
  auto emit = [&](uint32_t row, uint32_t out, float sum) {
    float* to = x + size_t(row) * p.hidden + out;
    const float more = round_to<E>(bias ? sum + to_f32(bias[out]) : sum);
    if constexpr (LOOP == Loop::kPlain || LOOP == Loop::kTile) {
      *to += more;
    } else {
      red_add_f32(to, more);
    }
  };

  const Product shape = {p.rows, p.inner,   (p.hidden + 1) / 2, p.inner % 8 == 0 && aligned16(p.in | p.w),
                         p.w,    p.partial, p.arrivals,         p.next};
  auto activations = [&] { return Raw<E>{ptr<const E>(p.in)}; };
  row_product<LOOP, E>(shape, p.hidden, activations, emit);
}
