/* The sampler of flow_chain on tensor cores, without a barrier of the grid: variants ring and resident (bf16).
 *
 *   as flow_chain.cu: h = w_in E(x) + b_in, h += gate * (w2 a + b2), v_raw = E(w_out u + b_out)     [S, F], [S, K]
 *   u = E(LN(h) * (1 + scale) + shift), a = E(silu(w0 u + b0)): operands of tensor cores are E, sums and h are float
 *
 * Shipped head (L 12, F = H = 1536): 113.6 MB of weights per evaluation, of which each of 128 blocks streams its 12
 * rows of every matrix: bound by the bytes (38 us at 3 TB/s) as long as 26 exchanges of about 0.8 us hide behind them.
 *
 *   warp 8 (producer):  gmem w -- bulk copies --> smem ring of segments [16 rows][512] E, and those that stay --+
 *   warps 0-7:          smem h -- norm --> smem u [S][F] E --> reg B ----------------------> mma <-- reg A <--+
 *                       reg sums --> smem partial [8 warps] --+
 *   warp 9 (sender):    bias, gate, silu <--------------------+ --> gmem words --> every block: smem h, a, v
 *
 * The producer knows all addresses ahead and waits only for room, in the ring and for a norm's vectors: it runs a ring
 * or two products ahead of the exchanges. The first `resident` segments of an evaluation stay in shared memory for the
 * kernel's life. flow_exchange.cuh has the words between the blocks.
 *
 * What a block does between two exchanges is latency, 26 times per evaluation. Hence a warp of its own that sums and
 * sends, while the consumers take the next product's weights into registers; loads and shuffles of two sequences go
 * side by side; and nothing divides.
 *
 * A sum is made of eight shares of k, one per warp, of 32 in every 256: its order follows from the width alone.
 */
#include "flow_exchange.cuh"

static constexpr uint32_t kThreads = kConsumers + 64; /* and one warp that copies, one that sends */
static constexpr uint32_t kColumns = 8;               /* sequences of a pass: columns of an mma */
static constexpr uint32_t kSegment = 512;             /* k of a segment */
static constexpr uint32_t kPitch = 2 * kSegment + 64; /* bytes between its rows: eight lanes' loads meet all banks */
static constexpr uint32_t kStep = 32;                 /* k of a lane quartet's 16-byte loads */
static constexpr uint32_t kAhead = 3;                 /* segments of a tile that registers hold ahead: all of 1536 */
static constexpr uint32_t kPairs = 3;                 /* neighbours of a row that a thread norms at once: all of 1536 */

/* Bytes between rows of n elements: 64 beyond a multiple of 128, so that eight lanes' 16-byte loads meet all banks. */
DEV uint32_t row_bytes(uint32_t n) { return 2 * n + (n % 64 == 0 ? 64 : 0); }
DEV uint32_t up16(uint32_t bytes) { return (bytes + 15) / 16 * 16; }
/* Elements that a row of n takes in an mma's steps: zeros follow the last. */
DEV uint32_t up_step(uint32_t n) { return (n + kStep - 1) / kStep * kStep; }
/* Bytes of a staged row: the longest of those that a product takes. */
DEV uint32_t staged_bytes(const FlowChainParams& p) {
  const uint32_t wide = p.width > p.mlp_width ? p.width : p.mlp_width, token = up_step(p.token_dim);
  return row_bytes(wide > token ? wide : token);
}
DEV v2u ld_v2(const void* p) { return *static_cast<const v2u*>(p); }

/* Shared memory of a block. ops/flow_chain/ring.rs lays it out the same way. */
struct Memory {
  float* x;      /* [B, K] of the pass */
  float* draw;   /* [B, K] of the solver step ahead */
  float* v;      /* [S, K] */
  float* h;      /* [S, F] */
  bf16* vectors; /* [S, 2 F] shift, scale of the norm ahead, then [2 F] its gain and offset */
  bf16* staged;  /* [S] rows of u or a, or [B] of E(x) */
  bf16* w_in;    /* [rows_width] rows of row_bytes(up_step(K)), zeros behind the last */
  uint8_t* slots;
  float* partial;                         /* [2, kWarps, kTile, kColumns] */
  float* own;                             /* [rows_width, kColumns] h of this block's rows, the sender's */
  float* stats;                           /* [kColumns, kWarps, 2] sums of distances and of their squares */
  uint64_t *full, *empty;                 /* of the slots, of the ring's stages */
  uint64_t *vectors_full, *vectors_empty; /* of `vectors` */
  uint64_t *partial_full, *partial_empty; /* [2] of the halves of `partial` */
  Words of_width, of_mlp, of_token;
};

/* Images of a pass, and its sequences: local sequence r * count + b is sequence r * B + first + b. */
struct Pass {
  Images images;
  uint32_t count;
};
DEV uint32_t sequence_of(const FlowChainParams& p, const Pass& pass, uint32_t local) {
  return local / pass.images.count * p.images + pass.images.first + local % pass.images.count;
}
/* The pass that begins with image `first`. */
DEV Pass pass_at(const FlowChainParams& p, uint32_t first) {
  const uint32_t count = umin(p.images_at_once, p.images - first);
  return {{first, count}, count * p.branches};
}

