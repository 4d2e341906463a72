/* One kernel per family of primitives of dev.cuh, with inputs that tell every lane, slot and element apart. What a GPU
 * makes of them is compared word by word with what the emulated device makes of them, and both with what the PTX manual
 * says, computed in Rust (src/conformance/).
 *
 *   out[i] = primitive(in, lane, block)          in [count_in] uint32, out [count_out] uint32, scratch [256] uint32
 *
 * Nothing here is fast: a launch is bound by its own latency.
 */
#include "dev.cuh"

static constexpr uint32_t kWarp = 32;

DEV const uint32_t* words(const ConformanceParams& p) { return ptr<const uint32_t>(p.in); }
DEV const float* floats(const ConformanceParams& p) { return ptr<const float>(p.in); }
DEV uint32_t* results(const ConformanceParams& p) { return ptr<uint32_t>(p.out); }
DEV uint32_t* flags(const ConformanceParams& p) { return ptr<uint32_t>(p.scratch); }
DEV uint32_t block_rank() { return (bid_z() * nbid_y() + bid_y()) * nbid_x() + bid_x(); }

/* out [blocks, threads, 8]: where a thread is, three ways. */
KERNEL(conformance_indices, ConformanceParams, 64, 1) {
  uint32_t* out = results(p) + (block_rank() * block_threads() + thread_rank()) * 8;
  out[0] = tid_x() | tid_y() << 8 | tid_z() << 16;
  out[1] = ntid_x() | ntid_y() << 8 | ntid_z() << 16;
  out[2] = bid_x() | bid_y() << 8 | bid_z() << 16;
  out[3] = nbid_x() | nbid_y() << 8 | nbid_z() << 16;
  out[4] = lane_id();
  out[5] = thread_rank();
  out[6] = warp_id();
  out[7] = num_warps();
}

/* in [32]; out [16, 32]. Distances that leave the warp, lanes beyond 31, half a warp by itself. */
KERNEL(conformance_shuffles, ConformanceParams, 32, 1) {
  const uint32_t lane = lane_id(), v = words(p)[lane];
  uint32_t* out = results(p) + lane;
  out[0 * kWarp] = shfl_xor(v, 1);
  out[1 * kWarp] = shfl_xor(v, 16);
  out[2 * kWarp] = shfl_xor(v, 31);
  out[3 * kWarp] = shfl_down(v, 1);
  out[4 * kWarp] = shfl_down(v, 31);
  out[5 * kWarp] = shfl_up(v, 1);
  out[6 * kWarp] = shfl_up(v, 31);
  out[7 * kWarp] = shfl_down(v, 0);
  out[8 * kWarp] = shfl_idx(v, 31);
  out[9 * kWarp] = shfl_idx(v, 37);
  out[10 * kWarp] = shfl_idx(v, lane * 7 % kWarp);
  out[11 * kWarp] = as_u32(shfl_xor(as_f32(v), 5));
  out[12 * kWarp] = warp_ballot(v & 1);
  out[13 * kWarp] = warp_ballot(lane == 31);
  if (lane < 16) {
    out[14 * kWarp] = shfl_xor(v, 9, 0x0000ffffu);
    out[15 * kWarp] = warp_ballot(v & 2, 0x0000ffffu);
  }
}

/* in [96] float; out [6, 96]: what every thread gets of the reductions. The scratch of the block reductions is used
 * again at once, which their second barrier allows. */
KERNEL(conformance_reductions, ConformanceParams, 96, 1) {
  SMEM(float, partial, 3);
  const uint32_t i = thread_rank();
  const float v = floats(p)[i];
  float pair[2] = {v, -v};
  warp_sum_all(pair);
  float* out = ptr<float>(p.out) + i;
  out[0] = warp_sum(v);
  out[96] = warp_sum<8>(v);
  out[2 * 96] = warp_max<16>(v);
  out[3 * 96] = pair[1];
  const float sum = block_sum(v, partial), max = block_max(v, partial), least = -block_max(-v, partial);
  out[4 * 96] = sum;
  out[5 * 96] = max - least;
}

/* in [128]; out [128]. Two warps fill shared memory for the other two, which never wait for them at block_sync. */
KERNEL(conformance_named_barriers, ConformanceParams, 128, 1) {
  SMEM(uint32_t, there, 64);
  SMEM(uint32_t, back, 64);
  const uint32_t i = thread_rank(), slot = i % 64;
  if (i < 64) {
    there[slot] = words(p)[i] * 3;
    bar_arrive(1, 128);
    bar_sync(2, 128);
    results(p)[i] = back[63 - slot];
  } else {
    bar_sync(1, 128);
    results(p)[i] = there[63 - slot];
    back[slot] = words(p)[i] * 5;
    bar_arrive(2, 128);
  }
}

