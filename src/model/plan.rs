//! What a generation needs, decided before anything is allocated: its settings, and every buffer's size and life.

use super::arena::{Layout, Life, Slot, Stage};
use super::flow_head::{DrawSource, check_sizes};
use super::nextstep::NextStep;
use super::sources::Sources;
use crate::device::DeviceInfo;
use crate::error::{Error, Result};
use crate::ops;
use crate::ops::params::{GenerationState, GridBarrier, SolverStep};
use crate::ops::product::ProductScratch;
use std::collections::HashMap;
use std::num::NonZeroU32;

impl From<&crate::sampler::SolverStep> for SolverStep {
    fn from(step: &crate::sampler::SolverStep) -> SolverStep {
        SolverStep { keep: step.keep, velocity: step.velocity, noise: step.noise, pad: 0 }
    }
}

/// Where the random draws come from.
#[derive(Clone, Debug)]
pub enum Draws {
    /// Made on the device, token by token.
    Philox(DrawSource),
    /// `[T, draws_per_token, B, K]`, recorded elsewhere.
    Recorded(Vec<f32>),
}

/// Everything that decides one generation, with all host arithmetic done.
#[derive(Clone, Debug)]
pub struct RunSpec {
    /// Token ids of every sequence, branch-major: sequence = branch * images + image.
    pub prompts: Vec<Vec<u32>>,
    /// Input pictures and the rows of `prompts` that show them.
    pub sources: Sources,
    /// Images B.
    pub images: usize,
    /// Guidance branches R.
    pub branches: usize,
    /// Token grid: rows and columns.
    pub grid: (usize, usize),
    /// Solver constants of the N evaluations.
    pub steps: Vec<SolverStep>,
    /// `[N, 256]`: sinusoids of the evaluation times.
    pub sinusoid: Vec<f32>,
    /// cfg and cfg_img for every token.
    pub guidance: Vec<[f32; 2]>,
    /// Draws per token.
    pub draws_per_token: usize,
    /// Their source.
    pub draws: Draws,
    /// LayerNorm over each token.
    pub use_norm: bool,
    /// Norm rescale after guidance.
    pub rescale: bool,
    /// Rotation frequencies, `[d / 2]`.
    pub frequencies: Vec<f32>,
    /// Added to every position of a sequence for its rotation angles (padding that the official code counts).
    pub rope_offset: Vec<u32>,
    /// Whether the position table of the model, if it has one, is added (the February code has none).
    pub pos_embed: bool,
    /// Rows of tokens between two previews, which need the VAE's memory while tokens are made.
    pub preview_every_rows: Option<NonZeroU32>,
    /// Allocate the buffers that verification reads.
    pub taps: bool,
    /// Fill buffers with NaN when their planned life ends.
    pub poison: bool,
}

impl RunSpec {
    /// Image tokens T.
    pub fn tokens_total(&self) -> usize {
        self.grid.0 * self.grid.1
    }

    /// Of every sequence, the first that has the same prompt: ids, image tokens behind them, and angles. From these
    /// follow its keys, values and last row, so that one sequence of each is prefilled and the others repeat it. For
    /// verification, which looks at the rows of all, each is its own.
    pub(super) fn origins(&self) -> Vec<usize> {
        let mut first = HashMap::new();
        let mut origins = Vec::with_capacity(self.prompts.len());
        let mut next_row = 0;
        for (sequence, prompt) in self.prompts.iter().enumerate() {
            let rows = next_row..next_row + prompt.len();
            next_row = rows.end;
            // Without pictures there is no such table.
            let shown = self.sources.rows.get(rows).unwrap_or_default();
            let same = *first.entry((prompt, shown, self.rope_offset.get(sequence))).or_insert(sequence);
            origins.push(if self.taps { sequence } else { same });
        }
        origins
    }

    /// Whether generations of both, planned alike, record the same lists but for the prompts' and for the parameters
    /// of the draws: what differs is uploaded.
    pub(super) fn records_like(&self, other: &RunSpec) -> bool {
        // Every field is named, so that a new one is not forgotten. Those with a `_` are uploaded, or in the layout.
        let RunSpec {
            prompts,
            sources,
            images,
            branches,
            grid,
            steps,
            sinusoid: _,
            guidance: _,
            draws_per_token,
            draws,
            use_norm,
            rescale,
            frequencies,
            rope_offset,
            pos_embed,
            preview_every_rows: _,
            taps,
            poison,
        } = self;
        let same_draws = match (draws, &other.draws) {
            (Draws::Philox(mine), Draws::Philox(theirs)) => mine.round_bf16 == theirs.round_bf16,
            _ => false,
        };
        same_draws
            && (prompts.len(), *images, *branches) == (other.prompts.len(), other.images, other.branches)
            && (*grid, steps.len(), *draws_per_token)
                == (other.grid, other.steps.len(), other.draws_per_token)
            && (*use_norm, *rescale, *pos_embed) == (other.use_norm, other.rescale, other.pos_embed)
            && (*taps, *poison) == (other.taps, other.poison)
            && (frequencies, rope_offset) == (&other.frequencies, &other.rope_offset)
            && sources.encode_like(&other.sources)
    }
}

