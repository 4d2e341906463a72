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
// Bound: FLOPs, then shared memory. Grid (tiles of 8x16 pixels, blocks of 16 * NT output channels, images), 128
// threads, two blocks per SM. The four warps are 2 (four rows of 16 pixels each) x 2 (8 * NT channels each); sums stay
// in registers.
//
//   x  --norm, swish, once per element--> patch   [pixels under the tile][32 channels]    x2 smem --ldmatrix--+
//   w  ------------cp.async-------------> weights [taps of a column][16 * NT][32 channels] x2 smem --ldmatrix--+--> mma
//
// A step is one column of taps of one slice of 32 input channels. The taps of a column share fragments of x: four rows
// of pixels under three taps are six rows of the patch, not twelve. While a step is multiplied, the weights of the next
// are on their way, and a share of the next slice's patch is loaded before the products and stored after them. The
// patch is kept at the size of x: enlarging by two is a matter of addresses.
//
// A row of 32 channels is four chunks of 16 bytes, which lie in an order that depends on the row: eight rows of a
// fragment are then in different banks, and so are the chunks that eight threads store.
//
// Channels are dealt to the columns of the fragments such that a thread ends with eight neighbours of a pixel: one
// 16-byte access to the residual, one to y.
#include "dev.cuh"

static constexpr int kThreads = 128;
static constexpr int kTileH = 8, kTileW = 16;  // pixels of a block; a fragment of 16 rows is one row of the tile
static constexpr int kWarpH = 4;               // rows of a warp
static constexpr int kSlice = 32;              // input channels at a time
static constexpr int kChunk = 8;               // channels of a 16-byte access
static constexpr int kSliceChunks = kSlice / kChunk;
static constexpr int kPartRows = 2;  // rows of the tile whose statistics one thread finds

template <int KSIZE, int STRIDE, int UP>
struct Form {
  static constexpr int kSize = KSIZE, kStride = STRIDE, kUp = UP, kTaps = KSIZE * KSIZE;
  static constexpr int kBorder = STRIDE == 1 ? KSIZE / 2 : 0;
  static constexpr int kRows = UP ? kTileH / 2 + 2 : (kTileH - 1) * STRIDE + KSIZE;
  static constexpr int kCols = UP ? kTileW / 2 + 2 : (kTileW - 1) * STRIDE + KSIZE;
  static constexpr uint32_t kChunks = kRows * kCols * kSliceChunks;
  static constexpr uint32_t kPatch = kRows * kCols * kSlice;  // elements
  // Row of the patch under row m of a warp and row r of the taps, from the warp's first one.
  static constexpr int row_of(int m, int r) { return (m * STRIDE + r + UP) >> UP; }
  static constexpr int kFragments = row_of(kWarpH - 1, KSIZE - 1) + 1;
  static constexpr int kShare = (kChunks + KSIZE * kThreads - 1) / (KSIZE * kThreads);  // chunks of a thread per step
  static constexpr int kFirst = KSIZE * kShare < 6 ? KSIZE * kShare : 6;  // the same before the first step, at a time
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

// Elements from the start of a row of 32 channels to chunk c of it; `row` counts rows or columns.
DEV uint32_t place(uint32_t row, uint32_t c) { return (c ^ (row / 2 % 4)) * kChunk; }

// By exp2: exp spends three instructions more on results below 2^-126, which leave 1 as it is.
DEV float swish(float x) { return fast_div(x, 1.0f + fast_exp2(x * -1.4426950408889634f)); }

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

// Scale and offset of the norm for the eight channels of a slice that a thread loads, the same for all its pixels.
struct Coefficients {
  float scale[8], offset[8];
};

DEV Coefficients coefficients_of(const Input& in, uint32_t slice) {
  Coefficients c = {};
  const uint32_t channel = slice * kSlice + tid_x() % kSliceChunks * kChunk;
  if (channel >= in.c_in) return c;
#pragma unroll
  for (int half = 0; half < 8; half += 4) {
    float scale[4], offset[4];
    load_vec_plain<float>(in.scale + channel + half, scale);
    load_vec_plain<float>(in.offset + channel + half, offset);
#pragma unroll
    for (int i = 0; i < 4; i++) c.scale[half + i] = scale[i], c.offset[half + i] = offset[i];
  }
  return c;
}

template <bool SILU>
DEV v4u normalise(v4u raw, const Coefficients& c) {
  float v[8];
  unpack_vec<bf16>(raw, v);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = f_fma(v[i], c.scale[i], c.offset[i]);
  raw = v4u{pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
  if (!SILU) return raw;
  unpack_vec<bf16>(raw, v);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = swish(v[i]);
  return v4u{pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7])};
}

