/* The parameter struct of every op: the only header that Rust mirrors (src/ops/params.rs, by bindgen).
 *
 * Plain C, fixed widths, 64-bit fields first, explicit padding. Device pointers are uint64_t; 0 means "absent"
 * where a comment says optional. Every struct is passed by value as the kernel's only argument.
 *
 * Axis letters: M rows (prompt tokens, or one per sequence while decoding), S sequences (images x branches),
 *   B images, R guidance branches, D hidden_size, Q query heads, G key/value heads, d head_dim, I
 *   intermediate_size, V vocabulary, T image tokens, N network evaluations, F flow-head width, H flow-head MLP
 *   width, L flow-head blocks, K token_dim (latent_channels * patch^2), P pixels, C channels.
 * Element type E is float or bf16, chosen by the kernel's symbol; everything else is named.
 * Sequences are branch-major: sequence = branch * B + image.
 */
#pragma once
#include <stdint.h>

/* Packed weights that a later launch reads, to be asked into L2 while this one ends (stream.cuh). */
typedef struct {
  uint64_t w;     /* [steps, 1024 bytes], 0: none */
  uint32_t steps; /* in all */
  uint32_t first; /* of every warp's share: those before it the launch asks for itself by then */
} NextWeights;

/* Counter of a grid-wide barrier, alone in its cache line. Zeroed once, never reset. */
typedef struct {
  uint32_t count;
  uint32_t pad[31];
} GridBarrier;

/* What changes from token to token; lives in device memory so that replayed nodes never change. */
typedef struct {
  uint32_t token;     /* index of the image token being made */
  uint32_t nonfinite; /* 0, or 1 + index of the first token that came out non-finite */
  uint32_t stalled;   /* 0, or 1 + index of a token whose blocks waited in vain for each other */
  uint32_t pad[29];
} GenerationState;

/* x[m, :] = table[ids[m], :], or source[source_row[m], :] where the row is an image token's */
typedef struct {
  uint64_t ids;        /* [M] uint32, each below vocab */
  uint64_t table;      /* [V, D] E */
  uint64_t source;     /* [source_rows, D] float, optional: projected image tokens */
  uint64_t source_row; /* [M] uint32, with source: below source_rows, or 0xffffffff for a row of the table */
  uint64_t x;          /* [M, D] float, written */
  uint32_t rows, hidden, vocab, source_rows;
} EmbedParams;

/* y[s, :] = x[index[s], :] */
typedef struct {
  uint64_t x;            /* [M, D] float */
  uint64_t index;        /* [S] uint32, each below M */
  uint64_t y;            /* [S, D] float, written */
  uint32_t rows, hidden; /* rows = S */
} GatherRowsParams;

/* sequence s gets keys, values and last row of its prompt from sequence origin[s], unless that is s itself */
typedef struct {
  uint64_t keys;     /* [layers, S, G, capacity, d] E, slots below length[s] read or written */
  uint64_t values;   /* [layers, S, G, capacity, d] E, slots below length[s] read or written */
  uint64_t prompt_x; /* [S, D] float, read and written */
  uint64_t origin;   /* [S] uint32, each below S and an origin of its own */
  uint64_t length;   /* [S] uint32: slots that the prompt takes, at most capacity */
  uint32_t layers, sequences, heads_kv, capacity, hidden;
  uint32_t slot_bytes; /* of d elements, a multiple of 4 */
} RepeatPromptsParams;

/* h[m, :] = E(E(x[m, :] / rms(x[m, :])) * norm_w) */
typedef struct {
  uint64_t x;      /* [M, D] float: residual stream */
  uint64_t norm_w; /* [D] E */
  uint64_t h;      /* [M, D] E, written */
  uint32_t rows, hidden;
  float eps;
  uint32_t pad;
} NormRowsParams;

