/* The words between the blocks of flow_ring.cu.
 *
 * A 128-bit word carries an epoch and three values, so that a plain relaxed store publishes it and a polled load takes
 * it, without fence or flag. Three buffers in turn: who writes exchange i + 3 has read i + 2, whose words come from
 * blocks that had read i + 1 and so had done with i; a block without rows of a product (at most every other exchange
 * has such) can be one further behind. h goes as float, three rows of a sequence to a word; a and v_raw, which are E,
 * three rows of two sequences. Every block takes every word, 16 and 8 KB for two sequences: each look at all of them is
 * L2 traffic like a third of the weights, so that bytes count here too. Epochs go on from launch to launch, modulo 2^32
 * - 1 and never 0. Who waits longer than spin_limit looks reports the token in GenerationState.stalled and waits no
 * more: the launch ends with a useless token instead of hanging.
 */
#pragma once
#include "flow_solver.cuh"

static constexpr uint32_t kConsumers = 32 * kWarps;
static constexpr uint32_t kTile = 16;  /* rows of an mma */
static constexpr uint32_t kTriple = 3; /* rows of a word */
static constexpr uint32_t kTileWords = (kTile + kTriple - 1) / kTriple;
static constexpr uint32_t kGroups = 32 / kTriple; /* words that a warp makes at once */
static constexpr uint32_t kPolls = 2; /* words of each of two sequences or pairs that a thread has in flight */
static constexpr uint32_t kEpochs = 0xffffffffu;

/* A block's rows of a product. */
struct Share {
  uint32_t first, count;
};
DEV Share share(uint32_t rows, uint32_t per_block) {
  const uint32_t first = umin(bid_x() * per_block, rows);
  return {first, umin(per_block, rows - first)};
}

/* Words for r rows of a block: a tile's rows in threes. */
DEV uint32_t words_of(uint32_t r) { return r / kTile * kTileWords + (r % kTile + kTriple - 1) / kTriple; }
/* Where the rows of a product are in words: those of the blocks in turn, all of them once per sequence or pair. */
struct Words {
  uint32_t of_block, of_all;
  bool whole;     /* every word has three rows */
  uint32_t* rows; /* [of_all] in shared memory: of each word its first row, and how many above bit 24 */
};
DEV Words words_for(uint32_t rows, uint32_t per_block, uint32_t*& next) {
  const uint32_t of_block = words_of(per_block), of_all = rows / per_block * of_block + words_of(rows % per_block);
  const bool whole = rows % per_block == 0 && per_block % kTriple == 0 && per_block < kTile;
  const Words w = {of_block, of_all, whole, next};
  next += of_all;
  return w;
}
/* Word i of a tile of this block, of the group'th sequence or pair. */
DEV uint32_t word_at(const Words& w, uint32_t group, uint32_t tile, uint32_t i) {
  return group * w.of_all + bid_x() * w.of_block + tile * kTileWords + i;
}
/* Fills in `rows`, as the thread'th of `threads`, whose barrier follows. */
DEV void list_rows(const Words& w, uint32_t rows, uint32_t per_block, uint32_t thread, uint32_t threads) {
  for (uint32_t i = thread; i < w.of_all; i += threads) {
    const uint32_t local = i % w.of_block, tile = local / kTileWords;
    const uint32_t first = tile * kTile + local % kTileWords * kTriple, row = i / w.of_block * per_block + first;
    const uint32_t end = umin(rows - row, umin(per_block, (tile + 1) * kTile) - first);
    w.rows[i] = umin(kTriple, end) << 24 | row;
  }
}

DEV void consumers_sync() { bar_sync(1, kConsumers); }

/* The words between the blocks. */
struct Exchange {
  v4u* words;     /* of the buffer in use */
  uint32_t epoch; /* of this exchange */
  bool waits;     /* false once this thread has waited in vain */
};
DEV void next_exchange(const FlowChainParams& p, Exchange& x) {
  x.epoch = x.epoch == kEpochs ? 1 : x.epoch + 1;
  v4u* first = ptr<v4u>(p.exchange + sizeof(FlowExchange));
  x.words = x.words == first + 2 * static_cast<size_t>(p.exchange_words) ? first : x.words + p.exchange_words;
}
/* take(group, row, rows, word) for the words of all blocks, `groups` times `words`; on to the next exchange. All
 * consumers call it; what they took is there for all when it returns. */
