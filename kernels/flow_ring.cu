/* The sampler of flow_chain on tensor cores, without a barrier of the grid: variants ring and resident (bf16).
 *
 *   as flow_chain.cu: h = w_in E(x) + b_in, h += gate * (w2 a + b2), v_raw = E(w_out u + b_out)     [S, F], [S, K]
 *   u = E(LN(h) * (1 + scale) + shift), a = E(silu(w0 u + b0)): operands of tensor cores are E, sums and h are float
 *
 * Shipped head (L 12, F = H = 1536): 113.6 MB of weights per evaluation, of which each of 128 blocks streams its 12
 * rows of every matrix: bound by the bytes (38 us at 3 TB/s) as long as 26 exchanges of about 0.8 us hide behind them.
 *
 *   warp 8 (producer):  gmem w -- bulk copies --> smem ring of segments [16 rows][512] E, and those that stay --+
 *   warps 0-7:          smem h -- norm --> smem u [S][F] E --> reg B --------------------------------> mma <----+
 *                       reg sums --> smem partial [8 warps] --> sum --> gmem words --> every block: smem h, a, v
 *
 * The producer knows all addresses ahead and waits for nothing but room: it runs a ring ahead of the exchanges. The
 * first `resident` segments of an evaluation stay in shared memory for the kernel's life.
 *
 * Exchange: a 64-bit word carries its value and an epoch, so that a plain relaxed store publishes it and a polled load
 * takes it, without fence or flag. Three buffers in turn: who writes exchange i + 3 has read i + 2, whose words come
 * from blocks that had read i + 1 and so had done with i; a block without rows of a product (at most every other
 * exchange has such) can be one further behind. h goes as float; a and v_raw, which are E, two sequences to a word.
 * Epochs go on from launch to launch, modulo 2^32 - 1 and never 0. Who waits longer than spin_limit looks reports the
 * token in GenerationState.stalled and waits no more: the launch ends with a useless token instead of hanging.
 *
 * A sum is made of eight shares of k, one per warp, of 32 in every 256: its order follows from the width alone.
 */
#include "flow_solver.cuh"

static constexpr uint32_t kConsumers = 32 * kWarps;
static constexpr uint32_t kThreads = kConsumers + 32;
static constexpr uint32_t kColumns = 8;    /* sequences of a pass: columns of an mma */
static constexpr uint32_t kTile = 16;      /* rows of an mma */
static constexpr uint32_t kSegment = 512;  /* k of a segment */
static constexpr uint32_t kStep = 32;      /* k of a lane quartet's 16-byte loads */
static constexpr uint32_t kMaxStages = 16, kMaxResident = 32;
static constexpr uint32_t kPolls = 8;      /* words that a thread has in flight */
static constexpr uint32_t kEpochs = 0xffffffffu;

/* Bytes between rows of n elements: 64 beyond a multiple of 128, so that eight lanes' 16-byte loads meet all banks. */
DEV uint32_t row_bytes(uint32_t n) { return 2 * n + (n % 64 == 0 ? 64 : 0); }
DEV uint32_t up16(uint32_t bytes) { return (bytes + 15) / 16 * 16; }

/* Shared memory of a block. ops/flow_chain/ring.rs lays it out the same way. */
struct Memory {
  float* x;      /* [B, K] of the pass */
  float* v;      /* [S, K] */
  float* h;      /* [S, F] */
  bf16* vectors; /* [S, 2 F] shift, scale of the norm ahead, then [2 F] its gain and offset */
  bf16* staged;  /* [S] rows of u or a */
  bf16* w_in;    /* [rows_width, K] */
  uint8_t* slots;
  float* partial; /* [2, kWarps, kTile, kColumns] */
  float* stats;   /* [kColumns, kWarps, 2] mean and sum of squared distances */
  uint64_t *full, *empty;
};