/* in [384]; out the same: eight warps take the registers that the four behind them give up. */
KERNEL(conformance_registers, ConformanceParams, 384, 1) {
  const uint32_t i = thread_rank();
  if (warp_id() < 8) {
    regs_grow<216>();
    results(p)[i] = words(p)[i] * 3;
  } else {
    regs_shrink<40>();
    results(p)[i] = words(p)[i] ^ 5;
  }
}

/* Clusters of 4. out [blocks, 32, 3]: rank, size, and the next block's value. */
KERNEL(conformance_clusters, ConformanceParams, 32, 1) {
  SMEM(uint32_t, mine, 32);
  const uint32_t lane = lane_id();
  mine[lane] = bid_x() * 100 + lane;
  cluster_sync();
  const uint32_t next = (cluster_rank() + 1) % cluster_size();
  uint32_t* out = results(p) + (bid_x() * kWarp + lane) * 3;
  out[0] = cluster_rank();
  out[1] = cluster_size();
  out[2] = cluster_map(mine, next)[31 - lane];
  /* A block's shared memory lives until the others have read it. */
  cluster_sync();
}

/* in [6, 32, 4]; out the same: every load of 16 bytes, 8 bytes and one float. */
KERNEL(conformance_loads, ConformanceParams, 32, 1) {
  const uint32_t at = lane_id() * 4, row = kWarp * 4;
  const uint32_t* in = words(p) + at;
  uint32_t* out = results(p) + at;
  prefetch_l2(in);
  st_v4(out, ld_nc_v4(in));
  const v2u lo = ld_nc_v2(in + row), hi = ld_nc_v2(in + row + 2);
  st_v4(out + row, v4u{lo.x, lo.y, hi.x, hi.y});
  st_v4(out + 2 * row, ld_cg_v4(in + 2 * row));
  for (uint32_t j = 0; j < 4; j++) out[3 * row + j] = as_u32(ld_cg_f32(floats(p) + at + 3 * row + j));
  st_v4(out + 4 * row, ld_v4(in + 4 * row));
  st_v4(out + 5 * row, ld_stream_v4(in + 5 * row));
}

/* 4 blocks of 64; out [4 + 256]: a sum, a maximum, a float sum, a count, and one mark for every ticket handed out. */
KERNEL(conformance_atomics, ConformanceParams, 64, 1) {
  uint32_t* out = results(p);
  const uint32_t i = bid_x() * 64 + thread_rank(), v = words(p)[i];
  atom_add_relaxed(out, v);
  atom_max_relaxed(out + 1, v);
  red_add_f32(ptr<float>(p.out) + 2, static_cast<float>(i));
  const uint32_t ticket = atom_add_acqrel(out + 3, 1);
  atom_add_relaxed(out + 4 + ticket, 1);
}

/* Two blocks that are resident together; in [32]; out [98]: data behind a released flag; a 64-bit word of value and
 * round that goes to and fro, then one of 128 bits; and how many of 4096 words of 128 bits, as they were written one
 * over the other, came in pieces: none, and the last one came. */