template <class Take>
DEV void receive(const FlowChainParams& p, Exchange& x, const Words& words, uint32_t groups, Take take) {
  const uint32_t wanted = x.epoch;
  for (uint32_t first = 0; first < words.of_all; first += kConsumers * kPolls) {
    const uint32_t base = first + tid_x();
    uint32_t rows[kPolls];
#pragma unroll
    for (uint32_t j = 0; j < kPolls; j++)
      rows[j] = base + j * kConsumers < words.of_all ? words.rows[base + j * kConsumers] : 0;
    for (uint32_t g = 0; g < groups; g += 2) {
      v4u word[kPolls][2];
      bool missing = true;
#pragma unroll
      for (uint32_t j = 0; j < kPolls; j++) word[j][0] = word[j][1] = v4u{0, 0, 0, 0};
      const v4u* from = x.words + g * words.of_all + base;
      for (uint32_t looks = 0; missing && x.waits; looks++) {
        missing = false;
#pragma unroll
        for (uint32_t j = 0; j < kPolls; j++)
#pragma unroll
          for (uint32_t r = 0; r < 2; r++)
            if (rows[j] != 0 && g + r < groups && word[j][r].x != wanted)
              word[j][r] = poll_relaxed_v4(from + r * words.of_all + j * kConsumers);
#pragma unroll
        for (uint32_t j = 0; j < kPolls; j++)
#pragma unroll
          for (uint32_t r = 0; r < 2; r++)
            if (rows[j] != 0 && g + r < groups && word[j][r].x != wanted) missing = true;
        if (missing && looks >= p.spin_limit) {
          GenerationState* state = ptr<GenerationState>(p.state);
          atom_max_relaxed(&state->stalled, 1 + state->token);
          x.waits = false;
        }
      }
#pragma unroll
      for (uint32_t j = 0; j < kPolls; j++)
#pragma unroll
        for (uint32_t r = 0; r < 2; r++)
          if (rows[j] == 0 || g + r >= groups)
            continue;
          else if (words.whole)
            take(g + r, rows[j] & 0xffffff, kTriple, word[j][r]);
          else
            take(g + r, rows[j] & 0xffffff, rows[j] >> 24, word[j][r]);
    }
  }
  next_exchange(p, x);
  consumers_sync();
}
/* Stores up to three rows of floats of one sequence. */
DEV void take_floats(float* to, uint32_t rows, const v4u& word) {
  to[0] = as_f32(word.y);
  if (rows > 1) to[1] = as_f32(word.z);
  if (rows > 2) to[2] = as_f32(word.w);
}
/* take(row of the word, first or second sequence, value) for up to three rows of a pair. */
template <class Take>
DEV void take_pairs(uint32_t rows, bool second, const v4u& word, Take take) {
  const uint32_t value[kTriple] = {word.y, word.z, word.w};
#pragma unroll
  for (uint32_t e = 0; e < kTriple; e++) {
    if (e >= rows) continue;
    take(e, 0, bf16{static_cast<uint16_t>(value[e])});
    if (second) take(e, 1, bf16{static_cast<uint16_t>(value[e] >> 16)});
  }
}

/* The output of a tile's product that a lane of the sender sums: a row of two columns. Three lanes make a word. */
struct Output {
  uint32_t row;    /* of the tile */
  uint32_t column; /* the first of two */
  uint32_t word;   /* of the tile */
  uint32_t part;   /* of the word */
  bool exists;     /* the row and the first column */
  bool begins;     /* the word's first row and the first column */
  bool second;     /* the other column as well */
};
/* In round `round` of those that a tile takes. */
DEV Output output_of(uint32_t rows, uint32_t columns, uint32_t round) {
  const uint32_t group = round * kGroups + lane_id() / kTriple, part = lane_id() % kTriple;
  const uint32_t word = group % kTileWords, column = group / kTileWords * 2, row = word * kTriple + part;
  const bool mine = lane_id() < kGroups * kTriple && column < columns;
  const bool exists = mine && row < rows, begins = mine && word * kTriple < rows;
  return {umin(row, kTile - 1), mine ? column : 0, word, part, exists, begins, column + 1 < columns};
}

/* Sends what three lanes hold: E of two columns each. Whole warps. */
DEV void send_pairs(const Exchange& x, const Words& words, uint32_t tile, const Output& o, float first, float second) {
  const uint32_t mine = o.exists ? pack_bf16(first, o.second ? second : 0.0f) : 0;
  const uint32_t next = shfl_down(mine, 1), last = shfl_down(mine, 2);
  if (o.begins && o.part == 0)
    st_relaxed_v4(x.words + word_at(words, o.column / 2, tile, o.word), v4u{x.epoch, mine, next, last});
}
/* The same as floats: a word for each column, of which the second lane sends the other. */
DEV void send_floats(const Exchange& x, const Words& words, uint32_t tile, const Output& o, float first, float second) {
  const float first1 = shfl_down(first, 1), first2 = shfl_down(first, 2);
  const float second0 = shfl_up(second, 1), second2 = shfl_down(second, 1);
  if (!o.begins || o.part > (o.second ? 1 : 0)) return;
  const v4u values = o.part == 0 ? v4u{x.epoch, as_u32(first), as_u32(first1), as_u32(first2)}
                                 : v4u{x.epoch, as_u32(second0), as_u32(second), as_u32(second2)};
  st_relaxed_v4(x.words + word_at(words, o.column + o.part, tile, o.word), values);
}
