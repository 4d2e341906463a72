//! One generation bound to a device: memory, tables, and the node lists of prefill, token and image.
//!
//! A [`Run`] is what sessions drive token by token and what `verify` drives stage by stage; both replay the
//! same nodes. Everything that changes from token to token is in device memory, so no list is ever rebuilt.
//! Sessions take a run from request to request (`reuse`).
//!
//! # What may be launched
//!
//! Nodes of a run name buffers of its own and weights of its model, which are on its device; it holds both, and waits
//! for its stream before it lets go of them. Tables are written by it alone, from a spec whose sizes it checks against
//! the plan, and advance with the tokens: a token list is replayed once for every token of the spec, or `verify` and
//! `bench` set the positions back between replays. Neither a run nor the addresses in it leave this crate.

mod reuse;
mod sources;

pub use reuse::PrefillShape;
pub(super) use sources::SourceParts;

use super::arena::{Arena, Slot, Stage};
use super::backbone::{Cache, Rows, rope_table};
use super::flow_head::{DrawSource, FlowBuffers, FlowTaps};
use super::nextstep::NextStep;
use super::plan::{Draws, Planned, RunSpec, Slots, TapSlots, plan_memory};
use super::vae::Decoded;
use crate::device::{Buffer, Copies, Device, DeviceInfo, Executable, Node, NodeList, Span, Stream};
use crate::error::{Error, Result};
use crate::ops::params::{GenerationState, GridBarrier};
use crate::ops::product::ProductScratch;
use crate::ops::{self, DType, Form, Launch, Selection};
use std::sync::Arc;

/// A generation bound to device memory.
pub struct Run {
    model: Arc<NextStep>,
    stream: Box<dyn Stream>,
    info: DeviceInfo,
    spec: RunSpec,
    selection: Selection,
    arena: Arena,
    slots: Slots,
    cache: Cache,
    splits: usize,
    cache_buffers: [Buffer; 2],
    /// Sequences whose prompts go through the transformer, in order: of those that the cache lacks, one of each.
    fresh: Vec<usize>,
    /// Of every sequence, the one whose prompt prefill copies to it; itself where it is fresh or in the cache.
    origin: Vec<usize>,
    /// Of every sequence, the prompt whose keys and values are in the cache, and its last row in `prompt_x`, when the
    /// next generation begins.
    cached: Vec<Option<Vec<u32>>>,
}

impl Run {
    /// Allocates, uploads the tables, embeds the evaluation times.
    pub fn new(
        model: Arc<NextStep>,
        device: &Arc<dyn Device>,
        selection: Selection,
        spec: RunSpec,
    ) -> Result<Run> {
        model.check_device(device)?;
        let info = device.info();
        let Planned { layout, slots, capacity, splits, cache_bytes } = plan_memory(&model, &info, &spec)?;
        let keys = device.alloc(cache_bytes, "cache.keys")?;
        let values = device.alloc(cache_bytes, "cache.values")?;
        let arena = layout.bind(device.as_ref(), "arena")?;
        let sequences = spec.prompts.len();
        let offset = spec.rope_offset.iter().copied().max().unwrap_or(0) as usize;
        let cache = Cache {
            keys: keys.span(),
            values: values.span(),
            sequences,
            capacity,
            rope: arena.span(slots.rope),
            positions: capacity + offset,
            rope_offset: arena.span(slots.rope_offset),
        };
        let origin = spec.origins();
        let mut run = Run {
            model,
            stream: device.stream()?,
            info,
            spec,
            selection,
            arena,
            slots,
            cache,
            splits,
            cache_buffers: [keys, values],
            fresh: own(&origin),
            origin,
            cached: vec![None; sequences],
        };
        let rope = rope_table(&run.spec.frequencies, run.cache.positions, run.model.dtype);
        run.upload_whole(run.slots.rope, bytemuck::cast_slice(&rope))?;
        run.upload_tables()?;
        Ok(run)
    }

    /// Uploads what fills `slot`.
    fn upload_whole(&mut self, slot: Slot, bytes: &[u8]) -> Result<()> {
        let span = self.arena.span(slot);
        if bytes.len() != span.bytes {
            return Err(Error::Internal(format!("table of {} bytes for {}", bytes.len(), span.bytes)));
        }
        self.stream.put(span, bytes)
    }

