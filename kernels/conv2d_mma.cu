// y = w * act(norm(x)) + bias (+ residual): the convolutions of the VAE on tensor cores. Tensors and conventions as in
// conv2d.cu, all bf16; C_in is a multiple of 8.
//
//   x        [B, h_in, w_in, C_in]    w [C_out, k, k, C_in]    y, residual [B, h, w, C_out]
//   partial  [B, tiles, C_out, 2] float, optional: mean and sum of squared deviations of every channel of y over the
//            pixels of a tile, as they are stored; group_stats merges them, and nobody reads y again for its norm
//
// Rounding: as conv2d.cu, and the input is rounded to bf16 where the official code stores it: after the norm and after
// the swish. (Only after the swish is further from its pictures: independent roundings of the same value add up.)
//
// Bound: FLOPs. Grid (tiles of 8x16 pixels, blocks of 16 * NT output channels, images), 256 threads, two blocks per SM.
// The eight warps are 4 (two rows of 16 pixels each) x 2 (8 * NT channels each); sums stay in registers.
//
//   x  --norm, swish, once per element--> patch   [pixels under the tile][32 channels]  x2 smem --ldmatrix--+
//   w  ------------cp.async-------------> weights [16 * NT][32 channels] of one tap      x3 smem --ldmatrix--+--> mma
//
// A step is one tap of one slice of 32 input channels. While it is multiplied, the weights of the step after next are
// on their way, and a share of the next slice's patch is loaded before the products and stored after them. The patch
// is kept at the size of x: enlarging by two is a matter of addresses.
//
// Channels are dealt to the columns of the fragments such that a thread ends with eight neighbours of a pixel: one
// 16-byte access to the residual, one to y.
#include "dev.cuh"

static constexpr int kThreads = 256;
static constexpr int kTileH = 8, kTileW = 16;  // pixels of a block; a fragment of 16 rows is one row of the tile
static constexpr int kSlice = 32;              // input channels at a time
static constexpr int kPitch = kSlice + 8;      // rows of 80 bytes: eight of them lie in different banks
static constexpr int kStages = 3;              // weights: one in use, two on their way
static constexpr int kChunk = 8;               // channels of a 16-byte access
static constexpr int kSliceChunks = kSlice / kChunk;

template <int KSIZE, int STRIDE, int UP>
struct Form {
  static constexpr int kSize = KSIZE, kStride = STRIDE, kUp = UP, kTaps = KSIZE * KSIZE;
  static constexpr int kBorder = STRIDE == 1 ? KSIZE / 2 : 0;
  static constexpr int kRows = UP ? kTileH / 2 + 2 : (kTileH - 1) * STRIDE + KSIZE;
  static constexpr int kCols = UP ? kTileW / 2 + 2 : (kTileW - 1) * STRIDE + KSIZE;
  static constexpr uint32_t kChunks = kRows * kCols * kSliceChunks;
  static constexpr uint32_t kPatch = kRows * kCols * kPitch;  // elements
  static constexpr int kShare = (kChunks + kTaps * kThreads - 1) / (kTaps * kThreads);  // chunks of a thread per step
  static_assert(!UP || (KSIZE == 3 && STRIDE == 1), "the address arithmetic of the enlarged patch relies on both");
};

// The input of a block: a picture, where the patch begins in it, and the norm.
struct Input {
  const bf16* x;
  int height, width, row0, col0;
  uint32_t c_in;
  const float* scale;   // [c_in], in shared memory, or null: y = x * scale + offset
  const float* offset;  // [c_in]
  bool silu;
};

DEV float swish(float x) { return fast_div(x, 1.0f + fast_exp(-x)); }

// Eight channels of one pixel of the patch, zero where there is none; whether there is one.
template <class F>
DEV bool fetch(const Input& in, uint32_t slice, uint32_t chunk, v4u& raw) {
  raw = v4u{0, 0, 0, 0};
  const uint32_t channel = slice * kSlice + chunk % kSliceChunks * kChunk, pixel = chunk / kSliceChunks;
  const int row = in.row0 + static_cast<int>(pixel / F::kCols), col = in.col0 + static_cast<int>(pixel % F::kCols);
  if (chunk >= F::kChunks || channel >= in.c_in || row < 0 || row >= in.height || col < 0 || col >= in.width)
    return false;
  raw = ld_cg_v4(in.x + (static_cast<size_t>(row) * in.width + col) * in.c_in + channel);
  return true;
}

