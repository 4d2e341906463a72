/* Attention over the KV cache on tensor cores, grouped-query, online softmax, bf16.
 *
 *   out[m, h, :] = bf16( sum_t softmax_t(scale * q[m, h] . k[t]) v[t] ),   t = 0..=row_pos[m]
 *
 * q, out [M, Q, d]; k, v [S, G, capacity, d]; d is 64 or 128; kv head of query head h is h / (Q/G). Slots after the
 * last that a row of the block sees are not read. Scores and sums are float; weights are rounded to bf16 before they
 * meet v, their sum is not.
 *
 * flash, for prompts: grid (tiles of 64 rows, query heads), 128 threads, a warp per 16 rows. Rows of a tile are taken
 * run by run of equal sequence, so any order of rows is right and few sequences per tile are fast. Keys go by in tiles
 * of 64, the next one on its way while one is used. Bound: FLOPs, 4 d per query and key.
 *
 *   k, v (gmem) --cp.async--> [64][d + 8] x2 smem --ldmatrix--> S = q k^T reg --softmax--> P reg --mma v--> O reg
 *
 * splitkv_mma, for decoding: grid (row * G + kv head, split), 128 threads. The query heads of a kv head, at most
 * eight, are the rows of one fragment. A warp takes 32 slots at a time, all their bytes in flight at once, with a
 * softmax of its own; the block adds its warps, and the last block of a (row, kv head) adds the splits in their order.
 * All blocks ask for a share of the next product's weights while they wait. Bound: latency, 4 KB per slot and layer.
 */
#include "dev.cuh"

static constexpr uint32_t kThreads = 128, kWarps = kThreads / 32;
static constexpr uint32_t kRows = 64;  /* query rows of a block of flash */
static constexpr uint32_t kKeys = 64;  /* keys of a tile of flash */
static constexpr uint32_t kHeads = 8;  /* query heads of a kv head in splitkv_mma */
static constexpr uint32_t kSlots = 32; /* slots of a warp of splitkv_mma */
static constexpr uint32_t kPad = 8;    /* rows 16 bytes off a multiple of 128: eight of them in different banks */
static constexpr uint32_t kMaxSplits = 64;
static constexpr float kLog2e = 1.4426950408889634f;
static constexpr uint32_t kMinusInfinity = 0xff800000u;
static constexpr uint32_t kLine = 128; /* bytes of a line of L2 */

/* What is left of a running maximum's exponentials when it becomes `max`; nothing was seen before the first. */
DEV float shrink(float before, float max) { return before == as_f32(kMinusInfinity) ? 0.0f : fast_exp2(before - max); }

/* s[n] (+)= q k^T: 16 rows of q against 8 * N keys, both [..][d + kPad] in shared memory. */
template <int D, int N>
DEV void scores(float (&s)[1][N][4], const bf16* q, const bf16* k) {
  const uint32_t lane = lane_id();
  const bf16* q_at = q + lane % 16 * (D + kPad) + lane / 16 * 8;
  const bf16* k_at = k + (lane % 8 + lane / 16 * 8) * (D + kPad) + lane / 8 % 2 * 8;
#pragma unroll
  for (int c = 0; c < D; c += 16) {
    uint32_t a[1][4], b[N][2];
    ldmatrix_x4_all(a, q_at + c, 0);
    ldmatrix_x4_all(b, k_at + c, 16 * (D + kPad));
    mma_bf16_all(s, a, b);
  }
}

/* o[n] += p v: 16 rows of weights, as the scores' fragments hold them, against 8 * N keys of v [..][d + kPad]. */
template <int D, int N>
DEV void weigh(float (&o)[1][D / 8][4], const float (&p)[1][N][4], const bf16* v) {
  const uint32_t lane = lane_id();
  const bf16* v_at = v + lane % 16 * (D + kPad) + lane / 16 * 8;
#pragma unroll
  for (int j = 0; j < N; j += 2) {
    const uint32_t a[1][4] = {{pack_bf16(p[0][j][0], p[0][j][1]), pack_bf16(p[0][j][2], p[0][j][3]),
                               pack_bf16(p[0][j + 1][0], p[0][j + 1][1]), pack_bf16(p[0][j + 1][2], p[0][j + 1][3])}};
    uint32_t b[D / 8][2];
    ldmatrix_x4_trans_all(b, v_at + j * 8 * (D + kPad), 16);
    mma_bf16_all(o, a, b);
  }
}

