// out[b, p, :] = softmax(scale * q[b, p, :] . k[b, :, :]) v[b, :, :]: the VAE's attention on tensor cores.
//
//   q, k, v, out [B, P, C] bf16     C a multiple of 64, at most 512
//
// Rounding: scores and sums are float; probabilities are rounded to bf16 before they meet v, their sum is not.
//
// Bound: FLOPs, 4 P^2 C: 34 GFLOP at 512x512 pixels. Grid (tiles of 32 queries, images): 128 blocks at that size, 256
// threads. A head of 512 channels is wide: its results take 64 registers of every thread, warp w holding channels
// 64 w to 64 w + 63 of all 32 queries; scores are dealt to the warps as 2 (16 queries) x 4 (16 keys).
//
//   q [32][C + 8], k [64][C + 8] smem --ldmatrix--> S reg --> scores [32][68] float smem --softmax--> P [32][72] smem
//   P, v [64][C + 8] smem --ldmatrix--> O [32][64] per warp, reg --> out
//
// The next k travels during softmax and the second product, the next v during the first product.
#include "dev.cuh"

static constexpr uint32_t kThreads = 256;
static constexpr uint32_t kQueries = 32, kKeys = 64;
static constexpr uint32_t kScorePitch = kKeys + 4, kWeightPitch = kKeys + 8;
static constexpr uint32_t kLanes = kThreads / kQueries;  // threads of a row in the softmax
static constexpr uint32_t kMinusInfinity = 0xff800000u;

// ROWS rows of src [pixels, channels] from `first` on their way, zero after the last. A warp takes a row at a time, a
// lane every 32nd of its chunks: no divisions, which were most of the instructions of the loop.
template <uint32_t ROWS>
DEV void send_rows(bf16* to, const bf16* src, uint32_t first, uint32_t pixels, uint32_t channels) {
  for (uint32_t c = lane_id() * 8; c < channels; c += 32 * 8) {
#pragma unroll
    for (uint32_t i = 0; i < ROWS; i += kThreads / 32) {
      const uint32_t row = i + warp_id();
      const bool known = first + row < pixels;
      cp_async16(to + row * (channels + 8) + c, src + (known ? static_cast<size_t>(first + row) * channels + c : 0),
                 known);
    }
  }
}

