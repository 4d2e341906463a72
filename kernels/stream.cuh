/* Few rows times packed weights: the loop shared by the `stream` and `ring` variants of the transformer's products.
 *
 *   sum[m, u, half] = dot(weight(u, half), h[m, :])       for up to 8 rows m and all units u; then emit(m, u, sums)
 *
 *   gmem x ---- RMSNorm, round ----> smem h [rows][K | 32] bf16 ---- 16-byte loads ----+
 *   gmem w ---- one linear stream (packed.cuh), cut into equal shares -----------------+--> mma, sums in registers
 *
 * Every block takes an equal share of the stream's steps and every warp an equal share of its block's (stream-K): no
 * wave has a tail, whatever the shape. A tile that one warp has whole goes from its registers to the epilogue. Of a
 * cut tile the warps' sums meet in shared memory; the sums of a tile that blocks share meet in `partial`, added in the
 * order of the blocks by the last to arrive. All orders are fixed by shape and grid, so the bits are too, and a row's
 * sums do not depend on the rows beside it.
 * Weights depend on no earlier launch: the first loads are under way before griddep_wait, and what a later launch reads
 * is asked into L2 when a warp has asked for the last of its own.
 * Grid: x = blocks, one per SM; y = groups of eight rows, which read the weights once each.
 * Bound by the bytes of w. In flight per SM: up to 64 KB in registers, 8 KB of a warp at a time (`stream`), 64 to 128
 * KB in shared memory (`ring`).
 */
#pragma once
#include "packed.cuh"

/* The ring, and how much shared memory it may take: all mirrored in ops/product.rs. */
static constexpr uint32_t kRingSteps = 2; /* of a slot */
static constexpr uint32_t kRingSlotBytes = kRingSteps * kStepBytes;
static constexpr uint32_t kRingStageBytes = kWarps * kRingSlotBytes;
static constexpr uint32_t kRingStages = 8;               /* most */
static constexpr uint32_t kHalfSharedBytes = 110 * 1024; /* two blocks of successive launches fit an SM */
static constexpr uint32_t kSharedBytes = 225 * 1024;
/* Warps' sums of cut tiles, two per warp. */
static constexpr uint32_t kCutBytes = kWarps * 2 * 512;

/* A run of steps. */
struct Steps {
  uint32_t first, end;
};
/* Products of steps and parts fit 32 bits (ops/product.rs): these divisions stand before the first load. */
DEV Steps share_of(Steps all, uint32_t part, uint32_t parts) {
  const uint32_t n = all.end - all.first;
  return {all.first + n * part / parts, all.first + n * (part + 1) / parts};
}
/* The part whose share has `step`. */
DEV uint32_t part_of(Steps all, uint32_t step, uint32_t parts) {
  return ((step - all.first + 1) * parts - 1) / (all.end - all.first);
}

/* Elements from one staged row to the next: K bf16 and, where it takes one, a gap of 64 bytes, so that the 16-byte
 * loads of eight lanes, four of a row and four of the next, fall into different banks. */
DEV uint32_t staged_stride(uint32_t inner) { return inner | 32; }
DEV uint32_t staged_bytes(uint32_t rows, uint32_t inner) {
  const uint32_t bytes = (rows < kStepRows ? rows : kStepRows) * staged_stride(inner) * 2;
  return bytes < kCutBytes ? kCutBytes : bytes;
}
/* Stages of the ring beside `staged` bytes: half an SM's worth if that is deep enough, else all there is. */
DEV uint32_t ring_stages(uint32_t staged) {
  uint32_t stages = staged < kHalfSharedBytes ? (kHalfSharedBytes - staged) / kRingStageBytes : 0;
  if (stages < 4) stages = (kSharedBytes - staged) / kRingStageBytes;
  return stages < kRingStages ? stages : kRingStages;
}