template <int D>
DEV void flash(const AttentionParams& p) {
  constexpr uint32_t kPitch = D + kPad, kChunks = D / 8, kTile = kKeys * kPitch;
  SMEM_DYN(bf16, smem);
  SMEM(uint32_t, sequence, kRows);
  SMEM(int32_t, last, kRows); /* slot that the row sees last; -1: no such row */
  bf16 *q_tile = smem, *k_tiles = smem + kRows * kPitch, *v_tiles = k_tiles + 2 * kTile;
  const uint32_t row0 = bid_x() * kRows, head = bid_y(), kv_head = head / (p.heads_q / p.heads_kv);
  const uint32_t tid = tid_x(), lane = lane_id(), mine = warp_id() * 16 + lane / 4; /* and mine + 8 */
  const float scale = p.scale * kLog2e;

  griddep_launch();
  griddep_wait();
  const bf16* q = ptr<const bf16>(p.q);
  for (uint32_t i = tid; i < kRows * kChunks; i += kThreads) {
    const uint32_t row = i / kChunks, c = i % kChunks * 8;
    const bool known = row0 + row < p.rows;
    const bf16* from = known ? q + (size_t(row0 + row) * p.heads_q + head) * D + c : q;
    cp_async16(q_tile + row * kPitch + c, from, known);
  }
  cp_async_commit();
  if (tid < kRows) {
    const bool known = row0 + tid < p.rows;
    sequence[tid] = known ? ptr<const uint32_t>(p.row_seq)[row0 + tid] : 0;
    last[tid] = known ? static_cast<int32_t>(ptr<const uint32_t>(p.row_pos)[row0 + tid]) : -1;
  }
  block_sync();

  float o[1][D / 8][4] = {}, max[2] = {as_f32(kMinusInfinity), as_f32(kMinusInfinity)}, sum[2] = {};
  uint32_t end = 0;
  for (uint32_t first = 0; first < kRows && last[first] >= 0; first = end) {
    const uint32_t seq = sequence[first];
    int32_t furthest = -1;
    for (end = first; end < kRows && last[end] >= 0 && sequence[end] == seq; end++)
      furthest = last[end] > furthest ? last[end] : furthest;
    int32_t see[2]; /* of this thread's rows */
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
      const uint32_t row = mine + 8 * i;
      see[i] = row >= first && row < end ? last[row] : -1;
    }
    int32_t warp_sees = -1;
    for (uint32_t row = warp_id() * 16; row < warp_id() * 16 + 16; row++)
      if (row >= first && row < end && last[row] > warp_sees) warp_sees = last[row];

    const size_t cache = (size_t(seq) * p.heads_kv + kv_head) * p.capacity * D;
    const bf16 *k = ptr<const bf16>(p.k_cache) + cache, *v = ptr<const bf16>(p.v_cache) + cache;
    const uint32_t slots = static_cast<uint32_t>(furthest) + 1, tiles = (slots + kKeys - 1) / kKeys;
    const auto send = [&](uint32_t tile) {
      for (uint32_t i = tid; i < kKeys * kChunks; i += kThreads) {
        const uint32_t key = i / kChunks, c = i % kChunks * 8, slot = tile * kKeys + key;
        const bool known = slot < slots;
        const size_t at = known ? size_t(slot) * D + c : 0, to = tile % 2 * kTile + key * kPitch + c;
        cp_async16(k_tiles + to, k + at, known);
        cp_async16(v_tiles + to, v + at, known);
      }
      cp_async_commit();
    };
    send(0);
#pragma unroll 1
    for (uint32_t tile = 0; tile < tiles; tile++) {
      if (tile + 1 < tiles)
        send(tile + 1);
      else
        cp_async_commit();
      cp_async_wait<1>();
      block_sync();
      if (static_cast<int32_t>(tile * kKeys) <= warp_sees) {
        float s[1][kKeys / 8][4] = {};
        scores<D>(s, q_tile + warp_id() * 16 * kPitch, k_tiles + tile % 2 * kTile);
        float factor[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float tile_max = max[i];
#pragma unroll
          for (int n = 0; n < static_cast<int>(kKeys / 8); n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
              const int32_t slot = static_cast<int32_t>(tile * kKeys + n * 8 + lane % 4 * 2 + j);
              float& score = s[0][n][2 * i + j];
              score = slot <= see[i] ? score * scale : as_f32(kMinusInfinity);
              tile_max = f_max(tile_max, score);
            }
          tile_max = warp_max<4>(tile_max);
          factor[i] = shrink(max[i], tile_max);
          max[i] = tile_max;
          sum[i] *= factor[i];
#pragma unroll
          for (int n = 0; n < static_cast<int>(kKeys / 8); n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
              float& score = s[0][n][2 * i + j];
              score = shrink(score, max[i]);
              sum[i] += score;
            }
        }
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
          for (int j = 0; j < 4; j++) o[0][n][j] *= factor[j / 2];
        weigh<D>(o, s, v_tiles + tile % 2 * kTile);
      }
      block_sync();
    }
  }

  /* A warp's rows of q are its own: its results go through them to 16-byte stores. */
  bf16* result = q_tile + warp_id() * 16 * kPitch;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float inverse = 1.0f / warp_sum<4>(sum[i]);
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
      for (int j = 0; j < 2; j++)
        result[(lane / 4 + 8 * i) * kPitch + n * 8 + lane % 4 * 2 + j] = to_bf16(o[0][n][2 * i + j] * inverse);
  }
  warp_sync();
  for (uint32_t i = lane; i < 16 * kChunks; i += 32) {
    const uint32_t row = row0 + warp_id() * 16 + i / kChunks, c = i % kChunks * 8;
    if (row < p.rows)
      st_v4(ptr<bf16>(p.out) + (size_t(row) * p.heads_q + head) * D + c, ld_v4(result + i / kChunks * kPitch + c));
  }
}

