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
 * Variants: plain.
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

DEV float silu(float x) { return x / (1.0f + f_exp(-x)); }

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
    for (uint32_t j = 0; j < 4; j++) out[j] = round_to<E>(silu(round_to<E>(t[j] + c[j])));
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

KERNEL(flow_modulation_plain_f32, FlowModulationParams, kThreads, 1) { flow_modulation<float>(p); }
KERNEL(flow_modulation_plain_bf16, FlowModulationParams, kThreads, 2) { flow_modulation<bf16>(p); }