/// Device bytes of a generation, known before anything is allocated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct RunBytes {
    /// Key/value cache.
    pub cache: u64,
    /// Activations, tables, draws and pictures.
    pub activations: u64,
}

/// Where everything lies.
pub(super) struct Slots {
    pub(super) ids: Slot,
    pub(super) prefill_x: Slot,
    pub(super) prefill_seq: Slot,
    pub(super) prefill_pos: Slot,
    pub(super) prefill_q: Slot,
    pub(super) prefill_normed: Slot,
    pub(super) prefill_context: Slot,
    pub(super) prefill_act: Slot,
    pub(super) last_rows: Slot,
    pub(super) origin: Slot,
    pub(super) prompt_x: Slot,
    pub(super) x: Slot,
    pub(super) row_seq: Slot,
    pub(super) row_pos: Slot,
    pub(super) normed: Slot,
    pub(super) q: Slot,
    pub(super) context: Slot,
    pub(super) act: Slot,
    pub(super) partial: Slot,
    pub(super) arrivals: Slot,
    pub(super) product_partial: Slot,
    pub(super) product_arrivals: Slot,
    pub(super) rope: Slot,
    pub(super) rope_offset: Slot,
    pub(super) condition: Slot,
    pub(super) time: Slot,
    pub(super) sinusoid: Slot,
    pub(super) time_hidden: Slot,
    pub(super) cond: Slot,
    pub(super) modulation: Slot,
    pub(super) steps_table: Slot,
    pub(super) guidance: Slot,
    pub(super) draws: Slot,
    pub(super) state: Slot,
    pub(super) barrier: Slot,
    pub(super) exchange: Slot,
    pub(super) h: Slot,
    pub(super) a: Slot,
    pub(super) v_raw: Slot,
    pub(super) tokens: Slot,
    pub(super) vae: Slot,
    pub(super) sources: Option<SourceSlots>,
    pub(super) taps: Option<TapSlots>,
}

/// What input pictures need until the prompt is through.
pub(super) struct SourceSlots {
    pub(super) encoder: Slot,
    pub(super) draws: Slot,
    pub(super) tokens: Slot,
    pub(super) x: Slot,
    pub(super) rows: Slot,
}

/// What only verification needs.
pub(super) struct TapSlots {
    pub(super) norm: Slot,
    pub(super) scratch: Slot,
    pub(super) forced_x: Slot,
    pub(super) v_raw: Slot,
    pub(super) v: Slot,
    pub(super) x: Slot,
    pub(super) sampled: Slot,
}

/// A layout with its sizes.
pub(super) struct Planned {
    pub(super) layout: Layout,
    pub(super) slots: Slots,
    pub(super) capacity: usize,
    pub(super) splits: usize,
    pub(super) cache_bytes: usize,
}

/// Prompts are planned for in steps of so many tokens, so that requests with other captions fit the same memory and
/// lists: less than a percent of a picture's time in the 14B, and 12 MB of cache per image on average.
const PROMPT_STEP: usize = 64;

