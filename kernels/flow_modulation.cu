/* The modulations of the flow head for all evaluations and sequences of one image token at once: they depend on the
 * time and the condition, not on the state, so one product replaces N x S of them and reads the weights once.
 *
 *   mod[n, s, o] = dot(w[o, :], E(silu(E(time[n, :] + cond[s, :])))) + bias[o]
 *
 * In: time [N, F] E, cond [S, F] E, w [O, F] E, bias [O] E. Out: mod [N, S, O] E. O = (3 L + 2) F: per block shift,
 * scale, gate, then the final shift and scale. Sums in f32; rounded to E: the sum of time and cond, its silu, mod.
 *
 * Shipped model (F 1536, L 12, bf16): 179 MB of weights, read once whatever N x S is; 10 GFLOP at 28 evaluations of 2
 * sequences. Up to about 260 rows the bytes bound tensor cores; this variant uses none and is bound by its FMAs.
 *
 *   gmem w    -- 16-byte loads, once --> smem w [columns][F] E ---------+
 *   gmem time, cond -- add, silu -----> smem s [64 rows][kChunk] float -+--> reg sums [4 rows][2 columns] --> gmem mod
 *
 * A block owns up to 32 outputs (columns) for all N x S rows: their weights stay in shared memory while the rows go by,
 * 64 at a time. Each output is summed by one thread in ascending k, so it depends on neither grid nor batch.
 *
 * mma (bf16, F a multiple of 32): tensor cores.
 *
 *   gmem w    -- 16-byte loads, once, a batch ahead --> reg A [16 outputs][32 k] --------+
 *   gmem time, cond -- add, silu, E --> smem s [160 rows][chunk] E -- 16-byte loads --> B +--> reg sums --> gmem mod
 *
 * A product does not mind the order of its k: lane (g, t) of a warp takes the eight neighbours from 32 i + 8 t of rows
 * g and g + 8 as the A operands of two mma, and the same eight of activation row g as their B operands, so that both
 * come straight from row-major memory. A block owns an even share of the tiles of 16 outputs, a warp one tile at a
 * time, up to 160 rows per pass. Beyond 160 rows every further pass reads w again.
 *
 * LayerNorm's gain and offset are not folded into scale and shift: a folded w (1 + scale) in bf16 is rounded relative
 * to itself, the scale that it replaces only relative to the scale, so the error of every norm's input would grow three
 * times at scale 0.5; and kept in f32 the two vectors are more bytes for the chain than the four are in bf16.
 * Variants: plain, mma.
 */
#include "dev.cuh"

static constexpr uint32_t kThreads = 256;
static constexpr uint32_t kLanes = 16; /* threads along each side of the tile */
static constexpr uint32_t kRowsPerThread = 4;
static constexpr uint32_t kColumnsPerThread = 2;
static constexpr uint32_t kRows = kLanes * kRowsPerThread;
static constexpr uint32_t kColumns = kLanes * kColumnsPerThread;
static constexpr uint32_t kChunk = 32; /* k per stage of the activations */
/* Elements from one staged row of activations to the next: neighbours start four banks apart. */
static constexpr uint32_t kActStride = kChunk + 4;
/* Most shared memory for weights; with the activations it stays below 227 KiB. At width 1536 in bf16 the 32 columns
 * take 97 KiB, so that two blocks share an SM. */
static constexpr uint32_t kWeightBytes = 208 * 1024;
static_assert(kLanes * kLanes == kThreads && kChunk % 4 == 0);

/* Elements from one staged weight row to the next: 16-byte aligned, zeros at the end, rows not all on one bank. */
template <class E>
DEV uint32_t weight_stride(uint32_t width) {
  return (width + kVec<E> - 1) / kVec<E> * kVec<E> + kVec<E>;
}

/* Columns of a block: ops/flow_modulation.rs computes the same for the grid. */
template <class E>
DEV uint32_t block_columns(uint32_t width) {
  const uint32_t fit = kWeightBytes / (weight_stride<E>(width) * static_cast<uint32_t>(sizeof(E)));
  return fit < kColumns ? fit : kColumns;
}

/* Four consecutive elements, aligned to their own size. */
DEV void load4(float (&f)[4], const float* p) { load_vec_plain<float>(p, f); }
DEV void load4(float (&f)[4], const bf16* p) {
  const v2u u = *reinterpret_cast<const v2u*>(p);
  f[0] = bf_lo(u.x), f[1] = bf_hi(u.x), f[2] = bf_lo(u.y), f[3] = bf_hi(u.y);
}

