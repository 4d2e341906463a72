/* Many rows times packed weights: the loop shared by the `mma` variants of the transformer's products.
 *
 * The same sums, units and epilogues as stream.cuh, from the same copy of the weights. One block makes 8 tiles (128
 * weight rows) x 256 rows; each of 8 warps 4 tiles x 64 rows, in registers. Four more, the producers, fill stages:
 *
 *   gmem w ---- bulk copies ----> smem A [4 stages][8 tiles][2 steps][1024 bytes] ----+
 *   gmem h ---- cp.async -------> smem B [4 stages][2 steps][256 rows][32 of K] ------+--> mma --> emit
 *
 * What a warp reads of shared memory serves four or eight multiplications: for each step of a block, 768 cycles of
 * tensor cores at one per 6 cycles stand beside 704 of shared memory. The warps wait for nothing but full stages, and
 * two on a scheduler hide each other's loads. Rows come as they are to be multiplied:
 * norm_rows.cu norms those of a product that has a norm before it.
 *
 * Grid: x = groups of rows, y = groups of tiles: the blocks that read the same weights are launched one after another,
 * and all but the first find them in L2. (The other way round a matrix larger than L2 comes from memory once per group
 * of rows.) z = parts of K, a cluster, where the other two leave SMs idle (ops/product.rs): its blocks leave their sums
 * in shared memory, and each adds up, in the order of K, and emits its share.
 *
 * A stage is two steps (64 of K); a last odd step is not there. Every row is a column of its own in all multiplications
 * and is added up along K in one order: its bits do not depend on the rows beside it. Bound by tensor cores and shared
 * memory; for up to about 200 rows by the bytes of w, which are read once.
 */
#pragma once
#include "packed.cuh"

/* Mirrored in ops/product.rs. */
static constexpr uint32_t kMmaProducers = 4; /* warps */
static constexpr uint32_t kMmaThreads = kThreads + 32 * kMmaProducers;
static constexpr uint32_t kMmaTiles = 8;
static constexpr uint32_t kMmaRows = 256;
static constexpr uint32_t kMmaSteps = 2;
static constexpr uint32_t kMmaStages = 4;
static constexpr uint32_t kMmaTileBytes = kMmaSteps * kStepBytes;
static constexpr uint32_t kMmaWeightBytes = kMmaTiles * kMmaTileBytes;
static constexpr uint32_t kMmaRowBytes = kStepK * 2; /* of a step */
static constexpr uint32_t kMmaStepRowBytes = kMmaRows * kMmaRowBytes;
static constexpr uint32_t kMmaStageBytes = kMmaWeightBytes + kMmaSteps * kMmaStepRowBytes;
/* Stages whose rows are on their way while the producer asks for the next. */
static constexpr int kMmaAhead = 2;
/* Of a thread: 12 warps begin with 168 each. */
static constexpr int kProducerRegisters = 56;
static constexpr int kWarpRegisters = 224;
/* A warp's part of a block. */
static constexpr uint32_t kWarpTiles = 4;
static constexpr uint32_t kWarpGroups = 8; /* of eight rows */
static constexpr uint32_t kGroupBytes = kStepRows * kMmaRowBytes;

struct MmaBlock {
  uint32_t first, end; /* of K in stages */
  uint32_t steps;      /* of all of K */
  uint32_t tile0, tiles;
  uint32_t row0, rows, groups;
  unsigned char* stages;
  uint64_t *full, *empty; /* [kMmaStages] */
};

DEV uint32_t producer_id() { return warp_id() - kWarps; }
/* The weights of stage `chunk`, by one of the producers. Tiles that do not exist repeat the last one: nobody emits
 * their sums. */