/* Adds the partial results of all splits of `heads` query heads; factors is [kHeads][kMaxSplits + 1]. */
template <int D>
DEV void combine(const float* partial, bf16* out, uint32_t heads, uint32_t splits, float* factors) {
  for (uint32_t head = warp_id(); head < heads; head += kWarps) {
    const float* mine = partial + size_t(head) * splits * (D + 2) + D;
    float* factor = factors + head * (kMaxSplits + 1);
    float max = as_f32(kMinusInfinity), denominator = 0.0f;
    for (uint32_t s = lane_id(); s < splits; s += 32) max = f_max(max, ld_cg_f32(mine + size_t(s) * (D + 2)));
    max = warp_max(max);
    for (uint32_t s = lane_id(); s < splits; s += 32) {
      factor[s] = shrink(ld_cg_f32(mine + size_t(s) * (D + 2)), max);
      denominator += ld_cg_f32(mine + size_t(s) * (D + 2) + 1) * factor[s];
    }
    denominator = warp_sum(denominator);
    if (lane_id() == 0) factor[kMaxSplits] = 1.0f / denominator;
  }
  block_sync();
  for (uint32_t i = tid_x(); i < heads * D; i += kThreads) {
    const float* factor = factors + i / D * (kMaxSplits + 1);
    const float* from = partial + size_t(i / D) * splits * (D + 2) + i % D;
    float sum = 0.0f;
#pragma unroll 8
    for (uint32_t s = 0; s < splits; s++) sum = f_fma(ld_cg_f32(from + size_t(s) * (D + 2)), factor[s], sum);
    out[i] = to_bf16(sum * factor[kMaxSplits]);
  }
}