// N chunks of a thread, from `first` in steps of kThreads, on their way; bit i of the result: whether there is an i-th.
template <class F, int N>
DEV uint32_t fetch_all(const Input& in, uint32_t slice, uint32_t first, v4u (&raw)[N]) {
  uint32_t known = 0;
#pragma unroll
  for (int i = 0; i < N; i++) known |= fetch<F>(in, slice, first + i * kThreads + tid_x(), raw[i]) ? 1u << i : 0u;
  return known;
}

// Normalises what `fetch_all` brought and puts it into the patch. Zeros around a picture are calculated with and then
// dropped: without branches in between the chunks' exponentials overlap.
template <class F, int N>
DEV void put_all(const Input& in, bf16* patch, uint32_t slice, uint32_t first, v4u (&raw)[N], uint32_t known) {
  if (in.scale) {
    const Coefficients c = coefficients_of(in, slice);
    if (in.silu) {
#pragma unroll
      for (int i = 0; i < N; i++) raw[i] = normalise<true>(raw[i], c);
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) raw[i] = normalise<false>(raw[i], c);
    }
  }
#pragma unroll
  for (int i = 0; i < N; i++) {
    const uint32_t chunk = first + i * kThreads + tid_x(), pixel = chunk / kSliceChunks;
    bf16* to = patch + pixel * kSlice + place(pixel % F::kCols, chunk % kSliceChunks);
    if (chunk < F::kChunks) st_v4(to, known >> i & 1 ? raw[i] : v4u{0, 0, 0, 0});
  }
}

// Output channel (of 32) that row r of the weights in shared memory holds. Fragment j of four covers rows 8 j to 8 j +
// 7, and the lanes with lane % 4 == p get its columns 2 p and 2 p + 1: together channels 8 p to 8 p + 7.
DEV uint32_t channel_of_row(uint32_t r) { return r % 8 / 2 * 8 + r / 8 * 2 + r % 2; }

// Weights [taps of column `tap_col`][16 * NT][32] of a slice on their way, zero where there are none.
template <class F, int NT>
DEV void send_weights(const Conv2dParams& p, bf16* to, uint32_t slice, uint32_t tap_col, uint32_t n0) {
  static_assert(kThreads == 32 * kSliceChunks, "a thread's rows are 32 apart, so that they hold channels 32 apart");
  const uint32_t row = tid_x() / kSliceChunks, channel = slice * kSlice + tid_x() % kSliceChunks * kChunk;
  const uint32_t n = n0 + channel_of_row(row);
  const bf16* from = ptr<const bf16>(p.w) + (static_cast<size_t>(n) * F::kTaps + tap_col) * p.c_in + channel;
  to += row * kSlice + place(row, tid_x() % kSliceChunks);
#pragma unroll
  for (uint32_t i = 0; i < 16 * NT; i += 32)
#pragma unroll
    for (uint32_t r = 0; r < F::kSize; r++)
      cp_async16(to + (r * 16 * NT + i) * kSlice, from + static_cast<size_t>(i * F::kTaps + r * F::kSize) * p.c_in,
                 n + i < p.c_out && channel < p.c_in);
  cp_async_commit();
}

