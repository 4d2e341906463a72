// Variants of gather_rows, the node that hands the prompt's last rows to the first image token, that a researcher
// could have got wrong; tests/emulator/variants.rs puts them into a whole generation.
#include "dev.cuh"

DEV void gather_rows(const GatherRowsParams& p) {
  const uint32_t row = bid_x(), from = ptr<const uint32_t>(p.index)[row];
  const float* x = ptr<const float>(p.x) + size_t(from) * p.hidden;
  float* y = ptr<float>(p.y) + size_t(row) * p.hidden;
  for (uint32_t k = tid_x(); k < p.hidden; k += ntid_x()) y[k] = x[k];
}

// Right, and the last value of the last row is NaN.
KERNEL(bug_variant_nan, GatherRowsParams, 256, 2) {
  griddep_wait();
  gather_rows(p);
  block_sync();
  if (tid_x() == 0 && bid_x() == p.rows - 1) ptr<float>(p.y)[size_t(p.rows) * p.hidden - 1] = as_f32(0x7fc00000u);
}

// Right, and reads far beyond its input.
KERNEL(bug_variant_out_of_bounds, GatherRowsParams, 256, 2) {
  griddep_wait();
  gather_rows(p);
  const float* x = ptr<const float>(p.x) + (size_t(1) << 32);
  if (tid_x() == 0 && bid_x() == 0 && x[0] == 1.0f) ptr<float>(p.y)[0] = 2.0f;
}

// Waits for a flag that nobody sets: the index of row 0, which is no such number.
KERNEL(bug_variant_endless, GatherRowsParams, 256, 2) {
  griddep_wait();
  while (ld_acquire(ptr<const uint32_t>(p.index)) != 0xffffffffu) {
  }
  gather_rows(p);
}