// Normalises what `fetch` brought and puts it into the patch.
template <class F>
DEV void put(const Input& in, bf16* patch, uint32_t slice, uint32_t chunk, v4u raw, bool known) {
  if (chunk >= F::kChunks) return;
  if (known && in.scale) {
    const uint32_t channel = slice * kSlice + chunk % kSliceChunks * kChunk;
    float v[8];
    unpack_vec<bf16>(raw, v);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float scale[4], offset[4];
      load_vec_plain<float>(in.scale + channel + half * 4, scale);
      load_vec_plain<float>(in.offset + channel + half * 4, offset);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float n = f_fma(v[half * 4 + i], scale[i], offset[i]);
        v[half * 4 + i] = in.silu ? swish(round_to<bf16>(n)) : n;
      }
    }
    raw = v4u{pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
  }
  st_v4(patch + chunk / kSliceChunks * kPitch + chunk % kSliceChunks * kChunk, raw);
}

// Output channel (of 32) that row r of the weights in shared memory holds. Fragment j of four covers rows 8 j to 8 j +
// 7, and the lanes with lane % 4 == p get its columns 2 p and 2 p + 1: together channels 8 p to 8 p + 7.
DEV uint32_t channel_of_row(uint32_t r) { return r % 8 / 2 * 8 + r / 8 * 2 + r % 2; }

// Weights [16 * NT][32] of one step on their way, zero where there are none.
template <class F, int NT>
DEV void send_weights(const Conv2dParams& p, bf16* to, uint32_t step, uint32_t n0) {
  const uint32_t tap = step % F::kTaps, channel = step / F::kTaps * kSlice + tid_x() % kSliceChunks * kChunk;
  const bf16* w = ptr<const bf16>(p.w);
#pragma unroll
  for (uint32_t r = tid_x() / kSliceChunks; r < 16 * NT; r += kThreads / kSliceChunks) {
    const uint32_t n = n0 + r / 32 * 32 + channel_of_row(r % 32);
    const bool known = n < p.c_out && channel < p.c_in;
    const bf16* from = known ? w + (static_cast<size_t>(n) * F::kTaps + tap) * p.c_in + channel : w;
    cp_async16(to + r * kPitch + tid_x() % kSliceChunks * kChunk, from, known);
  }
  cp_async_commit();
}

// Statistics of every channel of the tile [128 pixels][16 * NT + 8] that the block has left in shared memory.
template <int NT>
DEV void tile_stats(const Conv2dParams& p, const bf16* tile, float* parts, uint32_t n0, uint32_t rows, uint32_t cols) {
  constexpr uint32_t kN = 16 * NT, kParts = kThreads / (kN / 2), kPartRows = kTileH / kParts;
  const uint32_t pair = tid_x() % (kN / 2) * 2, part = tid_x() / (kN / 2);
  float sum[2] = {}, m2[2] = {};
  const uint32_t wanted = n0 + pair < p.c_out ? rows : 0;  // nothing lies in the columns of other channels
  const uint32_t last = (part + 1) * kPartRows < wanted ? (part + 1) * kPartRows : wanted;
  const uint32_t count = part * kPartRows < last ? (last - part * kPartRows) * cols : 0;
  const auto each = [&](auto&& use) {
    for (uint32_t row = part * kPartRows; row < last; row++)
      for (uint32_t col = 0; col < cols; col++) {
        const bf16* at = tile + (row * kTileW + col) * (kN + 8) + pair;
        use(to_f32(at[0]), to_f32(at[1]));
      }
  };
  each([&](float a, float b) { sum[0] += a, sum[1] += b; });
  const float inverse = count ? 1.0f / static_cast<float>(count) : 0.0f;
  const float mean[2] = {sum[0] * inverse, sum[1] * inverse};
  each([&](float a, float b) {
    m2[0] = f_fma(a - mean[0], a - mean[0], m2[0]);
    m2[1] = f_fma(b - mean[1], b - mean[1], m2[1]);
  });
  for (int i = 0; i < 2; i++) {
    parts[(part * kN + pair + i) * 2] = mean[i];
    parts[(part * kN + pair + i) * 2 + 1] = m2[i];
  }
  block_sync();
  const uint32_t n = n0 + tid_x();
  if (tid_x() >= kN || n >= p.c_out) return;
  float all_count = 0.0f, all_mean = 0.0f, all_m2 = 0.0f;
  for (uint32_t i = 0; i < kParts && i * kPartRows < rows; i++) {
    const uint32_t part_rows = rows - i * kPartRows < kPartRows ? rows - i * kPartRows : kPartRows;
    const float c = static_cast<float>(part_rows * cols), *from = parts + (i * kN + tid_x()) * 2;
    const float delta = from[0] - all_mean, share = c / (all_count + c);
    all_mean = f_fma(delta, share, all_mean);
    all_m2 += from[1] + delta * delta * all_count * share;
    all_count += c;
  }
  float* out = ptr<float>(p.partial) + ((static_cast<size_t>(bid_z()) * nbid_x() + bid_x()) * p.c_out + n) * 2;
  out[0] = all_mean;
  out[1] = all_m2;
}

