/* Products of staged rows inside one persistent launch: what flow_chain is made of.
 *
 *   gmem rows -- past L1 --> smem staged [rows][chunk] float (normed, modulated in place) --+
 *   gmem w ----- 16-byte loads, once per eight rows ----------------------------------------+--> reg sums --> emit
 *
 * A block owns a contiguous share of a product's outputs, a warp two of them, its lanes eight elements in every 256. So
 * the order of a sum follows from the width alone: neither the grid nor the number of rows nor a row's place changes a
 * bit. Widths that are not multiples of eight, or lie badly, take element-wise loads on the same path.
 *
 * The thread that stages an element also norms it: stage_rows, norm_statistics and stage_normed give thread t the
 * elements 8 t + 2048 i of every row, and need no barrier among themselves.
 */
#pragma once
#include "flow_solver.cuh"

static constexpr uint32_t kThreads = 32 * kWarps;
/* Rows per pass over the weights. */
static constexpr uint32_t kRowGroup = 8;
/* Rows whose loads a thread has in flight while it stages: the latency of one load then covers two branches of two
 * images. */
static constexpr uint32_t kInFlight = 4;
/* Shared memory for the staged rows. ops/flow_chain.rs reserves the same. */
static constexpr uint32_t kStageBytes = 128 * 1024;

/* The block's shared memory. */
struct Shared {
  float* x;      /* [B, K] state of the solver */
  float* staged; /* [rows, chunk] input of the product at hand */
  float* warps;  /* [kRowGroup, kWarps, 3] count, mean and sum of squared distances of each warp's elements */
  float* norm;   /* [kRowGroup, 2] mean and 1 / sqrt(variance + eps) */
};

/* Rows of a product, at most kRowGroup of them. */
struct Group {
  uint32_t first, count;
};

/* [outputs, inner] weights and [outputs] biases. */
template <class E>
struct Matrix {
  const E* w;
  const E* bias;
  uint32_t outputs, inner;
};

/* LN(h; gain, offset) * (1 + scale) + shift */
template <class E>
struct Norm {
  const E* gain;   /* [F], null for a norm without parameters */
  const E* offset; /* [F] */
  const E* shift;  /* [F] of row 0; the next row's is mod_stride elements further on */
  const E* scale;  /* [F] likewise */
  size_t mod_stride;
};

DEV bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

/* Where element k of a row is staged. A lane reads eight neighbours in two loads; swapping the halves of every other
 * 32 elements keeps each of the loads free of bank conflicts. */
DEV uint32_t slot(uint32_t k) { return k ^ ((k >> 5 & 1) << 2); }

/* Eight elements of weights, zeros from `valid` on; vec: p is 16-byte aligned and all are valid. */
template <class E>
DEV void load8(float (&f)[8], const E* p, uint32_t valid, bool vec) {
  if (vec) {
#pragma unroll
    for (int i = 0; i < 8; i += kVec<E>) load_vec<E>(p + i, *reinterpret_cast<float (*)[kVec<E>]>(f + i));
  } else {
#pragma unroll
    for (uint32_t i = 0; i < 8; i++) f[i] = i < valid ? to_f32(p[i]) : 0.0f;
  }
}
/* The same of what an earlier launch wrote, which may still run when a dependent one begins: not read-only. */
template <class E>
DEV void load8_earlier(float (&f)[8], const E* p, uint32_t valid, bool vec) {
  if (vec) {
#pragma unroll
    for (int i = 0; i < 8; i += kVec<E>) load_vec_cg<E>(p + i, *reinterpret_cast<float (*)[kVec<E>]>(f + i));
  } else {
#pragma unroll
    for (uint32_t i = 0; i < 8; i++) f[i] = i < valid ? to_f32(p[i]) : 0.0f;
  }
}
/* The same of floats that another block wrote in this launch. */
DEV void load8_cg(float (&f)[8], const float* p, uint32_t valid, bool vec) {
  if (vec) {
    load_vec_cg<float>(p, *reinterpret_cast<float (*)[4]>(f));
    load_vec_cg<float>(p + 4, *reinterpret_cast<float (*)[4]>(f + 4));
  } else {
#pragma unroll
    for (uint32_t i = 0; i < 8; i++) f[i] = i < valid ? ld_cg_f32(p + i) : 0.0f;
  }
}
DEV void load8_staged(float (&f)[8], const float* row, uint32_t k) {
  load_vec_plain<float>(row + slot(k), *reinterpret_cast<float (*)[4]>(f));
  load_vec_plain<float>(row + slot(k + 4), *reinterpret_cast<float (*)[4]>(f + 4));
}
DEV void store8_staged(float* row, uint32_t k, const float (&f)[8]) {
  store_vec<float>(row + slot(k), *reinterpret_cast<const float (*)[4]>(f));
  store_vec<float>(row + slot(k + 4), *reinterpret_cast<const float (*)[4]>(f + 4));
}

