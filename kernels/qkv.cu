/* RMSNorm, q/k/v projection, bias, rotary embedding and KV cache write in one launch.
 *
 *   h[m, :]    = E(E(x[m, :] / rms(x[m, :])) * norm_w)                x [M, D] float
 *   (q, k, v)  = E(w h + bias)                                         w [(Q+2G)*d, D] E
 *   (a, b)     = E(a cos - b sin), E(b cos + a sin)                    for q and k, pairs (j, j + d/2)
 *   q -> q[m]; k, v -> slot row_pos[m] of sequence row_seq[m]
 *
 * Rounded to E: the normalised x, h, each of q, k, v after the bias, the rotated pair (once: the products inside
 * are float). Accumulation and cos/sin arithmetic in float. The angle of row m is slot row_pos[m] + rope_offset.
 * Bound at 14B, 1-3 rows: 73.4 MB of bf16 weights per layer; many rows: 73.4 MFLOP per row.
 * A unit (gemv.cuh) is the pair (j, j + d/2) of one head, so that the rotation happens in registers; v heads are
 * cut the same way.
 * Variants: plain (warp per pair, one pass over w for up to 8 rows), tile (64 x 64 tiles, many rows); from packed
 * weights stream, ring (equal shares per SM) and mma (tensor-core tiles, many rows): product.cuh.
 */
#include "product.cuh"

template <class E, Loop LOOP>
DEV void qkv(const QkvParams& p) {
  const uint32_t half = p.head_dim / 2;
  const E* w = ptr<const E>(p.w);
  const E* bias = ptr<const E>(p.bias);
  const float* rope = ptr<const float>(p.rope);
  const uint32_t* row_seq = ptr<const uint32_t>(p.row_seq);
  const uint32_t* row_pos = ptr<const uint32_t>(p.row_pos);
  const uint32_t* rope_offset = ptr<const uint32_t>(p.rope_offset);

  auto weight = [&](uint32_t unit, uint32_t which) -> const E* {
    const uint32_t out = unit / half * p.head_dim + unit % half + which * half;
    return w + size_t(out) * p.hidden;
  };
  auto emit = [&](uint32_t row, uint32_t unit, float a, float b) {
    const uint32_t head = unit / half, j = unit % half, out = head * p.head_dim + j;
    if (bias) {
      a += to_f32(bias[out]);
      b += to_f32(bias[out + half]);
    }
    a = round_to<E>(a);
    b = round_to<E>(b);
    const uint32_t seq = row_seq[row], pos = row_pos[row];
    if (head < p.heads_q + p.heads_kv) {
      const float* angle = rope + size_t(pos + rope_offset[seq]) * p.head_dim;
      const float cosine = angle[j], sine = angle[half + j], u = a;
      a = u * cosine - b * sine;
      b = b * cosine + u * sine;
    }
    E* to;
    if (head < p.heads_q) {
      to = ptr<E>(p.q) + (size_t(row) * p.heads_q + head) * p.head_dim;
    } else {
      const bool key = head < p.heads_q + p.heads_kv;
      const uint32_t kv_head = head - p.heads_q - (key ? 0 : p.heads_kv);
      to = ptr<E>(key ? p.k_cache : p.v_cache) + ((size_t(seq) * p.heads_kv + kv_head) * p.capacity + pos) * p.head_dim;
    }
    to[j] = from_f32<E>(a);
    to[j + half] = from_f32<E>(b);
  };

  const Product shape = {p.rows,
                         p.hidden,
                         (p.heads_q + 2 * p.heads_kv) * half,
                         p.hidden % 8 == 0 && aligned16(p.x | p.norm_w | p.w),
                         p.w,
                         p.partial,
                         p.arrivals,
                         p.next};
  auto activations = [&] {
    /* norm_rows.cu has normed them. */
    if constexpr (LOOP == Loop::kMma)
      return Raw<E>{ptr<const E>(p.x)};
    else
      return Normed<E>{ptr<const float>(p.x), ptr<const E>(p.norm_w), nullptr, p.eps};
  };
  product<LOOP, E>(shape, activations, weight, emit);
}

KERNEL(qkv_plain_f32, QkvParams, 256, 2) { qkv<float, Loop::kPlain>(p); }
KERNEL(qkv_plain_bf16, QkvParams, 256, 2) { qkv<bf16, Loop::kPlain>(p); }
KERNEL(qkv_tile_f32, QkvParams, 256, 2) { qkv<float, Loop::kTile>(p); }
KERNEL(qkv_tile_bf16, QkvParams, 256, 2) { qkv<bf16, Loop::kTile>(p); }
KERNEL(qkv_stream_bf16, QkvParams, 256, 2) { qkv<bf16, Loop::kStream>(p); }
KERNEL(qkv_ring_bf16, QkvParams, 256, 2) { qkv<bf16, Loop::kRing>(p); }
KERNEL(qkv_mma_bf16, QkvParams, kMmaThreads, 1) { qkv<bf16, Loop::kMma>(p); }