/* staged[c, :] = w[c, :], then zeros up to the stride. */
template <class E>
DEV void stage_weights(E* staged, const E* w, uint32_t columns, uint32_t width, uint32_t stride) {
  const bool vec = width % kVec<E> == 0 && reinterpret_cast<uintptr_t>(w) % 16 == 0;
  for (uint32_t c = 0; c < columns; c++) {
    const E* from = w + static_cast<size_t>(c) * width;
    E* to = staged + c * stride;
    if (vec) {
      for (uint32_t k = tid_x() * kVec<E>; k < width; k += kThreads * kVec<E>) {
        float f[kVec<E>];
        load_vec<E>(from + k, f);
        store_vec<E>(to + k, f);
      }
    } else {
      for (uint32_t k = tid_x(); k < width; k += kThreads) to[k] = from[k];
    }
    for (uint32_t k = width + tid_x(); k < stride; k += kThreads) to[k] = from_f32<E>(0.0f);
  }
}

/* acts[r, k] = silu(time + cond) of row row0 + r at k0 + k, zero beyond the width. vec: four elements are aligned. */
template <class E>
DEV void stage_activations(float* acts, const FlowModulationParams& p, uint32_t row0, uint32_t rows, uint32_t k0,
                           bool vec) {
  for (uint32_t i = tid_x(); i < rows * (kChunk / 4); i += kThreads) {
    const uint32_t r = i / (kChunk / 4), k = i % (kChunk / 4) * 4;
    const uint32_t n = (row0 + r) / p.rows, s = (row0 + r) % p.rows;
    const E* time = ptr<const E>(p.time) + static_cast<size_t>(n) * p.width + k0 + k;
    const E* cond = ptr<const E>(p.cond) + static_cast<size_t>(s) * p.width + k0 + k;
    float t[4] = {}, c[4] = {}, out[4];
    if (vec && k0 + k < p.width) {
      load4(t, time);
      load4(c, cond);
    } else {
#pragma unroll
      for (uint32_t j = 0; j < 4; j++) {
        if (k0 + k + j < p.width) {
          t[j] = to_f32(time[j]);
          c[j] = to_f32(cond[j]);
        }
      }
    }
    /* silu(0) is 0, so the padding stays zero. */
#pragma unroll
    for (uint32_t j = 0; j < 4; j++) out[j] = round_to<E>(silu<E>(round_to<E>(t[j] + c[j])));
    store_vec<float>(acts + r * kActStride + k, out);
  }
}

/* Grid: outputs / block_columns, rounded up. Block: 256 threads. Shared: the block's weight rows, then kRows rows of
 * activations. */