/* h = E(rms(x)) * norm_w; (q, k, v) = w h + bias; q, k rotated; k, v into the cache */
typedef struct {
  uint64_t x;           /* [M, D] float: residual stream; mma: [M, D] E, h */
  uint64_t norm_w;      /* [D] E */
  uint64_t w;           /* [(Q+2G)*d, D] E: q rows, k rows, v rows; packed for stream, ring and mma */
  uint64_t bias;        /* [(Q+2G)*d] E, optional */
  uint64_t rope;        /* [positions, d] float: d/2 cosines, then d/2 sines, already rounded to E */
  uint64_t row_seq;     /* [M] uint32: sequence of the row */
  uint64_t row_pos;     /* [M] uint32: cache slot of the row (real tokens from 0), below capacity */
  uint64_t rope_offset; /* [S] uint32: added to the slot for the rotation angle; the sum is below positions */
  uint64_t q;           /* [M, Q, d] E, written */
  uint64_t k_cache;     /* [S, G, capacity, d] E, slot row_pos written */
  uint64_t v_cache;     /* [S, G, capacity, d] E, slot row_pos written */
  uint64_t partial;     /* [groups of 8 rows, blocks, 2, 128] float: sums of tiles that blocks share; stream, ring */
  uint64_t arrivals;    /* [groups of 8 rows, blocks] uint32, zero before and after every launch; stream, ring */
  NextWeights next;
  uint32_t rows, hidden, heads_q, heads_kv, head_dim, capacity, positions;
  float eps;
} QkvParams;

/* out[m, h, :] = softmax(scale * q[m, h, :] . k[0..=row_pos[m]]) v; query head h reads kv head h / (Q/G) */
typedef struct {
  uint64_t q;        /* [M, Q, d] E */
  uint64_t k_cache;  /* [S, G, capacity, d] E */
  uint64_t v_cache;  /* [S, G, capacity, d] E */
  uint64_t row_seq;  /* [M] uint32 */
  uint64_t row_pos;  /* [M] uint32: the row sees slots 0..=row_pos */
  uint64_t out;      /* [M, Q, d] E, written */
  uint64_t partial;  /* [M, Q, splits, d + 2] float in the variant's order: sum, max, denominator; splits > 1 */
  uint64_t arrivals; /* [M, G] uint32, zero before and after every launch; splits > 1 */
  uint64_t prefetch; /* weights of the next op, asked into L2 while the cache is awaited (splitkv_mma) */
  uint32_t rows, heads_q, heads_kv, head_dim, capacity, splits;
  float scale;
  uint32_t prefetch_bytes; /* 0: none */
} AttentionParams;

/* x[m, :] += w in[m, :] + bias: the output projection and the MLP's down projection */
typedef struct {
  uint64_t in;       /* [M, K] E */
  uint64_t w;        /* [D, K] E; packed for stream, ring and mma */
  uint64_t bias;     /* [D] E, optional */
  uint64_t x;        /* [M, D] float, read and written */
  uint64_t partial;  /* [groups of 8 rows, blocks, 2, 128] float: sums of tiles that blocks share; stream, ring */
  uint64_t arrivals; /* [groups of 8 rows, blocks] uint32, zero before and after every launch; stream, ring */
  NextWeights next;
  uint32_t rows, hidden, inner, pad; /* inner = K */
} ProjectParams;

/* act = silu(w_gate h + b_gate) * (w_up h + b_up), h = E(rms(x)) * norm_w */
typedef struct {
  uint64_t x;         /* [M, D] float: residual stream; mma: [M, D] E, h */
  uint64_t norm_w;    /* [D] E */
  uint64_t w_gate;    /* [I, D] E; for stream, ring and mma both weights, packed */
  uint64_t w_up;      /* [I, D] E */
  uint64_t gate_bias; /* [I] E, optional */
  uint64_t up_bias;   /* [I] E, optional */
  uint64_t act;       /* [M, I] E, written */
  uint64_t partial;   /* [groups of 8 rows, blocks, 2, 128] float: sums of tiles that blocks share; stream, ring */
  uint64_t arrivals;  /* [groups of 8 rows, blocks] uint32, zero before and after every launch; stream, ring */
  NextWeights next;
  uint32_t rows, hidden, intermediate;
  float eps;
} GateUpParams;

