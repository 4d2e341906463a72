/* RMSNorm, gate and up projections, SiLU and product in one launch.
 *
 *   h[m, :]   = E(E(x[m, :] / rms(x[m, :])) * norm_w)                  x [M, D] float
 *   g, u      = E(w_gate h + gate_bias), E(w_up h + up_bias)           w_gate, w_up [I, D] E
 *   act[m, :] = E(E(g / (1 + exp(-g))) * u)                            act [M, I] E
 *
 * Rounded to E: the normalised x, h, gate, up, silu(gate), the product. Everything between in float.
 * Bound at 14B, 1-3 rows: 283.1 MB of bf16 weights per layer; many rows: 283.1 MFLOP per row.
 * A unit (gemv.cuh) is gate row i with up row i.
 * Variants: plain (warp per unit, one pass over w for up to 8 rows), tile (64 x 64 tiles, many rows); from packed
 * weights stream, ring (equal shares per SM) and mma (tensor-core tiles, many rows): product.cuh.
 */
#include "product.cuh"

template <class E, Loop LOOP>
DEV void gate_up(const GateUpParams& p) {
  const E* gate_bias = ptr<const E>(p.gate_bias);
  const E* up_bias = ptr<const E>(p.up_bias);
  E* act = ptr<E>(p.act);
  auto weight = [&](uint32_t unit, uint32_t which) -> const E* {
    return ptr<const E>(which ? p.w_up : p.w_gate) + size_t(unit) * p.hidden;
  };
  auto emit = [&](uint32_t row, uint32_t unit, float gate, float up) {
    gate = round_to<E>(gate_bias ? gate + to_f32(gate_bias[unit]) : gate);
    up = round_to<E>(up_bias ? up + to_f32(up_bias[unit]) : up);
    act[size_t(row) * p.intermediate + unit] = from_f32<E>(round_to<E>(silu<E>(gate)) * up);
  };

  /* Packed, both weights are one tensor at w_gate. */
  const Product shape = {
      p.rows,   p.hidden,  p.intermediate, p.hidden % 8 == 0 && aligned16(p.x | p.norm_w | p.w_gate | p.w_up),
      p.w_gate, p.partial, p.arrivals,     p.next};
  auto activations = [&] {
    /* norm_rows.cu has normed them. */
    if constexpr (LOOP == Loop::kMma)
      return Raw<E>{ptr<const E>(p.x)};
    else
      return Normed<E>{ptr<const float>(p.x), ptr<const E>(p.norm_w), nullptr, p.eps};
  };
  product<LOOP, E>(shape, activations, weight, emit);
}

KERNEL(gate_up_plain_f32, GateUpParams, 256, 2) { gate_up<float, Loop::kPlain>(p); }
KERNEL(gate_up_plain_bf16, GateUpParams, 256, 2) { gate_up<bf16, Loop::kPlain>(p); }
KERNEL(gate_up_tile_f32, GateUpParams, 256, 2) { gate_up<float, Loop::kTile>(p); }
KERNEL(gate_up_tile_bf16, GateUpParams, 256, 2) { gate_up<bf16, Loop::kTile>(p); }
KERNEL(gate_up_stream_bf16, GateUpParams, 256, 2) { gate_up<bf16, Loop::kStream>(p); }
KERNEL(gate_up_ring_bf16, GateUpParams, 256, 2) { gate_up<bf16, Loop::kRing>(p); }
KERNEL(gate_up_mma_bf16, GateUpParams, kMmaThreads, 1) { gate_up<bf16, Loop::kMma>(p); }