    /// Uploads what may leave the end of `slot` unused: prompts are planned for in steps.
    fn upload_start(&mut self, slot: Slot, values: &[u32]) -> Result<()> {
        let span = self.arena.span(slot);
        if size_of_val(values) > span.bytes {
            return Err(Error::Internal(format!("table of {} rows for {} bytes", values.len(), span.bytes)));
        }
        self.stream.put(span, bytemuck::cast_slice(values))
    }

    /// Everything that a generation finds on the device when it begins, but what it keeps from the one before.
    fn upload_tables(&mut self) -> Result<()> {
        let spec = self.spec.clone();
        let sequences = spec.prompts.len();
        let mut ids = Vec::new();
        let mut row_seq = Vec::new();
        let mut row_pos = Vec::new();
        let mut last_rows = Vec::new();
        let mut source_rows = Vec::new();
        let mut first_row = 0;
        for (sequence, prompt) in spec.prompts.iter().enumerate() {
            let rows = first_row..first_row + prompt.len();
            first_row = rows.end;
            if !self.fresh.contains(&sequence) {
                continue;
            }
            ids.extend_from_slice(prompt);
            row_seq.extend(prompt.iter().map(|_| sequence as u32));
            row_pos.extend(0..prompt.len() as u32);
            last_rows.push(row_pos.len() as u32 - 1);
            source_rows.extend(spec.sources.rows.get(rows).into_iter().flatten());
        }
        let lengths: Vec<u32> = spec.prompts.iter().map(|p| p.len() as u32).collect();
        let origin: Vec<u32> = self.origin.iter().map(|&sequence| sequence as u32).collect();
        ops::repeat_prompts::check_tables(&origin, &lengths, self.cache.capacity)?;
        let identity: Vec<u32> = (0..sequences as u32).collect();
        let guidance: Vec<f32> = spec.guidance.concat();
        let (state, barrier) = (GenerationState::default(), GridBarrier::default());
        let s = &self.slots;
        let prompts =
            [(s.ids, ids), (s.prefill_seq, row_seq), (s.prefill_pos, row_pos), (s.last_rows, last_rows)];
        let tables: [(Slot, &[u8]); 8] = [
            (s.origin, bytemuck::cast_slice(&origin)),
            (s.row_seq, bytemuck::cast_slice(&identity)),
            // The first image token goes into the slot after the prompt.
            (s.row_pos, bytemuck::cast_slice(&lengths)),
            (s.rope_offset, bytemuck::cast_slice(&spec.rope_offset)),
            (s.steps_table, bytemuck::cast_slice(&spec.steps)),
            (s.guidance, bytemuck::cast_slice(&guidance)),
            (s.state, bytemuck::bytes_of(&state)),
            (s.barrier, bytemuck::bytes_of(&barrier)),
        ];
        for (slot, values) in prompts {
            self.upload_start(slot, &values)?;
        }
        for (slot, bytes) in tables {
            self.upload_whole(slot, bytes)?;
        }
        if let Draws::Recorded(draws) = &spec.draws {
            let span = self.arena.span(self.slots.draws);
            if draws.len() * 4 != span.bytes {
                return Err(Error::Internal(format!(
                    "{} recorded draws for {}",
                    draws.len(),
                    span.bytes / 4
                )));
            }
            self.stream.put(span, bytemuck::cast_slice(draws))?;
        }
        let parts = SourceParts::new(&self.model, &self.arena, &self.slots.sources, &self.spec.sources);
        parts.upload(self.stream.as_mut(), &source_rows)?;
        for zeroed in [self.slots.arrivals, self.slots.product_arrivals, self.slots.exchange] {
            self.stream.set(self.arena.span(zeroed), 0)?;
        }
        self.upload_whole(self.slots.sinusoid, &ops::harness::encode(self.model.dtype, spec.sinusoid).0)?;
        // One row per evaluation, however many images there are.
        let selection = self.stage_selection(Stage::Prefill)?;
        let launch = self.launch(&selection);
        let [input, hidden, time] =
            [self.slots.sinusoid, self.slots.time_hidden, self.slots.time].map(|slot| self.arena.span(slot));
        let (steps, scratch) = (spec.steps.len(), self.scratch());
        let nodes = self.model.flow.record_times(&launch, steps, (input, hidden), time, scratch)?;
        nodes.iter().try_for_each(|node| self.enqueue(node))
    }