template <class E>
DEV void flow_modulation(const FlowModulationParams& p) {
  SMEM_DYN(E, weights);
  SMEM(float, acts, kRows * kActStride);
  const uint32_t stride = weight_stride<E>(p.width), per_block = block_columns<E>(p.width);
  const uint32_t first = bid_x() * per_block;
  const uint32_t columns = p.outputs - first < per_block ? p.outputs - first : per_block;
  griddep_launch();
  stage_weights(weights, ptr<const E>(p.w) + static_cast<size_t>(first) * p.width, columns, p.width, stride);
  /* Up to here only weights were read; time and cond come from the launches before. */
  griddep_wait();

  /* Columns that do not exist repeat the first; their sums are dropped. */
  const uint32_t tx = tid_x() % kLanes, ty = tid_x() / kLanes;
  const E* column[kColumnsPerThread];
#pragma unroll
  for (uint32_t j = 0; j < kColumnsPerThread; j++) {
    const uint32_t c = tx + j * kLanes;
    column[j] = weights + (c < columns ? c : 0) * stride;
  }
  const bool vec = p.width % 4 == 0 && (p.time | p.cond) % (4 * sizeof(E)) == 0;
  const uint32_t total = p.steps * p.rows;
  for (uint32_t row0 = 0; row0 < total; row0 += kRows) {
    const uint32_t rows = total - row0 < kRows ? total - row0 : kRows;
    float sums[kRowsPerThread][kColumnsPerThread] = {};
    for (uint32_t k0 = 0; k0 < p.width; k0 += kChunk) {
      block_sync();
      stage_activations<E>(acts, p, row0, rows, k0, vec);
      block_sync();
      const uint32_t n = p.width - k0 < kChunk ? p.width - k0 : kChunk;
      for (uint32_t k = 0; k < n; k += 4) {
        float w[kColumnsPerThread][4];
#pragma unroll
        for (uint32_t j = 0; j < kColumnsPerThread; j++) load4(w[j], column[j] + k0 + k);
#pragma unroll
        for (uint32_t i = 0; i < kRowsPerThread; i++) {
          const uint32_t r = ty + i * kLanes;
          if (r >= rows) continue;
          float a[4];
          load4(a, acts + r * kActStride + k);
#pragma unroll
          for (uint32_t j = 0; j < kColumnsPerThread; j++) {
#pragma unroll
            for (uint32_t l = 0; l < 4; l++) sums[i][j] = f_fma(w[j][l], a[l], sums[i][j]);
          }
        }
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kRowsPerThread; i++) {
      const uint32_t r = ty + i * kLanes;
#pragma unroll
      for (uint32_t j = 0; j < kColumnsPerThread; j++) {
        const uint32_t c = tx + j * kLanes;
        if (r >= rows || c >= columns) continue;
        const float bias = to_f32(ptr<const E>(p.bias)[first + c]);
        ptr<E>(p.mod)[static_cast<size_t>(row0 + r) * p.outputs + first + c] = from_f32<E>(sums[i][j] + bias);
      }
    }
  }
}

/* ---- mma ---- */
static constexpr uint32_t kMmaThreads = 256; /* at most: eight warps leave a lane the registers for 160 rows */
static constexpr uint32_t kTile = 16;
static constexpr uint32_t kMmaRows = 160; /* rows of a pass */
static constexpr uint32_t kActBytes = 200 * 1024;
static constexpr uint32_t kStep = 32; /* k of a lane quartet's 16-byte loads */
static constexpr uint32_t kMaxBatch = 4;

DEV uint32_t at_most(uint32_t a, uint32_t b) { return a < b ? a : b; }
/* Elements between staged rows: 64 bytes beyond a multiple of 128, so that eight lanes meet all banks. */
DEV uint32_t act_stride(uint32_t chunk) { return chunk % 64 == 0 ? chunk + 32 : chunk; }
/* Elements of a row staged at once; ops/flow_modulation.rs computes the same. */
DEV uint32_t act_chunk(uint32_t rows, uint32_t width) {
  const uint32_t padded = (rows + 7) / 8 * 8;
  if (padded * act_stride(width) * 2 <= kActBytes) return width;
  return (kActBytes / (padded * 2) - 32) / (kStep * kMaxBatch) * (kStep * kMaxBatch);
}

/* acts[r, 0..n] = E(silu(E(time + cond))) of row row0 + r from k0 on; up to a multiple of eight rows the last one
 * again, whose sums are dropped. Every block does it for all rows before it multiplies. A warp per row: what to divide
 * by is the row's, and 1536 elements come in one latency of L2. */
DEV void stage_silu(bf16* acts, const FlowModulationParams& p, uint32_t row0, uint32_t rows, uint32_t k0, uint32_t n,
                    uint32_t stride) {
  constexpr uint32_t kAtOnce = 6, kApart = 32 * 8;
#pragma unroll 1
  for (uint32_t r = warp_id(); r < (rows + 7) / 8 * 8; r += num_warps()) {
    const uint32_t row = row0 + at_most(r, rows - 1);
    const bf16* time = ptr<const bf16>(p.time) + static_cast<size_t>(row / p.rows) * p.width + k0;
    const bf16* cond = ptr<const bf16>(p.cond) + static_cast<size_t>(row % p.rows) * p.width + k0;
#pragma unroll 1
    for (uint32_t k = lane_id() * 8; k < n; k += kAtOnce * kApart) {
      v4u of_time[kAtOnce], of_cond[kAtOnce];
#pragma unroll
      for (uint32_t j = 0; j < kAtOnce; j++) {
        const uint32_t at = at_most(k + j * kApart, n - 8);
        of_time[j] = ld_v4(time + at);
        of_cond[j] = ld_v4(cond + at);
      }
#pragma unroll
      for (uint32_t j = 0; j < kAtOnce; j++) {
        float t[8], c[8];
        unpack_vec<bf16>(of_time[j], t);
        unpack_vec<bf16>(of_cond[j], c);
#pragma unroll
        for (int e = 0; e < 8; e += 2) {
          const uint32_t sum = pack_bf16(t[e] + c[e], t[e + 1] + c[e + 1]);
          t[e] = silu<bf16>(bf_lo(sum));
          t[e + 1] = silu<bf16>(bf_hi(sum));
        }
        if (k + j * kApart < n) store_vec<bf16>(acts + r * stride + k + j * kApart, t);
      }
    }
  }
}

/* The block's outputs for rows row0..row0+rows, at most 8 NT of them. Weights are loaded BATCH steps ahead. */
template <int NT, int BATCH>
DEV void mma_pass(const FlowModulationParams& p, bf16* acts, uint32_t row0, uint32_t rows) {
  const uint32_t tiles = (p.outputs + kTile - 1) / kTile, warps = num_warps();
  const uint32_t first = static_cast<uint32_t>(static_cast<uint64_t>(tiles) * bid_x() / nbid_x());
  const uint32_t end = static_cast<uint32_t>(static_cast<uint64_t>(tiles) * (bid_x() + 1) / nbid_x());
  /* Of a full pass, in every pass: a last one of few rows could stage longer pieces, in more memory than there is. */
  const uint32_t chunk = act_chunk(at_most(kMmaRows, p.steps * p.rows), p.width), stride = act_stride(chunk);
  const uint32_t g = lane_id() / 4, t = lane_id() % 4;
  for (uint32_t base = first; base < end; base += warps) {
    const uint32_t tile = base + warp_id();
    const bool active = tile < end;
    /* Outputs beyond the last repeat it; their sums are dropped. */
    const uint32_t o0 = at_most(tile * kTile + g, p.outputs - 1), o1 = at_most(tile * kTile + g + 8, p.outputs - 1);
    const bf16* w0 = ptr<const bf16>(p.w) + static_cast<size_t>(o0) * p.width + 8 * t;
    const bf16* w1 = ptr<const bf16>(p.w) + static_cast<size_t>(o1) * p.width + 8 * t;
    v4u now0[BATCH], now1[BATCH], next0[BATCH], next1[BATCH];
    const auto load = [&](v4u(&to0)[BATCH], v4u(&to1)[BATCH], uint32_t k) {
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        if (!active || k + i * kStep >= p.width) continue;
        to0[i] = ld_nc_v4(w0 + k + i * kStep);
        to1[i] = ld_nc_v4(w1 + k + i * kStep);
      }
    };
    load(next0, next1, 0);
    float sums[NT][4] = {};
    uint32_t staged = 0;
    for (uint32_t k = 0; k < p.width; k += kStep * BATCH) {
#pragma unroll
      for (int i = 0; i < BATCH; i++) now0[i] = next0[i], now1[i] = next1[i];
      load(next0, next1, k + kStep * BATCH);
      if (k % chunk == 0) {
        staged = k;
        if (base == first || chunk < p.width) {
          /* Up to here only weights were read; time and cond come from the launches before. */
          if (base == first && k == 0) griddep_wait();
          block_sync();
          stage_silu(acts, p, row0, rows, k, at_most(chunk, p.width - k), stride);
          block_sync();
        }
      }
      if (!active) continue;
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        if (k + i * kStep >= p.width) continue;
        const uint32_t a[2][4] = {{now0[i].x, now1[i].x, now0[i].y, now1[i].y},
                                  {now0[i].z, now1[i].z, now0[i].w, now1[i].w}};
        const bf16* column = acts + g * stride + (k - staged) + i * kStep + 8 * t;
#pragma unroll
        for (uint32_t j = 0; j < NT; j++) {
          if (8 * j >= rows) continue;
          const v4u b = ld_v4(column + 8 * j * stride);
          const uint32_t b0[2] = {b.x, b.y}, b1[2] = {b.z, b.w};
          mma_bf16_16816(sums[j], a[0], b0);
          mma_bf16_16816(sums[j], a[1], b1);
        }
      }
    }
    if (!active) continue;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const uint32_t o = tile * kTile + g + 8 * i;
      if (o >= p.outputs) continue;
      const float bias = to_f32(ptr<const bf16>(p.bias)[o]);
#pragma unroll
      for (int j = 0; j < 2 * NT; j++) {
        const uint32_t r = j / 2 * 8 + 2 * t + j % 2;
        if (r < rows)
          ptr<bf16>(p.mod)[static_cast<size_t>(row0 + r) * p.outputs + o] = to_bf16(sums[j / 2][2 * i + j % 2] + bias);
      }
    }
  }
}