/* A block's rows of a product. */
struct Share {
  uint32_t first, count;
};
DEV Share share(uint32_t rows, uint32_t per_block) {
  const uint32_t first = umin(bid_x() * per_block, rows);
  return {first, umin(per_block, rows - first)};
}

struct Product {
  const bf16 *w, *bias;
  uint32_t inner;
  Share rows;
};
/* Product i of an evaluation: mlp.0 and mlp.2 of every block, then the final layer. */
DEV Product product_at(const FlowChainParams& p, uint32_t i) {
  const size_t m = i / 2, matrix = static_cast<size_t>(p.width) * p.mlp_width;
  if (m == p.blocks)
    return {ptr<const bf16>(p.w_out), ptr<const bf16>(p.b_out), p.width, share(p.token_dim, p.rows_token)};
  if (i % 2 == 0)
    return {ptr<const bf16>(p.w0) + m * matrix, ptr<const bf16>(p.b0) + m * p.mlp_width, p.width,
            share(p.mlp_width, p.rows_mlp)};
  return {ptr<const bf16>(p.w2) + m * matrix, ptr<const bf16>(p.b2) + m * p.width, p.mlp_width,
          share(p.width, p.rows_width)};
}

/* Images of a pass, and its sequences: local sequence r * count + b is sequence r * B + first + b. */
struct Pass {
  Images images;
  uint32_t count;
};
DEV uint32_t sequence_of(const FlowChainParams& p, const Pass& pass, uint32_t local) {
  return local / pass.images.count * p.images + pass.images.first + local % pass.images.count;
}

/* Where producer and consumers are in the stream of segments. */
struct Cursor {
  uint32_t segment; /* of the evaluation */
  uint32_t stage, parity;
};
DEV void advance(const FlowChainParams& p, Cursor& at) {
  if (at.segment++ < p.resident) return;
  if (++at.stage == p.stages) at.stage = 0, at.parity ^= 1;
}
DEV bool stays(const FlowChainParams& p, const Cursor& at) { return at.segment < p.resident; }
DEV uint32_t slot_of(const FlowChainParams& p, const Cursor& at) {
  return stays(p, at) ? at.segment : p.resident + at.stage;
}

DEV void produce(const FlowChainParams& p, const Memory& sh) {
  const uint32_t passes = (p.images + p.images_at_once - 1) / p.images_at_once;
  const uint64_t passing = l2_evict_first(), pinned = l2_evict_last();
  Cursor at = {0, 0, 0};
  for (uint32_t e = 0; e < passes * p.steps; e++) {
    at.segment = 0;
    for (uint32_t i = 0; i < 2 * p.blocks + 1; i++) {
      const Product m = product_at(p, i);
      for (uint32_t tile = 0; tile < m.rows.count; tile += kTile) {
        const uint32_t rows = umin(kTile, m.rows.count - tile);
        for (uint32_t k = 0; k < m.inner; k += kSegment, advance(p, at)) {
          const uint32_t n = umin(kSegment, m.inner - k), slot = slot_of(p, at);
          if (stays(p, at)) {
            if (e != 0) continue;
          } else {
            mbar_wait(&sh.empty[at.stage], at.parity ^ 1);
          }
          /* Bytes may land before they are expected: without this one arrival the phase cannot end. */
          if (lane_id() == 0) mbar_arrive_tx(&sh.full[slot], rows * n * 2);
          if (lane_id() < rows)
            bulk_g2s_hint(sh.slots + slot * p.stage_bytes + lane_id() * row_bytes(n),
                          m.w + static_cast<size_t>(m.rows.first + tile + lane_id()) * m.inner + k, n * 2,
                          &sh.full[slot], at.segment < p.resident + p.pinned ? pinned : passing);
        }
      }
    }
  }
}

DEV void consumers_sync() { bar_sync(1, kConsumers); }

