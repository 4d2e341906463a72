/* Final RMSNorm and lm_head: the logits of the last row of every sequence.
 *
 *   h[s, :] = E(E(x[s, :] / rms(x[s, :])) * norm_w)                    x [S, D] float; h to norm_out if asked for
 *   logits[s, v] = E(w[v, :] h[s, :])                                  w [V, D] E, logits [S, V] float
 *
 * Rounded to E: the normalised x, h, the logits (a Linear stores them so, and greedy text breaks ties among rounded
 * values). Accumulation in float. Bound at 14B: 1.56 GB of bf16 weights per text token; image tokens never run it.
 * A unit (gemv.cuh) is two neighbouring logits. Variants: plain, also where the embedding table is the weight; from
 * packed weights stream and ring: product.cuh.
 */
#include "final_norm.cuh"
#include "product.cuh"

template <class E, Loop LOOP>
DEV void lm_head(const LmHeadParams& p) {
  float* logits = ptr<float>(p.logits);
  auto emit = [&](uint32_t row, uint32_t out, float sum) { logits[size_t(row) * p.vocab + out] = round_to<E>(sum); };

  const Product shape = {p.rows, p.hidden,  (p.vocab + 1) / 2, p.hidden % 8 == 0 && aligned16(p.x | p.norm_w | p.w),
                         p.w,    p.partial, p.arrivals,        {}};
  auto activations = [&] {
    const Normed<E> h{ptr<const float>(p.x), ptr<const E>(p.norm_w), nullptr, p.eps};
    write_norm(ptr<E>(p.norm_out), h, p.rows, p.hidden);
    return h;
  };
  row_product<LOOP, E>(shape, p.vocab, activations, emit);
}

KERNEL(lm_head_plain_f32, LmHeadParams, 256, 2) { lm_head<float, Loop::kPlain>(p); }
KERNEL(lm_head_plain_bf16, LmHeadParams, 256, 2) { lm_head<bf16, Loop::kPlain>(p); }
KERNEL(lm_head_stream_bf16, LmHeadParams, 256, 2) { lm_head<bf16, Loop::kStream>(p); }
KERNEL(lm_head_ring_bf16, LmHeadParams, 256, 2) { lm_head<bf16, Loop::kRing>(p); }
