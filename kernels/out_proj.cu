/* Final RMSNorm and image_out_projector, for the last row of every sequence.
 *
 *   h[s, :] = E(E(x[s, :] / rms(x[s, :])) * norm_w)                    x [S, D] float; h to norm_out if asked for
 *   c[s, :] = E(w E(h[s, :] + pos_embed[token, :]) + bias)             w [D, D] E; pos_embed optional
 *
 * Rounded to E: the normalised x, h, the sum with the position row, c. Accumulation in float.
 * Bound at 14B: 52.4 MB of bf16 weights per token.
 * A unit (gemv.cuh) is two neighbouring outputs. Variants: plain; from packed weights stream and ring:
 * product.cuh.
 */
#include "final_norm.cuh"
#include "product.cuh"

template <class E, Loop LOOP>
DEV void out_proj(const OutProjParams& p) {
  const E* bias = ptr<const E>(p.bias);
  E* c = ptr<E>(p.c);
  auto emit = [&](uint32_t row, uint32_t out, float sum) {
    c[size_t(row) * p.hidden + out] = from_f32<E>(sum + to_f32(bias[out]));
  };

  const Product shape = {
      p.rows, p.hidden,  (p.hidden + 1) / 2, p.hidden % 8 == 0 && aligned16(p.x | p.norm_w | p.pos_embed | p.w),
      p.w,    p.partial, p.arrivals,         p.next};
  auto activations = [&] {
    Normed<E> h{ptr<const float>(p.x), ptr<const E>(p.norm_w), nullptr, p.eps};
    write_norm(ptr<E>(p.norm_out), h, p.rows, p.hidden);
    if (p.pos_embed) {
      const uint32_t token = ptr<const GenerationState>(p.state)->token;
      /* The table ends before the image does only if the request was not checked: no row is added then. */
      if (token < p.pos_rows) h.add = ptr<const E>(p.pos_embed) + size_t(token) * p.hidden;
    }
    return h;
  };
  row_product<LOOP, E>(shape, p.hidden, activations, emit);
}

KERNEL(out_proj_plain_f32, OutProjParams, 256, 2) { out_proj<float, Loop::kPlain>(p); }
KERNEL(out_proj_plain_bf16, OutProjParams, 256, 2) { out_proj<bf16, Loop::kPlain>(p); }
KERNEL(out_proj_stream_bf16, OutProjParams, 256, 2) { out_proj<bf16, Loop::kStream>(p); }
KERNEL(out_proj_ring_bf16, OutProjParams, 256, 2) { out_proj<bf16, Loop::kRing>(p); }