/* The words between the blocks. */
struct Exchange {
  uint64_t* words; /* of the buffer in use */
  uint64_t made;   /* before this launch */
  uint32_t index, buffer;
  bool waits; /* false once this thread has waited in vain */
};
DEV uint32_t epoch(const Exchange& x) {
  const uint64_t e = x.made + x.index;
  return static_cast<uint32_t>(e >= kEpochs ? e - kEpochs : e) + 1;
}
DEV void next_exchange(const FlowChainParams& p, Exchange& x) {
  x.index++;
  x.buffer = x.buffer == 2 ? 0 : x.buffer + 1;
  x.words = ptr<uint64_t>(p.exchange + sizeof(FlowExchange)) + static_cast<size_t>(x.buffer) * p.exchange_words;
}
DEV void send(const Exchange& x, uint32_t word, uint32_t value) {
  st_relaxed(x.words + word, static_cast<uint64_t>(epoch(x)) << 32 | value);
}
/* take(i, value) for words first + i, i below n, of all blocks: this thread's share, tid + 256 j. Whole warps. */
template <class Take>
DEV void receive(const FlowChainParams& p, Exchange& x, uint32_t first, uint32_t n, Take take) {
  const uint32_t wanted = epoch(x);
  for (uint32_t base = tid_x(); base < n; base += kConsumers * kPolls) {
    uint64_t word[kPolls];
    bool missing = true;
#pragma unroll
    for (uint32_t j = 0; j < kPolls; j++) word[j] = 0;
    for (uint32_t looks = 0; missing && x.waits; looks++) {
      missing = false;
#pragma unroll
      for (uint32_t j = 0; j < kPolls; j++) {
        const uint32_t i = base + j * kConsumers;
        if (i < n && word[j] >> 32 != wanted) word[j] = poll_relaxed(x.words + first + i);
      }
#pragma unroll
      for (uint32_t j = 0; j < kPolls; j++)
        if (base + j * kConsumers < n && word[j] >> 32 != wanted) missing = true;
      if (missing && looks >= p.spin_limit) {
        GenerationState* state = ptr<GenerationState>(p.state);
        atom_max_relaxed(&state->stalled, 1 + state->token);
        x.waits = false;
      }
    }
#pragma unroll
    for (uint32_t j = 0; j < kPolls; j++)
      if (base + j * kConsumers < n) take(base + j * kConsumers, static_cast<uint32_t>(word[j]));
  }
  /* The lanes have looked for different times, and a product reads what its own warp has received. */
  warp_sync();
}
/* The same for n values of every sequence, two to a word. */
template <class Take>
DEV void receive_pairs(const FlowChainParams& p, Exchange& x, const Pass& pass, uint32_t n, Take take) {
  for (uint32_t s = 0; s < pass.count; s += 2)
    receive(p, x, s / 2 * n, n, [&](uint32_t i, uint32_t value) {
      take(s, i, bf16{static_cast<uint16_t>(value)});
      if (s + 1 < pass.count) take(s + 1, i, bf16{static_cast<uint16_t>(value >> 16)});
    });
}

/* Starts copying what norm j of evaluation n needs beside h. */
DEV void fetch_vectors(const FlowChainParams& p, const Memory& sh, const Pass& pass, uint32_t n, uint32_t j) {
  const uint32_t row = p.width / 4; /* 16-byte pieces of two vectors */
  const bool affine = j < p.blocks;
  const size_t at = 3 * static_cast<size_t>(j) * p.width;
  for (uint32_t i = tid_x(); i < (pass.count + (affine ? 1 : 0)) * row; i += kConsumers) {
    const uint32_t s = i / row, k = i % row * 8;
    const bf16* from;
    if (s < pass.count)
      from = ptr<const bf16>(p.mod) + (static_cast<size_t>(n) * sequences(p) + sequence_of(p, pass, s)) * mod_width(p) +
             at + k;
    else
      from = (k < p.width ? ptr<const bf16>(p.ln_w) + k : ptr<const bf16>(p.ln_b) + (k - p.width)) +
             static_cast<size_t>(j) * p.width;
    cp_async16(sh.vectors + s * 2 * p.width + k, from);
  }
  cp_async_commit();
}

