/* Few rows times a weight matrix: the loop shared by the `plain` variants of the transformer's products.
 *
 *   sum[m, u, half] = dot(weight(u, half), h[m, :])       for rows m and units u; then emit(m, u, sum 0, sum 1)
 *
 * A unit is a pair of weight rows that one epilogue needs together: a rotary pair, gate and up, or simply two
 * neighbours. One warp owns a unit, so pairs meet in registers and every output has one writer.
 *
 *   gmem x ---- RMSNorm, round ----> smem h [rows][chunk] E --+
 *   gmem w ---- 16-byte loads, read once for 8 rows ----------+--> reg sums [2][rows] --> warp_sum --> emit
 *
 * Bound by the bytes of w. h is staged in chunks of K that fit kStageBytes; K below the chunk is staged once per
 * block, else once per pass over eight units. Rows beyond eight repeat the whole for the next eight, and w with it.
 * Also here, because the many-row form (gemm_tile.cuh) needs them too: where h comes from (Raw, Normed).
 */
#pragma once
#include "dev.cuh"

static constexpr uint32_t kWarps = 8;
static constexpr uint32_t kThreads = 32 * kWarps;
/* Rows per pass over the weights. */
static constexpr uint32_t kRowGroup = 8;
/* Shared memory for h; two blocks fit an SM. ops/gemv.rs computes the same chunk. */
static constexpr uint32_t kStageBytes = 96 * 1024;

DEV bool aligned16(uint64_t addresses_ored) { return (addresses_ored & 15) == 0; }

/* Eight consecutive elements of staged or earlier data, 16-byte aligned. */
template <class E>
DEV void load8(float (&f)[8], const E* p) {
#pragma unroll
  for (int i = 0; i < 8; i += kVec<E>) load_vec_plain<E>(p + i, *reinterpret_cast<float (*)[kVec<E>]>(f + i));
}
/* The same of weights: read once, kept out of L1. Packed until used, so that the next octet can be in flight. */
template <class E>
struct Octet {
  v4u part[8 / kVec<E>];
};
template <class E>
DEV Octet<E> load_weights(const E* p) {
  Octet<E> o;
#pragma unroll
  for (int i = 0; i < 8 / kVec<E>; i++) o.part[i] = ld_nc_v4(p + i * kVec<E>);
  return o;
}
template <class E>
DEV void unpack8(float (&f)[8], const Octet<E>& o) {
#pragma unroll
  for (int i = 0; i < 8 / kVec<E>; i++)
    unpack_vec<E>(o.part[i], *reinterpret_cast<float (*)[kVec<E>]>(f + i * kVec<E>));
}
template <class E>
DEV void store8(E* p, const float (&f)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += kVec<E>) store_vec<E>(p + i, *reinterpret_cast<const float (*)[kVec<E>]>(f + i));
}

/* h as it lies in memory: [M, K] E. */
template <class E>
struct Raw {
  const E* in;
};

/* h = E(E(x / rms(x)) * norm_w), and E(h + add) where add is given: [M, K] float residual stream to E. */
template <class E>
struct Normed {
  const float* x;
  const E* norm_w; /* [K] */
  const E* add;    /* [K], optional */
  float eps;
};

template <class E>
DEV float normed_value(const Normed<E>& h, float x, float inverse_rms, uint32_t k) {
  return round_to<E>(round_to<E>(x * inverse_rms) * to_f32(h.norm_w[k]));
}

/* Eight elements of x from k on become h. */
template <class E>
DEV void normalise8(float (&f)[8], const Normed<E>& h, float inverse_rms, uint32_t k) {
  float w[8];
  load8(w, h.norm_w + k);
#pragma unroll
  for (int i = 0; i < 8; i++) f[i] = round_to<E>(round_to<E>(f[i] * inverse_rms) * w[i]);
  if (h.add) {
    load8(w, h.add + k);
#pragma unroll
    for (int i = 0; i < 8; i++) f[i] = round_to<E>(f[i] + w[i]);
  }
}

template <class E>
DEV void activation8(float (&f)[8], const Raw<E>& h, const float*, size_t row, uint32_t k, uint32_t inner) {
  load8(f, h.in + row * inner + k);
}
template <class E>
DEV float activation(const Raw<E>& h, const float*, size_t row, uint32_t k, uint32_t inner) {
  return to_f32(h.in[row * inner + k]);
}
template <class E>
DEV void activation8(float (&f)[8], const Normed<E>& h, const float* inverse_rms, size_t row, uint32_t k,
                     uint32_t inner) {
  load8(f, h.x + row * inner + k);
  normalise8(f, h, *inverse_rms, k);
}
template <class E>
DEV float activation(const Normed<E>& h, const float* inverse_rms, size_t row, uint32_t k, uint32_t inner) {
  const float v = normed_value(h, h.x[row * inner + k], *inverse_rms, k);
  return h.add ? round_to<E>(v + to_f32(h.add[k])) : v;
}

