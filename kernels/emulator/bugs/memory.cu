// Planted bugs: accesses to the wrong place or at the wrong time. Unless it says otherwise a kernel has 256 threads
// and copies in to out; tests/emulator_bugs.rs says which build must notice what.
#include "bugs.h"
#include "dev.cuh"

KERNEL(bug_static_shared_overrun, BugParams, 256, 1) {
  SMEM(float, s, 256);
  SMEM(float, neighbour, 16);
  const uint32_t t = tid_x();
  if (t < 16) neighbour[t] = 0.0f;
  float* beyond = s + p.n;
  s[t] = ptr<const float>(p.in)[t];
  if (t == 255) *beyond = 7.0f;
  block_sync();
  ptr<float>(p.out)[t] = s[t];
}

KERNEL(bug_dynamic_shared_overrun, BugParams, 256, 1) {
  SMEM_DYN(float, s);
  const uint32_t t = tid_x();
  s[t] = ptr<const float>(p.in)[t];
  if (t == 255) s[256] = 1.0f;
  block_sync();
  ptr<float>(p.out)[t] = s[t];
}

KERNEL(bug_global_overrun, BugParams, 256, 1) {
  const uint32_t t = tid_x();
  ptr<float>(p.out)[t] = ptr<const float>(p.in)[t];
  if (t == 255) ptr<float>(p.out)[p.n] = 1.0f;
}

KERNEL(bug_local_overrun, BugParams, 256, 1) {
  const uint32_t t = tid_x();
  float r[8];
  for (uint32_t i = 0; i < 8 + (p.n == 256); i++) r[i] = ptr<const float>(p.in)[t] * static_cast<float>(i);
  ptr<float>(p.out)[t] = r[t * p.n % 8] + ptr<const float>(p.in)[t];
}

// NaN > 0 is false, so that poison alone changes nothing.
KERNEL(bug_shared_uninitialised, BugParams, 256, 1) {
  SMEM(float, s, 256);
  const uint32_t t = tid_x();
  if (t < 128) s[t] = ptr<const float>(p.in)[t];
  block_sync();
  const float v = s[t];
  ptr<float>(p.out)[t] = ptr<const float>(p.in)[t] + (t >= 128 && v > 0.0f ? 1.0f : 0.0f);
}

KERNEL(bug_misaligned, BugParams, 256, 1) {
  const uint32_t t = tid_x();
  const v4u u = ld_nc_v4(ptr<const char>(p.in) + 4 * (t % 200));
  ptr<float>(p.out)[t] = as_f32(u.x);
}

// A block's threads exchange values through global memory without a barrier. out[256..512] is scratch.
KERNEL(bug_global_race, BugParams, 256, 1) {
  const uint32_t t = tid_x();
  float* out = ptr<float>(p.out);
  out[256 + t] = ptr<const float>(p.in)[t];
  out[t] = out[256 + (t + 33) % 256];
}

// Four blocks, cooperative; the read-only path reads what this launch has written.
KERNEL(bug_nc_of_fresh_data, BugParams, 256, 1) {
  const uint32_t t = tid_x();
  float* scratch = ptr<float>(p.out) + 256;
  if (t < 64) scratch[bid_x() * 64 + t] = ptr<const float>(p.in)[bid_x() * 64 + t];
  grid_sync(ptr<GridBarrier>(p.barrier));
  if (bid_x() != 0) return;
  const v4u u = ld_nc_v4(scratch + t / 4 * 4);
  const uint32_t words[4] = {u.x, u.y, u.z, u.w};
  ptr<float>(p.out)[t] = as_f32(words[t % 4]);
}

// Reads before the copy was waited for.
KERNEL(bug_cp_async_no_wait, BugParams, 256, 1) {
  SMEM(float, s, 1024);
  const uint32_t t = tid_x();
  cp_async16(s + t * 4, ptr<const float>(p.in) + t % 64 * 4);
  cp_async_commit();
  block_sync();
  ptr<float>(p.out)[t] = s[t];
  cp_async_wait<0>();
}

KERNEL(bug_cp_async_at_exit, BugParams, 256, 1) {
  SMEM(float, s, 1024);
  const uint32_t t = tid_x();
  ptr<float>(p.out)[t] = ptr<const float>(p.in)[t];
  cp_async16(s + t * 4, ptr<const float>(p.in) + t % 64 * 4);
}