/* staged = E(LN(h; gain, offset) * (1 + scale) + shift). A thread goes through elements tid + 256 i of every row, which
 * are those that it has received. Means of threads, then of warps, are combined as in Chan's update, so that an offset
 * that a row's values share does not eat their variance. */
DEV void stage_normed(const FlowChainParams& p, const Memory& sh, const Pass& pass, bool affine, uint32_t stride) {
  const uint32_t width = p.width, tid = tid_x();
  const float mine = static_cast<float>(tid < width ? (width - tid + kConsumers - 1) / kConsumers : 0);
  const auto of_warp = [&](uint32_t w) {
    const uint32_t rest = width % kConsumers;
    return static_cast<float>(width / kConsumers * 32 + (rest > 32 * w ? umin(32, rest - 32 * w) : 0));
  };
#pragma unroll 2
  for (uint32_t s = 0; s < pass.count; s++) {
    const float* row = sh.h + s * width;
    const float first = tid < width ? row[tid] : 0.0f;
    float sum = 0.0f, square = 0.0f;
    for (uint32_t k = tid; k < width; k += kConsumers) {
      const float d = row[k] - first;
      sum += d;
      square = f_fma(d, d, square);
    }
    const float mean = warp_sum(f_fma(mine, first, sum)) / f_max(of_warp(warp_id()), 1.0f);
    const float local = sum / f_max(mine, 1.0f), distance = first + local - mean;
    const float within = f_max(f_fma(-sum, local, square), 0.0f);
    const float squares = warp_sum(f_fma(mine * distance, distance, within));
    if (lane_id() == 0) {
      sh.stats[(s * kWarps + warp_id()) * 2] = mean;
      sh.stats[(s * kWarps + warp_id()) * 2 + 1] = squares;
    }
  }
  cp_async_wait<0>();
  consumers_sync();
  const bf16* gain = sh.vectors + pass.count * 2 * width;
  for (uint32_t s = 0; s < pass.count; s++) {
    const float *in = sh.stats + s * kWarps * 2, *row = sh.h + s * width;
    const float all = static_cast<float>(width);
    float mean = 0.0f, squares = 0.0f;
    for (uint32_t w = 0; w < kWarps; w++) mean = f_fma(of_warp(w) / all, in[w * 2], mean);
    for (uint32_t w = 0; w < kWarps; w++) {
      const float distance = in[w * 2] - mean;
      squares += f_fma(of_warp(w) * distance, distance, in[w * 2 + 1]);
    }
    const float inv = 1.0f / f_sqrt(squares / all + kNormEps);
    const bf16* shift = sh.vectors + s * 2 * width;
    for (uint32_t k = tid; k < width; k += kConsumers) {
      float u = (row[k] - mean) * inv;
      if (affine) u = f_fma(u, to_f32(gain[k]), to_f32(gain[width + k]));
      sh.staged[s * stride + k] = to_bf16(f_fma(u, 1.0f + to_f32(shift[width + k]), to_f32(shift[k])));
    }
  }
  consumers_sync();
}

struct Held {
  float bias, gate, h;
};
/* This block's rows of a product with the staged columns. held = prefetch(row, sequence) is under way while the sums
 * run; then emit(whether there is such an output, row, sequence, sum + bias, held) by warps 0 to 3, whole. */