template <int D>
DEV void splitkv(const AttentionParams& p) {
  constexpr uint32_t kPitch = D + kPad, kChunks = D / 8, kTile = kSlots * kPitch;
  SMEM_DYN(bf16, smem); /* q [16][d + 8], then k and v of every warp [2][32][d + 8]; later [kWarps][kHeads][d] float */
  SMEM(float, warp_max_of, kWarps * kHeads);
  SMEM(float, warp_sum_of, kWarps * kHeads);
  SMEM(float, factors, kHeads * (kMaxSplits + 1));
  SMEM(uint32_t, arrived_last, 1);
  bf16 *q_tile = smem, *k_tile = smem + 16 * kPitch + warp_id() * 2 * kTile, *v_tile = k_tile + kTile;
  const uint32_t group = p.heads_q / p.heads_kv, tid = tid_x(), lane = lane_id();
  const uint32_t row = bid_x() / p.heads_kv, kv_head = bid_x() % p.heads_kv, split = bid_y();

  /* Nobody writes weights. */
  for (uint64_t line = (uint64_t(bid_y()) * nbid_x() + bid_x()) * kThreads + tid; line * kLine < p.prefetch_bytes;
       line += uint64_t(nbid_x()) * nbid_y() * kThreads)
    prefetch_l2(ptr<const unsigned char>(p.prefetch) + line * kLine);
  griddep_launch();
  griddep_wait();
  const uint32_t seq = ptr<const uint32_t>(p.row_seq)[row], length = ptr<const uint32_t>(p.row_pos)[row] + 1;
  const uint32_t share = (length + p.splits - 1) / p.splits, lo = split * share;
  const uint32_t hi = lo + share < length ? lo + share : length;
  const size_t cache = (size_t(seq) * p.heads_kv + kv_head) * p.capacity * D;
  const bf16 *k = ptr<const bf16>(p.k_cache) + cache, *v = ptr<const bf16>(p.v_cache) + cache;
  const size_t first_head = size_t(row) * p.heads_q + kv_head * group; /* of M * Q */
  const float scale = p.scale * kLog2e;

  const auto send = [&](bf16* to, const bf16* from, uint32_t base) {
#pragma unroll
    for (uint32_t i = lane; i < kSlots * kChunks; i += 32) {
      const uint32_t slot = base + i / kChunks, c = i % kChunks * 8;
      const bool known = slot < hi;
      cp_async16(to + i / kChunks * kPitch + c, from + (known ? size_t(slot) * D + c : 0), known);
    }
    cp_async_commit();
  };
  uint32_t base = lo + warp_id() * kSlots;
  if (base < hi) {
    send(k_tile, k, base);
    send(v_tile, v, base);
  }
  /* Rows of heads that do not exist are zeros; nobody stores their sums. */
  for (uint32_t i = tid; i < 16 * kChunks; i += kThreads) {
    const uint32_t head = i / kChunks, c = i % kChunks * 8;
    const v4u zero{0, 0, 0, 0};
    const bf16* q = ptr<const bf16>(p.q) + (first_head + head) * D + c;
    st_v4(q_tile + head * kPitch + c, head < group ? ld_v4(q) : zero);
  }
  block_sync();

  float o[1][D / 8][4] = {}, max = as_f32(kMinusInfinity), sum = 0.0f; /* of head lane / 4 */
#pragma unroll 1
  for (; base < hi; base += kWarps * kSlots) {
    cp_async_wait<1>();
    warp_sync();
    float s[1][kSlots / 8][4] = {};
    scores<D>(s, q_tile, k_tile);
    float tile_max = max;
#pragma unroll
    for (int n = 0; n < static_cast<int>(kSlots / 8); n++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float& score = s[0][n][j];
        score = base + n * 8 + lane % 4 * 2 + j < hi ? score * scale : as_f32(kMinusInfinity);
        tile_max = f_max(tile_max, score);
      }
    tile_max = warp_max<4>(tile_max);
    const float factor = shrink(max, tile_max);
    max = tile_max;
    sum *= factor;
#pragma unroll
    for (int n = 0; n < static_cast<int>(kSlots / 8); n++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        s[0][n][j] = shrink(s[0][n][j], max);
        sum += s[0][n][j];
        s[0][n][2 + j] = 0.0f; /* rows 8 to 15 */
      }
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
      for (int j = 0; j < 2; j++) o[0][n][j] *= factor;
    cp_async_wait<0>();
    warp_sync();
    weigh<D>(o, s, v_tile);
    warp_sync();
    const uint32_t next = base + kWarps * kSlots;
    if (next < hi) {
      send(k_tile, k, next);
      send(v_tile, v, next);
    }
  }
  sum = warp_sum<4>(sum);

  /* Warps into the block. */
  block_sync();
  float* sums = reinterpret_cast<float*>(smem);
#pragma unroll
  for (int n = 0; n < D / 8; n++)
#pragma unroll
    for (int j = 0; j < 2; j++)
      sums[(warp_id() * kHeads + lane / 4) * D + n * 8 + lane % 4 * 2 + j] = o[0][n][j];
  if (lane % 4 == 0) {
    warp_max_of[warp_id() * kHeads + lane / 4] = max;
    warp_sum_of[warp_id() * kHeads + lane / 4] = sum;
  }
  block_sync();
  bf16* out = ptr<bf16>(p.out) + first_head * D;
  float* partial = ptr<float>(p.partial) + first_head * p.splits * (D + 2);
  for (uint32_t i = tid; i < group * D; i += kThreads) {
    const uint32_t head = i / D, j = i % D;
    float block_max = as_f32(kMinusInfinity), block_sum = 0.0f, total = 0.0f;
#pragma unroll
    for (uint32_t w = 0; w < kWarps; w++) block_max = f_max(block_max, warp_max_of[w * kHeads + head]);
#pragma unroll
    for (uint32_t w = 0; w < kWarps; w++) {
      const float factor = shrink(warp_max_of[w * kHeads + head], block_max);
      block_sum = f_fma(warp_sum_of[w * kHeads + head], factor, block_sum);
      total = f_fma(sums[(w * kHeads + head) * D + j], factor, total);
    }
    if (p.splits == 1) {
      out[i] = to_bf16(total / block_sum);
    } else {
      float* to = partial + (size_t(head) * p.splits + split) * (D + 2);
      to[j] = total;
      if (j == 0) {
        to[D] = block_max;
        to[D + 1] = block_sum;
      }
    }
  }
  if (p.splits == 1) return;

  uint32_t* arrivals = ptr<uint32_t>(p.arrivals) + bid_x();
  block_sync();
  if (tid == 0) arrived_last[0] = atom_add_acqrel(arrivals, 1) == p.splits - 1;
  block_sync();
  if (!arrived_last[0]) return;
  combine<D>(partial, out, group, p.splits, factors);
  if (tid == 0) *arrivals = 0;
}

KERNEL(attention_mma_flash_bf16, AttentionParams, 128, 2) {
  if (p.head_dim == 64)
    flash<64>(p);
  else
    flash<128>(p);
}
KERNEL(attention_mma_splitkv_bf16, AttentionParams, 128, 2) {
  if (p.head_dim == 64)
    splitkv<64>(p);
  else
    splitkv<128>(p);
}
