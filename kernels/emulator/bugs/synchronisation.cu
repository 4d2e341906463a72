// Planted bugs: threads that do not wait for each other, or wait for what never comes. Unless it says otherwise a
// kernel has 256 threads and copies in to out; tests/emulator_bugs.rs says which build must notice what.
#include "bugs.h"
#include "dev.cuh"

// No barrier between writing and reading a shared array.
KERNEL(bug_missing_sync, BugParams, 256, 1) {
  SMEM(float, s, 256);
  const uint32_t t = tid_x();
  s[t] = ptr<const float>(p.in)[t];
  ptr<float>(p.out)[t] = s[(t + 33) % 256];
}

// The second barrier of a loop is missing: the next round overwrites what is still being read.
KERNEL(bug_missing_sync_in_loop, BugParams, 256, 1) {
  SMEM(float, s, 256);
  const uint32_t t = tid_x();
  float sum = 0.0f;
  for (int i = 0; i < 4; i++) {
    s[t] = ptr<const float>(p.in)[t] * static_cast<float>(i + 1);
    block_sync();
    sum += s[(t + 33) % 256];
  }
  ptr<float>(p.out)[t] = sum / 10.0f;
}

// A full-mask shuffle that half of the warp never reaches.
KERNEL(bug_shuffle_divergent, BugParams, 256, 1) {
  float v = ptr<const float>(p.in)[tid_x()];
  if (lane_id() < 16) v += shfl_xor(v, 1);
  ptr<float>(p.out)[tid_x()] = v;
}

// The halves of a warp meet in two different shuffles.
KERNEL(bug_shuffle_two_sites, BugParams, 256, 1) {
  float v = ptr<const float>(p.in)[tid_x()];
  if (lane_id() < 16) {
    v += shfl_xor(v, 1);
  } else {
    v -= shfl_xor(v, 1);
  }
  ptr<float>(p.out)[tid_x()] = v;
}

// Reads from a lane outside the mask.
KERNEL(bug_shuffle_outside_mask, BugParams, 256, 1) {
  float v = ptr<const float>(p.in)[tid_x()];
  if (lane_id() < 16) v = shfl_xor(v, 16, 0x0000ffffu);
  ptr<float>(p.out)[tid_x()] = v;
}

// A shuffle taken for a fence: it orders nothing.
KERNEL(bug_shuffle_as_fence, BugParams, 256, 1) {
  SMEM(float, s, 256);
  const uint32_t t = tid_x();
  s[t] = ptr<const float>(p.in)[t];
  shfl_xor(0.0f, 1);
  ptr<float>(p.out)[t] = s[t ^ 1];
}

// One block barrier, reached from two branches.
KERNEL(bug_barrier_divergent, BugParams, 256, 1) {
  if (warp_id() == 0) {
    block_sync();
  } else {
    block_sync();
  }
  ptr<float>(p.out)[tid_x()] = ptr<const float>(p.in)[tid_x()];
}

// Some threads return before the block's barrier.
KERNEL(bug_barrier_early_exit, BugParams, 256, 1) {
  if (tid_x() >= 192) return;
  ptr<float>(p.out)[tid_x()] = ptr<const float>(p.in)[tid_x()];
  block_sync();
}

// A named barrier whose count is never reached.
KERNEL(bug_barrier_count, BugParams, 256, 1) {
  if (warp_id() != 3) bar_sync(1, 256);
  ptr<float>(p.out)[tid_x()] = ptr<const float>(p.in)[tid_x()];
}

// Four blocks, cooperative; one leaves before the grid's barrier.
KERNEL(bug_grid_early_exit, BugParams, 256, 1) {
  if (bid_x() == 1) return;
  grid_sync(ptr<GridBarrier>(p.barrier));
  ptr<float>(p.out)[tid_x()] = ptr<const float>(p.in)[tid_x()];
}

// Four blocks, cooperative; block 0 reads its neighbour's scratch without a barrier of the grid.
KERNEL(bug_grid_sync_missing, BugParams, 256, 1) {
  const uint32_t t = tid_x();
  float* scratch = ptr<float>(p.out) + 256;
  scratch[bid_x() * 256 + t] = ptr<const float>(p.in)[t];
  block_sync();
  const float v = scratch[(bid_x() + 1) % nbid_x() * 256 + t];
  if (bid_x() == 0) ptr<float>(p.out)[t] = v;
}

// Four blocks; the last to arrive sums. The counter orders nothing.
KERNEL(bug_split_relaxed, BugParams, 256, 1) {
  SMEM(uint32_t, last, 1);
  const uint32_t t = tid_x();
  float* parts = ptr<float>(p.out) + 256;
  parts[bid_x() * 256 + t] = ptr<const float>(p.in)[t];
  block_sync();
  if (t == 0) last[0] = atom_add_relaxed(ptr<uint32_t>(p.counters), 1) == nbid_x() - 1;
  block_sync();
  if (!last[0]) return;
  float sum = 0.0f;
  for (uint32_t b = 0; b < nbid_x(); b++) sum += parts[b * 256 + t];
  ptr<float>(p.out)[t] = sum / static_cast<float>(nbid_x());
}

// As above with the right counter, but thread 0 releases before the other threads have written.
KERNEL(bug_split_release_early, BugParams, 256, 1) {
  SMEM(uint32_t, last, 1);
  const uint32_t t = tid_x();
  float* parts = ptr<float>(p.out) + 256;
  parts[bid_x() * 256 + t] = ptr<const float>(p.in)[t];
  if (t == 0) last[0] = atom_add_acqrel(ptr<uint32_t>(p.counters), 1) == nbid_x() - 1;
  block_sync();
  if (!last[0]) return;
  float sum = 0.0f;
  for (uint32_t b = 0; b < nbid_x(); b++) sum += parts[b * 256 + t];
  ptr<float>(p.out)[t] = sum / static_cast<float>(nbid_x());
}

// Clusters of four: reads a neighbour's shared memory without a cluster barrier.
KERNEL(bug_cluster_sync_missing, BugParams, 256, 1) {
  SMEM(float, s, 256);
  const uint32_t t = tid_x();
  s[t] = ptr<const float>(p.in)[t];
  block_sync();
  const float v = cluster_map(s, (cluster_rank() + 1) % cluster_size())[t];
  if (bid_x() == 0) ptr<float>(p.out)[t] = v;
  cluster_sync();
}

// Programmatic dependent launch that reads what its predecessor writes before waiting for it.
KERNEL(bug_dependent_early_access, BugParams, 256, 1) {
  const float v = ptr<const float>(p.in)[tid_x()];
  griddep_wait();
  ptr<float>(p.out)[tid_x()] = v;
}

// Only thread 0 waits and nothing orders the others after it.
KERNEL(bug_dependent_no_barrier, BugParams, 256, 1) {
  if (tid_x() == 0) griddep_wait();
  ptr<float>(p.out)[tid_x()] = ptr<const float>(p.in)[tid_x()];
}

// The read-only path reads what the predecessor wrote while this launch had begun already.
KERNEL(bug_dependent_nc, BugParams, 256, 1) {
  griddep_wait();
  const v2u u = ld_nc_v2(ptr<const float>(p.in) + tid_x() / 2 * 2);
  ptr<uint32_t>(p.out)[tid_x()] = tid_x() % 2 ? u.y : u.x;
}

// Ends without waiting: whoever waits for this launch would not have waited for its predecessors.
KERNEL(bug_dependent_no_wait, BugParams, 256, 1) {
  if (p.n == 0) ptr<float>(p.out)[tid_x()] = 0.0f;
}
