/* Picks rows of the residual stream: y[s, :] = x[index[s], :], the last prompt row of every sequence.
 *
 * x [M, D] float, index [S] uint32 (each below M), y [S, D] float. Bound by latency: 40 KB per row at 14B.
 * Grid: one block per picked row. The residual stream is float whatever E is, so one kernel serves both.
 */
#include "dev.cuh"

KERNEL(gather_rows_plain, GatherRowsParams, 256, 2) {
  griddep_launch();
  griddep_wait();
  const uint32_t row = bid_x(), from = ptr<const uint32_t>(p.index)[row];
  const float* x = ptr<const float>(p.x) + size_t(from) * p.hidden;
  float* y = ptr<float>(p.y) + size_t(row) * p.hidden;
  for (uint32_t k = tid_x(); k < p.hidden; k += ntid_x()) y[k] = x[k];
}
