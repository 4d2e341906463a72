/* Gives sequences whose prompt another one has too, such as the images of a batch, its keys, values and last row:
 * keys[l, s, g, i, :] = keys[l, o, g, i, :] with o = origin[s] and i < length[s], values alike, x[s, :] = x[o, :].
 *
 *   keys, values [layers, S, G, capacity, d] E, x = prompt_x [S, D] float, origin and length [S] uint32
 *
 * A sequence that is its own origin has them already. A copy has no element type, so one kernel serves both: sizes are
 * in bytes, of a slot a multiple of four.
 * Bound by bytes: at 14B 197 KB read and as many written per token of a repeated prompt. The sequences of one origin
 * come one after another, so that all but the first find it in L2 where it has 128 tokens (25 MB).
 * Grid: x a block per layer and head for keys, as many for values, one for the row; y the sequence.
 */
#include "dev.cuh"

static constexpr uint32_t kThreads = 256;
/* 16-byte loads of a thread on their way at once: with four blocks on an SM 64 KB. */
static constexpr uint32_t kAhead = 4;

/* What lies beyond `bytes` is not touched: slots after the prompt are nobody's yet. */
DEV void copy_bytes(char* to, const char* from, uint32_t bytes) {
  const bool vec = ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) & 15) == 0;
  const uint32_t whole = vec ? bytes / 16 * 16 : 0;
  for (uint32_t at = tid_x() * 16; at < whole; at += kAhead * kThreads * 16) {
    v4u u[kAhead];
#pragma unroll
    for (uint32_t i = 0; i < kAhead; i++)
      if (at + i * kThreads * 16 < whole) u[i] = ld_v4(from + at + i * kThreads * 16);
#pragma unroll
    for (uint32_t i = 0; i < kAhead; i++)
      if (at + i * kThreads * 16 < whole) st_v4(to + at + i * kThreads * 16, u[i]);
  }
  for (uint32_t at = whole + tid_x() * 4; at < bytes; at += kThreads * 4)
    *reinterpret_cast<uint32_t*>(to + at) = *reinterpret_cast<const uint32_t*>(from + at);
}

KERNEL(repeat_prompts_plain, RepeatPromptsParams, 256, 4) {
  griddep_launch();
  // Before the exit: a launch none of whose blocks waits could end before those that it follows.
  griddep_wait();
  const uint32_t sequence = bid_y(), origin = ptr<const uint32_t>(p.origin)[sequence];
  if (origin == sequence) return;
  const uint32_t pieces = p.layers * p.heads_kv;
  if (bid_x() == 2 * pieces) {
    const size_t row_bytes = static_cast<size_t>(p.hidden) * sizeof(float);
    char* x = ptr<char>(p.prompt_x);
    copy_bytes(x + sequence * row_bytes, x + origin * row_bytes, static_cast<uint32_t>(row_bytes));
    return;
  }
  const uint32_t piece = bid_x() % pieces, layer = piece / p.heads_kv, head = piece % p.heads_kv;
  char* cache = ptr<char>(bid_x() < pieces ? p.keys : p.values);
  const size_t piece_bytes = static_cast<size_t>(p.capacity) * p.slot_bytes;
  const size_t first = static_cast<size_t>(layer) * p.sequences;
  char* to = cache + ((first + sequence) * p.heads_kv + head) * piece_bytes;
  const char* from = cache + ((first + origin) * p.heads_kv + head) * piece_bytes;
  copy_bytes(to, from, ptr<const uint32_t>(p.length)[sequence] * p.slot_bytes);
}