    fn stage_selection(&self, stage: Stage) -> Result<Selection> {
        stage_selection(&self.model, &self.selection, stage)
    }

    fn scratch(&self) -> Option<ProductScratch> {
        Some(ProductScratch {
            partial: self.arena.span(self.slots.product_partial),
            arrivals: self.arena.span(self.slots.product_arrivals),
            next: None,
        })
    }

    fn launch<'a>(&self, selection: &'a Selection) -> Launch<'a> {
        Launch { selection, dtype: self.model.dtype, sm_count: self.info.sm_count, dependent: true }
    }

    /// The spec this run was made of.
    pub fn spec(&self) -> &RunSpec {
        &self.spec
    }

    /// The model that it is a generation of.
    pub fn model(&self) -> Arc<NextStep> {
        self.model.clone()
    }

    /// Everything but weights and cache.
    pub fn arena(&self) -> Span {
        self.arena.whole()
    }

    /// Enqueues a node that this run recorded, or one over spans of its buffers.
    pub fn enqueue(&mut self, node: &Node) -> Result<()> {
        // SAFETY: see the module.
        unsafe { self.stream.launch(node) }
    }

    /// Prepares a list that this run recorded. The executable goes before the run.
    pub fn instantiate(&mut self, list: impl Into<Arc<NodeList>>) -> Result<Box<dyn Executable>> {
        // SAFETY: see the module.
        unsafe { self.stream.instantiate(list.into()) }
    }

    /// Gives node `index` of a token list of this run, the one of [`record_draws`](Self::record_draws), the seed of the
    /// generation that has begun.
    pub fn set_draws(&self, list: &mut dyn Executable, index: usize) -> Result<()> {
        let node = self.record_draws()?;
        let node = node.ok_or_else(|| Error::Internal("another seed for recorded draws".into()))?;
        // SAFETY: see the module; of another node than that one this is an error.
        unsafe { list.set_params(index, &node) }
    }

    /// The stream that everything runs on.
    pub fn stream(&mut self) -> &mut dyn Stream {
        self.stream.as_mut()
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.model.dtype
    }

    /// Side of the square of latent pixels that a token holds.
    pub fn latent_patch_size(&self) -> usize {
        self.model.config.latent_patch_size
    }

    /// The cache, for verification.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The prompt rows that prefill takes.
    fn prefill_rows(&self) -> Rows {
        let s = &self.slots;
        let config = &self.model.config;
        let rows: usize = self.fresh.iter().map(|&sequence| self.spec.prompts[sequence].len()).sum();
        let element = self.model.dtype.bytes();
        let q_values = config.num_attention_heads * config.head_dim;
        let part = |slot: Slot, row_bytes: usize| self.arena.span(slot).slice(0, rows * row_bytes);
        Rows {
            rows,
            x: part(s.prefill_x, config.hidden_size * size_of::<f32>()),
            row_seq: part(s.prefill_seq, size_of::<u32>()),
            row_pos: part(s.prefill_pos, size_of::<u32>()),
            normed: part(s.prefill_normed, config.hidden_size * element),
            q: part(s.prefill_q, q_values * element),
            context: part(s.prefill_context, q_values * element),
            act: part(s.prefill_act, config.intermediate_size * element),
            split: None,
            scratch: self.scratch(),
        }
    }

    fn decode_rows(&self) -> Rows {
        let s = &self.slots;
        Rows {
            rows: self.spec.prompts.len(),
            x: self.arena.span(s.x),
            row_seq: self.arena.span(s.row_seq),
            row_pos: self.arena.span(s.row_pos),
            normed: self.arena.span(s.normed),
            q: self.arena.span(s.q),
            context: self.arena.span(s.context),
            act: self.arena.span(s.act),
            split: Some(ops::attention::SplitScratch {
                splits: self.splits,
                partial: self.arena.span(s.partial),
                arrivals: self.arena.span(s.arrivals),
            }),
            scratch: self.scratch(),
        }
    }

    /// Buffers by name, for verification and tests.
    pub fn buffers(&self) -> RunBuffers {
        let taps = self.slots.taps.as_ref();
        let tap = |slot: fn(&TapSlots) -> Slot| taps.map(|t| self.arena.span(slot(t)));
        RunBuffers {
            prefill: self.prefill_rows(),
            decode: self.decode_rows(),
            condition: self.arena.span(self.slots.condition),
            time: self.arena.span(self.slots.time),
            cond: self.arena.span(self.slots.cond),
            modulation: self.arena.span(self.slots.modulation),
            state: self.arena.span(self.slots.state),
            tokens: self.arena.span(self.slots.tokens),
            norm: tap(|t| t.norm),
            taps: FlowTaps {
                forced_x: tap(|t| t.forced_x),
                v_raw: tap(|t| t.v_raw),
                v: tap(|t| t.v),
                x: tap(|t| t.x),
                sampled: tap(|t| t.sampled),
            },
        }
    }

    /// Nodes from the ids of the prompts that are not in the cache yet, once of each, and the tokens of encoded
    /// pictures, to the residual rows that the first image token is sampled from. Without `embed` the residual stream
    /// is taken as it stands in memory.
    pub fn record_prefill(&self, embed: bool) -> Result<NodeList> {
        let mut list = NodeList::new();
        let selection = self.stage_selection(Stage::Prefill)?;
        let launch = self.launch(&selection);
        let rows = self.prefill_rows();
        let hidden = self.model.config.hidden_size;
        let [last_rows, prompt_x] =
            [self.slots.last_rows, self.slots.prompt_x].map(|slot| self.arena.span(slot));
        if rows.rows > 0 {
            if embed {
                let ids = self.arena.span(self.slots.ids);
                let source = self.source_parts().record_rows(&launch, &mut list, self.scratch())?;
                self.model.backbone.record_embed(&launch, &mut list, "prefill", ids, source, &rows)?;
            }
            self.model.backbone.record_layers(&launch, &mut list, "prefill", &rows, &self.cache)?;
        }
        let row_bytes = hidden * size_of::<f32>();
        let mut done = 0;
        for run in self.fresh.chunk_by(|a, b| a + 1 == *b) {
            let gather = ops::gather_rows::Args {
                x: rows.x,
                index: last_rows.slice(done * size_of::<u32>(), run.len() * size_of::<u32>()),
                y: prompt_x.slice(run[0] * row_bytes, run.len() * row_bytes),
                rows: run.len(),
                source_rows: rows.rows,
                hidden,
            };
            list.push(ops::gather_rows::node(&launch, "prefill.gather_rows", &gather)?);
            done += run.len();
        }
        if self.repeats() {
            let repeat = ops::repeat_prompts::Args {
                keys: self.cache.keys,
                values: self.cache.values,
                prompt_x,
                origin: self.arena.span(self.slots.origin),
                // Until the first token is made, the slot after the prompt is its length.
                length: self.arena.span(self.slots.row_pos),
                layers: self.model.backbone.layers(),
                sequences: self.cache.sequences,
                heads_kv: self.model.config.num_key_value_heads,
                head_dim: self.model.config.head_dim,
                capacity: self.cache.capacity,
                hidden,
            };
            list.push(ops::repeat_prompts::node(&launch, "prefill.repeat_prompts", &repeat)?);
        }
        // A copy: decoding writes over the rows that it starts from, and these outlive it.
        let gather = ops::gather_rows::Args {
            x: prompt_x,
            index: self.arena.span(self.slots.row_seq),
            y: self.arena.span(self.slots.x),
            rows: self.spec.prompts.len(),
            source_rows: self.spec.prompts.len(),
            hidden,
        };
        list.push(ops::gather_rows::node(&launch, "prefill.start_rows", &gather)?);
        Ok(list)
    }

    /// Final norm of all prompt rows into the `norm` tap; verification only.
    pub fn record_prefill_norm(&self) -> Result<NodeList> {
        let mut list = NodeList::new();
        let selection = self.stage_selection(Stage::Prefill)?;
        let rows = self.prefill_rows();
        let taps = self.slots.taps.as_ref();
        let taps = taps.ok_or_else(|| Error::Internal("the norm of all prompt rows needs taps".into()))?;
        let (norm, scratch) = (Some(self.arena.span(taps.norm)), self.arena.span(taps.scratch));
        let launch = self.launch(&selection);
        let backbone = &self.model.backbone;
        backbone.record_condition(
            &launch,
            &mut list,
            "prefill",
            rows.x,
            rows.rows,
            None,
            norm,
            scratch,
            rows.scratch,
        )?;
        Ok(list)
    }

    /// Nodes from the residual rows to their condition.
    pub fn record_condition(&self, list: &mut NodeList) -> Result<()> {
        let selection = self.stage_selection(Stage::Decode)?;
        let launch = self.launch(&selection);
        let x = self.arena.span(self.slots.x);
        let state = self.arena.span(self.slots.state);
        let norm = self.slots.taps.as_ref().map(|t| self.arena.span(t.norm));
        let condition = self.arena.span(self.slots.condition);
        let pos_embed = if self.spec.pos_embed { self.model.backbone.pos_embed(state) } else { None };
        let rows = self.spec.prompts.len();
        let backbone = &self.model.backbone;
        let scratch = self.scratch();
        backbone.record_condition(&launch, list, "decode", x, rows, pos_embed, norm, condition, scratch)
    }

    /// Nodes from the condition to the sampled token and the next residual rows. `forced` replaces the state
    /// before every evaluation by the tap's contents.
    pub fn record_sample(&self, list: &mut NodeList, forced: bool) -> Result<()> {
        let selection = self.stage_selection(Stage::Decode)?;
        let launch = self.launch(&selection);
        let mut buffers = self.flow_buffers();
        if !forced {
            buffers.taps.forced_x = None;
        }
        self.model.flow.record(&launch, list, &buffers, self.draw_source())
    }

    /// The node of the token lists whose parameters hold the seed; none where the draws are recorded ones.
    pub fn record_draws(&self) -> Result<Option<Node>> {
        let selection = self.stage_selection(Stage::Decode)?;
        let launch = self.launch(&selection);
        let node = |source| self.model.flow.draws_node(&launch, &self.flow_buffers(), source);
        self.draw_source().map(node).transpose()
    }

    fn draw_source(&self) -> Option<DrawSource> {
        match &self.spec.draws {
            Draws::Philox(source) => Some(*source),
            Draws::Recorded(_) => None,
        }
    }

    fn flow_buffers(&self) -> FlowBuffers {
        let s = &self.slots;
        let span = |slot: Slot| self.arena.span(slot);
        FlowBuffers {
            steps: self.spec.steps.len(),
            images: self.spec.images,
            branches: self.spec.branches,
            tokens_total: self.spec.tokens_total(),
            condition: span(s.condition),
            time: span(s.time),
            cond: span(s.cond),
            modulation: span(s.modulation),
            steps_table: span(s.steps_table),
            guidance: span(s.guidance),
            draws: span(s.draws),
            draws_per_slot: self.spec.draws_per_token,
            draw_slots: if self.draw_source().is_some() { 1 } else { self.spec.tokens_total() },
            state: span(s.state),
            barrier: span(s.barrier),
            exchange: span(s.exchange),
            h: span(s.h),
            a: span(s.a),
            v_raw: span(s.v_raw),
            tokens: span(s.tokens),
            x_next: span(s.x),
            use_norm: self.spec.use_norm,
            rescale: self.spec.rescale,
            scratch: self.scratch(),
            taps: self.buffers().taps,
        }
    }

    /// Nodes that feed the token through the transformer and move on to the next.
    pub fn record_step(&self, list: &mut NodeList) -> Result<()> {
        let selection = self.stage_selection(Stage::Decode)?;
        let launch = self.launch(&selection);
        let rows = self.decode_rows();
        self.model.backbone.record_layers(&launch, list, "decode", &rows, &self.cache)?;
        let advance = ops::advance::Args {
            state: self.arena.span(self.slots.state),
            row_pos: rows.row_pos,
            rows: rows.rows,
        };
        list.push(ops::advance::node(&launch, "decode.advance", &advance)?);
        Ok(())
    }

    /// The list of one image token, replayed unchanged; `last` leaves out the transformer pass whose result
    /// nobody would use.
    pub fn record_token(&self, last: bool) -> Result<NodeList> {
        let mut list = NodeList::new();
        self.record_condition(&mut list)?;
        self.record_sample(&mut list, false)?;
        if !last {
            self.record_step(&mut list)?;
        }
        Ok(list)
    }

    /// Nodes from tokens to pixels.
    pub fn record_image(&self) -> Result<(NodeList, Decoded)> {
        self.record_decoder(self.arena.span(self.slots.tokens), self.spec.images, self.spec.grid)
    }

    /// The same for the first `rows` rows of tokens of one image, as if the picture ended there.
    pub fn record_preview(&self, image: usize, rows: usize) -> Result<(NodeList, Decoded)> {
        let (height, width) = self.spec.grid;
        let all = self.arena.span(self.slots.tokens);
        let row_bytes = all.bytes / (self.spec.images * height);
        let tokens = all.slice(image * height * row_bytes, rows.min(height) * row_bytes);
        self.record_decoder(tokens, 1, (rows.min(height), width))
    }

    fn record_decoder(
        &self,
        tokens: Span,
        images: usize,
        grid: (usize, usize),
    ) -> Result<(NodeList, Decoded)> {
        let mut list = NodeList::new();
        let selection = self.stage_selection(Stage::Image)?;
        let launch = self.launch(&selection);
        let arena = self.arena.span(self.slots.vae);
        let decoded = self.model.vae.record(&launch, &mut list, tokens, images, grid, arena)?;
        Ok((list, decoded))
    }

    /// Runs a list once, calling `after` with every finished node: for taps.
    pub fn run_once(
        &mut self,
        list: &NodeList,
        mut after: impl FnMut(&Node, &mut dyn Stream) -> Result<()>,
    ) -> Result<()> {
        for node in list.nodes() {
            self.enqueue(node)?;
            after(node, self.stream.as_mut())?;
        }
        self.stream.synchronize()
    }

    /// Declares a stage over: its buffers are filled with NaN if the spec asks for it.
    pub fn end_stage(&mut self, stage: Stage) -> Result<()> {
        if self.spec.poison {
            let dying: Vec<Span> = self.arena.dying_after(stage).collect();
            for span in dying {
                self.stream.set(span, 0xff)?;
            }
        }
        Ok(())
    }

    /// Fails if, since the generation state was set, a token came out non-finite or its blocks waited in vain for each
    /// other; waits for everything enqueued so far.
    pub fn check_tokens(&mut self) -> Result<()> {
        let state = self.state()?;
        // First: what a stalled token holds means nothing.
        if state.stalled != 0 {
            return Err(Error::Stalled { op: "flow_chain", token: state.stalled as usize - 1 });
        }
        if state.nonfinite != 0 {
            return Err(Error::NonFinite { stage: "flow head", token: state.nonfinite as usize - 1 });
        }
        Ok(())
    }

    /// The device's generation state, after everything enqueued so far.
    pub fn state(&mut self) -> Result<GenerationState> {
        let mut state = GenerationState::default();
        let span = self.arena.span(self.slots.state);
        self.stream.get(span, bytemuck::bytes_of_mut(&mut state))?;
        Ok(state)
    }
}