template <class Prefetch, class Emit>
DEV void product(const FlowChainParams& p, const Memory& sh, Cursor& at, uint32_t& half, const Product& m,
                 const Pass& pass, uint32_t stride, Prefetch prefetch, Emit emit) {
  const uint32_t g = lane_id() / 4, t = lane_id() % 4;
  /* Columns and rows beyond the last repeat it; their sums are dropped. */
  const bf16* column = sh.staged + umin(g, pass.count - 1) * stride + 8 * t;
  for (uint32_t tile = 0; tile < m.rows.count; tile += kTile) {
    const uint32_t rows = umin(kTile, m.rows.count - tile);
    const uint32_t row = m.rows.first + tile + tid_x() / kColumns, s = tid_x() % kColumns;
    const bool exists = tid_x() / kColumns < rows && s < pass.count;
    Held held = {0.0f, 0.0f, 0.0f};
    if (exists) held = prefetch(row, s);
    float even[4] = {}, odd[4] = {};
    for (uint32_t k = 0; k < m.inner; k += kSegment, advance(p, at)) {
      const uint32_t n = umin(kSegment, m.inner - k), slot = slot_of(p, at), pitch = row_bytes(n);
      mbar_wait(&sh.full[slot], stays(p, at) ? 0 : at.parity);
      /* Lanes may leave the spin apart, and the multiplications need them together. */
      warp_sync();
      const uint8_t* w = sh.slots + slot * p.stage_bytes + 16 * t;
      const uint8_t *w0 = w + umin(g, rows - 1) * pitch, *w1 = w + umin(g + 8, rows - 1) * pitch;
#pragma unroll 2
      for (uint32_t i = warp_id() * kStep; i < n; i += kWarps * kStep) {
        const v4u a = ld_v4(w0 + 2 * i), b = ld_v4(w1 + 2 * i), c = ld_v4(column + k + i);
        const uint32_t a0[4] = {a.x, b.x, a.y, b.y}, a1[4] = {a.z, b.z, a.w, b.w};
        const uint32_t c0[2] = {c.x, c.y}, c1[2] = {c.z, c.w};
        mma_bf16_16816(even, a0, c0);
        mma_bf16_16816(odd, a1, c1);
      }
      if (!stays(p, at)) {
        warp_sync();
        if (lane_id() == 0) mbar_arrive(&sh.empty[at.stage]);
      }
    }
    float* partial = sh.partial + half * kWarps * kTile * kColumns;
    half ^= 1;
#pragma unroll
    for (uint32_t i = 0; i < 4; i++)
      partial[warp_id() * kTile * kColumns + (g + i / 2 * 8) * kColumns + 2 * t + i % 2] = even[i] + odd[i];
    consumers_sync();
    if (tid_x() >= kTile * kColumns) continue;
    float sum = partial[tid_x()];
    for (uint32_t w = 1; w < kWarps; w++) sum += partial[w * kTile * kColumns + tid_x()];
    emit(exists, row, s, sum + held.bias, held);
  }
}

/* Sends E(value) of two neighbouring sequences as one word; whole warps, sequences in neighbouring lanes. */
DEV void send_pair(const Exchange& x, bool exists, uint32_t rows, uint32_t row, uint32_t s, float value) {
  const float mine = exists ? value : 0.0f, other = shfl_xor(mine, 1);
  if (exists && s % 2 == 0) send(x, s / 2 * rows + row, pack_bf16(mine, other));
}

/* h = w_in E(x) + b_in: this block's rows, sent to all. A warp per row; x is the same for all branches of an image. */
DEV void send_state(const FlowChainParams& p, const Memory& sh, const Exchange& ex, const Pass& pass) {
  const Share rows = share(p.width, p.rows_width);
  for (uint32_t i = warp_id(); i < rows.count * pass.images.count; i += kWarps) {
    const uint32_t b = i / rows.count, r = i % rows.count;
    float sum = 0.0f;
    for (uint32_t k = lane_id(); k < p.token_dim; k += 32)
      sum = f_fma(to_f32(sh.w_in[r * p.token_dim + k]), round_to<bf16>(sh.x[b * p.token_dim + k]), sum);
    sum = warp_sum(sum);
    if (lane_id() == 0)
      send(ex, b * p.width + rows.first + r, as_u32(sum + to_f32(ptr<const bf16>(p.b_in)[rows.first + r])));
  }
}