KERNEL(conformance_messages, ConformanceParams, 32, 1) {
  uint32_t* data = flags(p) + 64;
  uint64_t* there = reinterpret_cast<uint64_t*>(flags(p) + 128);
  uint64_t* back = there + 1;
  const uint32_t lane = lane_id();
  if (bid_x() == 0) {
    data[lane] = words(p)[lane];
    warp_sync();
    if (lane == 0) st_release(flags(p), 1);
  } else {
    if (lane == 0)
      while (ld_acquire(flags(p)) == 0) {
      }
    warp_sync();
    results(p)[lane] = data[lane] + 1;
  }
  if (lane != 0) return;
  const uint64_t* from = bid_x() == 0 ? back : there;
  uint64_t* to = bid_x() == 0 ? there : back;
  uint32_t value = words(p)[0];
  for (uint32_t round = 1; round <= 16; round++) {
    if (bid_x() == 0) st_relaxed(to, static_cast<uint64_t>(round) << 32 | value);
    uint64_t word = 0;
    while ((word = poll_relaxed(from)) >> 32 != round) {
    }
    value = static_cast<uint32_t>(word) * 3 + bid_x();
    if (bid_x() == 1) st_relaxed(to, static_cast<uint64_t>(round) << 32 | value);
    results(p)[kWarp + (round - 1) * 2 + bid_x()] = value;
  }
  const v4u* wide_from = reinterpret_cast<const v4u*>(flags(p) + 160) + (bid_x() == 0 ? 1 : 0);
  v4u* wide_to = reinterpret_cast<v4u*>(flags(p) + 160) + (bid_x() == 0 ? 0 : 1);
  for (uint32_t round = 1; round <= 16; round++) {
    if (bid_x() == 0) st_relaxed_v4(wide_to, v4u{round, value, ~value, value + round});
    v4u word = {0, 0, 0, 0};
    while ((word = poll_relaxed_v4(wide_from)).x != round) {
    }
    value = word.y * 3 + (~word.z ^ word.y) + (word.w - word.y - round) + bid_x();
    if (bid_x() == 1) st_relaxed_v4(wide_to, v4u{round, value, ~value, value + round});
    results(p)[2 * kWarp + (round - 1) * 2 + bid_x()] = value;
  }
  v4u* over = reinterpret_cast<v4u*>(flags(p) + 192);
  if (bid_x() == 0) {
    for (uint32_t i = 1; i <= 4096; i++) st_relaxed_v4(over, v4u{i, i, i, i});
  } else {
    uint32_t torn = 0;
    v4u word = {0, 0, 0, 0};
    while ((word = poll_relaxed_v4(over)).x != 4096) torn += word.y != word.x || word.z != word.x || word.w != word.x;
    results(p)[3 * kWarp] = torn + (word.y != 4096 || word.z != 4096 || word.w != 4096);
    results(p)[3 * kWarp + 1] = word.x;
  }
}

/* Cooperative; in [blocks]; out [4, blocks]: rounds in which every block reads what all have written. */
KERNEL(conformance_grid_sync, ConformanceParams, 64, 1) {
  GridBarrier* barrier = ptr<GridBarrier>(p.scratch);
  uint32_t* shared = flags(p) + 64;
  uint32_t value = words(p)[bid_x()];
  for (uint32_t round = 0; round < 4; round++) {
    if (thread_rank() == 0) shared[round * nbid_x() + bid_x()] = value;
    grid_sync(barrier);
    value = 0;
    for (uint32_t b = 0; b < nbid_x(); b++)
      value = value * 31 + ld_acquire(shared + round * nbid_x() + (b + bid_x()) % nbid_x());
    if (thread_rank() == 0) results(p)[round * nbid_x() + bid_x()] = value;
  }
}

/* Launched first; the next may start before it ends, and reads only after its wait. scratch [32]. */
KERNEL(conformance_dependent_first, ConformanceParams, 32, 1) {
  griddep_launch();
  griddep_wait();
  flags(p)[lane_id()] = words(p)[lane_id()] ^ 0x5a5a5a5au;
}
KERNEL(conformance_dependent_second, ConformanceParams, 32, 1) {
  griddep_launch();
  griddep_wait();
  results(p)[lane_id()] = flags(p)[lane_id()] + 1;
}

/* in [4, 32, 4]; out [4, 32, 4]. Four groups of copies; in group g every third lane asks for zeros. The thread's own
 * data is there after its wait, the others' after the barrier. */
KERNEL(conformance_cp_async, ConformanceParams, 32, 1) {
  SMEM(uint32_t, stage, 4 * 32 * 4);
  const uint32_t lane = lane_id();
  for (uint32_t g = 0; g < 4; g++) {
    const uint32_t at = (g * kWarp + lane) * 4;
    cp_async16(stage + at, words(p) + at, lane % 3 != g % 3);
    cp_async_commit();
  }
  cp_async_wait<2>();
  for (uint32_t g = 0; g < 2; g++) st_v4(results(p) + (g * kWarp + lane) * 4, ld_v4(stage + (g * kWarp + lane) * 4));
  cp_async_wait<0>();
  block_sync();
  for (uint32_t g = 2; g < 4; g++)
    st_v4(results(p) + (g * kWarp + lane) * 4, ld_v4(stage + (g * kWarp + 31 - lane) * 4));
}

/* in [64]; out [4, 64]: four phases of one barrier, each of which hands a value to the neighbour. */
KERNEL(conformance_mbarrier, ConformanceParams, 64, 1) {
  SMEM(uint64_t, bar, 1);
  SMEM(uint32_t, slots, 2 * 64);
  const uint32_t i = thread_rank();
  if (i == 0) {
    mbar_init(bar, 64);
    mbar_init_fence();
  }
  block_sync();
  uint32_t value = words(p)[i];
  for (uint32_t phase = 0; phase < 4; phase++) {
    slots[phase % 2 * 64 + i] = value;
    mbar_arrive(bar);
    mbar_wait(bar, phase % 2);
    value = slots[phase % 2 * 64 + (i + 1) % 64] * 3 + phase;
    results(p)[phase * 64 + i] = value;
  }
}