/// The sequences that are their own origins.
fn own(origin: &[usize]) -> Vec<usize> {
    (0..origin.len()).filter(|&sequence| origin[sequence] == sequence).collect()
}

/// Variants of a stage. Fixed by the stage, never by the number of rows: see [`Selection::or`].
pub(super) fn stage_selection(model: &NextStep, chosen: &Selection, stage: Stage) -> Result<Selection> {
    let form = match stage {
        Stage::Prefill => Form::Many,
        Stage::Decode | Stage::Image | Stage::Idle => Form::Few,
    };
    let config = &model.config;
    let heads = (config.num_attention_heads, config.num_key_value_heads);
    let decode = form == Form::Few;
    let attention = ops::attention::default_variant(model.dtype, heads, config.head_dim, decode);
    Ok(chosen.clone().or(&ops::attention::OP, attention)?.for_products(form))
}

impl Drop for Run {
    fn drop(&mut self) {
        // The device may still be working in memory that is about to be freed; an error changes nothing here.
        let _ = self.stream.synchronize();
    }
}

/// Spans that verification reads and writes.
#[derive(Clone, Copy, Debug)]
pub struct RunBuffers {
    /// Prompt rows.
    pub prefill: Rows,
    /// Decode rows.
    pub decode: Rows,
    /// `[S, D]` E.
    pub condition: Span,
    /// `[N, F]` E.
    pub time: Span,
    /// `[S, F]` E.
    pub cond: Span,
    /// `[N, S, (3L + 2) F]` E.
    pub modulation: Span,
    /// GenerationState.
    pub state: Span,
    /// `[B, T, K]` E.
    pub tokens: Span,
    /// `[rows, D]` E: final norm; verification only.
    pub norm: Option<Span>,
    /// Taps of the sampler; verification only.
    pub taps: FlowTaps,
}