/* x_next = w_next token + b_next: this block's rows, for all branches. */
DEV void project_token(const FlowChainParams& p, const Memory& sh, const Pass& pass) {
  const Share rows = share(p.hidden, p.rows_hidden);
  for (uint32_t i = warp_id(); i < rows.count * pass.images.count; i += kWarps) {
    const uint32_t b = i / rows.count, row = rows.first + i % rows.count;
    const bf16* w = ptr<const bf16>(p.w_next) + static_cast<size_t>(row) * p.token_dim;
    float sum = 0.0f;
    for (uint32_t k = lane_id(); k < p.token_dim; k += 32) sum = f_fma(to_f32(w[k]), sh.x[b * p.token_dim + k], sum);
    sum = warp_sum(sum) + to_f32(ptr<const bf16>(p.b_next)[row]);
    if (lane_id() < p.branches)
      ptr<float>(p.x_next)[(static_cast<size_t>(lane_id()) * p.images + pass.images.first + b) * p.hidden + row] = sum;
  }
}

DEV void consume(const FlowChainParams& p, const Memory& sh, Exchange& ex) {
  const uint32_t token = ptr<const GenerationState>(p.state)->token, width = p.width;
  const uint32_t stride = row_bytes(width > p.mlp_width ? width : p.mlp_width) / 2;
  const float* draws = draws_of(p, token);
  Cursor at = {0, 0, 0};
  uint32_t half = 0;
  for (uint32_t first = 0; first < p.images; first += p.images_at_once) {
    const Images images = {first, umin(p.images_at_once, p.images - first)};
    const Pass pass = {images, images.count * p.branches};
    const auto velocity = [&](uint32_t r, uint32_t i) { return sh.v[r * images.count * p.token_dim + i]; };
    const auto take_h = [&](uint32_t s) {
      return [&, s](uint32_t i, uint32_t value) { sh.h[s * width + i] = as_f32(value); };
    };
    fetch_vectors(p, sh, pass, 0, 0);
    for (uint32_t n = 0; n < p.steps; n++) {
      const bf16* mod = ptr<const bf16>(p.mod) + static_cast<size_t>(n) * sequences(p) * mod_width(p);
      at.segment = 0;
      set_state(p, sh.x, images, n, draws);
      consumers_sync();
      send_state(p, sh, ex, pass);
      for (uint32_t b = 0; b < images.count; b++)
        receive(p, ex, b * width, width, [&](uint32_t i, uint32_t value) {
          for (uint32_t s = b; s < pass.count; s += images.count) sh.h[s * width + i] = as_f32(value);
        });
      next_exchange(p, ex);
      for (uint32_t j = 0; j <= p.blocks; j++) {
        const bool last = j == p.blocks;
        stage_normed(p, sh, pass, !last, stride);
        if (!last)
          fetch_vectors(p, sh, pass, n, j + 1);
        else if (n + 1 < p.steps)
          fetch_vectors(p, sh, pass, n + 1, 0);
        const Product up = product_at(p, 2 * j);
        const uint32_t outputs = last ? p.token_dim : p.mlp_width;
        product(
            p, sh, at, half, up, pass, stride,
            [&](uint32_t row, uint32_t) {
              return Held{to_f32(up.bias[row]), 0.0f, 0.0f};
            },
            [&](bool exists, uint32_t row, uint32_t s, float sum, Held) {
              send_pair(ex, exists, outputs, row, s, last ? sum : silu(sum));
            });
        if (last) break;
        receive_pairs(p, ex, pass, p.mlp_width,
                      [&](uint32_t s, uint32_t i, bf16 value) { sh.staged[s * stride + i] = value; });
        next_exchange(p, ex);
        /* No barrier: a warp's share of k is just what its lanes have received. */
        static_assert(kSegment % kConsumers == 0 && kConsumers == kWarps * kStep);
        const Product down = product_at(p, 2 * j + 1);
        const bool keeps = n + 1 == p.steps && j + 1 == p.blocks;
        product(
            p, sh, at, half, down, pass, stride,
            [&](uint32_t row, uint32_t s) {
              const size_t third = 3 * static_cast<size_t>(j) + 2;
              const bf16* gate = mod + sequence_of(p, pass, s) * mod_width(p) + third * width;
              return Held{to_f32(down.bias[row]), to_f32(gate[row]), sh.h[s * width + row]};
            },
            [&](bool exists, uint32_t row, uint32_t s, float sum, Held held) {
              if (!exists) return;
              const float h = f_fma(held.gate, sum, held.h);
              send(ex, s * width + row, as_u32(h));
              if (keeps) ptr<float>(p.h)[static_cast<size_t>(sequence_of(p, pass, s)) * width + row] = h;
            });
        for (uint32_t s = 0; s < pass.count; s++) receive(p, ex, s * width, width, take_h(s));
        next_exchange(p, ex);
      }
      receive_pairs(p, ex, pass, p.token_dim,
                    [&](uint32_t s, uint32_t i, bf16 value) { sh.v[s * p.token_dim + i] = to_f32(value); });
      next_exchange(p, ex);
      consumers_sync();
      step_solver(p, sh.x, images, n, token, draws, velocity);
    }
    finish_token<bf16>(p, sh.x, images, token);
    consumers_sync();
    project_token(p, sh, pass);
    consumers_sync();
  }
}