/* A warp's steps, 16-byte loads straight into registers, STEPS of them at a time. */
template <int STEPS>
struct Direct {
  static constexpr int kChunk = STEPS;
  const unsigned char* at; /* this lane's part of the first step */
  uint32_t steps;
  v4u held[2 * STEPS];
};
template <int STEPS>
DEV void load_step(Direct<STEPS>& s, int u, uint32_t step) {
  const unsigned char* from = s.at + size_t(step) * kStepBytes;
  s.held[2 * u] = ld_stream_v4(from);
  s.held[2 * u + 1] = ld_stream_v4(from + kStepBytes / 2);
}
template <int STEPS>
DEV void begin(Direct<STEPS>& s, const unsigned char* w, Steps mine, unsigned char*, uint32_t) {
  s.at = w + size_t(mine.first) * kStepBytes + lane_id() * 16;
  s.steps = mine.end - mine.first;
#pragma unroll
  for (int u = 0; u < STEPS; u++) {
    s.held[2 * u] = s.held[2 * u + 1] = v4u{};
    if (uint32_t(u) < s.steps) load_step(s, u, u);
  }
}
template <int STEPS>
DEV void await_chunk(Direct<STEPS>&) {}
template <int STEPS>
DEV void take_step(Direct<STEPS>& s, int u, v4u& low, v4u& high) {
  low = s.held[2 * u];
  high = s.held[2 * u + 1];
}
/* All loads of a chunk at once, after the last of its multiplications: a lane's loads count down on one scoreboard
 * (all of a kernel's branches must agree which), so that what waits for one waits for all that were issued before. A
 * load behind each multiplication would make the next one wait for memory. */
template <int STEPS>
DEV void release_chunk(Direct<STEPS>& s, uint32_t next) {
#pragma unroll
  for (int u = 0; u < STEPS; u++)
    if (next + u < s.steps) load_step(s, u, next + u);
}

/* A warp's steps by bulk copies into its own slots of shared memory. The warp that reads a slot asks for its next
 * contents, so nothing passes between warps. */
struct Ring {
  static constexpr int kChunk = kRingSteps;
  const unsigned char* next; /* the first byte that was not asked for yet */
  uint32_t left;             /* steps not asked for yet */
  unsigned char* slots;
  uint64_t* full; /* one barrier per slot */
  uint32_t depth, put, get, phase;
};
DEV void request_chunk(Ring& r) {
  if (!r.left) return;
  const uint32_t steps = r.left < kRingSteps ? r.left : kRingSteps, bytes = steps * kStepBytes;
  if (lane_id() == 0) {
    mbar_arrive_tx(r.full + r.put, bytes);
    bulk_g2s(r.slots + r.put * kRingSlotBytes, r.next, bytes, r.full + r.put);
  }
  r.next += bytes;
  r.left -= steps;
  r.put = r.put + 1 == r.depth ? 0 : r.put + 1;
}
/* `room`: the shared memory of the ring; the slots of a warp lie together. */
DEV void begin(Ring& r, const unsigned char* w, Steps mine, unsigned char* room, uint32_t stages) {
  SMEM(uint64_t, full, kWarps * kRingStages);
  r.next = w + size_t(mine.first) * kStepBytes;
  r.left = mine.end - mine.first;
  r.slots = room + warp_id() * stages * kRingSlotBytes;
  r.full = full + warp_id() * kRingStages;
  r.depth = stages;
  r.put = r.get = r.phase = 0;
  if (lane_id() == 0) {
    for (uint32_t i = 0; i < stages; i++) mbar_init(r.full + i, 1);
    mbar_init_fence();
  }
  warp_sync();
  for (uint32_t i = 0; i < stages; i++) request_chunk(r);
}
DEV void await_chunk(Ring& r) {
  mbar_wait(r.full + r.get, r.phase);
  /* Lanes may leave the spin apart, and the multiplications need them together. */
  warp_sync();
}
DEV void take_step(Ring& r, int u, v4u& low, v4u& high) {
  const unsigned char* from = r.slots + r.get * kRingSlotBytes + u * kStepBytes + lane_id() * 16;
  low = ld_v4(from);
  high = ld_v4(from + kStepBytes / 2);
}
DEV void release_chunk(Ring& r, uint32_t) {
  warp_sync();
  request_chunk(r);
  r.get = r.get + 1 == r.depth ? 0 : r.get + 1;
  if (r.get == 0) r.phase ^= 1;
}

/* inverse_rms[r] for up to eight rows, by the whole block. Unlike gemv.cuh's the order of a row's sum does not depend
 * on how many rows there are. A row of 6144 comes in one latency of memory; two rows at once would take the registers
 * of the weights on their way. */