template <class F, int NT>
DEV void conv2d_tile(const Conv2dParams& p, unsigned char* smem) {
  constexpr int kN = 16 * NT;
  constexpr uint32_t kStage = kN * kPitch;  // elements
  static_assert(kTileH * kTileW * (kN + 8) * 2 + kThreads * 16 <= (2 * F::kPatch + kStages * kStage) * 2,
                "the finished tile and its statistics fit where patch and weights were");
  bf16* patches = reinterpret_cast<bf16*>(smem);
  bf16* weights = patches + 2 * F::kPatch;
  float* coefficients = reinterpret_cast<float*>(weights + kStages * kStage);

  const uint32_t tiles_x = (p.width + kTileW - 1) / kTileW, image = bid_z(), n0 = bid_y() * kN;
  const uint32_t y0 = bid_x() / tiles_x * kTileH, x0 = bid_x() % tiles_x * kTileW;
  const uint32_t warp_row = warp_id() % 4 * 2, warp_n = warp_id() / 4 * (8 * NT), lane = lane_id();
  const bool active = y0 + warp_row < p.height && n0 + warp_n < p.c_out;
  const uint32_t slices = (p.c_in + kSlice - 1) / kSlice, steps = slices * F::kTaps;

  // Nobody writes weights: they may set out before the predecessors end.
  send_weights<F, NT>(p, weights, 0, n0);
  if (steps > 1) send_weights<F, NT>(p, weights + kStage, 1, n0);
  else cp_async_commit();
  griddep_launch();
  griddep_wait();

  Input in;
  in.height = static_cast<int>(p.height * F::kStride) >> F::kUp;
  in.width = static_cast<int>(p.width * F::kStride) >> F::kUp;
  in.row0 = (static_cast<int>(y0 * F::kStride) - F::kBorder) >> F::kUp;
  in.col0 = (static_cast<int>(x0 * F::kStride) - F::kBorder) >> F::kUp;
  in.c_in = p.c_in;
  in.x = ptr<const bf16>(p.x) + static_cast<size_t>(image) * in.height * in.width * p.c_in;
  in.scale = p.stats ? coefficients : nullptr;
  in.offset = coefficients + p.c_in;
  in.silu = p.silu != 0;
  if (p.stats) {
    for (uint32_t c = tid_x(); c < p.c_in; c += kThreads) {
      const float* stats = ptr<const float>(p.stats) + (image * p.groups + c / (p.c_in / p.groups)) * 2;
      const float scale = stats[1] * to_f32(ptr<const bf16>(p.gamma)[c]);
      coefficients[c] = scale;
      coefficients[p.c_in + c] = f_fma(-stats[0], scale, to_f32(ptr<const bf16>(p.beta)[c]));
    }
    block_sync();
  }
  for (uint32_t chunk = tid_x(); chunk < F::kChunks; chunk += kThreads) {
    v4u raw;
    const bool known = fetch<F>(in, 0, chunk, raw);
    put<F>(in, patches, 0, chunk, raw, known);
  }

  float acc[2][NT][4] = {};
  uint32_t step = 0;
#pragma unroll 1
  for (uint32_t slice = 0; slice < slices; slice++) {
    const bf16* patch = patches + slice % 2 * F::kPatch;
    bf16* next_patch = patches + (slice + 1) % 2 * F::kPatch;
    const bool more = slice + 1 < slices;
#pragma unroll 1
    for (uint32_t tap = 0; tap < F::kTaps; tap++, step++) {
      cp_async_wait<1>();
      block_sync();
      if (step + 2 < steps) send_weights<F, NT>(p, weights + (step + 2) % kStages * kStage, step + 2, n0);
      else cp_async_commit();
      v4u raw[F::kShare];
      bool known[F::kShare] = {};
      const uint32_t chunk0 = tap * (F::kShare * kThreads) + tid_x();
      if (more) {
#pragma unroll
        for (int i = 0; i < F::kShare; i++) known[i] = fetch<F>(in, slice + 1, chunk0 + i * kThreads, raw[i]);
      }
      if (active) {
        const uint32_t col = ((lane % 16) * F::kStride + tap % F::kSize + F::kUp) >> F::kUp;
        const uint32_t row0 = (warp_row * F::kStride + tap / F::kSize + F::kUp) >> F::kUp;
        const uint32_t row1 = ((warp_row + 1) * F::kStride + tap / F::kSize + F::kUp) >> F::kUp;
        const bf16* a_at = patch + (row0 * F::kCols + col) * kPitch + lane / 16 * 8;
        const bf16* b_at =
            weights + step % kStages * kStage + (warp_n + lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 8;
#pragma unroll
        for (uint32_t k = 0; k < kSlice; k += 16) {
          if (slice * kSlice + k >= p.c_in) break;
          uint32_t a[2][4], b[NT][2];
          ldmatrix_x4_all(a, a_at + k, (row1 - row0) * F::kCols * kPitch);
          ldmatrix_x4_all(b, b_at + k, 16 * kPitch);
          mma_bf16_all(acc, a, b);
        }
      }
      if (more) {
#pragma unroll
        for (int i = 0; i < F::kShare; i++)
          put<F>(in, next_patch, slice + 1, chunk0 + i * kThreads, raw[i], known[i]);
      }
    }
  }

  const bool vector = p.c_out % kChunk == 0;
  bf16* tile = patches;
  if (p.partial) block_sync();  // patch and weights have been read
  if (active) {
#pragma unroll
    for (uint32_t q = 0; q < NT / 4; q++) {
      const uint32_t column = warp_n + q * 32 + lane % 4 * 8, n = n0 + column;
      if (n >= p.c_out) continue;
      float bias[8];
#pragma unroll
      for (uint32_t i = 0; i < 8; i++) bias[i] = n + i < p.c_out ? to_f32(ptr<const bf16>(p.bias)[n + i]) : 0.0f;
#pragma unroll
      for (uint32_t m = 0; m < 2; m++)
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
          const uint32_t row = warp_row + m, col = lane / 4 + half * 8;
          if (y0 + row >= p.height || x0 + col >= p.width) continue;
          const size_t at = ((static_cast<size_t>(image) * p.height + y0 + row) * p.width + x0 + col) * p.c_out + n;
          const bf16* residual = p.residual ? ptr<const bf16>(p.residual) + at : nullptr;
          float v[8], r[8] = {};
          if (residual && vector) load_vec_plain<bf16>(residual, r);
#pragma unroll
          for (uint32_t i = 0; i < 8; i++) {
            if (residual && !vector && n + i < p.c_out) r[i] = to_f32(residual[i]);
            v[i] = acc[m][q * 4 + i / 2][half * 2 + i % 2] + bias[i] + r[i];
          }
          bf16* y = ptr<bf16>(p.y) + at;
          if (vector) {
            store_vec(y, v);
          } else {
#pragma unroll
            for (uint32_t i = 0; i < 8; i++)
              if (n + i < p.c_out) y[i] = to_bf16(v[i]);
          }
          if (p.partial) store_vec(tile + (row * kTileW + col) * (kN + 8) + column, v);
        }
    }
  }
  if (!p.partial) return;
  block_sync();
  const uint32_t rows = p.height - y0 < kTileH ? p.height - y0 : kTileH;
  const uint32_t cols = p.width - x0 < kTileW ? p.width - x0 : kTileW;
  tile_stats<NT>(p, tile, reinterpret_cast<float*>(tile + kTileH * kTileW * (kN + 8)), n0, rows, cols);
}

template <int NT>
DEV void conv2d_mma(const Conv2dParams& p, unsigned char* smem) {
  if (p.stride == 2)
    conv2d_tile<Form<3, 2, 0>, NT>(p, smem);
  else if (p.ksize == 1)
    conv2d_tile<Form<1, 1, 0>, NT>(p, smem);
  else if (p.upsample)
    conv2d_tile<Form<3, 1, 1>, NT>(p, smem);
  else
    conv2d_tile<Form<3, 1, 0>, NT>(p, smem);
}

KERNEL(conv2d_mma_bf16, Conv2dParams, 256, 2) {
  SMEM_DYN(unsigned char, smem);
  if (p.c_out > 64)
    conv2d_mma<8>(p, smem);
  else
    conv2d_mma<4>(p, smem);
}