/// Lays out every buffer of a generation, by the stages it lives through.
pub(super) fn plan_memory(model: &NextStep, info: &DeviceInfo, spec: &RunSpec) -> Result<Planned> {
    let config = &model.config;
    let element = model.dtype.bytes();
    let float = size_of::<f32>();
    let index = size_of::<u32>();
    let (sequences, images) = (spec.prompts.len(), spec.images);
    let dims = model.flow.dims;
    if sequences == 0 || sequences != images * spec.branches {
        return Err(Error::Internal(format!(
            "{sequences} prompts for {images} x {} sequences",
            spec.branches
        )));
    }
    check_sizes(&dims, spec.steps.len(), sequences)?;
    let exact_rows: usize = spec.prompts.iter().map(Vec::len).sum();
    let planned = |prompt: &Vec<u32>| prompt.len().next_multiple_of(PROMPT_STEP);
    // Of every prompt once.
    let origins = spec.origins();
    let distinct = spec.prompts.iter().enumerate().filter(|&(sequence, _)| origins[sequence] == sequence);
    let rows: usize = distinct.map(|(_, prompt)| planned(prompt)).sum();
    let longest = spec.prompts.iter().map(planned).max().unwrap_or(0);
    let tokens = spec.tokens_total();
    // The last image token is never fed back, but a slot for it keeps `advance` inside the cache.
    let capacity = (longest + tokens).next_multiple_of(16);
    let offset = spec.rope_offset.iter().copied().max().unwrap_or(0) as usize;
    let positions = capacity + offset;
    let head_values = config.num_key_value_heads * config.head_dim;
    let cache_bytes = [config.num_hidden_layers, sequences, capacity, head_values, element]
        .into_iter()
        .try_fold(1usize, usize::checked_mul)
        .ok_or_else(|| Error::request("size", "the key/value cache overflows"))?;
    // By branches, not rows: the order of summation, and so the bits, must not depend on the batch.
    let splits = ops::attention::splits(info.sm_count, spec.branches, config.num_key_value_heads, capacity);
    // Taps run out_proj, a product of few rows, on whole prompts.
    let wide = product_rows(model, sequences, &[rows, spec.steps.len(), spec.sources.tokens()]);
    let wide = if spec.taps { wide.max(exact_rows) } else { wide };
    let (partial_floats, arrivals) = ProductScratch::sizes(info.sm_count, wide);
    let q_values = config.num_attention_heads * config.head_dim;
    let mut layout = Layout::default();
    let prefill = Life::only(Stage::Prefill);
    let decode = Life::only(Stage::Decode);
    let both = Life::between(Stage::Prefill, Stage::Decode);
    let draw_slots = match spec.draws {
        Draws::Philox(_) => 1,
        Draws::Recorded(_) => tokens,
    };
    let vae_bytes = model.vae.plan(images, spec.grid, model.dtype)?;
    let vae_life = match spec.preview_every_rows {
        Some(_) => Life::between(Stage::Decode, Stage::Image),
        None => Life::only(Stage::Image),
    };
    let slots = Slots {
        ids: layout.add("prefill.ids", rows, index, prefill)?,
        prefill_x: layout.add("prefill.x", rows * config.hidden_size, float, prefill)?,
        prefill_seq: layout.add("prefill.row_seq", rows, index, prefill)?,
        prefill_pos: layout.add("prefill.row_pos", rows, index, prefill)?,
        prefill_q: layout.add("prefill.q", rows * q_values, element, prefill)?,
        prefill_normed: layout.add("prefill.normed", rows * config.hidden_size, element, prefill)?,
        prefill_context: layout.add("prefill.context", rows * q_values, element, prefill)?,
        prefill_act: layout.add("prefill.act", rows * config.intermediate_size, element, prefill)?,
        last_rows: layout.add("prefill.last_rows", sequences, index, prefill)?,
        origin: layout.add("prefill.origin", sequences, index, prefill)?,
        prompt_x: layout.add("prompt_x", sequences * config.hidden_size, float, Life::KEPT)?,
        x: layout.add("x", sequences * config.hidden_size, float, both)?,
        row_seq: layout.add("row_seq", sequences, index, both)?,
        row_pos: layout.add("row_pos", sequences, index, both)?,
        normed: layout.add("normed", sequences * config.hidden_size, element, decode)?,
        q: layout.add("q", sequences * q_values, element, decode)?,
        context: layout.add("context", sequences * q_values, element, decode)?,
        act: layout.add("act", sequences * config.intermediate_size, element, decode)?,
        partial: layout.add(
            "attention.partial",
            sequences * config.num_attention_heads * splits * (config.head_dim + 2),
            float,
            both,
        )?,
        arrivals: layout.add("attention.arrivals", sequences * config.num_key_value_heads, index, both)?,
        product_partial: layout.add("product.partial", partial_floats, float, both)?,
        product_arrivals: layout.add("product.arrivals", arrivals, index, both)?,
        rope: layout.add("rope", positions * config.head_dim, float, Life::KEPT)?,
        rope_offset: layout.add("rope_offset", sequences, index, both)?,
        condition: layout.add("condition", sequences * config.hidden_size, element, both)?,
        time: layout.add("flow.time", spec.steps.len() * dims.width, element, both)?,
        sinusoid: layout.add("flow.sinusoid", spec.sinusoid.len(), element, prefill)?,
        time_hidden: layout.add("flow.time_hidden", spec.steps.len() * dims.width, element, prefill)?,
        cond: layout.add("flow.cond", sequences * dims.width, element, decode)?,
        modulation: layout.add(
            "flow.modulation",
            spec.steps.len() * sequences * dims.modulation_outputs(),
            element,
            decode,
        )?,
        steps_table: layout.add("flow.steps", spec.steps.len(), size_of::<SolverStep>(), both)?,
        guidance: layout.add("flow.guidance", tokens * 2, float, both)?,
        draws: layout.add(
            "flow.draws",
            draw_slots * spec.draws_per_token * images * dims.token_dim,
            float,
            both,
        )?,
        state: layout.add("state", 1, size_of::<GenerationState>(), Life::ALWAYS)?,
        barrier: layout.add("flow.barrier", 1, size_of::<GridBarrier>(), both)?,
        exchange: layout.add(
            "flow.exchange",
            ops::flow_chain::exchange_bytes(
                (dims.width, dims.mlp_width, dims.token_dim),
                images,
                spec.branches,
            ),
            1,
            both,
        )?,
        h: layout.add("flow.h", sequences * dims.width, float, decode)?,
        a: layout.add("flow.a", sequences * dims.mlp_width, float, decode)?,
        v_raw: layout.add("flow.v_raw", sequences * dims.token_dim, float, decode)?,
        tokens: layout.add("tokens", images * tokens * dims.token_dim, element, Life::ALWAYS)?,
        vae: layout.add("vae", vae_bytes, 1, vae_life)?,
        sources: plan_sources(model, &spec.sources, rows, &mut layout)?,
        taps: match spec.taps {
            false => None,
            true => {
                let per_step = spec.steps.len() * dims.token_dim;
                let all = Life::ALWAYS;
                Some(TapSlots {
                    norm: layout.add(
                        "tap.norm",
                        exact_rows.max(sequences) * config.hidden_size,
                        element,
                        all,
                    )?,
                    scratch: layout.add(
                        "tap.scratch",
                        exact_rows.max(sequences) * config.hidden_size,
                        element,
                        all,
                    )?,
                    forced_x: layout.add("tap.forced_x", per_step * images, float, all)?,
                    v_raw: layout.add("tap.v_raw", per_step * sequences, float, all)?,
                    v: layout.add("tap.v", per_step * images, float, all)?,
                    x: layout.add("tap.x", per_step * images, float, all)?,
                    sampled: layout.add("tap.sampled", images * dims.token_dim, float, all)?,
                })
            }
        },
    };
    Ok(Planned { layout, slots, capacity, splits, cache_bytes })
}