#[cfg(all(test, feature = "demo-model"))]
mod tests {
    use super::*;
    use crate::device::emulated::{EmulatedDevice, EmulatedOptions, ReplayOrder};
    use crate::engine::{Engine, EngineOptions, ModelSource};

    /// A generation of two tokens of the demo model with the replays in `order`.
    fn run(order: ReplayOrder) -> Run {
        let options = EmulatedOptions { replay_order: order, ..EmulatedOptions::default() };
        let device: Arc<dyn Device> = Arc::new(EmulatedDevice::new(options).unwrap());
        let engine = Engine::load(&ModelSource::Demo, device.clone(), EngineOptions::default()).unwrap();
        let mut request = engine.request("a red circle on a blue background").unwrap();
        (request.width, request.height, request.seed) = (32, 16, 3);
        request.sampler.steps = 2;
        let spec = engine.prepare(&request).unwrap().spec;
        Run::new(engine.model.clone(), &device, Selection::default(), spec).unwrap()
    }

    /// What such a generation draws; `cut` drops one edge of the token list first.
    fn tokens(order: ReplayOrder, cut: Option<(usize, usize)>) -> Vec<u8> {
        let mut run = run(order);
        let prefill = run.record_prefill(true).unwrap();
        let mut token = run.record_token(false).unwrap();
        if let Some((from, to)) = cut {
            token.remove_edge(from, to).unwrap();
        }
        let last = run.record_token(true).unwrap();
        for list in [prefill, token, last] {
            let executable = run.instantiate(list).unwrap();
            run.stream().replay(executable.as_ref()).unwrap();
        }
        let span = run.buffers().tokens;
        let mut bytes = vec![0; span.bytes];
        run.stream().get(span, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn every_legal_order_gives_the_same_bytes_and_a_deleted_edge_is_caught() {
        let expected = tokens(ReplayOrder::Recorded, None);
        for seed in 0..6 {
            assert!(tokens(ReplayOrder::Legal(seed), None) == expected, "order {seed}");
        }
        // Node 1 embeds the condition that node 0 makes.
        let caught = (0..12).any(|seed| tokens(ReplayOrder::Legal(seed), Some((0, 1))) != expected);
        assert!(caught, "no order showed the missing edge");
    }

    #[test]
    fn only_the_models_device_runs_it_and_copies_end_with_their_span() {
        let mut run = run(ReplayOrder::Recorded);
        let other: Arc<dyn Device> = Arc::new(EmulatedDevice::new(EmulatedOptions::default()).unwrap());
        let error = Run::new(run.model(), &other, Selection::default(), run.spec().clone()).map(drop);
        assert!(matches!(error, Err(Error::Internal(reason)) if reason.contains("another device")));
        let state = run.buffers().state;
        let longer = vec![0; state.bytes + 1];
        assert!(matches!(run.stream().put(state, &longer), Err(Error::Internal(_))));
        assert!(run.stream().put(state, &longer[1..]).is_ok());
    }

    #[test]
    fn a_prompts_rows_are_normed_once_for_each_product_that_needs_them() {
        let run = run(ReplayOrder::Recorded);
        let named = |list: &NodeList, op: &str| {
            list.nodes().iter().filter(|node| node.label.ends_with(op)).cloned().collect::<Vec<Node>>()
        };
        let prefill = run.record_prefill(true).unwrap();
        let layers = run.model.config.num_hidden_layers;
        assert_eq!(named(&prefill, "norm_rows").len(), 2 * layers);
        let x = run.buffers().prefill.x;
        for op in ["qkv", "gate_up"] {
            let products = named(&prefill, op);
            assert_eq!(products.len(), layers, "{op}");
            let norms = |node: &Node| node.reads.iter().any(|span| span.overlaps(&x));
            assert!(!products.iter().any(norms), "{op} norms rows itself");
        }
        // There is nobody to share them with.
        assert!(named(&prefill, "repeat_prompts").is_empty());
        // Few rows are normed by every block on its way.
        assert!(named(&run.record_token(false).unwrap(), "norm_rows").is_empty());
    }
}
