/* Final RMSNorm and lm_head: the logits of the last row of every sequence.
 *
 *   h[s, :] = E(E(x[s, :] / rms(x[s, :])) * norm_w)                    x [S, D] float; h to norm_out if asked for
 *   logits[s, v] = E(w[v, :] h[s, :])                                  w [V, D] E, logits [S, V] float
 *
 * Rounded to E: the normalised x, h, the logits (a Linear stores them so, and greedy text breaks ties among rounded
 * values). Accumulation in float. Bound at 14B: 1.56 GB of bf16 weights per text token; image tokens never run it.
 * A unit (gemv.cuh) is two neighbouring logits. Variants: plain.
 */
#include "final_norm.cuh"

template <class E>
DEV void lm_head(const LmHeadParams& p) {
  const E* w = ptr<const E>(p.w);
  float* logits = ptr<float>(p.logits);
  auto weight = [&](uint32_t unit, uint32_t which) -> const E* {
    const uint32_t out = unit * 2 + which;
    return out < p.vocab ? w + size_t(out) * p.hidden : nullptr;
  };
  auto emit = [&](uint32_t row, uint32_t unit, float a, float b) {
    const uint32_t out = unit * 2;
    float* to = logits + size_t(row) * p.vocab + out;
    to[0] = round_to<E>(a);
    if (out + 1 < p.vocab) to[1] = round_to<E>(b);
  };

  const uint32_t units = (p.vocab + 1) / 2;
  griddep_launch();
  gemv_prefetch<E>(p.hidden, units, weight);
  griddep_wait();
  const Normed<E> h{ptr<const float>(p.x), ptr<const E>(p.norm_w), nullptr, p.eps};
  if (p.norm_out)
    write_norm(ptr<E>(p.norm_out), h, p.rows, p.hidden, p.hidden % 8 == 0 && aligned16(p.x));
  const bool vec = p.hidden % 8 == 0 && aligned16(p.x | p.norm_w | p.w);
  gemv<E>(h, p.rows, p.hidden, units, vec, weight, emit);
}

KERNEL(lm_head_plain_f32, LmHeadParams, 256, 2) { lm_head<float>(p); }
KERNEL(lm_head_plain_bf16, LmHeadParams, 256, 2) { lm_head<bf16>(p); }
