/* Standard normal draws of one image token, the numbers that eager torch.randn gives on a CUDA device.
 *
 *   draws[j, b, k] = normal(philox4x32_10(key = seed, counter = (offset / 4, e, 0)))
 *   offset = base_offset + 4 * (token * draws_per_token + j),  e = (first_image + b) * token_dim + k
 *
 * Out: draws [draws_per_token, images, token_dim] float; optionally rounded to bf16, as torch makes them in a bf16
 * model. A pure function of (seed, image, token, draw): nothing is carried from launch to launch.
 *
 * torch gives element e to thread e and takes only the first of its four normals as long as one call has no more
 * elements than the card has threads. The host refuses more (ops/randn.rs), because then the numbers would depend on
 * the card's number of SMs.
 *
 * Bound by latency: 13 KB written for 50 draws of one image. One thread per number.
 * Variants: plain.
 */
#include "dev.cuh"

static constexpr uint32_t kThreads = 256;
static constexpr int kRounds = 10;

DEV uint32_t mul_hi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32); }

/* Words 0 and 1 of Philox4x32-10: all that the first normal of a counter needs. */
DEV v2u philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#pragma unroll
  for (int round = 0; round < kRounds; round++) {
    const uint32_t hi0 = mul_hi(0xD2511F53u, c0), lo0 = 0xD2511F53u * c0;
    const uint32_t hi1 = mul_hi(0xCD9E8D57u, c2), lo1 = 0xCD9E8D57u * c2;
    c0 = hi1 ^ c1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ k1;
    c3 = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return v2u{c0, c1};
}

/* The sine branch of cuRAND's Box-Muller. The fused products and the fast sine are part of the stream: torch's own
 * kernel is compiled so, and other roundings would be other noise. */
DEV float first_normal(v2u word) {
  const float inv = 2.3283064e-10f; /* 2^-32 */
  const float inv_2pi = inv * 6.2831855f;
  const float u = f_fma(static_cast<float>(word.x), inv, inv / 2.0f);
  const float v = f_fma(static_cast<float>(word.y), inv_2pi, inv_2pi / 2.0f);
  float sine, cosine;
  fast_sincos(v, &sine, &cosine);
  return f_sqrt(-2.0f * f_log(u)) * sine;
}

/* Grid: all draws of the token / 256, rounded up. Block: 256 threads. */
KERNEL(randn_plain, RandnParams, kThreads, 1) {
  griddep_launch();
  griddep_wait();
  const uint32_t per_draw = p.images * p.token_dim;
  const uint32_t i = bid_x() * kThreads + tid_x();
  if (i >= p.draws_per_token * per_draw) return;
  const uint32_t draw = i / per_draw;
  const uint32_t element = p.first_image * p.token_dim + i % per_draw;
  const uint64_t calls = static_cast<uint64_t>(ptr<const GenerationState>(p.state)->token) * p.draws_per_token + draw;
  const uint64_t position = p.base_offset / 4 + calls;
  const v2u word = philox(static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), element, 0,
                          static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32));
  const float value = first_normal(word);
  ptr<float>(p.draws)[i] = p.round_bf16 ? round_to<bf16>(value) : value;
}
