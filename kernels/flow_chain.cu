/* The whole sampler of one image token: N evaluations of the flow head, guidance, the solver's steps, feedback.
 *
 *   x = draw[0]                                                        [B, K] float, kept by every block
 *   for n in 0..N:
 *     h = w_in E(x) + b_in                                             [S, F] float
 *     for m in 0..L:  a = silu(w0 u + b0), u = LN(h; ln_w, ln_b) * (1 + scale) + shift     [S, H] float
 *                     h += gate * (w2 a + b2)
 *     v_raw = E(w_out (LN(h) * (1 + scale) + shift) + b_out)           [S, K]
 *     x = keep * x + velocity * guided(v_raw) + noise * draw[n + 1]
 *   token = use_norm ? E(LN(E(x))) : E(x);  x_next = w_next token + b_next
 *
 * shift, scale and gate come from flow_modulation: they do not depend on x. Rounded to E: x where the network reads
 * it, v_raw, the token before and after its norm. All else is float.
 *
 * Shipped head (L 12, F = H = 1536, bf16): 113.6 MB of weights per evaluation, 2 L + 2 = 26 dependent products, each
 * behind a barrier of the whole grid. Bound by the bytes (38 us per evaluation at 3 TB/s) plus the barriers.
 *
 *   gmem h, a, v_raw -- past L1 --> smem staged [rows][k] float --+
 *   gmem w ---- 16-byte loads ------------------------------------+--> reg sums [2 outputs][rows] --> gmem h, a, v_raw
 *
 * One persistent cooperative grid. Each block owns a contiguous share of every product's outputs and each warp two of
 * them; weights pass once per evaluation for up to eight sequences. Every block recomputes the layer norms and the
 * solver step for itself, which spares a barrier each. A sum's order follows from the width alone: neither grid nor
 * batch nor an image's place in it changes a bit.
 * Variants: plain; ring and resident (flow_ring.cu).
 */
#include "flow_rows.cuh"

/* What stands between two barriers of the grid: one product over all rows. */
enum class Kind { kState, kUp, kDown, kVelocity };
template <class E>
struct Phase {
  Kind kind;
  Matrix<E> m;
  Norm<E> norm;  /* kUp, kVelocity */
  const E* gate; /* kDown: [F] of sequence 0, the next one mod_width further on */
  float* out;
};

/* Phases of one evaluation: input_proj, two per block, the final layer. */
DEV uint32_t phases(const FlowChainParams& p) { return 2 * p.blocks + 2; }

/* Phase i of evaluation n. After the last evaluation there is one more: image_in_projector of the token. */
template <class E>
DEV Phase<E> phase_at(const FlowChainParams& p, uint32_t n, uint32_t i) {
  const size_t width = p.width, mlp_width = p.mlp_width, mod_stride = mod_width(p);
  if (n == p.steps)
    return {Kind::kState,
            {ptr<const E>(p.w_next), ptr<const E>(p.b_next), p.hidden, p.token_dim},
            {},
            nullptr,
            ptr<float>(p.x_next)};
  if (i == 0)
    return {
        Kind::kState, {ptr<const E>(p.w_in), ptr<const E>(p.b_in), p.width, p.token_dim}, {}, nullptr, ptr<float>(p.h)};
  const size_t m = (i - 1) / 2;
  const E* shift = ptr<const E>(p.mod) + n * sequences(p) * mod_stride + 3 * m * width;
  Norm<E> norm = {nullptr, nullptr, shift, shift + width, mod_stride};
  if (m == p.blocks)
    return {Kind::kVelocity,
            {ptr<const E>(p.w_out), ptr<const E>(p.b_out), p.token_dim, p.width},
            norm,
            nullptr,
            ptr<float>(p.v_raw)};
  if (i % 2 == 0)
    return {Kind::kDown,
            {ptr<const E>(p.w2) + m * width * mlp_width, ptr<const E>(p.b2) + m * width, p.width, p.mlp_width},
            norm,
            shift + 2 * width,
            ptr<float>(p.h)};
  norm.gain = ptr<const E>(p.ln_w) + m * width;
  norm.offset = ptr<const E>(p.ln_b) + m * width;
  return {Kind::kUp,
          {ptr<const E>(p.w0) + m * mlp_width * width, ptr<const E>(p.b0) + m * mlp_width, p.mlp_width, p.width},
          norm,
          nullptr,
          ptr<float>(p.a)};
}