/* h = E(rms(x)) * norm_w; c = w E(h + pos_embed[token]) + bias: final norm and image_out_projector */
typedef struct {
  uint64_t x;         /* [S, D] float */
  uint64_t norm_w;    /* [D] E */
  uint64_t pos_embed; /* [pos_rows, D] E, optional: row state.token is added */
  uint64_t state;     /* GenerationState; read only with pos_embed */
  uint64_t w;         /* [D, D] E; packed for stream, ring and mma */
  uint64_t bias;      /* [D] E */
  uint64_t norm_out;  /* [S, D] E, written: h, before the position row is added; optional */
  uint64_t c;         /* [S, D] E, written */
  uint64_t partial;   /* [groups of 8 rows, blocks, 2, 128] float: sums of tiles that blocks share; stream, ring */
  uint64_t arrivals;  /* [groups of 8 rows, blocks] uint32, zero before and after every launch; stream, ring */
  NextWeights next;
  uint32_t rows, hidden, pos_rows;
  float eps;
} OutProjParams;

/* h = E(rms(x)) * norm_w; logits = w h: final norm and lm_head */
typedef struct {
  uint64_t x;        /* [S, D] float */
  uint64_t norm_w;   /* [D] E */
  uint64_t w;        /* [V, D] E; packed for stream, ring and mma */
  uint64_t norm_out; /* [S, D] E, written: h; optional */
  uint64_t logits;   /* [S, V] float, written: rounded to E, then widened */
  uint64_t partial;  /* [groups of 8 rows, blocks, 2, 128] float: sums of tiles that blocks share; stream, ring */
  uint64_t arrivals; /* [groups of 8 rows, blocks] uint32, zero before and after every launch; stream, ring */
  uint32_t rows, hidden, vocab;
  float eps;
} LmHeadParams;

/* y = act(w x + bias) */
typedef struct {
  uint64_t x;        /* [M, K] E */
  uint64_t w;        /* [O, K] E; packed for stream, ring and mma */
  uint64_t bias;     /* [O] E, optional */
  uint64_t y;        /* [M, O] E, or float with out_f32, written */
  uint64_t partial;  /* [groups of 8 rows, blocks, 2, 128] float: sums of tiles that blocks share; stream, ring */
  uint64_t arrivals; /* [groups of 8 rows, blocks] uint32, zero before and after every launch; stream, ring */
  uint32_t rows, outputs, inner; /* inner = K */
  uint32_t silu;                 /* 0 or 1 */
  uint32_t out_f32;              /* 0 or 1 */
  uint32_t pad;
} LinearParams;

/* mod[n, s, :] = w silu(time[n, :] + cond[s, :]) + bias, for all evaluations n and sequences s at once */
typedef struct {
  uint64_t time; /* [N, F] E: time_embed(t_n) */
  uint64_t cond; /* [S, F] E: cond_embed(c_s) */
  uint64_t w;    /* [O, F] E, O = (3L + 2) F: per block shift, scale, gate; then final shift, scale */
  uint64_t bias; /* [O] E */
  uint64_t mod;  /* [N, S, O] E, written */
  uint32_t steps, rows, width, outputs; /* N, S, F, O */
} FlowModulationParams;

/* One evaluation's place in the solver: x <- keep * x + velocity * v + noise * draw[k + 1] */
typedef struct {
  float keep, velocity, noise;
  uint32_t pad;
} SolverStep;

/* Head of the memory through which the blocks of one launch exchange values; zeroed once, never reset. */
typedef struct {
  uint64_t made; /* exchanges made so far, modulo 2^32 - 1: the epoch before the next one's */
  uint64_t pad[15];
} FlowExchange;

