/* Many rows times packed weights: the loop shared by the `mma` variants of the transformer's products.
 *
 * The same sums, units and epilogues as stream.cuh, from the same copy of the weights. One block makes 8 tiles (128
 * weight rows) x 128 rows; a warp 2 tiles x 64 rows, in registers.
 *
 *   gmem w ---- cp.async, 3 chunks ahead ----> smem A [4 stages][8 tiles][2 steps][1024 bytes] ---+
 *   gmem x ---- reg, RMSNorm, round ---------> smem B [2][2 steps][128 rows][32 of K] bf16 -------+--> mma --> emit
 *
 * Grid: x = groups of rows, y = groups of tiles: the blocks that read the same weights are launched one after another,
 * and all but the first find them in L2. (The other way round a matrix larger than L2 comes from memory once per group
 * of rows.) A chunk is two steps (64 of K); a last odd step is zeros that nobody multiplies. Every row is a column of
 * its own in all multiplications and is added up along K in one order: its bits do not depend on the rows beside it.
 * Bound by tensor cores and shared memory; for up to about 200 rows by the bytes of w, which are read once.
 */
#pragma once
#include "packed.cuh"

/* Mirrored in ops/product.rs. */
static constexpr uint32_t kMmaTiles = 8;
static constexpr uint32_t kMmaRows = 128;
static constexpr uint32_t kMmaSteps = 2;
static constexpr uint32_t kMmaStages = 4;
static constexpr uint32_t kMmaStageBytes = kMmaTiles * kMmaSteps * kStepBytes;
static constexpr uint32_t kMmaStepElements = kMmaRows * kStepK;

/* Eight elements of a row on their way: as they lie in memory, with the norm's weights, then as h. */
struct Fetched {
  v4u part[3];
};
DEV void fetch8(Fetched& f, const Raw<bf16>& h, size_t row, uint32_t k, uint32_t inner) {
  f.part[0] = ld_v4(h.in + row * inner + k);
}
DEV void fetch8(Fetched& f, const Normed<bf16>& h, size_t row, uint32_t k, uint32_t inner) {
  f.part[0] = ld_v4(h.x + row * inner + k);
  f.part[1] = ld_v4(h.x + row * inner + k + 4);
  f.part[2] = ld_v4(h.norm_w + k);
}
DEV v4u finish8(const Fetched& f, const Raw<bf16>&, const float*, uint32_t) { return f.part[0]; }
DEV v4u finish8(const Fetched& f, const Normed<bf16>& h, const float* inverse_rms, uint32_t k) {
  float v[8];
#pragma unroll
  for (int i = 0; i < 2; i++) unpack_vec<float>(f.part[i], *reinterpret_cast<float (*)[4]>(v + i * 4));
  return normalise8_packed(v, h, f.part[2], *inverse_rms, k);
}

/* inverse_rms of the block's rows, a warp per row. */
DEV void rms_by_warps(const Raw<bf16>&, float*, uint32_t, uint32_t, uint32_t) {}
DEV void rms_by_warps(const Normed<bf16>& h, float* inverse_rms, uint32_t row0, uint32_t rows, uint32_t inner) {
  for (uint32_t r = warp_id(); r < rows; r += kWarps) {
    const float sum = warp_sum(sum_of_squares<256, 10>(h.x + size_t(row0 + r) * inner, lane_id() * 8, inner));
    if (lane_id() == 0) inverse_rms[r] = 1.0f / f_sqrt(sum / float(inner) + h.eps);
  }
  block_sync();
}

