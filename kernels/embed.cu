/* Token embedding: x[m, :] = table[ids[m], :], widened to the float residual stream; with pictures in the prompt
 * x[m, :] = source[source_row[m], :] for the rows of their tokens.
 *
 * ids [M] uint32, table [V, D] E, source [P, D] float, source_row [M] uint32 (kText: the row is text), x [M, D] float.
 * Bound by latency: 10 KB read and 20 KB written per row at 14B.
 * Grid: one block per row. An index outside its table gives a row of NaN, never a read outside it.
 */
#include "dev.cuh"

static constexpr uint32_t kText = 0xffffffffu;

template <class E>
DEV void embed(const EmbedParams& p) {
  griddep_launch();
  griddep_wait();
  const uint32_t row = bid_x(), id = ptr<const uint32_t>(p.ids)[row];
  const E* from = ptr<const E>(p.table) + size_t(id < p.vocab ? id : 0) * p.hidden;
  float* to = ptr<float>(p.x) + size_t(row) * p.hidden;
  const float missing = as_f32(0x7fc00000u);
  const uint32_t source_row = p.source ? ptr<const uint32_t>(p.source_row)[row] : kText;
  if (source_row != kText) {
    const bool known = source_row < p.source_rows;
    const float* source = ptr<const float>(p.source) + size_t(known ? source_row : 0) * p.hidden;
    for (uint32_t k = tid_x(); k < p.hidden; k += ntid_x()) to[k] = known ? source[k] : missing;
    return;
  }
  for (uint32_t k = tid_x(); k < p.hidden; k += ntid_x()) to[k] = id < p.vocab ? to_f32(from[k]) : missing;
}

KERNEL(embed_plain_f32, EmbedParams, 256, 2) { embed<float>(p); }
KERNEL(embed_plain_bf16, EmbedParams, 256, 2) { embed<bf16>(p); }
