// out[b, p, :] = softmax(scale * q[b, p, :] . k[b, :, :]) v[b, :, :]: the VAE's one attention, a single head over all
// pixels of the latent.
//
//   q, k, v, out [B, P, C] E     C <= 512
//
// Rounding: scores, probabilities and sums are float; out is rounded to E once.
//
// Bound: FLOPs, 4 P^2 C: 34 GFLOP at 512x512 pixels (P = 4096, C = 512), 1.4 % of the decoder.
//
// variant plain: grid (tiles of 32 queries, images), 256 threads. Keys go by in tiles of 32 with an online softmax.
// Scores: 2 queries x 2 keys per thread, channels staged 64 at a time. Softmax: one warp owns 4 queries, one lane per
// key, so the running maximum and sum stay in registers. Output: 8 queries x 8 channels per thread, values staged 8
// keys at a time.
//
//   q, k [32][64] smem --> scores [32 keys][32 queries] smem --softmax--+
//   v [8 keys][C] smem --------------------------------------------------+--> acc [8 queries][8 channels] reg --> out
#include "dev.cuh"

static constexpr int kThreads = 256;
static constexpr int kBlockQ = 32, kBlockK = 32;  // queries of a block; keys of a tile, one per lane
static constexpr int kBlockC = 64;                // channels staged for the scores
static constexpr int kStageV = 8;                 // keys staged for the output
static constexpr int kMaxChannels = 512;
static constexpr int kStagePitch = kBlockC + 4;  // rows start on different banks, 16-byte aligned
static constexpr int kScorePitch = kBlockQ + 4;
static constexpr int kThreadQ = 8;  // output tile of a thread: queries x (2 x 4 channels)
static constexpr int kHalf = kMaxChannels / 2;
static constexpr int kStageFloats = (kBlockQ + kBlockK) * kStagePitch;
static_assert(kStageFloats >= kStageV * kMaxChannels, "values reuse the stage of queries and keys");
static_assert(kThreads == kBlockQ / kThreadQ * (kHalf / 4), "the output tiles cover 32 queries x 512 channels");
static_assert(kBlockQ * kBlockK == 4 * kThreads && kBlockK == 32, "2x2 scores per thread, a lane per key");

// stage[row, c] = rows [first, first + 32) x channels [c0, c0 + 64) of src [pixels, channels], zero outside.
template <class E>
DEV void stage_rows(float* stage, const E* src, uint32_t first, uint32_t c0, uint32_t pixels, uint32_t channels) {
  const uint32_t c = tid_x() % kBlockC;
  for (uint32_t row = tid_x() / kBlockC; row < 32; row += kThreads / kBlockC) {
    const bool known = first + row < pixels && c0 + c < channels;
    stage[row * kStagePitch + c] = known ? to_f32(src[static_cast<size_t>(first + row) * channels + c0 + c]) : 0.0f;
  }
}