/// Rows of the widest product that shares tiles between blocks: those of a prompt or its pictures only where a variant
/// is chosen by name that does so for any number of rows.
pub(super) fn product_rows(model: &NextStep, sequences: usize, many: &[usize]) -> usize {
    let chosen = ops::PRODUCTS.iter().any(|op| matches!(model.kernels.chosen(op), Some("stream" | "ring")));
    let widest = many.iter().copied().max().filter(|_| chosen);
    sequences.max(widest.unwrap_or(0))
}

/// Lays out what `sources` need among up to `rows` prompt rows; nothing where there are none.
pub(super) fn plan_sources(
    model: &NextStep,
    sources: &Sources,
    rows: usize,
    layout: &mut Layout,
) -> Result<Option<SourceSlots>> {
    if sources.places.is_empty() {
        return Ok(None);
    }
    let missing = || Error::request("images", "this model's VAE has no encoder, so it reads no pictures");
    let encoder = model.encoder.as_ref().ok_or_else(missing)?;
    let mut encoder_bytes = 0;
    for picture in &sources.pictures {
        let size = (picture.height() as usize, picture.width() as usize);
        encoder_bytes = encoder_bytes.max(encoder.plan(size, model.dtype)?);
    }
    let (config, prefill) = (&model.config, Life::only(Stage::Prefill));
    let (tokens, element) = (sources.tokens(), model.dtype.bytes());
    Ok(Some(SourceSlots {
        encoder: layout.add("sources.encoder", encoder_bytes, 1, prefill)?,
        draws: layout.add("sources.draws", sources.draw_values(), size_of::<f32>(), prefill)?,
        tokens: layout.add("sources.tokens", tokens * config.token_dim(), element, prefill)?,
        x: layout.add("sources.x", tokens * config.hidden_size, size_of::<f32>(), prefill)?,
        rows: layout.add("sources.rows", rows, size_of::<u32>(), prefill)?,
    }))
}

/// Bytes that a run of `spec` will allocate.
pub fn plan(model: &NextStep, info: &DeviceInfo, spec: &RunSpec) -> Result<RunBytes> {
    let planned = plan_memory(model, info, spec)?;
    Ok(RunBytes { cache: 2 * planned.cache_bytes as u64, activations: planned.layout.bytes() as u64 })
}