/* The whole sampler of one image token: N evaluations of the flow head, guidance, solver, feedback */
typedef struct {
  uint64_t mod;         /* [N, S, (3L + 2) F] E */
  uint64_t w_in;        /* [F, K] E: input_proj */
  uint64_t b_in;        /* [F] E */
  uint64_t ln_w;        /* [L, F] E: in_ln */
  uint64_t ln_b;        /* [L, F] E */
  uint64_t w0;          /* [L, H, F] E: mlp.0 */
  uint64_t b0;          /* [L, H] E */
  uint64_t w2;          /* [L, F, H] E: mlp.2 */
  uint64_t b2;          /* [L, F] E */
  uint64_t w_out;       /* [K, F] E: final_layer.linear */
  uint64_t b_out;       /* [K] E */
  uint64_t steps_table; /* [N] SolverStep */
  uint64_t guidance;    /* [T, 2] float: cfg, cfg_img for every token */
  uint64_t draws;       /* [slots, draws, B, K] float: initial noise, then one per solver step that takes one */
  uint64_t forced_x;    /* [N, B, K] float, optional: replaces x before evaluation n (teacher forcing) */
  uint64_t state;       /* GenerationState: token read, nonfinite written */
  uint64_t barrier;     /* GridBarrier */
  uint64_t h;           /* [S, F] float, scratch; at the end the residual of the last evaluation */
  uint64_t a;           /* [S, H] float, scratch */
  uint64_t v_raw;       /* [S, K] float, scratch: velocity of every sequence, rounded to E */
  uint64_t trace_v_raw; /* [N, S, K] float, optional, written */
  uint64_t trace_v;     /* [N, B, K] float, optional, written: after guidance */
  uint64_t trace_x;     /* [N, B, K] float, optional, written: x after step n */
  uint64_t sampled;     /* [B, K] float, optional, written: the token before use_norm, rounded to E */
  uint64_t tokens;      /* [B, T, K] E: row state.token written */
  uint64_t w_next;      /* [D, K] E: image_in_projector */
  uint64_t b_next;      /* [D] E */
  uint64_t x_next;      /* [S, D] float, written: input of the next transformer step */
  uint64_t exchange;    /* FlowExchange, then [3, exchange_words] of 128 bits: an epoch and three values; not plain */
  uint32_t steps, images, branches, width, mlp_width, blocks, token_dim, hidden, tokens_total;
  uint32_t draws_per_slot; /* draws stored per token */
  uint32_t draw_slots;     /* T when draws of every token are recorded, 1 when randn refills one slot */
  uint32_t use_norm;       /* 0 or 1: LayerNorm over the K values of the token */
  uint32_t rescale;        /* 0 or 1: multiply v by clamp(|v_cond| / (|v| + 1e-6), 0, 1) */
  /* ring and resident only: */
  uint32_t rows_width, rows_mlp, rows_token, rows_hidden; /* a block's share of F, H, K and D */
  uint32_t images_at_once;                                /* images of a pass; times R at most 8 */
  uint32_t exchange_words;                                /* of one of the three buffers */
  uint32_t stages;                                        /* of the ring */
  uint32_t stage_bytes;                                   /* of a stage, a multiple of 16 */
  uint32_t resident;                                      /* weight segments that stay in shared memory */
  uint32_t pinned;                                        /* segments after them that are to stay in L2 */
  uint32_t spin_limit;                                    /* looks at a word before the block gives up */
} FlowChainParams;

/* Standard normal draws of one token, as torch.randn on a CUDA device gives them (ecosystem: Philox4x32-10) */
typedef struct {
  uint64_t state; /* GenerationState: token read */
  uint64_t draws; /* [draws, B, K] float, written */
  uint64_t seed;
  uint64_t base_offset; /* torch generator offset before token 0, in 32-bit outputs, a multiple of 4 */
  uint32_t draws_per_token, images, first_image, token_dim;
  uint32_t round_bf16; /* 0 or 1: draws are rounded to bf16, as torch makes them in the model's dtype */
  uint32_t pad;
} RandnParams;

/* state.token += 1; row_pos[s] += 1 */
typedef struct {
  uint64_t state;   /* GenerationState */
  uint64_t row_pos; /* [S] uint32 */
  uint32_t rows, pad;
} AdvanceParams;

/* latent[b, y, x, c] = E(tokens[b, (y/p) * w/p + x/p, c*p*p + (y%p)*p + x%p] / scale + shift) */
typedef struct {
  uint64_t tokens;                                 /* [B, T, K] E */
  uint64_t latent;                                 /* [B, h, w, C] E, written */
  uint32_t images, height, width, channels, patch; /* height, width of the latent */
  float scale, shift;
  uint32_t pad;
} UnpatchifyParams;

/* tokens = E((sample - shift) * scale), as unpatchify folds; sample = mean + exp(clamp(log_variance) / 2) * draw */
typedef struct {
  uint64_t moments;                        /* [h, w, 2C] E: means, then log variances */
  uint64_t draw;                           /* [h, w, C] float, optional: the sample is the mean */
  uint64_t tokens;                         /* [T, K] E, written */
  uint64_t mean;                           /* [h, w, C] E, optional, written: after the norm */
  uint64_t deviation;                      /* [h, w, C] E, optional, written: 0 without draw */
  uint64_t sample;                         /* [h, w, C] E, optional, written */
  uint32_t height, width, channels, patch; /* height, width of the latent */
  uint32_t psz; /* each psz x psz patch of the mean is normalised over pixels and channels; 0: no norm */
  float scale, shift;
  uint32_t pad;
} EncodeLatentParams;

