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
 * Bound: latency, 4 KB per slot and layer.
 *
 * In both, all blocks ask for a share of the next product's weights while they wait.
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

/* This block's share of the next product's weights, while the cache is awaited. Not before the wait: the launch before
 * still streams more than L2 holds, and would drop these lines again. */
DEV void ask_for_next(const AttentionParams& p) {
  const uint64_t all = uint64_t(nbid_x()) * nbid_y() * kThreads;
  for (uint64_t line = (uint64_t(bid_y()) * nbid_x() + bid_x()) * kThreads + tid_x(); line * kLine < p.prefetch_bytes;
       line += all)
    prefetch_l2(ptr<const unsigned char>(p.prefetch) + line * kLine);
}

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
  ask_for_next(p);
  if (tid < kRows) {
    const bool known = row0 + tid < p.rows;
    sequence[tid] = known ? ptr<const uint32_t>(p.row_seq)[row0 + tid] : 0;
    last[tid] = known ? static_cast<int32_t>(ptr<const uint32_t>(p.row_pos)[row0 + tid]) : -1;
  }
  block_sync();

  /* Every lane looks at two rows, so that the rows of a run are found in the time of ten shuffles, not of 128 loads. */
  static_assert(kRows == 64, "two per lane");
  const uint32_t lane_sequence[2] = {sequence[lane], sequence[lane + 32]};
  const int32_t lane_last[2] = {last[lane], last[lane + 32]};
  float o[1][D / 8][4] = {}, max[2] = {as_f32(kMinusInfinity), as_f32(kMinusInfinity)}, sum[2] = {};
  uint32_t end = 0;
  for (uint32_t first = 0; first < kRows && last[first] >= 0; first = end) {
    const uint32_t seq = sequence[first];
    end = kRows;
#pragma unroll
    for (uint32_t i = 0; i < 2; i++)
      if (lane + 32 * i > first && (lane_last[i] < 0 || lane_sequence[i] != seq)) end = umin(end, lane + 32 * i);
#pragma unroll
    for (uint32_t apart = 16; apart; apart >>= 1) end = umin(end, shfl_xor(end, apart));
    uint32_t slots = 0, warp_slots = 0; /* that the run's rows, and those of this warp among them, see together */
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
      const uint32_t row = lane + 32 * i,
                     sees = row >= first && row < end ? static_cast<uint32_t>(lane_last[i]) + 1 : 0;
      slots = umax(slots, sees);
      warp_slots = umax(warp_slots, row / 16 == warp_id() ? sees : 0);
    }