DEV void rms_of_rows(const Normed<bf16>& h, float* inverse_rms, uint32_t row0, uint32_t rows, uint32_t inner) {
  SMEM(float, partial, kStepRows * kWarps);
#pragma unroll 1
  for (uint32_t r = 0; r < rows; r += 2) {
    float sum[2] = {};
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
      if (r + i < rows)
        sum[i] = sum_of_squares<kThreads * 8, 3>(h.x + size_t(row0 + r + i) * inner, tid_x() * 8, inner);
    }
#pragma unroll
    for (uint32_t o = 16; o; o >>= 1) {
      const float other[2] = {shfl_xor(sum[0], o), shfl_xor(sum[1], o)};
      sum[0] += other[0], sum[1] += other[1];
    }
    if (lane_id() == 0) {
      partial[r * kWarps + warp_id()] = sum[0];
      partial[(r + 1) * kWarps + warp_id()] = sum[1];
    }
  }
  block_sync();
  if (tid_x() < rows) {
    float total = 0.0f;
    for (uint32_t w = 0; w < kWarps; w++) total += partial[tid_x() * kWarps + w];
    inverse_rms[tid_x()] = 1.0f / f_sqrt(total / float(inner) + h.eps);
  }
  block_sync();
}

/* n elements, a multiple of 8, on their way to shared memory; a thread has those from tid_x() * 8 on. */
DEV void send_row(bf16* to, const bf16* from, uint32_t n) {
  constexpr uint32_t kApart = kThreads * 8;
  uint32_t k = tid_x() * 8;
#pragma unroll 1
  for (; k + kApart < n; k += 2 * kApart) {
    cp_async16(to + k, from + k);
    cp_async16(to + k + kApart, from + k + kApart);
  }
  if (k < n) cp_async16(to + k, from + k);
}
/* h of rows row0 .. row0 + rows - 1 to shared memory, visible to the block. Everything is asked for at once: a loop of
 * loads into registers waits for memory every few of them, and until it ends no more weights are asked for. */
DEV void stage_rows(const Raw<bf16>& h, bf16* staged, uint32_t row0, uint32_t rows, uint32_t inner) {
  for (uint32_t r = 0; r < rows; r++)
    send_row(staged + r * staged_stride(inner), h.in + size_t(row0 + r) * inner, inner);
  cp_async_commit();
  cp_async_wait<0>();
  block_sync();
}
/* The norm's weights wait in the last row's place: the thread that writes there is the one that has read them. The
 * statistics have brought x into L1. */
DEV void stage_rows(const Normed<bf16>& h, bf16* staged, uint32_t row0, uint32_t rows, uint32_t inner) {
  SMEM(float, inverse_rms, kStepRows);
  const uint32_t stride = staged_stride(inner);
  bf16* norm_w = staged + (rows - 1) * stride;
  send_row(norm_w, h.norm_w, inner);
  cp_async_commit();
  rms_of_rows(h, inverse_rms, row0, rows, inner);
  cp_async_wait<0>();
  for (uint32_t k = tid_x() * 8; k < inner; k += kThreads * 8) {
    const v4u w = ld_v4(norm_w + k);
#pragma unroll 2
    for (uint32_t r = 0; r < rows; r++) {
      float f[8];
      load8(f, h.x + size_t(row0 + r) * inner + k);
      st_v4(staged + r * stride + k, normalise8_packed(f, h, w, inverse_rms[r], k));
    }
  }
  block_sync();
}

/* Into L2, of what a later launch reads, kNextSteps steps of the same warp of the same block. The launch after this one
 * has held its first loads since long before, and the one after that begins when blocks of this one end: from a block's
 * last loads until then nothing would be asked of memory, some 2.5 us at the end of every launch. */
static constexpr uint32_t kNextSteps = 8;
DEV void ask_for_next(const NextWeights& next) {
  if (!next.w || bid_y() != 0) return;
  const Steps share = share_of(share_of({0, next.steps}, bid_x(), nbid_x()), warp_id(), kWarps);
  const uint32_t left = share.end - share.first, skipped = umin(next.first, left);
  const unsigned char* from = ptr<const unsigned char>(next.w) + size_t(share.first + skipped) * kStepBytes;
  const uint32_t bytes = umin(kNextSteps, left - skipped) * kStepBytes;
  for (uint32_t at = lane_id() * 128; at < bytes; at += 32 * 128) prefetch_l2(from + at);
}