/* activations() is called after griddep_wait and says where h comes from. */
template <class Activations, class Emit>
DEV void mma_product(const Product& p, Activations activations, Emit emit) {
  SMEM_DYN(unsigned char, stages);
  SMEM(float, inverse_rms, kMmaRows);
  bf16* const chunks_b = reinterpret_cast<bf16*>(stages + kMmaStages * kMmaStageBytes);
  const uint32_t steps = p.inner / kStepK, chunks = (steps + kMmaSteps - 1) / kMmaSteps;
  const uint32_t tiles = (p.units + kUnitsPerTile - 1) / kUnitsPerTile, tile0 = bid_y() * kMmaTiles;
  const uint32_t row0 = bid_x() * kMmaRows, rows = p.rows - row0 < kMmaRows ? p.rows - row0 : kMmaRows;

  auto copy_weights = [&](uint32_t chunk) {
    if (chunk < chunks) {
      unsigned char* to = stages + chunk % kMmaStages * kMmaStageBytes;
#pragma unroll
      for (uint32_t i = 0; i < kMmaStageBytes / (kThreads * 16); i++) {
        const uint32_t at = (i * kThreads + tid_x()) * 16, tile = tile0 + at / (kMmaSteps * kStepBytes);
        const uint32_t in_tile = at % (kMmaSteps * kStepBytes), step = chunk * kMmaSteps + in_tile / kStepBytes;
        const bool exists = tile < tiles && step < steps;
        const size_t from = (size_t(exists ? tile : 0) * steps + (exists ? step : 0)) * kStepBytes;
        cp_async16(to + at, ptr<const unsigned char>(p.w) + from + in_tile % kStepBytes, exists);
      }
    }
    cp_async_commit();
  };
  for (uint32_t chunk = 0; chunk + 1 < kMmaStages; chunk++) copy_weights(chunk);
  griddep_wait();
  const auto h = activations();
  rms_by_warps(h, inverse_rms, row0, rows, p.inner);

  /* Staging: a thread brings eight k of two rows for each of two steps. Rows that fill up a multiplication of eight
   * are zeros. */
  constexpr uint32_t kOctets = 2 * kMmaSteps;
  const uint32_t line = tid_x() / 4, quarter = tid_x() % 4, filled = (rows + 7) / 8 * 8;
  Fetched fetched[kOctets];
  auto row_of = [&](uint32_t i) { return line + i % 2 * (kMmaRows / 2); };
  auto k_of = [&](uint32_t chunk, uint32_t i) { return (chunk * kMmaSteps + i / 2) * kStepK + quarter * 8; };
  auto fetch = [&](uint32_t chunk) {
#pragma unroll
    for (uint32_t i = 0; i < kOctets; i++) {
      if (row_of(i) < rows && k_of(chunk, i) < p.inner)
        fetch8(fetched[i], h, row0 + row_of(i), k_of(chunk, i), p.inner);
    }
  };
  auto store = [&](uint32_t chunk) {
    bf16* to = chunks_b + chunk % 2 * kMmaSteps * kMmaStepElements;
#pragma unroll
    for (uint32_t i = 0; i < kOctets; i++) {
      const uint32_t row = row_of(i), k = k_of(chunk, i);
      if (row >= filled || k >= p.inner) continue;
      const v4u octet = row < rows ? finish8(fetched[i], h, inverse_rms + row, k) : v4u{};
      st_v4(to + i / 2 * kMmaStepElements + row * kStepK + quarter * 8, octet);
    }
  };

  /* Multiplying: two tiles, and every other eight rows, so that few rows still occupy all warps. */
  const uint32_t pair = warp_id() % 4, parity = warp_id() / 4;
  float sums[2][8][4] = {};
  fetch(0);
  for (uint32_t chunk = 0; chunk < chunks; chunk++) {
    store(chunk);
    cp_async_wait<kMmaStages - 2>();
    block_sync();
    /* Everyone is past the chunk before the last, whose buffers these two fill again. */
    copy_weights(chunk + kMmaStages - 1);
    if (chunk + 1 < chunks) fetch(chunk + 1);
    const unsigned char* w = stages + chunk % kMmaStages * kMmaStageBytes + pair * 2 * kMmaSteps * kStepBytes;
    const bf16* from = chunks_b + chunk % 2 * kMmaSteps * kMmaStepElements + lane_id() * 8;
#pragma unroll
    for (uint32_t s = 0; s < kMmaSteps; s++) {
      if (chunk * kMmaSteps + s >= steps) break;
      v4u a[2][2];
#pragma unroll
      for (uint32_t i = 0; i < 4; i++)
        a[i / 2][i % 2] = ld_v4(w + (i / 2 * kMmaSteps + s) * kStepBytes + i % 2 * (kStepBytes / 2) + lane_id() * 16);
      /* Four at a time where there are four: one by one, every load of b and every pair of products is waited for. */
#pragma unroll
      for (uint32_t j0 = 0; j0 < 8; j0 += 4) {
        const bf16* at = from + s * kMmaStepElements + (2 * j0 + parity) * kStepRows * kStepK;
        if ((2 * j0 + 6 + parity) * kStepRows < rows) {
          v4u b[4];
#pragma unroll
          for (uint32_t j = 0; j < 4; j++) b[j] = ld_v4(at + 2 * j * kStepRows * kStepK);
#pragma unroll
          for (uint32_t half = 0; half < 2; half++)
#pragma unroll
            for (uint32_t j = 0; j < 4; j++)
#pragma unroll
              for (uint32_t i = 0; i < 2; i++) multiply_half(sums[i][j0 + j], a[i][half], b[j], half);
        } else {
#pragma unroll
          for (uint32_t j = 0; j < 3; j++) {
            if ((2 * (j0 + j) + parity) * kStepRows >= rows) break;
            const v4u b = ld_v4(at + 2 * j * kStepRows * kStepK);
#pragma unroll
            for (int i = 0; i < 2; i++) multiply_step(sums[i][j0 + j], a[i][0], a[i][1], b);
          }
        }
      }
    }
  }
  cp_async_wait<0>();
#pragma unroll
  for (uint32_t j = 0; j < 8; j++) {
    const uint32_t row = (2 * j + parity) * kStepRows;
    if (row >= rows) break;
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) emit_tile(sums[i][j], tile0 + pair * 2 + i, p.units, row0 + row, p.rows, emit);
  }
}