/* in [2, 256]; out [2, 256]: per phase two bulk copies, of 16 bytes and of 1008 with a policy, on one barrier. */
KERNEL(conformance_bulk_copies, ConformanceParams, 64, 1) {
  SMEM(uint64_t, bar, 1);
  SMEM(uint32_t, stage, 2 * 256);
  if (thread_rank() == 0) {
    mbar_init(bar, 1);
    mbar_init_fence();
  }
  block_sync();
  for (uint32_t phase = 0; phase < 2; phase++) {
    uint32_t* to = stage + phase * 256;
    if (thread_rank() == 0) {
      mbar_arrive_tx(bar, 1024);
      bulk_g2s(to, words(p) + phase * 256, 16, bar);
      bulk_g2s_hint(to + 4, words(p) + phase * 256 + 4, 1008, bar, phase == 0 ? l2_evict_first() : l2_evict_last());
    }
    mbar_wait(bar, phase);
    for (uint32_t i = thread_rank(); i < 256; i += 64) results(p)[phase * 256 + i] = to[i];
    /* A phase that began and ended before a thread looked would be missed: its parity is that of the next but one. */
    block_sync();
  }
}

/* in [32, 8, 2 bytes]: four 8x8 matrices below each other; out [2, 32, 4]: fragments, plain and transposed. Rows lie
 * 80 bytes apart. */
KERNEL(conformance_ldmatrix, ConformanceParams, 32, 1) {
  SMEM(uint32_t, rows, 32 * 20);
  const uint32_t lane = lane_id();
  for (uint32_t j = 0; j < 4; j++) rows[lane * 20 + j] = words(p)[lane * 4 + j];
  warp_sync();
  uint32_t plain[4], transposed[4];
  ldmatrix_x4(plain, rows + lane * 20);
  ldmatrix_x4_trans(transposed, rows + lane * 20);
  for (uint32_t j = 0; j < 4; j++) {
    results(p)[lane * 4 + j] = plain[j];
    results(p)[(kWarp + lane) * 4 + j] = transposed[j];
  }
}

/* in [2, 32, 8, 2 bytes]: two loads of four matrices; out [2, 2, 32, 4]: plain by halves, transposed whole. */
KERNEL(conformance_ldmatrix_all, ConformanceParams, 32, 1) {
  SMEM(uint32_t, rows, 64 * 20);
  const uint32_t lane = lane_id();
  for (uint32_t row = lane; row < 64; row += 32)
    for (uint32_t j = 0; j < 4; j++) rows[row * 20 + j] = words(p)[row * 4 + j];
  warp_sync();
  uint32_t plain[4][2], transposed[2][4];
  const bf16* mine = reinterpret_cast<const bf16*>(rows + lane * 20);
  ldmatrix_x4_all(plain, mine, 32 * 40);
  ldmatrix_x4_trans_all(transposed, mine, 32 * 40);
  for (uint32_t i = 0; i < 2; i++)
    for (uint32_t j = 0; j < 4; j++) {
      results(p)[(i * kWarp + lane) * 4 + j] = plain[2 * i + j / 2][j % 2];
      results(p)[((2 + i) * kWarp + lane) * 4 + j] = transposed[i][j];
    }
}

/* in: A [16, 16] bf16, B [16, 8] bf16 column by column, C [16, 8] float; out [16, 8] float = A B + C. Fragments are
 * gathered by the manual's tables, so the layout of each is under test. */
KERNEL(conformance_mma, ConformanceParams, 32, 1) {
  const uint32_t row = lane_id() / 4, pair = lane_id() % 4;
  const uint32_t* a_in = words(p); /* pairs of neighbours in k */
  const uint32_t* b_in = words(p) + 128;
  const float* c_in = floats(p) + 192;
  const uint32_t a[4] = {a_in[row * 8 + pair], a_in[(row + 8) * 8 + pair], a_in[row * 8 + pair + 4],
                         a_in[(row + 8) * 8 + pair + 4]};
  const uint32_t b[2] = {b_in[row * 8 + pair], b_in[row * 8 + pair + 4]};
  const uint32_t at = row * 8 + pair * 2, below = at + 64;
  float c[4] = {c_in[at], c_in[at + 1], c_in[below], c_in[below + 1]};
  mma_bf16_16816(c, a, b);
  float* out = ptr<float>(p.out);
  out[at] = c[0], out[at + 1] = c[1], out[below] = c[2], out[below + 1] = c[3];
}

