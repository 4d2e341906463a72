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

/* What the two results of a row and a unit need besides their sums. */
template <class E>
struct Place {
  uint32_t seq, pos, line; /* of the row: its sequence and slot, its line of `rope` */
  bool turned;             /* of the unit: q or k */
  float cosine, sine, bias[2];
  E* to;
};
template <class E>
DEV void look(const QkvParams& p, Place<E>& at, uint32_t row) {
  at.seq = ptr<const uint32_t>(p.row_seq)[row];
  at.pos = ptr<const uint32_t>(p.row_pos)[row];
}
template <class E>
DEV void locate(const QkvParams& p, Place<E>& at) {
  at.line = at.pos + ptr<const uint32_t>(p.rope_offset)[at.seq];
}
template <class E>
DEV void fetch(const QkvParams& p, Place<E>& at, uint32_t row, uint32_t unit) {
  const uint32_t half = p.head_dim / 2, head = unit / half, j = unit % half;
  at.turned = head < p.heads_q + p.heads_kv;
  if (at.turned) {
    const float* angle = ptr<const float>(p.rope) + size_t(at.line) * p.head_dim + j;
    at.cosine = angle[0];
    at.sine = angle[half];
  }
  if (p.bias) {
    const E* bias = ptr<const E>(p.bias) + head * p.head_dim + j;
    at.bias[0] = to_f32(bias[0]);
    at.bias[1] = to_f32(bias[half]);
  }
  if (head < p.heads_q) {
    at.to = ptr<E>(p.q) + (size_t(row) * p.heads_q + head) * p.head_dim + j;
  } else {
    const uint32_t kv_head = head - p.heads_q - (at.turned ? 0 : p.heads_kv);
    at.to = ptr<E>(at.turned ? p.k_cache : p.v_cache) +
            ((size_t(at.seq) * p.heads_kv + kv_head) * p.capacity + at.pos) * p.head_dim + j;
  }
}
/* The epilogue. */
template <class E>
DEV void write(const QkvParams& p, const Place<E>& at, float a, float b) {
  if (p.bias) a += at.bias[0], b += at.bias[1];
  a = round_to<E>(a);
  b = round_to<E>(b);
  if (at.turned) {
    const float u = a;
    a = u * at.cosine - b * at.sine;
    b = b * at.cosine + u * at.sine;
  }
  at.to[0] = from_f32<E>(a);
  at.to[p.head_dim / 2] = from_f32<E>(b);
}

/* Those of the lane's rows in emit_tile, an even one and the one after it, ahead of their sums (stream.cuh). The last
 * row stands for those that do not exist. */
template <class E>
struct Ahead {
  const QkvParams& p;
  uint32_t row[2];
  Place<E> at[2];
};
template <class E>
DEV void look(Ahead<E>& ahead, uint32_t row0) {
#pragma unroll
  for (uint32_t i = 0; i < 2; i++) {
    ahead.row[i] = umin(row0 + lane_id() % 4 * 2 + i, ahead.p.rows - 1);
    look(ahead.p, ahead.at[i], ahead.row[i]);
  }
}
template <class E>
DEV void locate(Ahead<E>& ahead) {
#pragma unroll
  for (auto& at : ahead.at) locate(ahead.p, at);
}
template <class E>
DEV void fetch(Ahead<E>& ahead, uint32_t unit) {
#pragma unroll
  for (uint32_t i = 0; i < 2; i++) fetch(ahead.p, ahead.at[i], ahead.row[i], unit);
}

template <class E, Loop LOOP>
DEV void qkv(const QkvParams& p) {
  auto weight = [&](uint32_t unit, uint32_t which) -> const E* {
    const uint32_t half = p.head_dim / 2, out = unit / half * p.head_dim + unit % half + which * half;
    return ptr<const E>(p.w) + size_t(out) * p.hidden;
  };
  const Product shape = {p.rows,
                         p.hidden,
                         (p.heads_q + 2 * p.heads_kv) * (p.head_dim / 2),
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
  if constexpr (LOOP == Loop::kStream || LOOP == Loop::kRing) {
    Ahead<E> ahead = {p, {}, {}};
    auto emit = [&](uint32_t row, uint32_t, float a, float b) { write(p, ahead.at[row % 2], a, b); };
    product<LOOP, E>(shape, activations, weight, emit, ahead);
  } else {
    auto emit = [&](uint32_t row, uint32_t unit, float a, float b) {
      Place<E> at = {};
      look(p, at, row), locate(p, at), fetch(p, at, row, unit);
      write(p, at, a, b);
    };
    product<LOOP, E>(shape, activations, weight, emit);
  }
}

KERNEL(qkv_plain_f32, QkvParams, 256, 2) { qkv<float, Loop::kPlain>(p); }
KERNEL(qkv_plain_bf16, QkvParams, 256, 2) { qkv<bf16, Loop::kPlain>(p); }
KERNEL(qkv_tile_f32, QkvParams, 256, 2) { qkv<float, Loop::kTile>(p); }
KERNEL(qkv_tile_bf16, QkvParams, 256, 2) { qkv<bf16, Loop::kTile>(p); }
KERNEL(qkv_stream_bf16, QkvParams, 256, 2) { qkv<bf16, Loop::kStream>(p); }
KERNEL(qkv_ring_bf16, QkvParams, 256, 2) { qkv<bf16, Loop::kRing>(p); }
KERNEL(qkv_mma_bf16, QkvParams, kMmaThreads, 1) { qkv<bf16, Loop::kMma>(p); }
