/* End of a token: state.token += 1, row_pos[s] += 1 for every sequence.
 *
 * state: GenerationState; row_pos [S] uint32. Everything that changes between tokens changes here, on the device:
 * replayed nodes never do. Bound by latency: a few hundred bytes. One block.
 */
#include "dev.cuh"

KERNEL(advance_plain, AdvanceParams, 256, 2) {
  griddep_launch();
  griddep_wait();
  uint32_t* row_pos = ptr<uint32_t>(p.row_pos);
  for (uint32_t s = tid_x(); s < p.rows; s += ntid_x()) row_pos[s] += 1;
  if (tid_x() == 0) ptr<GenerationState>(p.state)->token += 1;
}