DEV void copy_weights(const Product& p, const MmaBlock& b, uint32_t chunk) {
  const uint32_t stage = (chunk - b.first) % kMmaStages, step = chunk * kMmaSteps;
  const uint32_t bytes = umin(kMmaSteps, b.steps - step) * kStepBytes;
  if (lane_id() == 0) mbar_arrive_tx(b.full + stage, kMmaTiles * bytes);
  if (lane_id() < kMmaTiles) {
    const size_t tile = umin(b.tile0 + lane_id(), b.tiles - 1);
    bulk_g2s(b.stages + stage * kMmaStageBytes + lane_id() * kMmaTileBytes,
             ptr<const unsigned char>(p.w) + (tile * b.steps + step) * kStepBytes, bytes, b.full + stage);
  }
}
/* The groups a warp multiplies where its rows are in `groups`: as many as there is code without branches for. Between
 * two branches every load of rows and every multiplication would be waited for. */
DEV uint32_t whole_groups(uint32_t groups) { return groups > 4 ? kWarpGroups : groups > 2 ? 4 : umin(groups, 1) * 2; }
/* The rows of stage `chunk`: eight lanes bring 64 of K of one. Rows that fill up a warp's groups are zeros. */
DEV void copy_rows(const bf16* h, const MmaBlock& b, uint32_t chunk, uint32_t inner) {
  const uint32_t octet = lane_id() % 8, k = (chunk * kMmaSteps + octet / 4) * kStepK + octet % 4 * 8;
  unsigned char* to = b.stages + (chunk - b.first) % kMmaStages * kMmaStageBytes + kMmaWeightBytes +
                      octet / 4 * kMmaStepRowBytes + octet % 4 * 16;
  const uint32_t last = b.groups % kWarpGroups, rows = (b.groups - last + whole_groups(last)) * kStepRows;
  if (k < inner) {
#pragma unroll 8
    for (uint32_t row = producer_id() * 4 + lane_id() / 8; row < rows; row += 4 * kMmaProducers)
      cp_async16(to + row * kMmaRowBytes, h + (row < b.rows ? size_t(b.row0 + row) * inner + k : 0), row < b.rows);
  }
  cp_async_commit();
}
/* The copies of all stages, those of the first ones' weights being on their way. */
DEV void produce(const Product& p, const bf16* h, const MmaBlock& b) {
  auto rows_arrived = [&](uint32_t chunk) {
    warp_sync();
    if (lane_id() == 0) mbar_arrive(b.full + (chunk - b.first) % kMmaStages);
  };
  for (uint32_t chunk = b.first; chunk < b.end; chunk++) {
    const uint32_t i = chunk - b.first;
    if (i >= kMmaStages) {
      mbar_wait(b.empty + i % kMmaStages, (i / kMmaStages - 1) & 1);
      if (producer_id() == 0) copy_weights(p, b, chunk);
    }
    copy_rows(h, b, chunk, p.inner);
    cp_async_wait<kMmaAhead>();
    if (i >= kMmaAhead) rows_arrived(chunk - kMmaAhead);
  }
  cp_async_wait<0>();
  for (uint32_t chunk = umax(b.first + kMmaAhead, b.end) - kMmaAhead; chunk < b.end; chunk++) rows_arrived(chunk);
}

/* What a warp multiplies of one step, of the first kGroups groups of eight rows. */
using WarpSums = float[kWarpTiles][kWarpGroups][4];
template <uint32_t kGroups>
DEV void multiply_tiles(WarpSums& sums, const unsigned char* w, const unsigned char* h) {
  v4u a[kWarpTiles][2], b[kGroups];
#pragma unroll
  for (uint32_t i = 0; i < kWarpTiles; i++)
#pragma unroll
    for (uint32_t half = 0; half < 2; half++) a[i][half] = ld_v4(w + i * kMmaTileBytes + half * (kStepBytes / 2));
#pragma unroll
  for (uint32_t j = 0; j < kGroups; j++) b[j] = ld_v4(h + j * kGroupBytes);
#pragma unroll
  for (uint32_t half = 0; half < 2; half++)
#pragma unroll
    for (uint32_t j = 0; j < kGroups; j++)
#pragma unroll
      for (uint32_t i = 0; i < kWarpTiles; i++) multiply_half(sums[i][j], a[i][half], b[j], half);
}
DEV void multiply_tiles(WarpSums& sums, const unsigned char* w, const unsigned char* h, uint32_t groups) {
  switch (groups) {
    case kWarpGroups: return multiply_tiles<kWarpGroups>(sums, w, h);
    case 4: return multiply_tiles<4>(sums, w, h);
    default: return multiply_tiles<2>(sums, w, h);
  }
}