DEV void start_copies(uint64_t* bar, uint32_t arrivals) {
  if (tid_x() == 0) {
    mbar_init(bar, arrivals);
    mbar_init_fence();
  }
  block_sync();
}

// The barrier expects more bytes than the copy brings.
KERNEL(bug_mbar_bytes, BugParams, 256, 1) {
  SMEM(float, s, 256);
  SMEM(uint64_t, bar, 1);
  start_copies(bar, 1);
  if (tid_x() == 0) {
    mbar_arrive_tx(bar, 1024);
    bulk_g2s(s, ptr<const float>(p.in), 512, bar);
  }
  mbar_wait(bar, 0);
  ptr<float>(p.out)[tid_x()] = s[tid_x()];
}

// Waits for the phase before the first, which has always ended.
KERNEL(bug_mbar_parity, BugParams, 256, 1) {
  SMEM(float, s, 256);
  SMEM(uint64_t, bar, 1);
  start_copies(bar, 1);
  if (tid_x() == 0) {
    mbar_arrive_tx(bar, 1024);
    bulk_g2s(s, ptr<const float>(p.in), 1024, bar);
  }
  mbar_wait(bar, 1);
  ptr<float>(p.out)[tid_x()] = s[tid_x()];
}

KERNEL(bug_mbar_uninitialised, BugParams, 256, 1) {
  SMEM(uint64_t, bar, 1);
  mbar_wait(bar, 0);
  ptr<float>(p.out)[tid_x()] = ptr<const float>(p.in)[tid_x()];
}

// Two arrivals per phase are expected and 256 made.
KERNEL(bug_mbar_arrivals, BugParams, 256, 1) {
  SMEM(uint64_t, bar, 2);
  start_copies(bar, 2);
  if (tid_x() == 0) mbar_arrive_tx(bar, 16);
  if (tid_x() > 1) mbar_arrive(bar);
  ptr<float>(p.out)[tid_x()] = ptr<const float>(p.in)[tid_x()];
}

KERNEL(bug_bulk_overlap, BugParams, 256, 1) {
  SMEM(float, s, 256);
  SMEM(uint64_t, bar, 1);
  start_copies(bar, 1);
  if (tid_x() == 0) {
    mbar_arrive_tx(bar, 1024);
    bulk_g2s(s, ptr<const float>(p.in), 512, bar);
    bulk_g2s(s + 64, ptr<const float>(p.in) + 64, 512, bar);
  }
  mbar_wait(bar, 0);
  ptr<float>(p.out)[tid_x()] = s[tid_x()];
}

// A ring of one slot: consumers hand it back before they have read it. out = in summed three times.
KERNEL(bug_ring_early_release, BugParams, 256, 1) {
  SMEM(float, s, 256);
  SMEM(uint64_t, bars, 2);
  const uint32_t t = tid_x();
  if (t == 0) mbar_init(bars + 1, 8);
  start_copies(bars, 1);
  float sum = 0.0f;
  for (uint32_t i = 0; i < 3; i++) {
    if (t == 0) {
      if (i) mbar_wait(bars + 1, (i - 1) & 1);
      mbar_arrive_tx(bars, 1024);
      bulk_g2s(s, ptr<const float>(p.in), 1024, bars);
    }
    mbar_wait(bars, i & 1);
    if (lane_id() == 0) mbar_arrive(bars + 1);
    sum += s[t];
  }
  ptr<float>(p.out)[t] = sum / 3.0f;
}

// More static shared memory than nvcc would accept; on the device this does not compile.
KERNEL(bug_static_shared_size, BugParams, 256, 1) {
  SMEM(float, a, 8192);
  SMEM(float, b, 8192);
  a[tid_x()] = ptr<const float>(p.in)[tid_x()];
  b[tid_x()] = a[tid_x()];
  ptr<float>(p.out)[tid_x()] = b[tid_x()];
}

// Reads in[n], which the node does not declare, and writes out[n], which it does not either.
KERNEL(bug_undeclared, BugParams, 256, 1) {
  const uint32_t t = tid_x();
  ptr<float>(p.out)[t] = ptr<const float>(p.in)[t];
  if (t == 0) ptr<float>(p.out)[p.n] = ptr<const float>(p.in)[p.n];
}