// Statistics of every channel of the tile [128 pixels][16 * NT + 8] that the block has left in shared memory. A thread
// finds those of four channels over kPartRows rows, which it keeps in registers for the second pass.
template <int NT>
DEV void tile_stats(const Conv2dParams& p, const bf16* tile, float* parts, uint32_t n0, uint32_t rows, uint32_t cols) {
  constexpr uint32_t kN = 16 * NT, kParts = kTileH / kPartRows, kPixels = kPartRows * kTileW;
  static_assert(kParts * (kN / 4) <= kThreads, "one part per thread");
  const uint32_t channel = tid_x() % (kN / 4) * 4, part = tid_x() / (kN / 4);
  if (part < kParts) {
    const uint32_t wanted = n0 + channel < p.c_out ? rows : 0;  // nothing lies in the columns of other channels
    const uint32_t part_rows = wanted > part * kPartRows ? wanted - part * kPartRows : 0;
    const uint32_t count = (part_rows < kPartRows ? part_rows : kPartRows) * cols;
    const float inverse = count ? 1.0f / static_cast<float>(count) : 0.0f;
    v2u stored[kPixels];
    float mean[4] = {}, m2[4] = {};
    const auto each = [&](auto&& use) {
#pragma unroll
      for (uint32_t i = 0; i < kPixels; i++) {
        if (i / kTileW >= part_rows || i % kTileW >= cols) continue;
        const float v[4] = {bf_lo(stored[i].x), bf_hi(stored[i].x), bf_lo(stored[i].y), bf_hi(stored[i].y)};
#pragma unroll
        for (int c = 0; c < 4; c++) use(c, v[c]);
      }
    };
#pragma unroll
    for (uint32_t i = 0; i < kPixels; i++)
      if (i / kTileW < part_rows && i % kTileW < cols)
        stored[i] = *reinterpret_cast<const v2u*>(tile + (part * kPixels + i) * (kN + 8) + channel);
    each([&](int c, float v) { mean[c] += v; });
#pragma unroll
    for (int c = 0; c < 4; c++) mean[c] *= inverse;
    each([&](int c, float v) { m2[c] = f_fma(v - mean[c], v - mean[c], m2[c]); });
    float* to = parts + (part * kN + channel) * 2;
    st_v4(to, v4u{as_u32(mean[0]), as_u32(m2[0]), as_u32(mean[1]), as_u32(m2[1])});
    st_v4(to + 4, v4u{as_u32(mean[2]), as_u32(m2[2]), as_u32(mean[3]), as_u32(m2[3])});
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

// Sums of a warp: fragments of 16 pixels by 8 channels.
template <int NT>
using Sums = float[kWarpH][NT][4];

template <class F, int NT>
DEV void multiply(const Conv2dParams& p, unsigned char* smem, Sums<NT>& acc) {
  constexpr int kN = 16 * NT;
  constexpr uint32_t kTapRow = kN * kSlice, kStage = F::kSize * kTapRow;  // elements
  bf16* patches = reinterpret_cast<bf16*>(smem);
  bf16* weights = patches + 2 * F::kPatch;
  float* coefficients = reinterpret_cast<float*>(weights + 2 * kStage);

  const uint32_t tiles_x = (p.width + kTileW - 1) / kTileW, image = bid_z(), n0 = bid_y() * kN;
  const uint32_t y0 = bid_x() / tiles_x * kTileH, x0 = bid_x() % tiles_x * kTileW;
  const uint32_t warp_row = warp_id() % 2 * kWarpH, warp_n = warp_id() / 2 * (8 * NT), lane = lane_id();
  const bool active = y0 + warp_row < p.height && n0 + warp_n < p.c_out;
  const uint32_t slices = (p.c_in + kSlice - 1) / kSlice;

  // Nobody writes weights: they may set out before the predecessors end.
  send_weights<F, NT>(p, weights, 0, 0, n0);
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

  v4u begin[F::kFirst];  // the first patch is on its way while the coefficients are made
  uint32_t known = fetch_all<F>(in, 0, 0, begin);
  if (p.stats) {
#pragma unroll 4
    for (uint32_t c = tid_x(); c < p.c_in; c += kThreads) {
      const float* stats = ptr<const float>(p.stats) + (image * p.groups + c / (p.c_in / p.groups)) * 2;
      const float scale = stats[1] * to_f32(ptr<const bf16>(p.gamma)[c]);
      coefficients[c] = scale;
      coefficients[p.c_in + c] = f_fma(-stats[0], scale, to_f32(ptr<const bf16>(p.beta)[c]));
    }
    block_sync();
  }
  put_all<F>(in, patches, 0, 0, begin, known);
#pragma unroll 1
  for (uint32_t first = F::kFirst * kThreads; first < F::kChunks; first += F::kFirst * kThreads) {
    known = fetch_all<F>(in, 0, first, begin);
    put_all<F>(in, patches, 0, first, begin, known);
  }

  const uint32_t row0 = warp_row * F::kStride >> F::kUp;
  const uint32_t b_at = (warp_n + lane % 8 + lane / 16 * 8) * kSlice + place(lane % 8, lane / 8 % 2);
#pragma unroll
  for (auto& row : acc)
#pragma unroll
    for (auto& fragment : row)
#pragma unroll
      for (float& sum : fragment) sum = 0.0f;
  uint32_t stage = 0;  // of the weights of this step
#pragma unroll 1
  for (uint32_t slice = 0; slice < slices; slice++) {
    const bf16* patch = patches + slice % 2 * F::kPatch;
    bf16* next_patch = patches + (slice + 1) % 2 * F::kPatch;
    const bool more = slice + 1 < slices;
#pragma unroll 1
    for (uint32_t tap_col = 0; tap_col < F::kSize; tap_col++, stage ^= 1) {
      cp_async_wait<0>();
      block_sync();
      const bool last = tap_col + 1 == F::kSize;
      if (!last || more)
        send_weights<F, NT>(p, weights + (stage ^ 1) * kStage, slice + last, last ? 0 : tap_col + 1, n0);
      v4u raw[F::kShare];
      const uint32_t first = tap_col * (F::kShare * kThreads);
      if (more) known = fetch_all<F>(in, slice + 1, first, raw);
      if (active) {
        const uint32_t col = (lane % 16 * F::kStride + tap_col + F::kUp) >> F::kUp;
        const uint32_t a_at = (row0 * F::kCols + col) * kSlice + place(col, lane / 16);
        const bf16* w = weights + stage * kStage;
#pragma unroll
        for (uint32_t k = 0; k < kSlice; k += 16) {  // the upper half of a slice's chunks is 16 elements away
          uint32_t a[F::kFragments][4];
          ldmatrix_x4_all(a, patch + (a_at ^ k), F::kCols * kSlice);
#pragma unroll
          for (int r = 0; r < F::kSize; r++) {
            uint32_t rows[kWarpH][4], b[NT][2];
            ldmatrix_x4_all(b, w + r * kTapRow + (b_at ^ k), 16 * kSlice);
#pragma unroll
            for (int m = 0; m < kWarpH; m++)
#pragma unroll
              for (int i = 0; i < 4; i++) rows[m][i] = a[F::row_of(m, r)][i];
            mma_bf16_all(acc, rows, b);
          }
        }
      }
      if (more) put_all<F>(in, next_patch, slice + 1, first, raw, known);
    }
  }
}

// Bias and residual, y, and the statistics of the tile.
template <int NT>
DEV void finish(const Conv2dParams& p, unsigned char* smem, const Sums<NT>& acc) {
  constexpr int kN = 16 * NT;
  static_assert(kN <= kThreads, "a thread merges the statistics of a channel");
  const uint32_t tiles_x = (p.width + kTileW - 1) / kTileW, image = bid_z(), n0 = bid_y() * kN;
  const uint32_t y0 = bid_x() / tiles_x * kTileH, x0 = bid_x() % tiles_x * kTileW;
  const uint32_t warp_row = warp_id() % 2 * kWarpH, warp_n = warp_id() / 2 * (8 * NT), lane = lane_id();
  const bool active = y0 + warp_row < p.height && n0 + warp_n < p.c_out;
  const bool vector = p.c_out % kChunk == 0;
  bf16* tile = reinterpret_cast<bf16*>(smem);
  if (p.partial) block_sync();  // patch and weights have been read
  if (active) {
#pragma unroll
    for (uint32_t q = 0; q < NT / 4; q++) {
      const uint32_t column = warp_n + q * 32 + lane % 4 * 8, n = n0 + column;
      if (n >= p.c_out) continue;
      const auto inside = [&](uint32_t m, uint32_t half) {
        return y0 + warp_row + m < p.height && x0 + lane / 4 + half * 8 < p.width;
      };
      const auto at = [&](uint32_t m, uint32_t half) {
        const size_t row = static_cast<size_t>(image) * p.height + y0 + warp_row + m;
        return (row * p.width + x0 + lane / 4 + half * 8) * p.c_out + n;
      };
      // All of the residual at once: it may be y, so that no load would move above a store before it.
      v4u residual[kWarpH][2] = {};
      if (p.residual && vector) {
#pragma unroll
        for (uint32_t m = 0; m < kWarpH; m++)
#pragma unroll
          for (uint32_t half = 0; half < 2; half++)
            if (inside(m, half)) residual[m][half] = ld_v4(ptr<const bf16>(p.residual) + at(m, half));
      }
      float bias[8];
#pragma unroll
      for (uint32_t i = 0; i < 8; i++) bias[i] = n + i < p.c_out ? to_f32(ptr<const bf16>(p.bias)[n + i]) : 0.0f;
#pragma unroll
      for (uint32_t m = 0; m < kWarpH; m++)
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
          if (!inside(m, half)) continue;
          float v[8], r[8];
          unpack_vec<bf16>(residual[m][half], r);
          bf16* y = ptr<bf16>(p.y) + at(m, half);
#pragma unroll
          for (uint32_t i = 0; i < 8; i++) {
            if (p.residual && !vector && n + i < p.c_out) r[i] = to_f32(ptr<const bf16>(p.residual)[at(m, half) + i]);
            v[i] = acc[m][q * 4 + i / 2][half * 2 + i % 2] + bias[i] + r[i];
          }
          if (vector) {
            store_vec(y, v);
          } else {
#pragma unroll
            for (uint32_t i = 0; i < 8; i++)
              if (n + i < p.c_out) y[i] = to_bf16(v[i]);
          }
          const uint32_t pixel = (warp_row + m) * kTileW + lane / 4 + half * 8;
          if (p.partial) store_vec(tile + pixel * (kN + 8) + column, v);
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
  Sums<NT> acc;
  if (p.ksize == 1)
    multiply<Form<1, 1, 0>, NT>(p, smem, acc);
  else if (p.upsample)
    multiply<Form<3, 1, 1>, NT>(p, smem, acc);
  else if (p.stride == 1)
    multiply<Form<3, 1, 0>, NT>(p, smem, acc);
  else if constexpr (NT == 4)  // a patch four times as large leaves no room for more channels
    multiply<Form<3, 2, 0>, NT>(p, smem, acc);
  finish<NT>(p, smem, acc);
}

KERNEL(conv2d_mma_bf16, Conv2dParams, 128, 2) {
  SMEM_DYN(unsigned char, smem);
  if (p.c_out > nbid_y() * 64)
    conv2d_mma<8>(p, smem);
  else
    conv2d_mma<4>(p, smem);
}