/* Sums of a tile and eight rows, the i'th of a block in this order: [row groups][tiles][lanes] 4 floats. */
static constexpr uint32_t kSumsBytes = 512;
DEV void put_sums(unsigned char* memory, uint32_t i, const float (&sum)[4]) {
  st_v4(memory + i * kSumsBytes + lane_id() * 16, v4u{as_u32(sum[0]), as_u32(sum[1]), as_u32(sum[2]), as_u32(sum[3])});
}
/* Adds up what the blocks of the cluster put, in the order of K; this block emits its share. */
template <class Emit>
DEV void emit_parts(const Product& p, const MmaBlock& b, Emit emit) {
  constexpr uint32_t kAtOnce = 2, kStride = kMmaThreads / 32;
  const uint32_t parts = cluster_size(), count = b.groups * kMmaTiles;
  const uint32_t first = count * cluster_rank() / parts, end = count * (cluster_rank() + 1) / parts;
  for (uint32_t i0 = first + warp_id(); i0 < end; i0 += kAtOnce * kStride) {
    float sums[kAtOnce][4] = {};
    for (uint32_t part = 0; part < parts; part++) {
      const unsigned char* from = cluster_map(b.stages, part) + lane_id() * 16;
#pragma unroll
      for (uint32_t j = 0; j < kAtOnce; j++) {
        const v4u v = ld_v4(from + umin(i0 + j * kStride, end - 1) * kSumsBytes);
        sums[j][0] += as_f32(v.x), sums[j][1] += as_f32(v.y), sums[j][2] += as_f32(v.z), sums[j][3] += as_f32(v.w);
      }
    }
#pragma unroll
    for (uint32_t j = 0; j < kAtOnce; j++) {
      const uint32_t i = i0 + j * kStride, row = b.row0 + i / kMmaTiles * kStepRows;
      if (i < end) emit_tile(sums[j], b.tile0 + i % kMmaTiles, p.units, row, p.rows, emit);
    }
  }
}

/* A warp's sums. WHOLE: all of its rows and units exist (emit_tile). */
template <bool WHOLE, class Emit>
DEV void emit_sums(const Product& p, const WarpSums& sums, uint32_t tile, uint32_t row, uint32_t groups, Emit emit) {
#pragma unroll
  for (uint32_t j = 0; j < kWarpGroups; j++) {
    if (!WHOLE && j >= groups) break;
#pragma unroll
    for (uint32_t i = 0; i < kWarpTiles; i++)
      emit_tile<WHOLE>(sums[i][j], tile + i, p.units, row + j * kStepRows, p.rows, emit);
  }
}