KERNEL(vae_attention_mma_bf16, VaeAttentionParams, 256, 1) {
  SMEM_DYN(bf16, smem);
  SMEM(float, scores, kQueries * kScorePitch);
  SMEM(bf16, weights, kQueries * kWeightPitch);
  SMEM(float, factor, kQueries);
  griddep_launch();
  griddep_wait();
  const uint32_t pixels = p.pixels, channels = p.channels, pitch = channels + 8, query0 = bid_x() * kQueries;
  const uint32_t lane = lane_id(), warp = warp_id();
  const size_t image = static_cast<size_t>(bid_y()) * pixels * channels;
  const bf16 *q = ptr<const bf16>(p.q) + image, *k = ptr<const bf16>(p.k) + image, *v = ptr<const bf16>(p.v) + image;
  bf16 *q_tile = smem, *k_tile = q_tile + kQueries * pitch, *v_tile = k_tile + kKeys * pitch;
  const float scale = p.scale * 1.4426950408889634f;  // exponentials to base 2

  send_rows<kQueries>(q_tile, q, query0, pixels, channels);
  send_rows<kKeys>(k_tile, k, 0, pixels, channels);
  cp_async_commit();
  send_rows<kKeys>(v_tile, v, 0, pixels, channels);
  cp_async_commit();

  const uint32_t score_q = warp % 2 * 16, score_k = warp / 2 * 16;
  const bf16* q_at = q_tile + (score_q + lane % 16) * pitch + lane / 16 * 8;
  const bf16* k_at = k_tile + (score_k + lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8;
  const bf16* p_at = weights + lane % 16 * kWeightPitch + lane / 16 * 8;
  const bf16* v_at = v_tile + lane % 16 * pitch + warp * 64 + lane / 16 * 8;
  const bool holds = warp * 64 < channels;
  const uint32_t row = tid_x() / kLanes, part = tid_x() % kLanes;  // of the softmax
  float o[2][8][4] = {}, max = as_f32(kMinusInfinity), sum = 0.0f;

#pragma unroll 1
  for (uint32_t key0 = 0; key0 < pixels; key0 += kKeys) {
    cp_async_wait<1>();
    block_sync();
    float s[1][2][4] = {};
#pragma unroll 1
    for (uint32_t c = 0; c < channels; c += 64) {
      uint32_t a[4][4], b[8][2];  // four steps of 16 channels
      ldmatrix_x4_all(a, q_at + c, 16);
      ldmatrix_x4_all(b, k_at + c, 16);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t a_step[1][4] = {{a[i][0], a[i][1], a[i][2], a[i][3]}};
        const uint32_t b_step[2][2] = {{b[2 * i][0], b[2 * i][1]}, {b[2 * i + 1][0], b[2 * i + 1][1]}};
        mma_bf16_all(s, a_step, b_step);
      }
    }
#pragma unroll
    for (uint32_t n = 0; n < 2; n++)
#pragma unroll
      for (uint32_t i = 0; i < 4; i++)
        scores[(score_q + lane / 4 + i / 2 * 8) * kScorePitch + score_k + n * 8 + lane % 4 * 2 + i % 2] =
            s[0][n][i] * scale;
    block_sync();
    const bool more = key0 + kKeys < pixels;
    if (more) send_rows<kKeys>(k_tile, k, key0 + kKeys, pixels, channels);
    cp_async_commit();

    float weight[kKeys / kLanes], tile_max = max;
#pragma unroll
    for (uint32_t i = 0; i < kKeys / kLanes; i++) {
      const uint32_t key = i * kLanes + part;
      weight[i] = key0 + key < pixels ? scores[row * kScorePitch + key] : as_f32(kMinusInfinity);
      tile_max = f_max(tile_max, weight[i]);
    }
    tile_max = warp_max<kLanes>(tile_max);  // of a key that exists: finite
    const float shrink = fast_exp2(max - tile_max);
    max = tile_max;
    sum *= shrink;
#pragma unroll
    for (uint32_t i = 0; i < kKeys / kLanes; i++) {
      weight[i] = fast_exp2(weight[i] - max);
      sum += weight[i];
      weights[row * kWeightPitch + i * kLanes + part] = to_bf16(weight[i]);
    }
    if (part == 0) factor[row] = shrink;
    cp_async_wait<1>();
    block_sync();

    if (holds) {
#pragma unroll
      for (uint32_t m = 0; m < 2; m++)
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
          const float f = factor[m * 16 + lane / 4 + half * 8];
#pragma unroll
          for (uint32_t n = 0; n < 8; n++) o[m][n][half * 2] *= f, o[m][n][half * 2 + 1] *= f;
        }
#pragma unroll
      for (uint32_t key = 0; key < kKeys; key += 16) {
        uint32_t a[2][4], b[8][2];
        ldmatrix_x4_all(a, p_at + key, 16 * kWeightPitch);
        ldmatrix_x4_trans_all(b, v_at + key * pitch, 16);
        mma_bf16_all(o, a, b);
      }
    }
    block_sync();
    if (more) send_rows<kKeys>(v_tile, v, key0 + kKeys, pixels, channels);
    cp_async_commit();
  }

  // Divided by the softmax's denominator, and through the queries' memory to 16-byte stores.
  sum = warp_sum<kLanes>(sum);
  if (part == 0) factor[row] = 1.0f / sum;
  block_sync();
  if (holds) {
#pragma unroll
    for (uint32_t m = 0; m < 2; m++)
#pragma unroll
      for (uint32_t half = 0; half < 2; half++) {
        const uint32_t at = m * 16 + lane / 4 + half * 8;
        const float f = factor[at];
        bf16* to = q_tile + at * pitch + warp * 64 + lane % 4 * 2;
#pragma unroll
        for (uint32_t n = 0; n < 8; n++)
#pragma unroll
          for (uint32_t j = 0; j < 2; j++) to[n * 8 + j] = to_bf16(o[m][n][half * 2 + j] * f);
      }
  }
  block_sync();
  for (uint32_t c = lane * 8; c < channels; c += 32 * 8)
    for (uint32_t at = warp; at < kQueries && query0 + at < pixels; at += kThreads / 32)
      st_v4(ptr<bf16>(p.out) + image + static_cast<size_t>(query0 + at) * channels + c, ld_v4(q_tile + at * pitch + c));
}