/* Product i of an evaluation: mlp.0 and mlp.2 of every block, then the final layer. */
struct Sizes {
  uint32_t inner;
  Share rows; /* this block's */
};
DEV Sizes sizes_at(const FlowChainParams& p, uint32_t i) {
  if (i == 2 * p.blocks) return {p.width, share(p.token_dim, p.rows_token)};
  if (i % 2 == 0) return {p.width, share(p.mlp_width, p.rows_mlp)};
  return {p.mlp_width, share(p.width, p.rows_width)};
}
struct Product {
  const bf16 *w, *bias;
  const bf16* gate; /* of sequence 0, the next one mod_width further on; mlp.2's only */
  Sizes sizes;
};
/* The same of evaluation n. */
DEV Product product_at(const FlowChainParams& p, uint32_t n, uint32_t i) {
  const size_t m = i / 2, matrix = static_cast<size_t>(p.width) * p.mlp_width;
  const Sizes sizes = sizes_at(p, i);
  if (m == p.blocks) return {ptr<const bf16>(p.w_out), ptr<const bf16>(p.b_out), nullptr, sizes};
  if (i % 2 == 0) return {ptr<const bf16>(p.w0) + m * matrix, ptr<const bf16>(p.b0) + m * p.mlp_width, nullptr, sizes};
  const size_t evaluation = static_cast<size_t>(n) * sequences(p) * mod_width(p);
  const bf16* gate = ptr<const bf16>(p.mod) + evaluation + (3 * m + 2) * p.width;
  return {ptr<const bf16>(p.w2) + m * matrix, ptr<const bf16>(p.b2) + m * p.width, gate, sizes};
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

/* Starts copying what norm j of evaluation n needs beside h. */
DEV void produce_vectors(const FlowChainParams& p, const Memory& sh, const Pass& pass, uint32_t n, uint32_t j,
                         uint32_t& parity) {
  const size_t width = p.width;
  const bool affine = j < p.blocks;
  mbar_wait(sh.vectors_empty, parity ^= 1);
  if (lane_id() == 0) mbar_arrive_tx(sh.vectors_full, (pass.count + (affine ? 1 : 0)) * 4 * p.width);
  bf16* to = sh.vectors + lane_id() * 2 * width;
  if (lane_id() < pass.count) {
    const size_t row = static_cast<size_t>(n) * sequences(p) + sequence_of(p, pass, lane_id());
    bulk_g2s(to, ptr<const bf16>(p.mod) + row * mod_width(p) + 3 * j * width, 4 * p.width, sh.vectors_full);
  } else if (lane_id() == pass.count && affine) {
    bulk_g2s(to, ptr<const bf16>(p.ln_w) + j * width, 2 * p.width, sh.vectors_full);
    bulk_g2s(to + width, ptr<const bf16>(p.ln_b) + j * width, 2 * p.width, sh.vectors_full);
  }
}

/* This block's rows of w_next and b_next into L2, an evaluation before project_token reads them: a token ago they were
 * there last, and the model's weights went by since. */
DEV void ask_for_projector(const FlowChainParams& p) {
  constexpr uint32_t kLine = 128;
  const Share rows = share(p.hidden, p.rows_hidden);
  const uint32_t bytes = rows.count * p.token_dim * 2;
  for (uint32_t at = lane_id() * kLine; at < bytes; at += 32 * kLine)
    prefetch_l2(ptr<const uint8_t>(p.w_next) + static_cast<size_t>(rows.first) * p.token_dim * 2 + at);
  if (lane_id() == 0 && rows.count != 0) prefetch_l2(ptr<const bf16>(p.b_next) + rows.first);
}

DEV void produce(const FlowChainParams& p, const Memory& sh) {
  const uint32_t passes = (p.images + p.images_at_once - 1) / p.images_at_once;
  const uint64_t passing = l2_evict_first(), pinned = l2_evict_last();
  Cursor at = {0, 0, 0};
  uint32_t vectors = 0;
  for (uint32_t e = 0; e < passes * p.steps; e++) {
    const Pass pass = pass_at(p, e / p.steps * p.images_at_once);
    const uint32_t n = e % p.steps;
    at.segment = 0;
    if (n + 1 == p.steps) ask_for_projector(p);
    for (uint32_t i = 0; i < 2 * p.blocks + 1; i++) {
      if (i % 2 == 0) produce_vectors(p, sh, pass, n, i / 2, vectors);
      const Product m = product_at(p, n, i);
      for (uint32_t tile = 0; tile < m.sizes.rows.count; tile += kTile) {
        const uint32_t rows = umin(kTile, m.sizes.rows.count - tile);
        for (uint32_t k = 0; k < m.sizes.inner; k += kSegment, advance(p, at)) {
          const uint32_t length = umin(kSegment, m.sizes.inner - k), slot = slot_of(p, at);
          if (stays(p, at)) {
            if (e != 0) continue;
          } else {
            mbar_wait(&sh.empty[at.stage], at.parity ^ 1);
          }
          /* Bytes may land before they are expected: without this one arrival the phase cannot end. */
          if (lane_id() == 0) mbar_arrive_tx(&sh.full[slot], rows * length * 2);
          const size_t row = m.sizes.rows.first + tile + lane_id();
          if (lane_id() < rows)
            bulk_g2s_hint(sh.slots + slot * p.stage_bytes + lane_id() * kPitch, m.w + row * m.sizes.inner + k,
                          length * 2, &sh.full[slot], at.segment < p.resident + p.pinned ? pinned : passing);
        }
      }
    }
  }
}

/* Sums over one or two rows of h: distances from the row's first value and their squares. That value is one of the
 * row's, and so at most sqrt(F) deviations from the mean: the variance keeps all but log2(F) of a float's 24 bits,
 * whatever offset the values share. */
struct Moments {
  float sum, square;
};
DEV void row_moments(const float* row, uint32_t width, uint32_t other, Moments (&m)[2]) {
  const float pivot[2] = {row[0], row[other]};
  m[0] = m[1] = Moments{0.0f, 0.0f};
  for (uint32_t k0 = 2 * tid_x(); k0 < width; k0 += 2 * kConsumers * kPairs) {
    v2u pair[kPairs][2];
#pragma unroll
    for (uint32_t j = 0; j < kPairs; j++) {
      const uint32_t k = k0 + j * 2 * kConsumers;
#pragma unroll
      for (uint32_t r = 0; r < 2; r++)
        pair[j][r] = k < width ? ld_v2(row + r * other + k) : v2u{as_u32(pivot[r]), as_u32(pivot[r])};
    }
#pragma unroll
    for (uint32_t j = 0; j < kPairs; j++)
#pragma unroll
      for (uint32_t r = 0; r < 2; r++) {
        const float a = as_f32(pair[j][r].x) - pivot[r], b = as_f32(pair[j][r].y) - pivot[r];
        m[r].sum += a + b;
        m[r].square = f_fma(b, b, f_fma(a, a, m[r].square));
      }
  }
}
struct RowNorm {
  float mean, inverse; /* 1 / deviation */
};
/* Of a row from the moments of the warps. */
DEV RowNorm row_norm(const float* of_warps, float pivot, float width) {
  Moments m[kWarps / 2];
#pragma unroll
  for (uint32_t w = 0; w < kWarps / 2; w++) {
    const v4u two = ld_v4(of_warps + 4 * w);
    m[w] = {as_f32(two.x) + as_f32(two.z), as_f32(two.y) + as_f32(two.w)};
  }
  const float share = 1.0f / width, mean = ((m[0].sum + m[1].sum) + (m[2].sum + m[3].sum)) * share;
  const float square = ((m[0].square + m[1].square) + (m[2].square + m[3].square)) * share;
  return {pivot + mean, fast_rsqrt(f_max(f_fma(-mean, mean, square), 0.0f) + kNormEps)};
}

/* staged rows s and, if there is one, s + 1. What lies beyond the width repeats the last two values and is not kept. */
DEV void norm_rows(const Memory& sh, const Pass& pass, uint32_t width, bool affine, uint32_t stride, uint32_t s) {
  const uint32_t other = s + 1 < pass.count ? 1 : 0;
  const float* h = sh.h + s * width;
  const bf16 *vectors = sh.vectors + s * 2 * width, *gain = sh.vectors + pass.count * 2 * width;
  bf16* staged = sh.staged + s * stride;
  const float* moments = sh.stats + s * kWarps * 2;
  const RowNorm norm[2] = {row_norm(moments, h[0], static_cast<float>(width)),
                           row_norm(moments + other * kWarps * 2, h[other * width], static_cast<float>(width))};
  constexpr uint32_t kOnes = 0x3f803f80; /* two of E */
  const auto load = [](const bf16* from) { return *reinterpret_cast<const uint32_t*>(from); };
  for (uint32_t k0 = 2 * tid_x(); k0 < width; k0 += 2 * kConsumers * kPairs) {
    v2u value[kPairs][2];
    uint32_t shift[kPairs][2], scale[kPairs][2], weight[kPairs], bias[kPairs];
#pragma unroll
    for (uint32_t j = 0; j < kPairs; j++) {
      const uint32_t k = umin(k0 + j * 2 * kConsumers, width - 2);
#pragma unroll
      for (uint32_t r = 0; r < 2; r++) {
        value[j][r] = ld_v2(h + r * other * width + k);
        shift[j][r] = load(vectors + r * other * 2 * width + k);
        scale[j][r] = load(vectors + r * other * 2 * width + width + k);
      }
      weight[j] = kOnes, bias[j] = 0;
      if (affine) weight[j] = load(gain + k), bias[j] = load(gain + width + k);
    }
#pragma unroll
    for (uint32_t j = 0; j < kPairs; j++) {
      const uint32_t k = k0 + j * 2 * kConsumers;
#pragma unroll
      for (uint32_t r = 0; r < 2; r++) {
        float lo = (as_f32(value[j][r].x) - norm[r].mean) * norm[r].inverse;
        float hi = (as_f32(value[j][r].y) - norm[r].mean) * norm[r].inverse;
        lo = f_fma(lo, bf_lo(weight[j]), bf_lo(bias[j])), hi = f_fma(hi, bf_hi(weight[j]), bf_hi(bias[j]));
        lo = f_fma(lo, 1.0f + bf_lo(scale[j][r]), bf_lo(shift[j][r]));
        hi = f_fma(hi, 1.0f + bf_hi(scale[j][r]), bf_hi(shift[j][r]));
        if (k < width && r <= other) *reinterpret_cast<uint32_t*>(staged + r * stride + k) = pack_bf16(lo, hi);
      }
    }
  }
}

/* staged = E(LN(h; gain, offset) * (1 + scale) + shift), there for all consumers when it returns. */
DEV void stage_normed(const Memory& sh, const Pass& pass, uint32_t width, bool affine, uint32_t stride,
                      uint32_t& parity) {
  for (uint32_t s = 0; s < pass.count; s += 2) {
    const uint32_t other = s + 1 < pass.count ? 1 : 0;
    Moments m[2];
    row_moments(sh.h + s * width, width, other * width, m);
    float sums[4] = {m[0].sum, m[0].square, m[1].sum, m[1].square};
    warp_sum_all(sums);
    if (lane_id() == 0) {
      float* to = sh.stats + (s * kWarps + warp_id()) * 2;
      to[0] = sums[0], to[1] = sums[1];
      if (other) to[kWarps * 2] = sums[2], to[kWarps * 2 + 1] = sums[3];
    }
  }
  mbar_wait(sh.vectors_full, parity);
  parity ^= 1;
  consumers_sync();
  for (uint32_t s = 0; s < pass.count; s += 2) norm_rows(sh, pass, width, affine, stride, s);
  consumers_sync();
  if (tid_x() == 0) mbar_arrive(sh.vectors_empty);
}

/* staged = E(x), zeros up to a whole step: elements that this thread has written. */
DEV void stage_state(const FlowChainParams& p, const Memory& sh, Images at, uint32_t stride) {
  for (uint32_t b = warp_id(); b < at.count; b += kWarps)
    for (uint32_t k = lane_id(); k < up_step(p.token_dim); k += 32)
      sh.staged[b * stride + k] = to_bf16(k < p.token_dim ? sh.x[b * p.token_dim + k] : 0.0f);
}

/* What a lane multiplies of one segment: two steps of this warp's, each two mmas deep. */
struct Weights {
  uint32_t a[2][2][4];
};
struct Columns {
  uint32_t b[2][2][2];
};
/* Where a lane's weights are in a segment of `rows` rows, the first step's; rows beyond the last repeat it. */
struct Lane {
  uint32_t w0, w1; /* bytes */
};
DEV Lane lane_of(uint32_t rows, uint32_t pitch) {
  const uint32_t g = lane_id() / 4, at = 16 * (lane_id() % 4);
  return {umin(g, rows - 1) * pitch + at, umin(g + 8, rows - 1) * pitch + at};
}
/* Where a lane's first column begins: columns beyond the last repeat it, and their sums are dropped. */
DEV const bf16* first_column(const Memory& sh, uint32_t columns, uint32_t stride) {
  return sh.staged + umin(lane_id() / 4, columns - 1) * stride + 8 * (lane_id() % 4) + kStep * warp_id();
}
/* Of n elements of k. A step beyond them has weights of the segment's first step, numbers whereas what lies behind may
 * be none, and zeros for columns. */
DEV void load_weights(Weights& f, const uint8_t* rows, const Lane& lane, uint32_t n) {
#pragma unroll
  for (uint32_t j = 0; j < 2; j++) {
    const uint32_t i = (warp_id() + j * kWarps) * kStep;
    const uint8_t* from = rows + (i < n ? 2 * i : 0);
    const v4u lo = ld_v4(from + lane.w0), hi = ld_v4(from + lane.w1);
    f.a[j][0][0] = lo.x, f.a[j][0][1] = hi.x, f.a[j][0][2] = lo.y, f.a[j][0][3] = hi.y;
    f.a[j][1][0] = lo.z, f.a[j][1][1] = hi.z, f.a[j][1][2] = lo.w, f.a[j][1][3] = hi.w;
  }
}
DEV void load_columns(Columns& f, const bf16* column, uint32_t n) {
#pragma unroll
  for (uint32_t j = 0; j < 2; j++) {
    const bool exists = (warp_id() + j * kWarps) * kStep < n;
    const v4u c = exists ? ld_v4(column + j * kWarps * kStep) : v4u{0, 0, 0, 0};
    f.b[j][0][0] = c.x, f.b[j][0][1] = c.y, f.b[j][1][0] = c.z, f.b[j][1][1] = c.w;
  }
}
DEV void multiply(float (&even)[4], float (&odd)[4], const Weights& w, const Columns& c) {
#pragma unroll
  for (uint32_t j = 0; j < 2; j++) {
    mma_bf16_16816(even, w.a[j][0], c.b[j][0]);
    mma_bf16_16816(odd, w.a[j][1], c.b[j][1]);
  }
}

/* Hands a warp's sums of a tile to the sender; `tiles` counts them. */
DEV void put_partial(const Memory& sh, uint32_t& tiles, const float (&even)[4], const float (&odd)[4],
                     uint32_t columns) {
  const uint32_t g = lane_id() / 4, t = lane_id() % 4, half = tiles & 1, parity = tiles >> 1 & 1;
  tiles++;
  mbar_wait(&sh.partial_empty[half], parity ^ 1);
  if (2 * t < columns) {
    float* mine = sh.partial + ((half * kWarps + warp_id()) * kTile + g) * kColumns + 2 * t;
    *reinterpret_cast<v2u*>(mine) = v2u{as_u32(even[0] + odd[0]), as_u32(even[1] + odd[1])};
    *reinterpret_cast<v2u*>(mine + 8 * kColumns) = v2u{as_u32(even[2] + odd[2]), as_u32(even[3] + odd[3])};
  }
  warp_sync();
  if (lane_id() == 0) mbar_arrive(&sh.partial_full[half]);
}

/* The next tile's weights, of product i of evaluation n: fetched while the words that make its columns are on their
 * way. */
struct Ahead {
  uint32_t n, i, tile;
  uint32_t inner, rows; /* k, and this block's rows of the product */
  Weights weights[kAhead];
};
/* Takes this warp's share of the stream's next segment: `left` elements of k are. */
DEV void take_segment(const FlowChainParams& p, const Memory& sh, Cursor& at, const Lane& lane, uint32_t left,
                      Weights& weights) {
  const bool held = stays(p, at);
  const uint32_t slot = slot_of(p, at);
  mbar_wait(&sh.full[slot], held ? 0 : at.parity);
  load_weights(weights, sh.slots + slot * p.stage_bytes, lane, left);
  /* Lanes may leave the spin apart; the one that gives the stage back does so for all. */
  warp_sync();
  if (!held && lane_id() == 0) mbar_arrive(&sh.empty[at.stage]);
  advance(p, at);
}
DEV void fetch_ahead(const FlowChainParams& p, const Memory& sh, Cursor& at, Ahead& ahead) {
  const Sizes m = sizes_at(p, ahead.i);
  /* There is none behind the last evaluation. */
  ahead.inner = m.inner, ahead.rows = ahead.n == p.steps ? 0 : m.rows.count;
  if (ahead.i == 0 && ahead.tile == 0) at.segment = 0;
  if (ahead.rows == 0) return;
  const Lane lane = lane_of(umin(kTile, ahead.rows - ahead.tile * kTile), kPitch);
#pragma unroll
  for (uint32_t j = 0; j < kAhead; j++)
    if (j * kSegment < m.inner) take_segment(p, sh, at, lane, m.inner - j * kSegment, ahead.weights[j]);
}

/* This block's rows of the product that is ahead, times the staged columns, to the sender. Then product i of evaluation
 * n is ahead. */
DEV void product(const FlowChainParams& p, const Memory& sh, Cursor& at, uint32_t& tiles, const Pass& pass,
                 uint32_t stride, uint32_t n, uint32_t i, Ahead& ahead) {
  bool more = false;
  do {
    if (ahead.rows != 0) {
      const bf16* column = first_column(sh, pass.count, stride);
      float even[4] = {}, odd[4] = {};
      Columns columns[kAhead];
#pragma unroll
      for (uint32_t j = 0; j < kAhead; j++)
        if (j * kSegment < ahead.inner) load_columns(columns[j], column + j * kSegment, ahead.inner - j * kSegment);
#pragma unroll
      for (uint32_t j = 0; j < kAhead; j++)
        if (j * kSegment < ahead.inner) multiply(even, odd, ahead.weights[j], columns[j]);
      if (kAhead * kSegment < ahead.inner) {
        const Lane lane = lane_of(umin(kTile, ahead.rows - ahead.tile * kTile), kPitch);
        for (uint32_t k = kAhead * kSegment; k < ahead.inner; k += kSegment) {
          Weights weights;
          take_segment(p, sh, at, lane, ahead.inner - k, weights);
          load_columns(columns[0], column + k, ahead.inner - k);
          multiply(even, odd, weights, columns[0]);
        }
      }
      put_partial(sh, tiles, even, odd, pass.count);
    }
    ahead.tile++;
    more = ahead.tile * kTile < ahead.rows;
    if (!more) ahead.n = n, ahead.i = i, ahead.tile = 0;
    fetch_ahead(p, sh, at, ahead);
  } while (more);
  /* All have read the columns: words may come in their place. */
  consumers_sync();
}

/* w_in E(x) of the staged images: this block's rows, to the sender. */
DEV void project_state(const FlowChainParams& p, const Memory& sh, uint32_t& tiles, const Pass& pass, uint32_t stride) {
  const Share mine = share(p.width, p.rows_width);
  const uint32_t inner = up_step(p.token_dim), pitch = row_bytes(inner), images = pass.images.count;
  const bf16* column = first_column(sh, images, stride);
  for (uint32_t tile = 0; tile * kTile < mine.count; tile++) {
    const Lane lane = lane_of(umin(kTile, mine.count - tile * kTile), pitch);
    float even[4] = {}, odd[4] = {};
    for (uint32_t k = 0; k < inner; k += kSegment) {
      Weights weights;
      Columns columns;
      load_weights(weights, reinterpret_cast<const uint8_t*>(sh.w_in) + tile * kTile * pitch + 2 * k, lane, inner - k);
      load_columns(columns, column + k, inner - k);
      multiply(even, odd, weights, columns);
    }
    put_partial(sh, tiles, even, odd, images);
  }
}

/* What an output needs beside the sums. */
struct Held {
  bf16 bias, gate[2];
};
/* The sender's part of a product: emit(tile, row of all, output, sum + bias of the first column, of the second, held)
 * by the whole warp. What held = prefetch(row of all, output) asks for is under way while the others multiply. */
template <class Prefetch, class Emit>
DEV void take_sums(const Memory& sh, uint32_t& tiles, Share rows, uint32_t columns, Prefetch prefetch, Emit emit) {
  for (uint32_t tile = 0; tile * kTile < rows.count; tile++, tiles++) {
    const uint32_t half = tiles & 1, parity = tiles >> 1 & 1, in_tile = umin(kTile, rows.count - tile * kTile);
    for (uint32_t round = 0; round * kGroups < (columns + 1) / 2 * kTileWords; round++) {
      const Output o = output_of(in_tile, columns, round);
      const uint32_t row = rows.first + tile * kTile + o.row;
      Held held = {};
      if (o.exists) held = prefetch(row, o);
      mbar_wait(&sh.partial_full[half], parity);
      v2u part[kWarps];
#pragma unroll
      for (uint32_t w = 0; w < kWarps; w++)
        part[w] = ld_v2(sh.partial + ((half * kWarps + w) * kTile + o.row) * kColumns + o.column);
      float first = as_f32(part[0].x), second = as_f32(part[0].y);
#pragma unroll
      for (uint32_t w = 1; w < kWarps; w++) first += as_f32(part[w].x), second += as_f32(part[w].y);
      const float bias = to_f32(held.bias);
      emit(tile, row, o, first + bias, second + bias, held);
    }
    warp_sync();
    if (lane_id() == 0) mbar_arrive(&sh.partial_empty[half]);
  }
}

/* The warp that sums and sends what the consumers multiply. */
DEV void send_all(const FlowChainParams& p, const Memory& sh, Exchange ex) {
  const uint32_t width = p.width;
  uint32_t tiles = 0;
  for (uint32_t first = 0; first < p.images; first += p.images_at_once) {
    const Pass pass = pass_at(p, first);
    const auto bias_of = [&](const bf16* bias) {
      return [=](uint32_t row, const Output&) { return Held{bias[row], {}}; };
    };
    for (uint32_t n = 0; n < p.steps; n++) {
      take_sums(sh, tiles, share(width, p.rows_width), pass.images.count, bias_of(ptr<const bf16>(p.b_in)),
                [&](uint32_t tile, uint32_t, const Output& o, float one, float two, const Held&) {
                  send_floats(ex, sh.of_width, tile, o, one, two);
                  float* own = sh.own + (tile * kTile + o.row) * kColumns;
                  for (uint32_t s = o.column; o.exists && s < pass.count; s += pass.images.count) {
                    own[s] = one;
                    if (o.second) own[s + 1] = two;
                  }
                });
      next_exchange(p, ex);
      for (uint32_t j = 0; j <= p.blocks; j++) {
        const bool last = j == p.blocks;
        const Product up = product_at(p, n, 2 * j);
        take_sums(sh, tiles, up.sizes.rows, pass.count, bias_of(up.bias),
                  [&](uint32_t tile, uint32_t, const Output& o, float one, float two, const Held&) {
                    if (last)
                      send_pairs(ex, sh.of_token, tile, o, one, two);
                    else
                      send_pairs(ex, sh.of_mlp, tile, o, silu<bf16>(one), silu<bf16>(two));
                  });
        next_exchange(p, ex);
        if (last) break;
        const Product down = product_at(p, n, 2 * j + 1);
        const bool keeps = n + 1 == p.steps && j + 1 == p.blocks;
        take_sums(
            sh, tiles, down.sizes.rows, pass.count,
            [&](uint32_t row, const Output& o) {
              const auto gate = [&](uint32_t s) { return down.gate[sequence_of(p, pass, s) * mod_width(p) + row]; };
              return Held{down.bias[row], {gate(o.column), gate(o.second ? o.column + 1 : o.column)}};
            },
            [&](uint32_t tile, uint32_t row, const Output& o, float one, float two, const Held& held) {
              float* own = sh.own + (tile * kTile + o.row) * kColumns + o.column;
              const float before[2] = {o.exists ? own[0] : 0.0f, o.exists && o.second ? own[1] : 0.0f};
              const float now[2] = {f_fma(to_f32(held.gate[0]), one, before[0]),
                                    f_fma(to_f32(held.gate[1]), two, before[1])};
              send_floats(ex, sh.of_width, tile, o, now[0], now[1]);
#pragma unroll
              for (uint32_t r = 0; r < 2; r++) {
                if (!o.exists || (r == 1 && !o.second)) continue;
                const size_t sequence = sequence_of(p, pass, o.column + r);
                own[r] = now[r];
                if (keeps) ptr<float>(p.h)[sequence * width + row] = now[r];
              }
            });
        next_exchange(p, ex);
      }
    }
  }
}

/* x_next = w_next token + b_next: this block's rows, for all branches. A warp asks for all of its rows at once. */
DEV void project_token(const FlowChainParams& p, const Memory& sh, const Pass& pass) {
  constexpr uint32_t kRows = 5; /* all of a 14B with 128 blocks */
  const Share rows = share(p.hidden, p.rows_hidden);
  const bf16* w = ptr<const bf16>(p.w_next) + static_cast<size_t>(rows.first) * p.token_dim;
  for (uint32_t b = 0; b < pass.images.count; b++)
    for (uint32_t r0 = warp_id(); r0 < rows.count; r0 += kRows * kWarps) {
      float sums[kRows] = {};
      for (uint32_t k = lane_id(); k < p.token_dim; k += 32) {
        const float x = sh.x[b * p.token_dim + k];
#pragma unroll
        for (uint32_t i = 0; i < kRows; i++) {
          const uint32_t r = r0 + i * kWarps;
          if (r < rows.count) sums[i] = f_fma(to_f32(w[static_cast<size_t>(r) * p.token_dim + k]), x, sums[i]);
        }
      }
      warp_sum_all(sums);
#pragma unroll
      for (uint32_t i = 0; i < kRows; i++) {
        const uint32_t row = rows.first + r0 + i * kWarps;
        if (r0 + i * kWarps >= rows.count || lane_id() >= p.branches) continue;
        const size_t sequence = static_cast<size_t>(lane_id()) * p.images + pass.images.first + b;
        ptr<float>(p.x_next)[sequence * p.hidden + row] = sums[i] + to_f32(ptr<const bf16>(p.b_next)[row]);
      }
    }
}

DEV void consume(const FlowChainParams& p, const Memory& sh, Exchange& ex) {
  const uint32_t width = p.width;
  const auto token = [&] { return ptr<const GenerationState>(p.state)->token; };
  const uint32_t stride = staged_bytes(p) / 2;
  Cursor at = {0, 0, 0};
  uint32_t tiles = 0, vectors = 0;
  for (uint32_t first = 0; first < p.images; first += p.images_at_once) {
    const Pass pass = pass_at(p, first);
    const Images images = pass.images;
    const uint32_t pairs = (pass.count + 1) / 2;
    const auto velocity = [&](uint32_t r, uint32_t i) { return sh.v[r * images.count * p.token_dim + i]; };
    const auto draw = [&](uint32_t i) { return sh.draw[i]; };
    Ahead ahead;
    ahead.n = ahead.i = ahead.tile = 0;
    fetch_ahead(p, sh, at, ahead);
    for (uint32_t n = 0; n < p.steps; n++) {
      set_state(p, sh.x, images, n, draws_of(p, token()));
      stage_state(p, sh, images, stride);
      consumers_sync();
      project_state(p, sh, tiles, pass, stride);
      receive(p, ex, sh.of_width, images.count, [&](uint32_t b, uint32_t row, uint32_t rows, const v4u& word) {
#pragma unroll 1
        for (uint32_t s = b; s < pass.count; s += images.count) take_floats(sh.h + s * width + row, rows, word);
      });
      for (uint32_t j = 0; j <= p.blocks; j++) {
        const bool last = j == p.blocks;
        stage_normed(sh, pass, width, !last, stride, vectors);
        product(p, sh, at, tiles, pass, stride, last ? n + 1 : n, last ? 0 : 2 * j + 1, ahead);
        if (last) break;
        receive(p, ex, sh.of_mlp, pairs, [&](uint32_t pair, uint32_t row, uint32_t rows, const v4u& word) {
          bf16* to = sh.staged + 2 * pair * stride + row;
          take_pairs(rows, 2 * pair + 1 < pass.count, word,
                     [&](uint32_t e, uint32_t r, bf16 value) { to[r * stride + e] = value; });
        });
        product(p, sh, at, tiles, pass, stride, n, 2 * j + 2, ahead);
        receive(p, ex, sh.of_width, pass.count, [&](uint32_t s, uint32_t row, uint32_t rows, const v4u& word) {
          take_floats(sh.h + s * width + row, rows, word);
        });
      }
      const Guidance guidance = guidance_of(p, token());
      const SolverStep step = ptr<const SolverStep>(p.steps_table)[n];
      const auto draws = draws_of(p, token());
#pragma unroll 1
      for (uint32_t i = tid_x(); i < images.count * p.token_dim; i += kConsumers)
        sh.draw[i] = draw_of(p, images, n, draws, i);
      receive(p, ex, sh.of_token, pairs, [&](uint32_t pair, uint32_t row, uint32_t rows, const v4u& word) {
        float* to = sh.v + 2 * pair * p.token_dim + row;
        take_pairs(rows, 2 * pair + 1 < pass.count, word,
                   [&](uint32_t e, uint32_t r, bf16 value) { to[r * p.token_dim + e] = to_f32(value); });
      });
      step_solver(p, sh.x, images, n, guidance, step, velocity, draw);
    }
    finish_token<bf16>(p, sh.x, images, token());
    consumers_sync();
    project_token(p, sh, pass);
    consumers_sync();
  }
}

/* Grid: cooperative, at most one block per SM. Block: eight warps that compute, one that copies, one that sends. */
KERNEL(flow_ring_bf16, FlowChainParams, kThreads, 1) {
  SMEM_DYN(uint8_t, dynamic);
  const uint32_t sequences = p.images_at_once * p.branches, w_in_bytes = row_bytes(up_step(p.token_dim));
  uint8_t* next = dynamic;
  const auto take = [&](uint32_t bytes) {
    uint8_t* at = next;
    next += up16(bytes);
    return at;
  };
  Memory sh;
  sh.slots = take((p.resident + p.stages) * p.stage_bytes);
  sh.full = reinterpret_cast<uint64_t*>(take((p.resident + p.stages) * 8));
  sh.empty = reinterpret_cast<uint64_t*>(take(p.stages * 8));
  sh.vectors_full = reinterpret_cast<uint64_t*>(take(16));
  sh.vectors_empty = sh.vectors_full + 1;
  sh.partial_full = reinterpret_cast<uint64_t*>(take(32));
  sh.partial_empty = sh.partial_full + 2;
  sh.x = reinterpret_cast<float*>(take(p.images_at_once * p.token_dim * 4));
  sh.draw = reinterpret_cast<float*>(take(p.images_at_once * p.token_dim * 4));
  sh.v = reinterpret_cast<float*>(take(sequences * p.token_dim * 4));
  sh.h = reinterpret_cast<float*>(take(sequences * p.width * 4));
  sh.vectors = reinterpret_cast<bf16*>(take((sequences + 1) * p.width * 4));
  sh.staged = reinterpret_cast<bf16*>(take(sequences * staged_bytes(p)));
  sh.w_in = reinterpret_cast<bf16*>(take(p.rows_width * w_in_bytes));
  sh.partial = reinterpret_cast<float*>(take(2 * kWarps * kTile * kColumns * 4));
  sh.stats = reinterpret_cast<float*>(take(kColumns * kWarps * 2 * 4));
  sh.own = reinterpret_cast<float*>(take(p.rows_width * kColumns * 4));
  uint32_t* rows_of = reinterpret_cast<uint32_t*>(next);
  sh.of_width = words_for(p.width, p.rows_width, rows_of);
  sh.of_mlp = words_for(p.mlp_width, p.rows_mlp, rows_of);
  sh.of_token = words_for(p.token_dim, p.rows_token, rows_of);

  if (tid_x() == 0) {
    for (uint32_t i = 0; i < p.resident + p.stages; i++) mbar_init(&sh.full[i], 1);
    for (uint32_t i = 0; i < p.stages; i++) mbar_init(&sh.empty[i], kWarps);
    mbar_init(sh.vectors_full, 1);
    mbar_init(sh.vectors_empty, 1);
    for (uint32_t i = 0; i < 2; i++) mbar_init(&sh.partial_full[i], kWarps), mbar_init(&sh.partial_empty[i], 1);
    mbar_init_fence();
  }
  block_sync();
  /* The first copies wait for nothing else. */
  if (warp_id() == kWarps) {
    produce(p, sh);
    return;
  }
  constexpr uint32_t kOthers = kThreads - 32;
  const uint32_t other = tid_x() < kConsumers ? tid_x() : tid_x() - 32;
  list_rows(sh.of_width, p.width, p.rows_width, other, kOthers);
  list_rows(sh.of_mlp, p.mlp_width, p.rows_mlp, other, kOthers);
  list_rows(sh.of_token, p.token_dim, p.rows_token, other, kOthers);
  const Share rows = share(p.width, p.rows_width);
  for (uint32_t i = other; i < rows.count * up_step(p.token_dim); i += kOthers) {
    const uint32_t r = i / up_step(p.token_dim), k = i % up_step(p.token_dim);
    const bf16* from = ptr<const bf16>(p.w_in) + static_cast<size_t>(rows.first + r) * p.token_dim + k;
    sh.w_in[r * w_in_bytes / 2 + k] = k < p.token_dim ? *from : bf16{0};
  }
  uint64_t* made = &ptr<FlowExchange>(p.exchange)->made;
  Exchange ex = {ptr<v4u>(p.exchange + sizeof(FlowExchange)), static_cast<uint32_t>(poll_relaxed(made)) + 1, true};
  bar_sync(2, kOthers);
  if (warp_id() == kWarps + 1) {
    send_all(p, sh, ex);
    return;
  }
  consume(p, sh, ex);
  /* No block gets here before all have sent something, and so have read `made`. */
  if (bid_x() == 0 && tid_x() == 0) st_relaxed(made, ex.epoch - 1);
}