/* The sums of a warp's steps: whole tiles are emitted; of a tile that began before them `head` and of one that ends
 * after them `tail` is left. A chunk may hold one end of a tile at most. `asked` is called once, when the last of the
 * weights have been asked for. */
template <class Source, class Emit, class Asked>
DEV void multiply_steps(Source& source, Steps mine, uint32_t per_tile, const bf16* h, float (&head)[4],
                        float (&tail)[4], Emit whole, Asked asked) {
  constexpr uint32_t kChunk = Source::kChunk;
  const uint32_t n = mine.end - mine.first, last_asked = n > 2 * kChunk ? ((n - 1) / kChunk - 1) * kChunk : 0;
  uint32_t tile = mine.first / per_tile, step = mine.first % per_tile;
  bool begun_here = step == 0;
  for (uint32_t base = 0; base < n; base += kChunk) {
    float done[4] = {};
    bool ended = false;
    await_chunk(source);
    /* A whole chunk of one tile, as most are, without a branch between its multiplications, and in two chains of sums:
     * a chunk that tests for the tile's end at every step takes four times as long. */
    if (base + kChunk <= n && step + kChunk <= per_tile) {
      float odd[4] = {};
#pragma unroll
      for (uint32_t u = 0; u < kChunk; u++) {
        v4u low, high;
        take_step(source, u, low, high);
        const v4u row = ld_v4(h + (step + u) * kStepK);
        multiply_half(tail, low, row, 0);
        multiply_half(odd, high, row, 1);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) tail[i] += odd[i];
      step += kChunk;
      if (step == per_tile) {
        step = 0;
        ended = true;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          done[i] = tail[i];
          tail[i] = 0.0f;
        }
      }
    } else {
#pragma unroll
      for (uint32_t u = 0; u < kChunk; u++) {
        if (base + u < n) {
          v4u low, high;
          take_step(source, u, low, high);
          multiply_step(tail, low, high, ld_v4(h + step * kStepK));
          if (++step == per_tile) {
            step = 0;
            ended = true;
#pragma unroll
            for (int i = 0; i < 4; i++) {
              done[i] = tail[i];
              tail[i] = 0.0f;
            }
          }
        }
      }
    }
    release_chunk(source, base + kChunk);
    if (base == last_asked) asked();
    if (ended) {
      if (begun_here) {
        whole(done, tile);
      } else {
#pragma unroll
        for (int i = 0; i < 4; i++) head[i] = done[i];
      }
      begun_here = true;
      tile++;
    }
  }
}

DEV void add_to(float (&sum)[4], v4u u) {
  sum[0] += as_f32(u.x), sum[1] += as_f32(u.y), sum[2] += as_f32(u.z), sum[3] += as_f32(u.w);
}
DEV v4u as_v4(const float (&f)[4]) { return {as_u32(f[0]), as_u32(f[1]), as_u32(f[2]), as_u32(f[3])}; }

/* Adds what the blocks have of a tile, in their order, if this block is the last to arrive; one warp. `partial`
 * [blocks][head, tail][128] float and `arrivals` [blocks] belong to the group of rows; a tile counts its arrivals at
 * the first of its blocks. Says whether `sum` is the whole tile's now. */
DEV bool combine_blocks(float (&sum)[4], Steps tile, Steps block, Steps all, float* partial, uint32_t* arrivals) {
  const uint32_t first = tile.first < block.first ? part_of(all, tile.first, nbid_x()) : bid_x(),
                 last = tile.end > block.end ? part_of(all, tile.end - 1, nbid_x()) : bid_x();
  /* Of a tile's blocks all but the last have it at their end. */
  auto slot = [&](uint32_t of) { return partial + (size_t(of) * 2 + (of < last ? 1 : 0)) * 128 + lane_id() * 4; };
  st_v4(slot(bid_x()), as_v4(sum));
  warp_sync();
  uint32_t arrived = 0;
  if (lane_id() == 0) arrived = atom_add_acqrel(arrivals + first, 1);
  arrived = shfl_idx(arrived, 0);
  warp_sync();
  if (arrived != last - first) return false;
#pragma unroll
  for (int i = 0; i < 4; i++) sum[i] = 0.0f;
  for (uint32_t of = first; of <= last; of++) add_to(sum, ld_cg_v4(slot(of)));
  if (lane_id() == 0) arrivals[first] = 0;
  return true;
}

