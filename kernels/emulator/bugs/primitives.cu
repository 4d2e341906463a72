// Kernels that use every primitive as it should be used; tests/emulator.rs computes what they must give.
#include "bugs.h"
#include "dev.cuh"

// out[t] = in[t] + 1; a thread that never waits
KERNEL(emu_add_one, BugParams, 1024, 1) {
  const uint32_t i = bid_x() * ntid_x() + tid_x();
  if (i < p.n) ptr<float>(p.out)[i] = ptr<const float>(p.in)[i] + 1.0f;
}

// One warp. Rows of 32: xor 5, down 3, up 3, from lane 7, ballot of odd values, sums and maxima over 32 and 8 lanes,
// and a sum over the even lanes by masked shuffles.
KERNEL(emu_exchange, BugParams, 32, 1) {
  const uint32_t t = tid_x();
  float* out = ptr<float>(p.out);
  const float v = ptr<const float>(p.in)[t];
  out[t] = shfl_xor(v, 5);
  out[32 + t] = shfl_down(v, 3);
  out[64 + t] = shfl_up(v, 3);
  out[96 + t] = shfl_idx(v, 7);
  out[128 + t] = as_f32(warp_ballot(static_cast<int>(v) & 1));
  out[160 + t] = warp_sum(v);
  out[192 + t] = warp_sum<8>(v);
  out[224 + t] = warp_max(v);
  out[256 + t] = warp_max<8>(v);
  const uint32_t mask = lane_id() & 1 ? 0xaaaaaaaau : 0x55555555u;
  out[288 + t] = shfl_xor(v, 2, mask);
}

// n blocks of 96 threads. out[b] = sum, out[n + b] = maximum of in[b, 96].
KERNEL(emu_block_reduce, BugParams, 96, 1) {
  SMEM(float, scratch, 3);
  const float v = ptr<const float>(p.in)[bid_x() * 96 + tid_x()];
  const float sum = block_sum(v, scratch), max = block_max(v, scratch);
  if (tid_x() == 0) ptr<float>(p.out)[bid_x()] = sum, ptr<float>(p.out)[nbid_x() + bid_x()] = max;
}