/* inverse_rms[i] = 1 / sqrt(mean(x[row0 + i, :]^2) + eps) for i < rows. All threads call it; what they read of an
 * earlier result they have read before its first barrier lets anyone write; the result is visible to the block when it
 * returns. */
template <class E>
DEV void prepare(const Raw<E>&, float*, uint32_t, uint32_t, uint32_t, bool) {}
template <class E>
DEV void prepare(const Normed<E>& h, float* inverse_rms, uint32_t row0, uint32_t rows, uint32_t inner, bool vec) {
  SMEM(float, partial, kWarps);
  /* All warps share the rows: decoding has one to three, and their latency is the start of every launch. */
  const uint32_t parts = rows >= kWarps ? 1 : kWarps / rows, slots = kWarps / parts;
  const uint32_t slot = warp_id() / parts, part = warp_id() % parts;
  for (uint32_t base = 0; base < rows; base += slots) {
    const uint32_t i = base + slot;
    float sum = 0.0f;
    if (slot < slots && i < rows) {
      const float* x = h.x + size_t(row0 + i) * inner;
      if (vec) {
        for (uint32_t k = (part * 32 + lane_id()) * 8; k < inner; k += parts * 256) {
          float f[8];
          load8(f, x + k);
#pragma unroll
          for (int j = 0; j < 8; j++) sum += f[j] * f[j];
        }
      } else {
        for (uint32_t k = part * 32 + lane_id(); k < inner; k += parts * 32) sum += x[k] * x[k];
      }
    }
    sum = warp_sum(sum);
    block_sync();
    if (lane_id() == 0) partial[warp_id()] = sum;
    block_sync();
    if (tid_x() < slots && base + tid_x() < rows) {
      float total = 0.0f;
      for (uint32_t j = 0; j < parts; j++) total += partial[tid_x() * parts + j];
      inverse_rms[base + tid_x()] = 1.0f / f_sqrt(total / float(inner) + h.eps);
    }
  }
  block_sync();
}

/* Elements of K staged at once for `rows` rows (at most kRowGroup): all of them if they fit. */
template <class E>
DEV uint32_t stage_chunk(uint32_t rows, uint32_t inner) {
  const uint32_t fits = kStageBytes / (rows * uint32_t(sizeof(E))) / 256 * 256;
  return inner <= fits ? inner : fits;
}

/* A lane's sums for one unit: [half][row], each in `kParts` interleaved parts, so that few rows still make enough
 * independent chains of additions. */
template <int ROWS>
struct Sums {
  static constexpr int kParts = ROWS == 1 ? 4 : ROWS <= 4 ? 2 : 1;
  float of[2 * ROWS][kParts];
};

/* sums.of[half * ROWS + r] += w_half[k] * h[r, k] over this lane's share of n staged elements. */
template <class E, int ROWS>
DEV void dot_rows(Sums<ROWS>& sums, const E* w0, const E* w1, const E* staged, uint32_t stride, uint32_t rows,
                  uint32_t n, bool vec) {
  constexpr int kParts = Sums<ROWS>::kParts;
  /* Rows that do not exist repeat row 0; their sums are dropped. */
  if (vec) {
    uint32_t k = lane_id() * 8;
    if (k >= n) return;
    Octet<E> next_a = load_weights(w0 + k), next_b = load_weights(w1 + k);
    for (; k < n; k += 256) {
      float a[8], b[8], f[8];
      unpack8(a, next_a);
      unpack8(b, next_b);
      /* Two steps of loads in flight: 32 KB per SM, what the memory system needs to stream. */
      if (k + 256 < n) {
        next_a = load_weights(w0 + k + 256);
        next_b = load_weights(w1 + k + 256);
      }
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        load8(f, staged + (uint32_t(r) < rows ? r : 0) * stride + k);
#pragma unroll
        for (int i = 0; i < 8; i++) {
          sums.of[r][i % kParts] += a[i] * f[i];
          sums.of[ROWS + r][i % kParts] += b[i] * f[i];
        }
      }
    }
  } else {
    for (uint32_t k = lane_id(); k < n; k += 32) {
      const float a = to_f32(w0[k]), b = to_f32(w1[k]);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const float f = to_f32(staged[(uint32_t(r) < rows ? r : 0) * stride + k]);
        sums.of[r][0] += a * f;
        sums.of[ROWS + r][0] += b * f;
      }
    }
  }
}