/* An epilogue may read more than sums, each thing from where the one before it says: look for what the lane's two rows
 * of emit_tile are, locate for where what they need lies, fetch for that of the lane's unit. Behind a launch's last
 * sums these would be three latencies of L2; each has its place before, where something else is awaited. Overloads say
 * what the lookups of an op are (qkv.cu); most have none. */
struct NoLookups {};
DEV void look(NoLookups&, uint32_t) {}
DEV void locate(NoLookups&) {}
DEV void fetch(NoLookups&, uint32_t) {}

/* activations() is called after griddep_wait and says where h comes from. */
template <class Source, class Activations, class Emit, class Lookups>
DEV void stream(const Product& p, Activations activations, Emit emit, Lookups& lookups) {
  SMEM_DYN(bf16, staged);
  const uint32_t per_tile = p.inner / kStepK, tiles = (p.units + kUnitsPerTile - 1) / kUnitsPerTile;
  const Steps all = {0, tiles * per_tile}, block = share_of(all, bid_x(), nbid_x()),
              mine = share_of(block, warp_id(), kWarps);
  const uint32_t bytes = staged_bytes(p.rows, p.inner);
  Source source;
  begin(source, ptr<const unsigned char>(p.w), mine, reinterpret_cast<unsigned char*>(staged) + bytes,
        ring_stages(bytes));
  griddep_wait();

  const uint32_t row0 = bid_y() * kStepRows, rows = p.rows - row0 < kStepRows ? p.rows - row0 : kStepRows;
  stage_rows(activations(), staged, row0, rows, p.inner);
  /* Sums of rows that do not exist are nobody's: the last row stands for them. */
  const bf16* h = staged + umin(lane_id() / 4, rows - 1) * staged_stride(p.inner) + lane_id() % 4 * 8;
  float head[4] = {}, tail[4] = {};
  auto unit_of = [&](uint32_t tile) { return umin(tile * kUnitsPerTile + lane_id() / 4, p.units - 1); };
  auto whole = [&](const float (&sum)[4], uint32_t tile) {
    look(lookups, row0), locate(lookups), fetch(lookups, unit_of(tile));
    emit_tile(sum, tile, p.units, row0, p.rows, emit);
  };
  multiply_steps(source, mine, per_tile, h, head, tail, whole, [&] { ask_for_next(p.next); });

  /* The staged rows have been read: their place takes the sums of cut tiles. */
  float* cut = reinterpret_cast<float*>(staged);
  auto slot = [&](uint32_t warp, bool is_tail) { return cut + (warp * 2 + (is_tail ? 1 : 0)) * 128 + lane_id() * 4; };
  look(lookups, row0);
  block_sync();
  st_v4(slot(warp_id(), false), as_v4(head));
  st_v4(slot(warp_id(), true), as_v4(tail));
  locate(lookups);
  block_sync();
  const uint32_t end_tile = (block.end + per_tile - 1) / per_tile;
  for (uint32_t t = block.first / per_tile + warp_id(); t < end_tile; t += kWarps) {
    const Steps tile = {t * per_tile, (t + 1) * per_tile};
    const bool shared = tile.first < block.first || tile.end > block.end;
    /* Of all warps at once, without asking by a division which ones have a part. */
    v4u part[kWarps];
#pragma unroll
    for (uint32_t w = 0; w < kWarps; w++) part[w] = ld_v4(slot(w, tile.end > share_of(block, w, kWarps).end));
    float sum[4] = {};
    bool emitted = false;
#pragma unroll
    for (uint32_t w = 0; w < kWarps; w++) {
      const Steps steps = share_of(block, w, kWarps);
      emitted |= steps.first <= tile.first && tile.end <= steps.end;
      if (steps.first < steps.end && steps.first < tile.end && tile.first < steps.end) add_to(sum, part[w]);
    }
    if (emitted) continue;
    fetch(lookups, unit_of(t));
    const size_t group = size_t(bid_y()) * nbid_x();
    if (!shared ||
        combine_blocks(sum, tile, block, all, ptr<float>(p.partial) + group * 256, ptr<uint32_t>(p.arrivals) + group)) {
      emit_tile(sum, t, p.units, row0, p.rows, emit);
    }
  }
}