/* Stages E(x): elements k0..k0+n of the group's images. */
template <class E>
DEV void stage_state(const FlowChainParams& p, const Shared& sh, Group g, uint32_t k0, uint32_t n) {
  const uint32_t chunk = stage_chunk(g.count, p.token_dim), padded = (n + 7) / 8 * 8;
  for (uint32_t i = tid_x(); i < g.count * padded; i += kThreads) {
    const uint32_t r = i / padded, k = i % padded;
    const float x = k < n ? sh.x[(g.first + r) * p.token_dim + k0 + k] : 0.0f;
    sh.staged[r * chunk + slot(k)] = round_to<E>(x);
  }
}

struct Residual {
  float h, gate;
};

/* The products that read the state have one row per image and give their result to all branches of it; the others have
 * one row per sequence. */
template <class E>
DEV void run_phase(const FlowChainParams& p, const Shared& sh, const Phase<E>& phase) {
  const Kind kind = phase.kind;
  const float* h = ptr<const float>(p.h);
  const uint32_t rows = kind == Kind::kState ? p.images : sequences(p);
  for (uint32_t row0 = 0; row0 < rows; row0 += kRowGroup) {
    const Group g = {row0, umin(kRowGroup, rows - row0)};
    if (kind == Kind::kUp || kind == Kind::kVelocity) norm_statistics(sh, h, g, p.width, kNormEps);
    product<E>(
        sh, phase.m, g,
        [&](uint32_t k0, uint32_t n) {
          if (kind == Kind::kState)
            stage_state<E>(p, sh, g, k0, n);
          else if (kind == Kind::kDown)
            stage_rows(sh, ptr<const float>(p.a), g, p.mlp_width, k0, n);
          else
            stage_normed<E>(sh, h, phase.norm, g, p.width, k0, n);
        },
        [&](uint32_t row, uint32_t o) {
          if (kind != Kind::kDown) return Residual{0.0f, 1.0f};
          return Residual{ld_cg_f32(h + static_cast<size_t>(row) * p.width + o),
                          to_f32(phase.gate[row * mod_width(p) + o])};
        },
        [&](uint32_t row, uint32_t o, float sum, Residual held) {
          float* out = phase.out + static_cast<size_t>(row) * phase.m.outputs + o;
          if (kind == Kind::kUp)
            *out = silu<float>(sum);
          else if (kind == Kind::kDown)
            *out = f_fma(held.gate, sum, held.h);
          else if (kind == Kind::kVelocity)
            *out = round_to<E>(sum);
          else
            for (uint32_t s = row; s < sequences(p); s += p.images, out += p.images * size_t(phase.m.outputs))
              *out = sum;
        });
  }
}

/* Grid: cooperative, any number of blocks up to the number of SMs. Block: 256 threads. Shared: x, then the rows. */
template <class E>
DEV void flow_chain(const FlowChainParams& p) {
  SMEM_DYN(float, dynamic);
  SMEM(float, warps, kRowGroup * kWarps * 3);
  SMEM(float, norm, kRowGroup * 2);
  const Shared sh = {dynamic, dynamic + (p.images * p.token_dim + 7) / 8 * 8, warps, norm};
  const uint32_t token = ptr<const GenerationState>(p.state)->token;
  const float* draws = draws_of(p, token);
  /* The iteration after the last evaluation is the token's. */
  const Images all = {0, p.images};
  const size_t branch = static_cast<size_t>(p.images) * p.token_dim;
  const auto velocity = [&](uint32_t r, uint32_t i) { return ld_cg_f32(ptr<const float>(p.v_raw) + r * branch + i); };
  for (uint32_t n = 0; n <= p.steps; n++) {
    const bool evaluates = n < p.steps;
    if (evaluates)
      set_state(p, sh.x, all, n, draws);
    else
      finish_token<E>(p, sh.x, all, token);
    for (uint32_t i = 0; i < (evaluates ? phases(p) : 1); i++) {
      run_phase<E>(p, sh, phase_at<E>(p, n, i));
      if (evaluates) grid_sync(ptr<GridBarrier>(p.barrier));
    }
    if (evaluates)
      step_solver(p, sh.x, all, n, guidance_of(p, token), ptr<const SolverStep>(p.steps_table)[n], velocity,
                  [&](uint32_t i) { return draw_of(p, all, n, draws, i); });
  }
}

KERNEL(flow_chain_plain_f32, FlowChainParams, kThreads, 1) { flow_chain<float>(p); }
KERNEL(flow_chain_plain_bf16, FlowChainParams, kThreads, 1) { flow_chain<bf16>(p); }