/* stats[b, g, :] = mean and 1 / sqrt(var + eps) over the pixels and channels of group g */
typedef struct {
  uint64_t x;     /* [B, P, C] E */
  uint64_t stats; /* [B, groups, 2] float, written */
  uint32_t images, pixels, channels, groups;
  float eps;
  uint32_t pad;
} GroupStatsParams;

/* The same from the statistics of every channel over tiles of 8x16 pixels */
typedef struct {
  uint64_t partial; /* [B, tiles, C, 2] float: mean and sum of squared deviations (conv2d) */
  uint64_t stats;   /* [B, groups, 2] float, written */
  uint32_t images, height, width, channels, groups;
  float eps;
} MergeStatsParams;

/* y = w * norm(x) + bias (+ residual): 3x3 with zero padding, or 1x1; channels last */
typedef struct {
  uint64_t x;        /* [B, h_in, w_in, C_in] E; h_in = height / 2 with upsample, else height * stride */
  uint64_t stats;    /* [B, groups, 2] float, optional: x is normalised on load */
  uint64_t gamma;    /* [C_in] E, with stats */
  uint64_t beta;     /* [C_in] E, with stats */
  uint64_t w;        /* [C_out, ksize, ksize, C_in] E */
  uint64_t bias;     /* [C_out] E */
  uint64_t residual; /* [B, height, width, C_out] E, optional; may be y */
  uint64_t y;        /* [B, height, width, C_out] E, written */
  uint64_t partial;  /* [B, tiles of 8x16, C_out, 2] float, optional, written by mma: mean, squared deviations */
  uint32_t images, height, width, c_in, c_out, groups; /* height, width of y */
  uint32_t ksize;                                      /* 1 or 3 */
  uint32_t upsample; /* 0 or 1: x is enlarged by two, nearest, before the convolution */
  uint32_t silu;     /* 0 or 1: swish after the normalisation; with stats */
  uint32_t stride;   /* 1: zeros on all sides of x; 2, only 3x3: zeros to the right and below */
} Conv2dParams;

/* One head over all pixels: out[b, p, :] = softmax(scale * q[b, p, :] . k[b, :, :]) v[b, :, :] */
typedef struct {
  uint64_t q;   /* [B, P, C] E */
  uint64_t k;   /* [B, P, C] E */
  uint64_t v;   /* [B, P, C] E */
  uint64_t out; /* [B, P, C] E, written */
  uint32_t images, pixels, channels;
  float scale;
} VaeAttentionParams;

/* rgb = rint(clamp(x / 2 + 0.5, 0, 1) * 255), half to even */
typedef struct {
  uint64_t x;   /* [B, h, w, 3] E */
  uint64_t rgb; /* [B, h, w, 3] uint8, written */
  uint64_t bad; /* [ceil(elements / 32)] uint32, written: bit i of word w is set if x[32 w + i] is not finite */
  uint64_t elements;
} ToRgb8Params;

/* The measuring kernels (kernels/bench.cu): copy, read-only sum, random values */
typedef struct {
  uint64_t src;      /* copy: [elements] 16 bytes; sum: [elements] 16 bytes */
  uint64_t dst;      /* copy: [elements] 16 bytes; sum: [1] uint32, added to; fill: [elements] E; written */
  uint64_t elements; /* of 16 bytes in copy and sum, of E in fill */
  uint64_t seed;     /* fill: of the values */
  float mean;        /* fill */
  float deviation;   /* fill */
} BenchParams;

/* What one conformance kernel is given and leaves (kernels/conformance.cu). */
typedef struct {
  uint64_t in;      /* [count_in] uint32 */
  uint64_t out;     /* [count_out] uint32, zero before the launch, written */
  uint64_t scratch; /* [256] uint32, zero before the launch: flags and counters */
  uint32_t count_in, count_out;
} ConformanceParams;

/* Of all above, comments and blanks left out (tests/params_drift.rs writes it): images say which structs they take. */
#define WARPSTEP_PARAMS_HASH "f38fcc2ac4bc9317"