/* Elements of a row staged at once: all of them, padded to eight, if they fit. Else a multiple of what the block
 * stages in one go, so that a lane meets the same elements in the same order however many rows share the space. */
DEV uint32_t stage_chunk(uint32_t rows, uint32_t inner) {
  return umin((inner + 7) / 8 * 8, kStageBytes / (rows * 4) / (kThreads * 8) * (kThreads * 8));
}

/* Stages elements k0..k0+n of rows [*, width] that this launch wrote, with zeros up to the next multiple of eight. */
DEV void stage_rows(const Shared& sh, const float* rows, Group g, uint32_t width, uint32_t k0, uint32_t n) {
  const uint32_t stride = stage_chunk(g.count, width);
  const bool vec = width % 8 == 0 && aligned16(rows);
  for (uint32_t r0 = 0; r0 < g.count; r0 += kInFlight) {
    for (uint32_t k = tid_x() * 8; k < n; k += kThreads * 8) {
      float f[kInFlight][8];
#pragma unroll
      for (uint32_t r = 0; r < kInFlight; r++)
        if (r0 + r < g.count) load8_cg(f[r], rows + static_cast<size_t>(g.first + r0 + r) * width + k0 + k, n - k, vec);
#pragma unroll
      for (uint32_t r = 0; r < kInFlight; r++)
        if (r0 + r < g.count) store8_staged(sh.staged + (r0 + r) * stride, k, f[r]);
    }
  }
}

/* sh.norm of the group's rows of h, valid after the caller's next barrier: product has one before it stages. Each
 * thread sums distances from its own first element; the means of threads, then of warps, are combined as in Chan's
 * update, so that an offset that a row's values share does not eat their variance. Leaves h staged if rows fit. */