/* Grid: at most one block per SM. Block: a warp per tile, up to 256 threads. Shared: rows x act_stride of E. */
DEV void flow_modulation_mma(const FlowModulationParams& p) {
  SMEM_DYN(bf16, acts);
  griddep_launch();
  const uint32_t total = p.steps * p.rows;
  for (uint32_t row0 = 0; row0 < total; row0 += kMmaRows) {
    const uint32_t rows = at_most(kMmaRows, total - row0);
    if (rows <= 8)
      mma_pass<1, 4>(p, acts, row0, rows);
    else if (rows <= 16)
      mma_pass<2, 4>(p, acts, row0, rows);
    else if (rows <= 32)
      mma_pass<4, 4>(p, acts, row0, rows);
    else if (rows <= 56)
      mma_pass<7, 4>(p, acts, row0, rows);
    else if (rows <= 88)
      mma_pass<11, 4>(p, acts, row0, rows);
    else
      mma_pass<20, 2>(p, acts, row0, rows);
  }
}

KERNEL(flow_modulation_mma_bf16, FlowModulationParams, kMmaThreads, 1) { flow_modulation_mma(p); }
KERNEL(flow_modulation_plain_f32, FlowModulationParams, kThreads, 1) { flow_modulation<float>(p); }
KERNEL(flow_modulation_plain_bf16, FlowModulationParams, kThreads, 2) { flow_modulation<bf16>(p); }
