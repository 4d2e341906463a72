/* A Linear layer: y[m, :] = act(E(w x[m, :] + bias)).
 *
 * x [M, K] E, w [O, K] E, bias [O] E optional, y [M, O] E or float.
 * Rounded to E: the sum after the bias, and silu of it. out_f32 only widens what a Linear would store, so that
 * image_in_projector feeds the float residual stream, and an lm_head behind a before_lm_head the logits, with the
 * values of the official code. Bound for few rows: the bytes of w; many rows: 2 K O FLOP per row.
 * A unit (gemv.cuh) is two neighbouring outputs.
 * Variants: plain (warp per unit, one pass over w for up to 8 rows), tile (64 x 64 tiles, many rows); from packed
 * weights stream, ring (equal shares per SM) and mma (tensor-core tiles, many rows): product.cuh.
 */
#include "product.cuh"

template <class E, Loop LOOP>
DEV void linear(const LinearParams& p) {
  const E* bias = ptr<const E>(p.bias);
  auto emit = [&](uint32_t row, uint32_t out, float sum) {
    float y = round_to<E>(bias ? sum + to_f32(bias[out]) : sum);
    if (p.silu) y = round_to<E>(silu<E>(y));
    const size_t at = size_t(row) * p.outputs + out;
    if (p.out_f32) {
      ptr<float>(p.y)[at] = y;
    } else {
      ptr<E>(p.y)[at] = from_f32<E>(y);
    }
  };

  const Product shape = {p.rows, p.inner,   (p.outputs + 1) / 2, p.inner % 8 == 0 && aligned16(p.x | p.w),
                         p.w,    p.partial, p.arrivals,          {}};
  auto activations = [&] { return Raw<E>{ptr<const E>(p.x)}; };
  row_product<LOOP, E>(shape, p.outputs, activations, emit);
}

KERNEL(linear_plain_f32, LinearParams, 256, 2) { linear<float, Loop::kPlain>(p); }
KERNEL(linear_plain_bf16, LinearParams, 256, 2) { linear<bf16, Loop::kPlain>(p); }
KERNEL(linear_tile_f32, LinearParams, 256, 2) { linear<float, Loop::kTile>(p); }
KERNEL(linear_tile_bf16, LinearParams, 256, 2) { linear<bf16, Loop::kTile>(p); }
KERNEL(linear_stream_bf16, LinearParams, 256, 2) { linear<bf16, Loop::kStream>(p); }
KERNEL(linear_ring_bf16, LinearParams, 256, 2) { linear<bf16, Loop::kRing>(p); }
KERNEL(linear_mma_bf16, LinearParams, kMmaThreads, 1) { linear<bf16, Loop::kMma>(p); }