// One warp: out[16, 8] float = in[16, 16] bf16 x in2[8, 16]^T bf16, which follows in memory. The second operand is
// read twice, plainly and through .trans from a transposed copy, and must come out the same; out[128] counts
// differences.
KERNEL(emu_mma, BugParams, 32, 1) {
  SMEM(bf16, a_tile, 16 * 16);
  SMEM(bf16, b_tile, 16 * 16);
  SMEM(bf16, b_transposed, 16 * 16);
  const uint32_t lane = lane_id();
  const bf16 *a_in = ptr<const bf16>(p.in), *b_in = a_in + 256;
  for (uint32_t i = lane; i < 256; i += 32) {
    a_tile[i] = a_in[i];
    b_tile[i] = i < 128 ? b_in[i] : to_bf16(0.0f);
    b_transposed[(i & 15) * 16 + (i >> 4)] = i < 128 ? b_in[i] : to_bf16(0.0f);
  }
  warp_sync();
  uint32_t a[4], b[4], bt[4];
  ldmatrix_x4(a, &a_tile[(lane & 15) * 16 + (lane >> 4) * 8]);
  ldmatrix_x4(b, &b_tile[(lane & 7) * 16 + (lane >> 3 & 1) * 8 + (lane >> 4) * 128]);
  ldmatrix_x4_trans(bt, &b_transposed[((lane >> 3 & 1) * 8 + (lane & 7)) * 16 + (lane >> 4) * 8]);
  const uint32_t first[2] = {b[0], b[1]};
  float c[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  mma_bf16_16816(c, a, first);
  float* out = ptr<float>(p.out);
  const uint32_t row = lane >> 2, col = (lane & 3) * 2;
  out[row * 8 + col] = c[0], out[row * 8 + col + 1] = c[1];
  out[(row + 8) * 8 + col] = c[2], out[(row + 8) * 8 + col + 1] = c[3];
  const uint32_t differing = warp_ballot(b[0] != bt[0] || b[1] != bt[1] || b[2] != bt[2] || b[3] != bt[3]);
  if (lane == 0) out[128] = static_cast<float>(differing);
}

// n tiles of 64 floats through a double buffer of cp.async, 16 threads' worth each; the last tile has only 20 floats
// and must come out padded with zeros. out = the tiles reversed within themselves.
KERNEL(emu_cp_async, BugParams, 64, 1) {
  SMEM(float, tile, 2 * 64);
  const uint32_t t = tid_x(), tiles = p.n;
  const float* in = ptr<const float>(p.in);
  auto load = [&](uint32_t i) {
    if (t < 16) cp_async16(&tile[(i & 1) * 64 + t * 4], in + i * 64 + t * 4, i + 1 < tiles || t < 5);
    cp_async_commit();
  };
  load(0);
  for (uint32_t i = 0; i < tiles; i++) {
    if (i + 1 < tiles) {
      load(i + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    block_sync();
    ptr<float>(p.out)[i * 64 + t] = tile[(i & 1) * 64 + 63 - t];
    block_sync();
  }
}

// n tiles of 128 floats from a producer warp to two consumer warps through a ring of three, bulk copies completing on
// mbarriers. out[tile, 2] = the sum of each half.
KERNEL(emu_bulk_ring, BugParams, 96, 1) {
  constexpr uint32_t kStages = 3, kTile = 128;
  SMEM_DYN(float, ring);
  SMEM(uint64_t, full, kStages);
  SMEM(uint64_t, empty, kStages);
  if (tid_x() == 0) {
    for (uint32_t i = 0; i < kStages; i++) mbar_init(&full[i], 1), mbar_init(&empty[i], 2);
    mbar_init_fence();
  }
  block_sync();
  for (uint32_t i = 0; i < p.n; i++) {
    const uint32_t stage = i % kStages, round = i / kStages;
    if (warp_id() == 2) {
      if (lane_id() == 0) {
        if (round) mbar_wait(&empty[stage], (round - 1) & 1);
        mbar_arrive_tx(&full[stage], kTile * 4);
        bulk_g2s(ring + stage * kTile, ptr<const float>(p.in) + i * kTile, kTile * 4, &full[stage]);
      }
    } else {
      mbar_wait(&full[stage], round & 1);
      const float* half = ring + stage * kTile + warp_id() * 64;
      const float sum = warp_sum(half[lane_id()] + half[lane_id() + 32]);
      warp_sync();
      if (lane_id() == 0) {
        ptr<float>(p.out)[i * 2 + warp_id()] = sum;
        mbar_arrive(&empty[stage]);
      }
    }
  }
}

// Cooperative. Three rounds: every block writes its value, then reads its right neighbour's and adds one.
// out[2, blocks]: the buffers in turn.
KERNEL(emu_grid_rounds, BugParams, 64, 1) {
  float* out = ptr<float>(p.out);
  const uint32_t blocks = nbid_x(), b = bid_x();
  if (tid_x() == 0) out[b] = ptr<const float>(p.in)[b];
  for (uint32_t round = 0; round < 3; round++) {
    grid_sync(ptr<GridBarrier>(p.barrier));
    const float* from = out + (round & 1) * blocks;
    if (tid_x() == 0) out[((round + 1) & 1) * blocks + b] = ld_cg_f32(from + (b + 1) % blocks) + 1.0f;
  }
}

// Named barriers: warp 0 produces, warps 1 and 2 consume, twice. out[2, 64] = in[2, 32] doubled, to both.
KERNEL(emu_named_barriers, BugParams, 96, 1) {
  SMEM(float, slot, 32);
  for (uint32_t i = 0; i < 2; i++) {
    if (warp_id() == 0) {
      if (i) bar_sync(2, 96);  // the slot is free again
      slot[lane_id()] = 2.0f * ptr<const float>(p.in)[i * 32 + lane_id()];
      bar_arrive(1, 96);
    } else {
      bar_sync(1, 96);
      ptr<float>(p.out)[i * 64 + (warp_id() - 1) * 32 + lane_id()] = slot[lane_id()];
      if (i == 0) bar_arrive(2, 96);
    }
  }
}

// The last of n blocks to arrive sums what all have left. out[0] = the sum, out[1 + b] = the parts.
KERNEL(emu_last_block, BugParams, 32, 1) {
  SMEM(uint32_t, last, 1);
  float* out = ptr<float>(p.out);
  const float sum = warp_sum(ptr<const float>(p.in)[bid_x() * 32 + tid_x()]);
  if (tid_x() == 0) {
    out[1 + bid_x()] = sum;
    last[0] = atom_add_acqrel(ptr<uint32_t>(p.counters), 1) == nbid_x() - 1;
  }
  block_sync();
  if (last[0] && tid_x() == 0) {
    float total = 0.0f;
    for (uint32_t b = 0; b < nbid_x(); b++) total += ld_cg_f32(out + 1 + b);
    out[0] = total;
  }
}

// Two blocks, cooperative, passing a token back and forth n times in a word that carries value and epoch together.
KERNEL(emu_ping_pong, BugParams, 32, 1) {
  uint64_t* words = ptr<uint64_t>(p.counters);
  if (tid_x() != 0) return;
  uint64_t value = 0;
  for (uint32_t i = 1; i <= p.n; i++) {
    if (bid_x() == 0) st_relaxed(&words[0], uint64_t{i} << 32 | (value + 1));
    uint64_t seen;
    while ((seen = poll_relaxed(&words[1 - bid_x()])) >> 32 != i) {
    }
    value = seen & 0xffffffffu;
    if (bid_x() == 1) st_relaxed(&words[1], uint64_t{i} << 32 | (value + 1));
  }
  ptr<uint32_t>(p.out)[bid_x()] = static_cast<uint32_t>(value);
}

// Flag passing by release and acquire, maxima, float sums. out[0] = in[0] seen by block 1, out[1] = sum over threads.
KERNEL(emu_flags, BugParams, 32, 1) {
  uint32_t* counters = ptr<uint32_t>(p.counters);
  float* out = ptr<float>(p.out);
  if (bid_x() == 0) {
    if (tid_x() == 0) {
      out[2] = ptr<const float>(p.in)[0];
      st_release(&counters[0], 1);
    }
  } else if (tid_x() == 0) {
    while (ld_acquire(&counters[0]) == 0) {
    }
    out[0] = out[2];
  }
  red_add_f32(&out[1], static_cast<float>(tid_x()));
  atom_max_relaxed(&counters[1], tid_x() + 100 * bid_x());
  atom_add_relaxed(&counters[2], 1);
}

// Clusters of four blocks: each block's first thread sums what the others hold. out[b] = sum of in over its cluster.
KERNEL(emu_cluster_sum, BugParams, 64, 1) {
  SMEM(float, first, 1);  // only block 0 of the cluster touches this one before the second
  SMEM_DYN(float, mine);
  if (cluster_rank() == 0 && tid_x() == 0) first[0] = 0.5f;
  SMEM(float, second, 2);
  if (tid_x() == 0) mine[0] = ptr<const float>(p.in)[bid_x()], second[1] = 2.0f * mine[0];
  cluster_sync();
  if (tid_x() == 0) {
    float sum = cluster_map(first, 0)[0];
    for (uint32_t r = 0; r < cluster_size(); r++) sum += cluster_map(mine, r)[0] + cluster_map(second, r)[1];
    ptr<float>(p.out)[bid_x()] = sum;
  }
  cluster_sync();
}

// Element types: out[i] = in[i] rounded to bf16, 8 at a time, through load and store of vectors and shared memory.
template <class E>
DEV void copy_vectors(const BugParams& p) {
  SMEM(E, tile, 32 * kVec<E>);
  const uint32_t i = tid_x() * kVec<E>;
  float v[kVec<E>], w[kVec<E>];
  load_vec(ptr<const E>(p.in) + i, v);
  store_vec(tile + i, v);
  warp_sync();
  load_vec_plain(tile + (31 - tid_x()) * kVec<E>, w);
  store_vec(ptr<E>(p.out) + i, w);
}
KERNEL(emu_copy_f32, BugParams, 32, 1) { copy_vectors<float>(p); }
KERNEL(emu_copy_bf16, BugParams, 32, 1) { copy_vectors<bf16>(p); }

// out[i] as bits = in[i] rounded to bf16, for i below n
KERNEL(emu_round_bf16, BugParams, 32, 1) {
  for (uint32_t i = tid_x(); i < p.n; i += 32) ptr<bf16>(p.out)[i] = to_bf16(ptr<const float>(p.in)[i]);
}

// As a dependent launch: copies after the wait.
KERNEL(emu_dependent, BugParams, 32, 1) {
  const float own = static_cast<float>(tid_x());
  griddep_launch();
  griddep_wait();
  ptr<float>(p.out)[tid_x()] = ptr<const float>(p.in)[tid_x()] + own;
}
