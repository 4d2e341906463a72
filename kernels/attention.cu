/* Attention of single query rows over the KV cache, grouped-query, online softmax.
 *
 *   out[m, h, :] = E( sum_t softmax_t(scale * q[m, h] . k[t]) v[t] ),   t = 0..=row_pos[m]
 *
 * q, out [M, Q, d] E; k, v [S, G, capacity, d] E; kv head of query head h is h / (Q/G). Slots after row_pos[m] are
 * never read. Only the result is rounded to E; scores, weights and sums are float. d is a multiple of 16, at most
 * 256; any Q/G (heads of a group are taken eight at a time); any length.
 * Bound while decoding at 14B: 4 KB of cache per slot and layer, 5 MB for two branches of 600 slots: latency.
 *
 * One block works for one (row, kv head), or for one of `splits` ranges of its slots. Per tile of 256 slots:
 *
 *   thread = slot   k (gmem) . q (smem [d][8])            -> smem scores [slot][8]
 *   warp   = head   running maximum, exp2, denominator     -> smem weights [slot][8], correction [8]
 *   thread = (slice, column of d)   weights x v (gmem)     -> reg sums [8]; slices of slots are added at the end
 *
 * Variants: plain (grid x = row * G + kv head; prefill), splitkv (y = split; the last block of a (row, kv head) to
 * arrive adds the partial results in the order of the splits, so that the same bits come out every time).
 */
#include "dev.cuh"

static constexpr uint32_t kThreads = 256;
static constexpr uint32_t kSlots = 256; /* tile of cache slots */
static constexpr uint32_t kHeads = 8;   /* query heads at once: one warp each */
static constexpr uint32_t kMaxHeadDim = 256;
static constexpr float kLog2e = 1.4426950408889634f;
static constexpr uint32_t kMinusInfinity = 0xff800000u;

/* What a block has shared memory for. */
struct Shared {
  float* q;           /* [d][kHeads], times scale * log2(e) */
  float* weights;     /* [kSlots][kHeads]: scores, then weights, then partial sums of slices */
  float* correction;  /* [kHeads]: factor for sums made under the previous maximum */
  float* max;         /* [kHeads], in units of log2 */
  float* denominator; /* [kHeads] */
};

/* Unnormalised sums of slots lo..hi for `heads` query heads starting at q: left in sh.weights as
 * [slice][d][kHeads], with sh.max and sh.denominator. An empty range leaves zeros and minus infinity. Earlier results
 * may still be read when it is called: they are not written before its first barrier. */
template <class E>
DEV void attend(const Shared& sh, const E* q, const E* k_head, const E* v_head, uint32_t heads, uint32_t d, uint32_t lo,
                uint32_t hi, float scale, uint32_t slice, uint32_t column, bool sums_here) {
  const uint32_t warp = warp_id(), lane = lane_id(), slices = kThreads / d;
  for (uint32_t i = tid_x(); i < d * kHeads; i += kThreads) {
    const uint32_t head = i % kHeads, j = i / kHeads;
    /* Heads that do not exist score zero; nobody stores their sums. */
    sh.q[i] = head < heads ? to_f32(q[size_t(head) * d + j]) * (scale * kLog2e) : 0.0f;
  }
  if (tid_x() < kHeads) sh.correction[tid_x()] = 1.0f;
  float max = as_f32(kMinusInfinity), denominator = 0.0f; /* of head `warp`, the same in all lanes */
  float sums[kHeads];
#pragma unroll
  for (uint32_t h = 0; h < kHeads; h++) sums[h] = 0.0f;

  for (uint32_t base = lo; base < hi; base += kSlots) {
    const uint32_t n = hi - base < kSlots ? hi - base : kSlots;
    block_sync();
    if (tid_x() < n) {
      const E* k = k_head + size_t(base + tid_x()) * d;
      float scores[kHeads];
#pragma unroll
      for (uint32_t h = 0; h < kHeads; h++) scores[h] = 0.0f;
      for (uint32_t j = 0; j < d; j += kVec<E>) {
        float f[kVec<E>];
        load_vec_plain<E>(k + j, f);
#pragma unroll
        for (int i = 0; i < kVec<E>; i++)
#pragma unroll
          for (uint32_t h = 0; h < kHeads; h++) scores[h] += sh.q[(j + i) * kHeads + h] * f[i];
      }
#pragma unroll
      for (uint32_t h = 0; h < kHeads; h++) sh.weights[tid_x() * kHeads + h] = scores[h];
    }
    block_sync();
    if (warp < heads) {
      float tile_max = max;
      for (uint32_t t = lane; t < n; t += 32) tile_max = f_max(tile_max, sh.weights[t * kHeads + warp]);
      tile_max = warp_max(tile_max);
      float sum = 0.0f;
      for (uint32_t t = lane; t < n; t += 32) {
        const float weight = fast_exp2(sh.weights[t * kHeads + warp] - tile_max);
        sh.weights[t * kHeads + warp] = weight;
        sum += weight;
      }
      const float correction = fast_exp2(max - tile_max);
      denominator = denominator * correction + warp_sum(sum);
      max = tile_max;
      if (lane == 0) sh.correction[warp] = correction;
    }
    block_sync();
    if (sums_here) {
#pragma unroll
      for (uint32_t h = 0; h < kHeads; h++) sums[h] *= sh.correction[h];
      const E* v = v_head + size_t(base) * d + column;
      for (uint32_t t = slice; t < n; t += slices) {
        const float value = to_f32(v[size_t(t) * d]);
#pragma unroll
        for (uint32_t h = 0; h < kHeads; h++) sums[h] += sh.weights[t * kHeads + h] * value;
      }
    }
  }
  block_sync();
  if (sums_here) {
#pragma unroll
    for (uint32_t h = 0; h < kHeads; h++) sh.weights[tid_x() * kHeads + h] = sums[h];
  }
  if (warp < heads && lane == 0) {
    sh.max[warp] = max;
    sh.denominator[warp] = denominator;
  }
  block_sync();
}

