/* What the variants of flow_chain share around the network: the state, guidance, the solver's steps, the token.
 *
 *   x <- keep * x + velocity * guided(v_raw) + noise * draw        v_raw [R, B, K] of the images at hand, x [B, K]
 *
 * Every block computes all of it for itself, in warps 0 to kWarps - 1, a warp per image; the first block writes what
 * leaves the kernel. Nothing here is a barrier. Not bound by anything: 64 values per image.
 */
#pragma once
#include "dev.cuh"

/* Warps that compute. */
static constexpr uint32_t kWarps = 8;
static constexpr float kNormEps = 1e-6f;

DEV uint32_t sequences(const FlowChainParams& p) { return p.images * p.branches; }
/* Outputs of flow_modulation per sequence. */
DEV size_t mod_width(const FlowChainParams& p) { return static_cast<size_t>(3 * p.blocks + 2) * p.width; }

/* The images at hand, of all. */
struct Images {
  uint32_t first, count;
};

/* This token's draws. */
DEV const float* draws_of(const FlowChainParams& p, uint32_t token) {
  const size_t slot_values = static_cast<size_t>(p.draws_per_slot) * p.images * p.token_dim;
  return ptr<const float>(p.draws) + (p.draw_slots > 1 ? token : 0) * slot_values;
}

/* x before evaluation n where it is given: the initial noise, or every state in teacher forcing. */
DEV void set_state(const FlowChainParams& p, float* x, Images at, uint32_t n, const float* draws) {
  const float* from = p.forced_x ? ptr<const float>(p.forced_x) + static_cast<size_t>(n) * p.images * p.token_dim
                      : n == 0   ? draws
                                 : nullptr;
  if (!from) return;
  from += static_cast<size_t>(at.first) * p.token_dim;
  for (uint32_t b = warp_id(); b < at.count; b += kWarps)
    for (uint32_t k = lane_id(); k < p.token_dim; k += 32) x[b * p.token_dim + k] = from[b * p.token_dim + k];
}

/* Velocity of element i of [B, K] after guidance; v(r, i) is branch r's. Branches: cond, nothing; or cond, image only,
 * nothing. */
template <class Velocity>
DEV float guided_velocity(const FlowChainParams& p, float cfg, float cfg_img, uint32_t i, Velocity v) {
  const float cond = v(0, i);
  if (p.branches == 1) return cond;
  const float second = v(1, i);
  if (p.branches == 2) return f_fma(cfg, cond - second, second);
  const float nothing = v(2, i);
  return f_fma(cfg, cond - second, f_fma(cfg_img, second - nothing, nothing));
}

/* A token's scales. */
struct Guidance {
  float cfg, cfg_img;
};
DEV Guidance guidance_of(const FlowChainParams& p, uint32_t token) {
  const float* scales = ptr<const float>(p.guidance) + 2 * static_cast<size_t>(token);
  return {scales[0], scales[1]};
}

/* Element i of [B, K] of the draw that step n takes. One that was never made would go unnoticed: it is NaN, and so is
 * the token. */
DEV float draw_of(const FlowChainParams& p, Images at, uint32_t n, const float* draws, uint32_t i) {
  const size_t values = static_cast<size_t>(p.images) * p.token_dim;
  if (n + 1 >= p.draws_per_slot) return as_f32(0x7fc00000u);
  return draws[(n + 1) * values + static_cast<size_t>(at.first) * p.token_dim + i];
}

/* x after evaluation n: guidance, norm rescale, solver. draw(i) is element i of the draw that it takes. */
template <class Velocity, class Draw>
DEV void step_solver(const FlowChainParams& p, float* state, Images at, uint32_t n, Guidance guidance, SolverStep step,
                     Velocity velocity, Draw draw) {
  const float cfg = guidance.cfg, cfg_img = guidance.cfg_img;
  const bool rescale = p.rescale && p.branches > 1 && cfg > 1.0f && (p.branches == 2 || cfg_img > 1.0f);
  const size_t values = static_cast<size_t>(p.images) * p.token_dim;
  for (uint32_t b = warp_id(); b < at.count; b += kWarps) {
    float factor = 1.0f;
    if (rescale) {
      float cond = 0.0f, guided = 0.0f;
      for (uint32_t k = lane_id(); k < p.token_dim; k += 32) {
        const float c = velocity(0, b * p.token_dim + k);
        const float v = guided_velocity(p, cfg, cfg_img, b * p.token_dim + k, velocity);
        cond = f_fma(c, c, cond);
        guided = f_fma(v, v, guided);
      }
      factor = f_min(f_sqrt(warp_sum(cond)) / (f_sqrt(warp_sum(guided)) + 1e-6f), 1.0f);
    }
    for (uint32_t k = lane_id(); k < p.token_dim; k += 32) {
      const uint32_t i = b * p.token_dim + k;
      const size_t out = static_cast<size_t>(at.first) * p.token_dim + i;
      const float v = guided_velocity(p, cfg, cfg_img, i, velocity) * factor;
      float x = f_fma(step.velocity, v, step.keep * state[i]);
      if (step.noise != 0.0f) x = f_fma(step.noise, draw(i), x);
      state[i] = x;
      if (bid_x() != 0) continue;
      for (uint32_t r = 0; p.trace_v_raw && r < p.branches; r++)
        ptr<float>(p.trace_v_raw)[(n * p.branches + r) * values + out] = velocity(r, i);
      if (p.trace_v) ptr<float>(p.trace_v)[n * values + out] = v;
      if (p.trace_x) ptr<float>(p.trace_x)[n * values + out] = x;
    }
  }
}

/* x becomes the token; the first block stores it and reports one that is not finite. */
template <class E>
DEV void finish_token(const FlowChainParams& p, float* state, Images at, uint32_t token) {
  const float count = static_cast<float>(p.token_dim);
  bool bad = false;
  for (uint32_t b = warp_id(); b < at.count; b += kWarps) {
    float* x = state + b * p.token_dim;
    float mean = 0.0f, inv = 1.0f;
    for (uint32_t k = lane_id(); k < p.token_dim; k += 32) {
      x[k] = round_to<E>(x[k]);
      mean += x[k];
      if (bid_x() == 0 && p.sampled) ptr<float>(p.sampled)[(at.first + b) * p.token_dim + k] = x[k];
    }
    if (p.use_norm) {
      mean = warp_sum(mean) / count;
      float square = 0.0f;
      for (uint32_t k = lane_id(); k < p.token_dim; k += 32) square = f_fma(x[k] - mean, x[k] - mean, square);
      inv = 1.0f / f_sqrt(warp_sum(square) / count + kNormEps);
    }
    for (uint32_t k = lane_id(); k < p.token_dim; k += 32) {
      const float sampled = x[k];
      if (p.use_norm) x[k] = round_to<E>((sampled - mean) * inv);
      if (!is_finite(sampled) || !is_finite(x[k])) bad = true;
      const size_t to = (static_cast<size_t>(at.first + b) * p.tokens_total + token) * p.token_dim + k;
      if (bid_x() == 0) ptr<E>(p.tokens)[to] = from_f32<E>(x[k]);
    }
  }
  /* The first token that went wrong stays on record; all writers of this one agree. */
  uint32_t* nonfinite = &ptr<GenerationState>(p.state)->nonfinite;
  if (bad && bid_x() == 0 && atom_max_relaxed(nonfinite, 0) == 0) atom_max_relaxed(nonfinite, 1 + token);
}