/* Grid: cooperative, at most one block per SM. Block: eight warps that compute and one that copies. */
KERNEL(flow_ring_bf16, FlowChainParams, kThreads, 1) {
  SMEM_DYN(uint8_t, dynamic);
  SMEM(uint64_t, full, kMaxResident + kMaxStages);
  SMEM(uint64_t, empty, kMaxStages);
  SMEM(float, partial, 2 * kWarps * kTile * kColumns);
  SMEM(float, stats, kColumns * kWarps * 2);
  const uint32_t sequences = p.images_at_once * p.branches, longest = p.width > p.mlp_width ? p.width : p.mlp_width;
  uint8_t* next = dynamic;
  const auto take = [&](uint32_t bytes) {
    uint8_t* at = next;
    next += up16(bytes);
    return at;
  };
  Memory sh;
  sh.slots = take((p.resident + p.stages) * p.stage_bytes);
  sh.x = reinterpret_cast<float*>(take(p.images_at_once * p.token_dim * 4));
  sh.v = reinterpret_cast<float*>(take(sequences * p.token_dim * 4));
  sh.h = reinterpret_cast<float*>(take(sequences * p.width * 4));
  sh.vectors = reinterpret_cast<bf16*>(take((sequences + 1) * p.width * 4));
  sh.staged = reinterpret_cast<bf16*>(take(sequences * row_bytes(longest)));
  sh.w_in = reinterpret_cast<bf16*>(take(p.rows_width * p.token_dim * 2));
  sh.partial = partial, sh.stats = stats, sh.full = full, sh.empty = empty;

  if (tid_x() == 0) {
    for (uint32_t i = 0; i < p.resident + p.stages; i++) mbar_init(&full[i], 1);
    for (uint32_t i = 0; i < p.stages; i++) mbar_init(&empty[i], kWarps);
    mbar_init_fence();
  }
  const Share rows = share(p.width, p.rows_width);
  for (uint32_t i = tid_x(); i < rows.count * p.token_dim; i += kThreads)
    sh.w_in[i] = ptr<const bf16>(p.w_in)[static_cast<size_t>(rows.first) * p.token_dim + i];
  uint64_t* made = &ptr<FlowExchange>(p.exchange)->made;
  Exchange ex = {ptr<uint64_t>(p.exchange + sizeof(FlowExchange)), poll_relaxed(made), 0, 0, true};
  block_sync();
  if (warp_id() == kWarps) {
    produce(p, sh);
    return;
  }
  consume(p, sh, ex);
  /* No block gets here before all have sent something, and so have read `made`. */
  if (bid_x() == 0 && tid_x() == 0) st_relaxed(made, (ex.made + ex.index) % kEpochs);
}