/* The multiplications of a warp, whose sums it emits, or leaves in the stages' place for emit_parts. */
template <class Emit>
DEV void multiply_all(const Product& p, const MmaBlock& b, Emit emit) {
  /* Rows in order, so that 128 of them are on all four schedulers. */
  const uint32_t tile0 = warp_id() % 2 * kWarpTiles, group0 = warp_id() / 2 * kWarpGroups;
  const uint32_t groups = b.groups > group0 ? umin(b.groups - group0, kWarpGroups) : 0;
  const uint32_t steps = umin(b.end * kMmaSteps, b.steps) - b.first * kMmaSteps;
  WarpSums sums = {};
  for (uint32_t i = 0; i * kMmaSteps < steps && groups; i++) {
    const uint32_t slot = i % kMmaStages;
    mbar_wait(b.full + slot, i / kMmaStages & 1);
    /* Lanes may leave the spin apart, and the multiplications need them together. */
    warp_sync();
    const unsigned char* stage = b.stages + slot * kMmaStageBytes + lane_id() * 16;
    const unsigned char *w = stage + tile0 * kMmaTileBytes, *h = stage + kMmaWeightBytes + group0 * kGroupBytes;
#pragma unroll
    for (uint32_t s = 0; s < kMmaSteps; s++)
      if (i * kMmaSteps + s < steps)
        multiply_tiles(sums, w + s * kStepBytes, h + s * kMmaStepRowBytes, whole_groups(groups));
    warp_sync();
    if (lane_id() == 0) mbar_arrive(b.empty + slot);
  }
  if (nbid_z() > 1) {
    /* All have read the stages: sums may take their place. */
    bar_sync(1, kThreads);
#pragma unroll
    for (uint32_t j = 0; j < kWarpGroups; j++) {
      if (j >= groups) break;
#pragma unroll
      for (uint32_t i = 0; i < kWarpTiles; i++) put_sums(b.stages, (group0 + j) * kMmaTiles + tile0 + i, sums[i][j]);
    }
    return;
  }
  const uint32_t first_tile = b.tile0 + tile0, first_row = b.row0 + group0 * kStepRows;
  if ((first_tile + kWarpTiles) * kUnitsPerTile <= p.units && first_row + kWarpGroups * kStepRows <= p.rows)
    emit_sums<true>(p, sums, first_tile, first_row, groups, emit);
  else
    emit_sums<false>(p, sums, first_tile, first_row, groups, emit);
}

/* activations() is called after griddep_wait and says where h comes from. */
template <class Activations, class Emit>
DEV void mma_product(const Product& p, Activations activations, Emit emit) {
  SMEM_DYN(unsigned char, stages);
  SMEM(uint64_t, full, kMmaStages);
  SMEM(uint64_t, empty, kMmaStages);
  const uint32_t steps = p.inner / kStepK, chunks = (steps + kMmaSteps - 1) / kMmaSteps;
  const uint32_t row0 = bid_x() * kMmaRows, rows = umin(p.rows - row0, kMmaRows);
  const uint32_t groups = (rows + kStepRows - 1) / kStepRows;
  const MmaBlock b = {chunks * bid_z() / nbid_z(),
                      chunks * (bid_z() + 1) / nbid_z(),
                      steps,
                      bid_y() * kMmaTiles,
                      (p.units + kUnitsPerTile - 1) / kUnitsPerTile,
                      row0,
                      rows,
                      groups,
                      stages,
                      full,
                      empty};
  if (warp_id() == kWarps) {
    if (lane_id() == 0) {
      /* Full: one arrival with the weights' bytes, those of the producers. Empty: the warps that have rows. */
      for (uint32_t i = 0; i < kMmaStages; i++) mbar_init(full + i, 1 + kMmaProducers);
      for (uint32_t i = 0; i < kMmaStages; i++) mbar_init(empty + i, (groups + kWarpGroups - 1) / kWarpGroups * 2);
      mbar_init_fence();
    }
    /* Copies of other lanes complete on them. */
    warp_sync();
    for (uint32_t chunk = b.first; chunk < umin(b.first + kMmaStages, b.end); chunk++) copy_weights(p, b, chunk);
  }
  griddep_wait();
  const Raw<bf16> h = activations();
  block_sync();
  if (warp_id() >= kWarps) {
    regs_shrink<kProducerRegisters>();
    produce(p, h.in, b);
  } else {
    regs_grow<kWarpRegisters>();
    multiply_all(p, b, emit);
  }
  if (nbid_z() == 1) return;
  cluster_sync();
  emit_parts(p, b, emit);
  /* Others may still read this block's. */
  cluster_sync();
}