/* The units of this block: a contiguous share of all. */
struct Share {
  uint32_t first, end;
};
DEV Share block_share(uint32_t units) {
  return {uint32_t(uint64_t(units) * bid_x() / nbid_x()), uint32_t(uint64_t(units) * (bid_x() + 1) / nbid_x())};
}

/* Before griddep_wait: the first 2 KB of the weight rows that each warp will start with. Weights do not depend on
 * the predecessor, and 64 KB per SM covers the few microseconds until it has ended. */
template <class E, class Weight>
DEV void gemv_prefetch(uint32_t inner, uint32_t units, Weight weight) {
  constexpr uint32_t kLine = 128 / sizeof(E);
  const Share share = block_share(units);
  const uint32_t unit = share.first + warp_id(), k = lane_id() % 16 * kLine;
  if (unit >= share.end || k >= inner) return;
  const E* w = weight(unit, lane_id() / 16);
  if (w) prefetch_l2(w + k);
}

/* One group of at most ROWS rows against this block's share of the units. */
template <class E, int ROWS, class H, class Weight, class Emit>
DEV void gemv_rows(const H& h, uint32_t row0, uint32_t rows, uint32_t inner, uint32_t units, uint32_t chunk, bool vec,
                   Weight weight, Emit emit) {
  SMEM_DYN(E, staged);
  SMEM(float, inverse_rms, kRowGroup);
  prepare(h, inverse_rms, row0, rows, inner, vec);
  const Share share = block_share(units);
  for (uint32_t base = share.first; base < share.end; base += kWarps) {
    const uint32_t unit = base + warp_id();
    const bool active = unit < share.end;
    const E* w0 = active ? weight(unit, 0) : nullptr;
    const E* w1 = active ? weight(unit, 1) : nullptr;
    /* A unit at the end of an odd matrix has one row: it is computed twice. */
    if (!w1) w1 = w0;
    Sums<ROWS> parts = {};
    for (uint32_t k0 = 0; k0 < inner; k0 += chunk) {
      const uint32_t n = inner - k0 < chunk ? inner - k0 : chunk;
      if (base == share.first || chunk < inner) {
        block_sync();
        for (uint32_t r = 0; r < rows; r++) {
          if (vec) {
            for (uint32_t k = tid_x() * 8; k < n; k += kThreads * 8) {
              float f[8];
              activation8(f, h, inverse_rms + r, row0 + r, k0 + k, inner);
              store8(staged + r * chunk + k, f);
            }
          } else {
            for (uint32_t k = tid_x(); k < n; k += kThreads)
              staged[r * chunk + k] = from_f32<E>(activation(h, inverse_rms + r, row0 + r, k0 + k, inner));
          }
        }
        block_sync();
      }
      if (active) dot_rows<E, ROWS>(parts, w0 + k0, w1 + k0, staged, chunk, rows, n, vec);
    }
    if (active) {
      float sums[2 * ROWS];
#pragma unroll
      for (int i = 0; i < 2 * ROWS; i++) {
        sums[i] = parts.of[i][0];
#pragma unroll
        for (int j = 1; j < Sums<ROWS>::kParts; j++) sums[i] += parts.of[i][j];
      }
      warp_sum_all(sums);
      float a = 0.0f, b = 0.0f;
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        if (lane_id() == uint32_t(r)) {
          a = sums[r];
          b = sums[ROWS + r];
        }
      }
      if (lane_id() < rows) emit(row0 + lane_id(), unit, a, b);
    }
  }
}

/* weight(unit, half) -> const E*, null for the missing half of the last unit; emit(row, unit, sum 0, sum 1).
 * vec: inner is a multiple of 8 and every row of weights and activations is 16-byte aligned. */
template <class E, class H, class Weight, class Emit>
DEV void gemv(const H& h, uint32_t rows, uint32_t inner, uint32_t units, bool vec, Weight weight, Emit emit) {
  const uint32_t chunk = stage_chunk<E>(rows < kRowGroup ? rows : kRowGroup, inner);
  for (uint32_t row0 = 0; row0 < rows; row0 += kRowGroup) {
    const uint32_t n = rows - row0 < kRowGroup ? rows - row0 : kRowGroup;
    if (n == 1) {
      gemv_rows<E, 1>(h, row0, n, inner, units, chunk, vec, weight, emit);
    } else if (n == 2) {
      gemv_rows<E, 2>(h, row0, n, inner, units, chunk, vec, weight, emit);
    } else if (n == 3) {
      gemv_rows<E, 3>(h, row0, n, inner, units, chunk, vec, weight, emit);
    } else if (n == 4) {
      gemv_rows<E, 4>(h, row0, n, inner, units, chunk, vec, weight, emit);
    } else {
      gemv_rows<E, 8>(h, row0, n, inner, units, chunk, vec, weight, emit);
    }
  }
}