#pragma unroll
    for (uint32_t apart = 16; apart; apart >>= 1) {
      slots = umax(slots, shfl_xor(slots, apart));
      warp_slots = umax(warp_slots, shfl_xor(warp_slots, apart));
    }
    int32_t see[2]; /* of this thread's rows */
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
      const uint32_t row = mine + 8 * i;
      see[i] = row >= first && row < end ? last[row] : -1;
    }

    const size_t cache = (size_t(seq) * p.heads_kv + kv_head) * p.capacity * D;
    const bf16 *k = ptr<const bf16>(p.k_cache) + cache, *v = ptr<const bf16>(p.v_cache) + cache;
    const uint32_t tiles = (slots + kKeys - 1) / kKeys;
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
      if (tile * kKeys < warp_slots) {
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

/* Over the aligned group of W lanes that a lane is in, for all of `v`: their shuffles do not wait for one another. */
template <int W, int N>
DEV void group_max_all(float (&v)[N]) {
#pragma unroll
  for (int o = W / 2; o; o >>= 1)
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = f_max(v[i], shfl_xor(v[i], o));
}
template <int W, int N>
DEV void group_sum_all(float (&v)[N]) {
#pragma unroll
  for (int o = W / 2; o; o >>= 1)
#pragma unroll
    for (int i = 0; i < N; i++) v[i] += shfl_xor(v[i], o);
}

/* A head's columns once its slots are added: D / 4 lanes share a head, four columns each. */
template <int D>
struct Columns {
  static constexpr uint32_t kLanes = D / 4, kAtOnce = kThreads / kLanes, kRounds = kHeads / kAtOnce;
};
DEV void add_scaled(float (&sum)[4], v4u u, float factor) {
  sum[0] = f_fma(as_f32(u.x), factor, sum[0]);
  sum[1] = f_fma(as_f32(u.y), factor, sum[1]);
  sum[2] = f_fma(as_f32(u.z), factor, sum[2]);
  sum[3] = f_fma(as_f32(u.w), factor, sum[3]);
}

/* Adds the partial results of all splits of `heads` query heads: values [heads][splits][D], maxima and sums
 * [heads][splits][2]; factors is [kHeads][kMaxSplits]. One block does it while the next launch waits, so everything
 * that kAhead splits left is asked for before anything is used: one latency of L2, not one per head and split. */
template <int D>
DEV void combine(const float* values, const float* max_sum, bf16* out, uint32_t heads, uint32_t splits,
                 float* factors) {
  using Its = Columns<D>;
  constexpr int kRounds = Its::kRounds, kEach = kMaxSplits / Its::kLanes, kAhead = 16;
  const uint32_t lane = tid_x() % Its::kLanes, first = tid_x() / Its::kLanes;
  float of_split[kRounds * kEach], weight[kRounds * kEach], max[kRounds * kEach], denominator[kRounds] = {};
  v4u held[kRounds][kAhead];
#pragma unroll
  for (int r = 0; r < kRounds; r++) {
    const uint32_t head = first + r * Its::kAtOnce;
    const float* from = max_sum + (head * splits + lane) * 2;
#pragma unroll
    for (int e = 0; e < kEach; e++) {
      const int i = r * kEach + e;
      of_split[i] = as_f32(kMinusInfinity), weight[i] = 0.0f;
      if (head < heads && lane + e * Its::kLanes < splits) {
        of_split[i] = ld_cg_f32(from + e * Its::kLanes * 2);
        weight[i] = ld_cg_f32(from + e * Its::kLanes * 2 + 1);
      }
    }
  }
  /* Beyond the last split comes the last one again, with a factor of 0: cheaper than a condition per load. */
  const auto ask = [&](int r, uint32_t s0) {
    const uint32_t head = first + r * Its::kAtOnce, most = splits - 1 - s0;
    const float* from = values + (head * splits + s0) * D + lane * 4;
#pragma unroll
    for (uint32_t s = 0; s < kAhead; s++) held[r][s] = ld_cg_v4(from + (s < most ? s : most) * D);
  };
#pragma unroll
  for (int r = 0; r < kRounds; r++)
    if (first + r * Its::kAtOnce < heads) ask(r, 0);

  /* A lane's own maximum comes after the exchange: before, ptxas has it wait above the loads of the values. */
#pragma unroll
  for (int i = 0; i < kRounds * kEach; i++) max[i] = of_split[i];
  group_max_all<Its::kLanes>(max);
#pragma unroll
  for (int r = 0; r < kRounds; r++) {
    float of_all = max[r * kEach];
#pragma unroll
    for (int e = 1; e < kEach; e++) of_all = f_max(of_all, max[r * kEach + e]);
#pragma unroll
    for (int e = 0; e < kEach; e++) {
      const float factor = shrink(of_split[r * kEach + e], of_all); /* of a split that there is not: 0 */
      factors[(first + r * Its::kAtOnce) * kMaxSplits + lane + e * Its::kLanes] = factor;
      denominator[r] += weight[r * kEach + e] * factor;
    }
  }
  group_sum_all<Its::kLanes>(denominator);
  warp_sync();
#pragma unroll
  for (int r = 0; r < kRounds; r++) {
    const uint32_t head = first + r * Its::kAtOnce;
    if (head >= heads) continue;
    float sum[4] = {};
#pragma unroll 1
    for (uint32_t s0 = 0; s0 < splits; s0 += kAhead) {
      if (s0) ask(r, s0);
#pragma unroll
      for (int s = 0; s < kAhead; s++) add_scaled(sum, held[r][s], factors[head * kMaxSplits + s0 + s]);
    }
    const float inverse = 1.0f / denominator[r];
    *reinterpret_cast<v2u*>(out + head * D + lane * 4) =
        v2u{pack_bf16(sum[0] * inverse, sum[1] * inverse), pack_bf16(sum[2] * inverse, sum[3] * inverse)};
  }
}

template <int D>
DEV void splitkv(const AttentionParams& p) {
  constexpr uint32_t kPitch = D + kPad, kChunks = D / 8, kTile = kSlots * kPitch;
  SMEM_DYN(bf16, smem); /* q [16][d + 8], then k and v of every warp [2][32][d + 8]; its sums replace them */
  SMEM(float, warp_max_of, kHeads * kWarps);
  SMEM(float, warp_sum_of, kHeads * kWarps);
  SMEM(float, factors, kHeads * kMaxSplits);
  SMEM(uint32_t, arrived_last, 1);
  bf16 *q_tile = smem, *k_tile = smem + 16 * kPitch + warp_id() * 2 * kTile, *v_tile = k_tile + kTile;
  const uint32_t group = p.heads_q / p.heads_kv, tid = tid_x(), lane = lane_id();
  const uint32_t row = bid_x() / p.heads_kv, kv_head = bid_x() % p.heads_kv, split = bid_y();
  const size_t first_head = size_t(row) * p.heads_q + kv_head * group; /* of M * Q */

  griddep_launch();
  griddep_wait();
  const uint32_t seq = ptr<const uint32_t>(p.row_seq)[row], length = ptr<const uint32_t>(p.row_pos)[row] + 1;
  /* Rows of heads that do not exist are zeros; nobody stores their sums. */
#pragma unroll
  for (uint32_t i = 0; i < 16 * kChunks / kThreads; i++) {
    const uint32_t head = i * (kThreads / kChunks) + tid / kChunks, c = tid % kChunks * 8;
    const bf16* q = ptr<const bf16>(p.q) + (first_head + head) * D + c;
    cp_async16(q_tile + head * kPitch + c, q, head < group);
  }
  cp_async_commit();
  const uint32_t share = (length + p.splits - 1) / p.splits, lo = split * share;
  const uint32_t hi = lo + share < length ? lo + share : length;
  const size_t cache = (size_t(seq) * p.heads_kv + kv_head) * p.capacity * D;
  const bf16 *k = ptr<const bf16>(p.k_cache) + cache, *v = ptr<const bf16>(p.v_cache) + cache;
  const float scale = p.scale * kLog2e;

  /* Addresses a constant apart, the last ones perhaps past the cache: there nothing is read. */
  const auto send = [&](bf16* to, const bf16* from, uint32_t base) {
    const uint32_t slot = base + lane / kChunks, c = lane % kChunks * 8;
    const bf16* source = from + size_t(slot) * D + c;
    bf16* target = to + lane / kChunks * kPitch + c;
#pragma unroll
    for (uint32_t i = 0; i < kSlots; i += 32 / kChunks) cp_async16(target + i * kPitch, source + i * D, slot + i < hi);
  };
  const uint32_t first = lo + warp_id() * kSlots;
  if (first < hi) send(k_tile, k, first);
  cp_async_commit();
  if (first < hi) send(v_tile, v, first);
  cp_async_commit();
  ask_for_next(p);
  cp_async_wait<2>();
  block_sync();

  float o[1][D / 8][4] = {}, max = as_f32(kMinusInfinity), sum = 0.0f; /* of head lane / 4 */
#pragma unroll 1
  for (uint32_t base = first; base < hi; base += kWarps * kSlots) {
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
    /* The branch also keeps the wait for v behind the scores: ptxas moves it up as far as it can. */
    if (base != first) {
#pragma unroll
      for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) o[0][n][j] *= factor;
    }
    cp_async_wait<0>();
    warp_sync();
    weigh<D>(o, s, v_tile);
    warp_sync();
    const uint32_t next = base + kWarps * kSlots;
    if (next < hi) {
      send(k_tile, k, next);
      cp_async_commit();
      send(v_tile, v, next);
      cp_async_commit();
    }
  }
  sum = warp_sum<4>(sum);

  /* Warps into the block: a warp's sums go where its own k was. Rows are eight banks apart. */
  const auto sums_of = [&](uint32_t warp) { return reinterpret_cast<float*>(smem + 16 * kPitch + warp * 2 * kTile); };
#pragma unroll
  for (int n = 0; n < D / 8; n++)
    *reinterpret_cast<v2u*>(sums_of(warp_id()) + lane / 4 * kPitch + n * 8 + lane % 4 * 2) =
        v2u{as_u32(o[0][n][0]), as_u32(o[0][n][1])};
  if (lane % 4 == 0) {
    warp_max_of[lane / 4 * kWarps + warp_id()] = max;
    warp_sum_of[lane / 4 * kWarps + warp_id()] = sum;
  }
  block_sync();
  using Its = Columns<D>;
  bf16* out = ptr<bf16>(p.out) + first_head * D;
  float* values = ptr<float>(p.partial) + first_head * p.splits * D;
  float* max_sum = ptr<float>(p.partial) + (size_t(p.rows) * p.heads_q * D + first_head * 2) * p.splits;
#pragma unroll
  for (uint32_t r = 0; r < Its::kRounds; r++) {
    const uint32_t head = r * Its::kAtOnce + tid / Its::kLanes, j = tid % Its::kLanes; /* and every kLanes further */
    if (head >= group) break;
    float of_warp[kWarps], weight[kWarps], total[4] = {};
    unpack_vec<float>(ld_v4(warp_max_of + head * kWarps), of_warp);
    unpack_vec<float>(ld_v4(warp_sum_of + head * kWarps), weight);
    float block_max = as_f32(kMinusInfinity), block_sum = 0.0f;
#pragma unroll
    for (uint32_t w = 0; w < kWarps; w++) block_max = f_max(block_max, of_warp[w]);
#pragma unroll
    for (uint32_t w = 0; w < kWarps; w++) {
      const float factor = shrink(of_warp[w], block_max);
      block_sum = f_fma(weight[w], factor, block_sum);
#pragma unroll
      for (uint32_t i = 0; i < 4; i++)
        total[i] = f_fma(sums_of(w)[head * kPitch + j + i * Its::kLanes], factor, total[i]);
    }
    if (p.splits == 1) {
#pragma unroll
      for (uint32_t i = 0; i < 4; i++) out[head * D + j + i * Its::kLanes] = to_bf16(total[i] / block_sum);
    } else {
      const size_t at = size_t(head) * p.splits + split;
#pragma unroll
      for (uint32_t i = 0; i < 4; i++) values[at * D + j + i * Its::kLanes] = total[i];
      if (j == 0) *reinterpret_cast<v2u*>(max_sum + at * 2) = v2u{as_u32(block_max), as_u32(block_sum)};
    }
  }
  if (p.splits == 1) return;

  uint32_t* arrivals = ptr<uint32_t>(p.arrivals) + bid_x();
  block_sync();
  if (tid == 0) arrived_last[0] = atom_add_acqrel(arrivals, 1) == p.splits - 1;
  block_sync();
  if (!arrived_last[0]) return;
  combine<D>(values, max_sum, out, group, p.splits, factors);
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
