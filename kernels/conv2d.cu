// y = w * act(norm(x)) + bias (+ residual): every convolution of the VAE, channels last.
//
//   x     [B, h_in, w_in, C_in] E   h_in = h / 2 with upsample (nearest, folded into the load), else h * stride
//   stats [B, groups, 2] float      mean and 1 / std of group_stats; absent: x is taken as it is
//   w     [C_out, k, k, C_in] E     k = 3 with one pixel of zeros around the *normalised* input, or k = 1;
//                                   with stride 2 (k = 3) the zeros are to the right and below only
//   y     [B, h, w, C_out] E        may be `residual`: each element is read and written by the same thread
//
// Rounding: x and w come from storage as E; normalisation, swish, products, sums, bias and residual are float; y is
// rounded to E once. Nothing is rounded between the swish and the product.
//
// Bound: FLOPs. The full-width decoder at 512x512 pixels is 2.5 TFLOP, 69 % of them at its two highest resolutions.
//
// The encoder, 512 x 512 pixels to a latent, is 1.1 TFLOP.
//
// variant plain: implicit GEMM on CUDA cores, any shape. Grid (tiles of 8x8 pixels, tiles of 64 output channels,
// images), 64 threads. A block walks C_in in chunks: the normalised patch under its pixels is made once per chunk and
// used by all k * k taps and 64 channels; a thread keeps 8 pixels of one row x 8 output channels in registers.
//
//   x    --norm, swish, upsample--> patch   [c][10x10]       smem --+       (17x17 with stride 2)
//   w    -------------------------> weights [tap][c][64 + 4] smem --+--> acc [8 pixels][8 channels] reg --> y
#include "dev.cuh"

static constexpr int kTile = 8;                   // pixels per side of a block's tile; a thread has one row of it
static constexpr int kBlockN = 64;                // output channels of a block
static constexpr int kThreadN = 8;                // output channels of a thread
static constexpr int kThreads = 64;               // 8 rows x 8 groups of channels
static constexpr int kWeightPitch = kBlockN + 4;  // lanes with different c write to different banks
static_assert(kTile * (kBlockN / kThreadN) == kThreads, "one row and one channel group per thread");

template <int KSIZE, int STRIDE>
struct Config {
  static constexpr int kTaps = KSIZE * KSIZE;
  static constexpr int kBorder = STRIDE == 1 ? KSIZE / 2 : 0;
  static constexpr int kSide = (kTile - 1) * STRIDE + KSIZE;
  // Input channels per chunk: with one tap there is less work per barrier, so more channels share it. With stride 2 a
  // patch is three times as large, and fewer channels keep eight blocks on an SM.
  static constexpr int kBlockC = STRIDE == 2 ? 4 : KSIZE == 3 ? 8 : 16;
  // 4 mod 32, for the banks again; at least kSide^2.
  static constexpr int kPatchPitch = STRIDE == 2 ? 292 : KSIZE == 3 ? 100 : 68;
  static constexpr int kPatch = kBlockC * kPatchPitch;
  static constexpr int kWeights = kTaps * kBlockC * kWeightPitch;
  static_assert(kPatchPitch >= kSide * kSide && kThreads % kBlockC == 0, "the loaders rely on both");
};
static constexpr int kPatchFloats = Config<3, 2>::kPatch;
static constexpr int kWeightFloats = Config<3, 1>::kWeights;
static_assert(kPatchFloats >= Config<1, 1>::kPatch && kPatchFloats >= Config<3, 1>::kPatch, "stride 2 needs the most");
static_assert(kWeightFloats >= Config<1, 1>::kWeights && kWeightFloats >= Config<3, 2>::kWeights, "3x3 needs the most");

DEV float swish(float x) { return fast_div(x, 1.0f + fast_exp(-x)); }

// patch[c, :, :] = act(norm(x)) of chunk channel c under the tile at (y0, x0) of y, zero outside the picture.
template <class E, int KSIZE, int STRIDE>
DEV void load_patch(const Conv2dParams& p, float* patch, uint32_t c0, int y0, int x0) {
  using C = Config<KSIZE, STRIDE>;
  const uint32_t image = bid_z(), c = tid_x() % C::kBlockC, channel = c0 + c;
  // Sides of the picture that the taps move over: x, enlarged where that is asked.
  const int height = static_cast<int>(p.height) * STRIDE, width = static_cast<int>(p.width) * STRIDE;
  const int in_width = width >> p.upsample;
  const size_t in_pixels = static_cast<size_t>(height >> p.upsample) * in_width;
  const E* x = ptr<const E>(p.x) + image * in_pixels * p.c_in + channel;

  // y = (x - mean) * scale + offset for this thread's channel
  const bool known = channel < p.c_in;
  float mean = 0.0f, scale = 1.0f, offset = 0.0f;
  if (p.stats && known) {
    const float* stats = ptr<const float>(p.stats) + (image * p.groups + channel / (p.c_in / p.groups)) * 2;
    mean = stats[0];
    scale = stats[1] * to_f32(ptr<const E>(p.gamma)[channel]);
    offset = to_f32(ptr<const E>(p.beta)[channel]);
  }
#pragma unroll 1  // three forms of the product leave no registers for more loads in flight
  for (uint32_t pixel = tid_x() / C::kBlockC; pixel < C::kSide * C::kSide; pixel += kThreads / C::kBlockC) {
    const int row = y0 * STRIDE - C::kBorder + static_cast<int>(pixel / C::kSide);
    const int col = x0 * STRIDE - C::kBorder + static_cast<int>(pixel % C::kSide);
    float v = 0.0f;
    if (known && row >= 0 && row < height && col >= 0 && col < width) {
      v = to_f32(x[static_cast<size_t>((row >> p.upsample) * in_width + (col >> p.upsample)) * p.c_in]);
      if (p.stats) v = f_fma(v - mean, scale, offset);
      if (p.stats && p.silu) v = swish(v);
    }
    patch[c * C::kPatchPitch + pixel] = v;
  }
}