DEV void norm_statistics(const Shared& sh, const float* h, Group g, uint32_t width, float eps) {
  const uint32_t chunk = stage_chunk(g.count, width);
  const bool vec = width % 8 == 0 && aligned16(h);
  block_sync();
  if (chunk >= width) stage_rows(sh, h, g, width, 0, width);
  for (uint32_t r = 0; r < g.count; r++) {
    float first = 0.0f, sum = 0.0f, square = 0.0f, count = 0.0f;
    for (uint32_t k = tid_x() * 8; k < width; k += kThreads * 8) {
      float f[8];
      if (chunk >= width)
        load8_staged(f, sh.staged + r * chunk, k);
      else
        load8_cg(f, h + static_cast<size_t>(g.first + r) * width + k, width - k, vec);
      if (count == 0.0f) first = f[0];
#pragma unroll
      for (uint32_t i = 0; i < 8; i++) {
        const float d = k + i < width ? f[i] - first : 0.0f;
        sum += d;
        square = f_fma(d, d, square);
      }
      count += static_cast<float>(umin(8, width - k));
    }
    const float of_warp = warp_sum(count);
    const float mean = warp_sum(f_fma(count, first, sum)) / f_max(of_warp, 1.0f);
    const float local = sum / f_max(count, 1.0f), distance = first + local - mean;
    const float within = f_max(f_fma(-sum, local, square), 0.0f);
    const float squares = warp_sum(f_fma(count * distance, distance, within));
    if (lane_id() == 0) {
      float* out = sh.warps + (r * kWarps + warp_id()) * 3;
      out[0] = of_warp, out[1] = mean, out[2] = squares;
    }
  }
  block_sync();
  if (tid_x() < g.count) {
    const float* in = sh.warps + tid_x() * kWarps * 3;
    const float all = static_cast<float>(width);
    float mean = 0.0f, squares = 0.0f;
    for (uint32_t w = 0; w < kWarps; w++) mean = f_fma(in[w * 3] / all, in[w * 3 + 1], mean);
    for (uint32_t w = 0; w < kWarps; w++) {
      const float distance = in[w * 3 + 1] - mean;
      squares += f_fma(in[w * 3] * distance, distance, in[w * 3 + 2]);
    }
    sh.norm[tid_x() * 2] = mean;
    sh.norm[tid_x() * 2 + 1] = 1.0f / f_sqrt(squares / all + eps);
  }
}

/* Stages the normed and modulated rows of h, which norm_statistics has just been through. */
template <class E>
DEV void stage_normed(const Shared& sh, const float* h, const Norm<E>& norm, Group g, uint32_t width, uint32_t k0,
                      uint32_t n) {
  const uint32_t chunk = stage_chunk(g.count, width);
  const bool vec = width % 8 == 0 && aligned16(norm.gain) && aligned16(norm.offset) && aligned16(norm.shift) &&
                   aligned16(norm.scale) && norm.mod_stride * sizeof(E) % 16 == 0;
  if (chunk < width) stage_rows(sh, h, g, width, k0, n);
  for (uint32_t k = tid_x() * 8; k < n; k += kThreads * 8) {
    float gain[8], offset[8];
#pragma unroll
    for (uint32_t i = 0; i < 8; i++) gain[i] = 1.0f, offset[i] = 0.0f;
    if (norm.gain) {
      load8(gain, norm.gain + k0 + k, n - k, vec);
      load8(offset, norm.offset + k0 + k, n - k, vec);
    }
    const E* shift_at = norm.shift + g.first * norm.mod_stride + k0 + k;
    const E* scale_at = norm.scale + g.first * norm.mod_stride + k0 + k;
#pragma unroll 2
    for (uint32_t r = 0; r < g.count; r++) {
      float f[8], shift[8], scale[8];
      load8_earlier(shift, shift_at + r * norm.mod_stride, n - k, vec);
      load8_earlier(scale, scale_at + r * norm.mod_stride, n - k, vec);
      load8_staged(f, sh.staged + r * chunk, k);
      const float mean = sh.norm[r * 2], inv = sh.norm[r * 2 + 1];
#pragma unroll
      for (uint32_t i = 0; i < 8; i++) {
        const float normed = f_fma((f[i] - mean) * inv, gain[i], offset[i]);
        f[i] = k + i < n ? f_fma(normed, 1.0f + scale[i], shift[i]) : 0.0f;
      }
      store8_staged(sh.staged + r * chunk, k, f);
    }
  }
}

