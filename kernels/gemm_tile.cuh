/* Many rows times a weight matrix: the loop shared by the `tile` variants of the transformer's products.
 *
 * The same sums, units and epilogues as gemv.cuh. One block makes 64 rows x 32 units (64 weight rows); a thread
 * makes 4 rows x 2 units in registers.
 *
 *   gmem x --- RMSNorm, round ---> reg --> smem A [32 k][64 rows] float --+
 *   gmem w ----------------------> reg --> smem B [32 k][64 cols] float --+--> reg sums [4][4] --> emit
 *
 * Grid: x = tiles of units, y = tiles of rows. Bound by FP32 FMA; the next tile is loaded into registers while
 * the current one is multiplied. Works for every shape; rows and units beyond the end are zeros that nobody emits.
 */
#pragma once
#include "gemv.cuh"

static constexpr uint32_t kTile = 64;
static constexpr uint32_t kTileUnits = kTile / 2;
static constexpr uint32_t kTileK = 32;

/* Column of element (k, i) in a tile: octets of k swap octets of columns, so that the eight rows by four octets
 * that a warp stores at once fall into different banks. Groups of four columns stay together. */
DEV uint32_t tile_column(uint32_t octet, uint32_t i) { return i ^ (octet * 8); }

template <class E, class H>
DEV void tile_activations(float (&f)[8], const H& h, const float* inverse_rms, uint32_t row, bool exists, uint32_t k,
                          uint32_t inner, bool vec) {
  if (exists && vec && k < inner) {
    activation8(f, h, inverse_rms, row, k, inner);
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) f[i] = exists && k + i < inner ? activation(h, inverse_rms, row, k + i, inner) : 0.0f;
  }
}

template <class E>
DEV void tile_weights(float (&f)[8], const E* w, uint32_t k, uint32_t inner, bool vec) {
  if (w && vec && k < inner) {
    unpack8(f, load_weights(w + k));
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) f[i] = w && k + i < inner ? to_f32(w[k + i]) : 0.0f;
  }
}

/* Arguments as for gemv. */
template <class E, class H, class Weight, class Emit>
DEV void gemm_tile(const H& h, uint32_t rows, uint32_t inner, uint32_t units, bool vec, Weight weight, Emit emit) {
  SMEM(float, tile_a, kTileK * kTile);
  SMEM(float, tile_b, kTileK * kTile);
  SMEM(float, inverse_rms, kTile);
  const uint32_t row0 = bid_y() * kTile, unit0 = bid_x() * kTileUnits;
  prepare(h, inverse_rms, row0, rows - row0 < kTile ? rows - row0 : kTile, inner, vec);

  /* Loading: a thread brings eight k of one row and of one weight row. */
  const uint32_t line = tid_x() / 4, octet = tid_x() % 4;
  const bool row_exists = row0 + line < rows;
  const uint32_t load_unit = unit0 + line / 2;
  const E* w = load_unit < units ? weight(load_unit, line % 2) : nullptr;
  const uint32_t column = tile_column(octet, line);

  /* Multiplying: four rows by four columns (two units). */
  const uint32_t sub_row = tid_x() / 16 * 4, sub_col = tid_x() % 16 * 4;
  const bool working = row0 + sub_row < rows && unit0 + sub_col / 2 < units;
  float sums[4][4] = {};
  float next_a[8], next_b[8];
  tile_activations<E>(next_a, h, inverse_rms + line, row0 + line, row_exists, octet * 8, inner, vec);
  tile_weights<E>(next_b, w, octet * 8, inner, vec);
  for (uint32_t k0 = 0; k0 < inner; k0 += kTileK) {
    block_sync();
#pragma unroll
    for (int i = 0; i < 8; i++) {
      tile_a[(octet * 8 + i) * kTile + column] = next_a[i];
      tile_b[(octet * 8 + i) * kTile + column] = next_b[i];
    }
    block_sync();
    if (k0 + kTileK < inner) {
      const uint32_t k = k0 + kTileK + octet * 8;
      tile_activations<E>(next_a, h, inverse_rms + line, row0 + line, row_exists, k, inner, vec);
      tile_weights<E>(next_b, w, k, inner, vec);
    }
    if (working) {
      for (uint32_t o = 0; o < kTileK / 8; o++) {
        const float* a = tile_a + o * 8 * kTile + tile_column(o, sub_row);
        const float* b = tile_b + o * 8 * kTile + tile_column(o, sub_col);
#pragma unroll
        for (int k = 0; k < 8; k++) {
#pragma unroll
          for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) sums[i][j] += a[k * kTile + i] * b[k * kTile + j];
        }
      }
    }
  }
  if (working) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t row = row0 + sub_row + i, unit = unit0 + sub_col / 2;
      if (row < rows) {
        emit(row, unit, sums[i][0], sums[i][1]);
        if (unit + 1 < units) emit(row, unit + 1, sums[i][2], sums[i][3]);
      }
    }
  }
}