// weights[tap, c, n] of chunk channel c and the block's output channel n, zero where there is none.
template <class E, int KSIZE, int STRIDE>
DEV void load_weights(const Conv2dParams& p, float* weights, uint32_t c0, uint32_t n0) {
  using C = Config<KSIZE, STRIDE>;
  const uint32_t c = tid_x() % C::kBlockC, channel = c0 + c;
  for (uint32_t n = tid_x() / C::kBlockC; n < kBlockN; n += kThreads / C::kBlockC) {
    const bool known = channel < p.c_in && n0 + n < p.c_out;
    const E* w = ptr<const E>(p.w) + static_cast<size_t>(n0 + n) * C::kTaps * p.c_in + channel;
    for (int tap = 0; tap < C::kTaps; tap++)
      weights[(tap * C::kBlockC + c) * kWeightPitch + n] = known ? to_f32(w[static_cast<size_t>(tap) * p.c_in]) : 0.0f;
  }
}

template <class E, int KSIZE, int STRIDE>
DEV void conv2d_tile(const Conv2dParams& p, float* patch, float* weights) {
  using C = Config<KSIZE, STRIDE>;
  const uint32_t tiles_x = (p.width + kTile - 1) / kTile;
  const int y0 = static_cast<int>(bid_x() / tiles_x) * kTile, x0 = static_cast<int>(bid_x() % tiles_x) * kTile;
  const uint32_t n0 = bid_y() * kBlockN;
  const uint32_t thread_row = tid_x() / (kBlockN / kThreadN), thread_n = tid_x() % (kBlockN / kThreadN) * kThreadN;
  const uint32_t row = y0 + thread_row;
  // conv_out has 3 channels: most threads of its blocks only load.
  const bool active = row < p.height && n0 + thread_n < p.c_out;

  float acc[kTile][kThreadN] = {};
  for (uint32_t c0 = 0; c0 < p.c_in; c0 += C::kBlockC) {
    block_sync();
    load_patch<E, KSIZE, STRIDE>(p, patch, c0, y0, x0);
    load_weights<E, KSIZE, STRIDE>(p, weights, c0, n0);
    block_sync();
    if (!active) continue;
#pragma unroll 1
    for (int c = 0; c < C::kBlockC; c++)
      for (int ky = 0; ky < KSIZE; ky++)
        for (int kx = 0; kx < KSIZE; kx++) {
          const float* a = patch + c * C::kPatchPitch + (thread_row * STRIDE + ky) * C::kSide + kx;
          const float* w = weights + ((ky * KSIZE + kx) * C::kBlockC + c) * kWeightPitch + thread_n;
          float b[kThreadN];
          for (int j = 0; j < kThreadN; j++) b[j] = w[j];
          for (int i = 0; i < kTile; i++)
            for (int j = 0; j < kThreadN; j++) acc[i][j] += a[i * STRIDE] * b[j];
        }
  }
  if (!active) return;

  const size_t at = (static_cast<size_t>(bid_z()) * p.height + row) * p.width;
  for (int j = 0; j < kThreadN; j++) {
    const uint32_t n = n0 + thread_n + j;
    if (n >= p.c_out) continue;
    const float bias = to_f32(ptr<const E>(p.bias)[n]);
    for (int i = 0; i < kTile; i++) {
      if (x0 + i >= static_cast<int>(p.width)) continue;
      const size_t index = (at + x0 + i) * p.c_out + n;
      float v = acc[i][j] + bias;
      if (p.residual) v += to_f32(ptr<const E>(p.residual)[index]);
      ptr<E>(p.y)[index] = from_f32<E>(v);
    }
  }
}

template <class E>
DEV void conv2d_plain(const Conv2dParams& p, float* patch, float* weights) {
  griddep_launch();
  griddep_wait();
  if (p.stride == 2)
    conv2d_tile<E, 3, 2>(p, patch, weights);
  else if (p.ksize == 3)
    conv2d_tile<E, 3, 1>(p, patch, weights);
  else
    conv2d_tile<E, 1, 1>(p, patch, weights);
}

KERNEL(conv2d_plain_f32, Conv2dParams, 64, 8) {
  SMEM(float, patch, kPatchFloats);
  SMEM(float, weights, kWeightFloats);
  conv2d_plain<float>(p, patch, weights);
}
KERNEL(conv2d_plain_bf16, Conv2dParams, 64, 8) {
  SMEM(float, patch, kPatchFloats);
  SMEM(float, weights, kWeightFloats);
  conv2d_plain<bf16>(p, patch, weights);
}