/* sums[half * kRowGroup + r] += dot(w_half, staged row r), this lane's share of n elements. */
template <class E, uint32_t ROWS>
DEV void dot_pair(float (&sums)[2 * kRowGroup], const E* w0, const E* w1, const float* staged, uint32_t stride,
                  uint32_t n, bool vec) {
#pragma unroll 2
  for (uint32_t k = lane_id() * 8; k < n; k += 256) {
    float a[8], b[8];
    load8(a, w0 + k, n - k, vec);
    load8(b, w1 + k, n - k, vec);
#pragma unroll
    for (uint32_t r = 0; r < ROWS; r++) {
      float f[8];
      load8_staged(f, staged + r * stride, k);
#pragma unroll
      for (uint32_t i = 0; i < 8; i++) {
        sums[r] = f_fma(a[i], f[i], sums[r]);
        sums[kRowGroup + r] = f_fma(b[i], f[i], sums[kRowGroup + r]);
      }
    }
  }
}
template <class E>
DEV void dot_pair(float (&sums)[2 * kRowGroup], const E* w0, const E* w1, const float* staged, uint32_t stride,
                  uint32_t rows, uint32_t n, bool vec) {
  switch (rows) {
    case 1: return dot_pair<E, 1>(sums, w0, w1, staged, stride, n, vec);
    case 2: return dot_pair<E, 2>(sums, w0, w1, staged, stride, n, vec);
    case 3: return dot_pair<E, 3>(sums, w0, w1, staged, stride, n, vec);
    case 4: return dot_pair<E, 4>(sums, w0, w1, staged, stride, n, vec);
    case 5: return dot_pair<E, 5>(sums, w0, w1, staged, stride, n, vec);
    case 6: return dot_pair<E, 6>(sums, w0, w1, staged, stride, n, vec);
    case 7: return dot_pair<E, 7>(sums, w0, w1, staged, stride, n, vec);
    default: return dot_pair<E, kRowGroup>(sums, w0, w1, staged, stride, n, vec);
  }
}

/* This block's share of the outputs for a group of rows. stage(k0, n) fills staged[r, slot(0..n)] with elements k0 on,
 * zeros up to the next multiple of eight; held = prefetch(row, output) is under way while the sums run; then
 * emit(row, output, sum + bias, held). All threads call it; staged may be in use until its first barrier. */
template <class E, class Stage, class Prefetch, class Emit>
DEV void product(const Shared& sh, const Matrix<E>& m, Group g, Stage stage, Prefetch prefetch, Emit emit) {
  const uint64_t pairs = (m.outputs + 1) / 2;
  const uint32_t first = 2 * static_cast<uint32_t>(pairs * bid_x() / nbid_x());
  const uint32_t end = umin(m.outputs, 2 * static_cast<uint32_t>(pairs * (bid_x() + 1) / nbid_x()));
  const uint32_t chunk = stage_chunk(g.count, m.inner);
  const bool vec = m.inner % 8 == 0 && aligned16(m.w);
  for (uint32_t base = first; base < end; base += 2 * kWarps) {
    const uint32_t o = base + 2 * warp_id(), half = lane_id() / kRowGroup, r = lane_id() % kRowGroup;
    const bool emits = half < 2 && r < g.count && o + half < end;
    float bias = 0.0f;
    decltype(prefetch(0u, 0u)) held = {};
    if (emits) {
      bias = to_f32(m.bias[o + half]);
      held = prefetch(g.first + r, o + half);
    }
    float sums[2 * kRowGroup] = {};
    for (uint32_t k0 = 0; k0 < m.inner; k0 += chunk) {
      const uint32_t n = umin(chunk, m.inner - k0);
      if (base == first || chunk < m.inner) {
        block_sync();
        stage(k0, n);
        block_sync();
      }
      if (o < end) {
        /* The last output of an odd matrix is computed twice. */
        const E* w = m.w + static_cast<size_t>(o) * m.inner + k0;
        dot_pair(sums, w, o + 1 < end ? w + m.inner : w, sh.staged, chunk, g.count, n, vec);
      }
    }
    if (o < end) {
      float mine = 0.0f;
#pragma unroll
      for (uint32_t i = 0; i < 2 * kRowGroup; i++) {
        if (i % kRowGroup >= g.count) continue;
        const float sum = warp_sum(sums[i]);
        if (lane_id() == i) mine = sum;
      }
      if (emits) emit(g.first + r, o + half, mine + bias, held);
    }
  }
}