/* Adds the partial results of all splits of `heads` query heads: by the last block to arrive. */
template <class E>
DEV void combine(const float* partial, E* out, uint32_t heads, uint32_t splits, uint32_t d) {
  for (uint32_t i = tid_x(); i < heads * d; i += kThreads) {
    const uint32_t head = i / d, j = i % d;
    const float* mine = partial + size_t(head) * splits * (d + 2);
    float max = as_f32(kMinusInfinity), sum = 0.0f, denominator = 0.0f;
    for (uint32_t s = 0; s < splits; s++) max = f_max(max, ld_cg_f32(mine + size_t(s) * (d + 2) + d));
    for (uint32_t s = 0; s < splits; s++) {
      const float* from = mine + size_t(s) * (d + 2);
      const float factor = fast_exp2(ld_cg_f32(from + d) - max);
      sum += ld_cg_f32(from + j) * factor;
      denominator += ld_cg_f32(from + d + 1) * factor;
    }
    out[i] = from_f32<E>(sum / denominator);
  }
}

template <class E, bool SPLIT>
DEV void attention(const AttentionParams& p) {
  SMEM(float, q_smem, kMaxHeadDim * kHeads);
  SMEM(float, weights_smem, kSlots * kHeads);
  SMEM(float, correction_smem, kHeads);
  SMEM(float, max_smem, kHeads);
  SMEM(float, denominator_smem, kHeads);
  SMEM(uint32_t, arrived_last, 1);
  const Shared sh{q_smem, weights_smem, correction_smem, max_smem, denominator_smem};

  griddep_launch();
  griddep_wait();
  const uint32_t d = p.head_dim, slices = kThreads / d, group = p.heads_q / p.heads_kv;
  const uint32_t row = bid_x() / p.heads_kv, kv_head = bid_x() % p.heads_kv, split = SPLIT ? bid_y() : 0;
  const uint32_t seq = ptr<const uint32_t>(p.row_seq)[row];
  const uint32_t length = ptr<const uint32_t>(p.row_pos)[row] + 1;
  const uint32_t splits = SPLIT ? p.splits : 1, share = (length + splits - 1) / splits;
  const uint32_t lo = split * share, hi = lo + share < length ? lo + share : length;
  const size_t cache = (size_t(seq) * p.heads_kv + kv_head) * p.capacity * d;
  const E* k_head = ptr<const E>(p.k_cache) + cache;
  const E* v_head = ptr<const E>(p.v_cache) + cache;
  const size_t first_head = size_t(row) * p.heads_q + kv_head * group; /* of M * Q */
  E* out = ptr<E>(p.out) + first_head * d;
  float* partial = ptr<float>(p.partial) + first_head * splits * (d + 2);
  const uint32_t slice = tid_x() / d, column = tid_x() % d;

  for (uint32_t h0 = 0; h0 < group; h0 += kHeads) {
    const uint32_t heads = group - h0 < kHeads ? group - h0 : kHeads;
    attend(sh, ptr<const E>(p.q) + (first_head + h0) * d, k_head, v_head, heads, d, lo, hi, p.scale, slice, column,
           slice < slices);
    for (uint32_t i = tid_x(); i < heads * d; i += kThreads) {
      const uint32_t head = i / d, j = i % d;
      float sum = 0.0f;
      for (uint32_t s = 0; s < slices; s++) sum += sh.weights[(s * d + j) * kHeads + head];
      if (splits == 1) {
        out[size_t(h0) * d + i] = from_f32<E>(sum / sh.denominator[head]);
      } else {
        float* to = partial + (size_t(h0 + head) * splits + split) * (d + 2);
        to[j] = sum;
        if (j == 0) {
          to[d] = sh.max[head];
          to[d + 1] = sh.denominator[head];
        }
      }
    }
  }
  if (!SPLIT || splits == 1) return;

  uint32_t* arrivals = ptr<uint32_t>(p.arrivals) + bid_x();
  block_sync();
  if (tid_x() == 0) arrived_last[0] = atom_add_acqrel(arrivals, 1) == splits - 1;
  block_sync();
  if (!arrived_last[0]) return;
  combine(partial, out, group, splits, d);
  if (tid_x() == 0) *arrivals = 0;
}

KERNEL(attention_plain_f32, AttentionParams, 256, 2) { attention<float, false>(p); }
KERNEL(attention_plain_bf16, AttentionParams, 256, 2) { attention<bf16, false>(p); }
KERNEL(attention_splitkv_f32, AttentionParams, 256, 2) { attention<float, true>(p); }
KERNEL(attention_splitkv_bf16, AttentionParams, 256, 2) { attention<bf16, true>(p); }