/* in: A [32, 16] bf16, B [24, 16] bf16 by column, C [32, 24] float; out [32, 24] float = A B + C, 2 x 3 fragments. */
KERNEL(conformance_mma_all, ConformanceParams, 32, 1) {
  const uint32_t row = lane_id() / 4, pair = lane_id() % 4;
  const uint32_t *a_in = words(p), *b_in = words(p) + 256;
  uint32_t a[2][4], b[3][2];
  float c[2][3][4];
  for (uint32_t m = 0; m < 2; m++)
    for (uint32_t i = 0; i < 4; i++) a[m][i] = a_in[(m * 16 + row + i % 2 * 8) * 8 + pair + i / 2 * 4];
  for (uint32_t n = 0; n < 3; n++)
    for (uint32_t i = 0; i < 2; i++) b[n][i] = b_in[(n * 8 + row) * 8 + pair + i * 4];
  const auto at = [&](uint32_t m, uint32_t n, uint32_t i) {
    return (m * 16 + row + i / 2 * 8) * 24 + n * 8 + pair * 2 + i % 2;
  };
  for (uint32_t m = 0; m < 2; m++)
    for (uint32_t n = 0; n < 3; n++)
      for (uint32_t i = 0; i < 4; i++) c[m][n][i] = floats(p)[448 + at(m, n, i)];
  mma_bf16_all(c, a, b);
  for (uint32_t m = 0; m < 2; m++)
    for (uint32_t n = 0; n < 3; n++)
      for (uint32_t i = 0; i < 4; i++) ptr<float>(p.out)[at(m, n, i)] = c[m][n][i];
}

/* in [count_in / 2, 2] float; out [10, count_in / 2]: what every build of the arithmetic must round alike. */
KERNEL(conformance_exact_arithmetic, ConformanceParams, 64, 1) {
  const uint32_t pairs = p.count_in / 2;
  for (uint32_t i = thread_rank(); i < pairs; i += 64) {
    const float a = floats(p)[2 * i], b = floats(p)[2 * i + 1];
    float* out = ptr<float>(p.out) + i;
    out[0] = a + b;
    out[1 * pairs] = a * b;
    out[2 * pairs] = a / b;
    out[3 * pairs] = f_fma(a, b, -a);
    out[4 * pairs] = f_sqrt(f_abs(a));
    out[5 * pairs] = f_min(a, b);
    out[6 * pairs] = f_max(a, b);
    out[7 * pairs] = f_rint(a);
    out[8 * pairs] = is_finite(a) ? 1.0f : 0.0f;
    out[9 * pairs] = as_f32(as_u32(f_abs(b)));
  }
}

/* in [count_in / 2, 2] float, finite; out [8, count_in / 2]: functions with a documented error. */
KERNEL(conformance_approximations, ConformanceParams, 64, 1) {
  const uint32_t pairs = p.count_in / 2;
  for (uint32_t i = thread_rank(); i < pairs; i += 64) {
    const float a = floats(p)[2 * i], b = floats(p)[2 * i + 1];
    float* out = ptr<float>(p.out) + i;
    out[0] = fast_exp2(a);
    out[1 * pairs] = fast_exp(a);
    out[2 * pairs] = fast_rsqrt(f_abs(a));
    out[3 * pairs] = fast_div(a, b);
    float sine = 0.0f, cosine = 0.0f;
    fast_sincos(a, &sine, &cosine);
    out[4 * pairs] = sine;
    out[5 * pairs] = cosine;
    out[6 * pairs] = f_exp(a);
    out[7 * pairs] = f_log(f_abs(a));
  }
}

/* in [count_in] float bits; out [count_in, 3]: rounded to bf16 in the low and in the high half, and the low half of the
 * input read as a bf16. */
KERNEL(conformance_conversions, ConformanceParams, 64, 1) {
  for (uint32_t i = thread_rank(); i < p.count_in; i += 64) {
    const uint32_t bits = words(p)[i];
    uint32_t* out = results(p) + i * 3;
    out[0] = pack_bf16(as_f32(bits), 1.0f);
    out[1] = pack_bf16(-2.0f, as_f32(bits));
    out[2] = as_u32(bf_lo(bits));
  }
}

/* in [count_in] float bits; out [256 + count_in]: the number of every e4m3 code, then the code of every input. */
KERNEL(conformance_e4m3, ConformanceParams, 64, 1) {
  for (uint32_t code = thread_rank(); code < 256; code += 64)
    results(p)[code] = as_u32(e4m3_to_f32(static_cast<uint8_t>(code)));
  for (uint32_t i = thread_rank(); i < p.count_in; i += 64) results(p)[256 + i] = f32_to_e4m3(floats(p)[i]);
}