template <class E>
DEV void vae_attention_plain(const VaeAttentionParams& p, float* stage, float* scores, float* factor) {
  griddep_launch();
  griddep_wait();
  const uint32_t tid = tid_x(), lane = lane_id(), warp = warp_id();
  const uint32_t pixels = p.pixels, channels = p.channels, query0 = bid_x() * kBlockQ;
  const size_t image = static_cast<size_t>(bid_y()) * pixels * channels;
  const E *q = ptr<const E>(p.q) + image, *k = ptr<const E>(p.k) + image, *v = ptr<const E>(p.v) + image;
  float *stage_q = stage, *stage_k = stage + kBlockQ * kStagePitch;

  // scores: queries score_q + {0, 1}, keys score_k + {0, 16}
  const uint32_t score_q = tid / 16 * 2, score_k = tid % 16;
  // output: queries out_q + 0..8, channels out_c + 0..4 and kHalf + out_c + 0..4
  const uint32_t out_q = tid / (kHalf / 4) * kThreadQ, out_c = tid % (kHalf / 4) * 4;
  const float scale = p.scale * 1.4426950408889634f;  // exponentials to base 2

  float acc[2][kThreadQ][4] = {};
  float row_max[4], row_sum[4];  // of queries warp * 4 + 0..4, the same on every lane
  for (int r = 0; r < 4; r++) row_max[r] = -INFINITY, row_sum[r] = 0.0f;

  for (uint32_t key0 = 0; key0 < pixels; key0 += kBlockK) {
    // scores of 32 queries x 32 keys; four partial sums each, so that four channels are one vector operation
    float s[2][2][4] = {};
    for (uint32_t c0 = 0; c0 < channels; c0 += kBlockC) {
      block_sync();
      stage_rows(stage_q, q, query0, c0, pixels, channels);
      stage_rows(stage_k, k, key0, c0, pixels, channels);
      block_sync();
#pragma unroll 4
      for (int c = 0; c < kBlockC; c += 4)
        for (int i = 0; i < 2; i++)
          for (int j = 0; j < 2; j++)
            for (int l = 0; l < 4; l++)
              s[i][j][l] +=
                  stage_q[(score_q + i) * kStagePitch + c + l] * stage_k[(score_k + 16 * j) * kStagePitch + c + l];
    }
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 2; j++)
        scores[(score_k + 16 * j) * kScorePitch + score_q + i] =
            ((s[i][j][0] + s[i][j][1]) + (s[i][j][2] + s[i][j][3])) * scale;
    block_sync();

    // scores become probabilities relative to the running maximum
    for (int r = 0; r < 4; r++) {
      const uint32_t row = warp * 4 + r;
      const float score = key0 + lane < pixels ? scores[lane * kScorePitch + row] : -INFINITY;
      const float new_max = f_max(row_max[r], warp_max(score));
      const float probability = fast_exp2(score - new_max);
      const float shrink = fast_exp2(row_max[r] - new_max);
      scores[lane * kScorePitch + row] = probability;
      row_sum[r] = f_fma(row_sum[r], shrink, warp_sum(probability));
      row_max[r] = new_max;
      if (lane == 0) factor[row] = shrink;
    }
    block_sync();
    for (int i = 0; i < kThreadQ; i++) {
      const float shrink = factor[out_q + i];
      for (int h = 0; h < 2; h++)
        for (int l = 0; l < 4; l++) acc[h][i][l] *= shrink;
    }

    // acc += probabilities x values
    for (uint32_t v0 = 0; v0 < kBlockK && key0 + v0 < pixels; v0 += kStageV) {
      if (v0 > 0) block_sync();
      for (uint32_t key = 0; key < kStageV; key++)
        for (uint32_t c = tid; c < (channels + 3) / 4 * 4; c += kThreads) {
          const uint32_t pixel = key0 + v0 + key;
          const bool known = pixel < pixels && c < channels;
          stage[key * kMaxChannels + c] = known ? to_f32(v[static_cast<size_t>(pixel) * channels + c]) : 0.0f;
        }
      block_sync();
      for (int h = 0; h < 2; h++) {
        if (h * kHalf + out_c >= channels) continue;
        for (int key = 0; key < kStageV; key++) {
          const float* weight = scores + (v0 + key) * kScorePitch + out_q;
          const float* value = stage + key * kMaxChannels + h * kHalf + out_c;
          for (int i = 0; i < kThreadQ; i++)
            for (int l = 0; l < 4; l++) acc[h][i][l] += weight[i] * value[l];
        }
      }
    }
  }

  // divide by the softmax's denominator
  if (lane == 0)
    for (int r = 0; r < 4; r++) factor[warp * 4 + r] = 1.0f / row_sum[r];
  block_sync();
  for (int i = 0; i < kThreadQ; i++) {
    const uint32_t pixel = query0 + out_q + i;
    if (pixel >= pixels) continue;
    for (int h = 0; h < 2; h++)
      for (int l = 0; l < 4; l++) {
        const uint32_t c = h * kHalf + out_c + l;
        if (c < channels)
          ptr<E>(p.out)[image + static_cast<size_t>(pixel) * channels + c] =
              from_f32<E>(acc[h][i][l] * factor[out_q + i]);
      }
  }
}

KERNEL(vae_attention_plain_f32, VaeAttentionParams, 256, 2) {
  SMEM(float, stage, kStageFloats);
  SMEM(float, scores, kBlockK * kScorePitch);
  SMEM(float, factor, kBlockQ);
  vae_attention_plain<float>(p, stage, scores, factor);
}
KERNEL(vae_attention_plain_bf16, VaeAttentionParams, 256, 2) {
  SMEM(float, stage, kStageFloats);
  SMEM(float, scores, kBlockK * kScorePitch);
  SMEM(float, factor, kBlockQ);
  vae_attention_plain<bf16>(p, stage, scores, factor);
}
