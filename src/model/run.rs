//! One generation bound to a device: memory, tables, and the node lists of prefill, token and image.
//!
//! A [`Run`] is what sessions drive token by token and what `verify` drives stage by stage; both replay the
//! same nodes. Everything that changes from token to token is in device memory, so no list is ever rebuilt.

use super::arena::{Arena, Layout, Life, Slot, Stage};
use super::backbone::{Cache, Rows, rope_table};
use super::flow_head::{DrawSource, FlowBuffers, FlowTaps, check_sizes};
use super::nextstep::NextStep;
use crate::device::{Buffer, Device, DeviceInfo, Node, NodeList, Span, Stream};
use crate::error::{Error, Result};
use crate::ops::params::{GenerationState, GridBarrier, SolverStep};
use crate::ops::{self, DType, Launch, Selection};
use std::sync::Arc;

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
}

/// Device bytes of a generation, known before anything is allocated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct RunBytes {
    /// Key/value cache.
    pub cache: u64,
    /// Activations, tables, draws and pictures.
    pub activations: u64,
}

struct Slots {
    ids: Slot,
    prefill_x: Slot,
    prefill_seq: Slot,
    prefill_pos: Slot,
    prefill_q: Slot,
    prefill_context: Slot,
    prefill_act: Slot,
    last_rows: Slot,
    x: Slot,
    row_seq: Slot,
    row_pos: Slot,
    q: Slot,
    context: Slot,
    act: Slot,
    partial: Slot,
    arrivals: Slot,
    rope: Slot,
    rope_offset: Slot,
    condition: Slot,
    time: Slot,
    cond: Slot,
    modulation: Slot,
    steps_table: Slot,
    guidance: Slot,
    draws: Slot,
    state: Slot,
    barrier: Slot,
    h: Slot,
    a: Slot,
    v_raw: Slot,
    tokens: Slot,
    vae: Slot,
    taps: Option<TapSlots>,
}

struct TapSlots {
    norm: Slot,
    scratch: Slot,
    forced_x: Slot,
    v_raw: Slot,
    v: Slot,
    x: Slot,
    sampled: Slot,
}

struct Planned {
    layout: Layout,
    slots: Slots,
    capacity: usize,
    splits: usize,
    cache_bytes: usize,
}

fn plan_memory(model: &NextStep, info: &DeviceInfo, spec: &RunSpec) -> Result<Planned> {
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
    let rows: usize = spec.prompts.iter().map(Vec::len).sum();
    let longest = spec.prompts.iter().map(Vec::len).max().unwrap_or(0);
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
    let slots = Slots {
        ids: layout.add("prefill.ids", rows, index, prefill)?,
        prefill_x: layout.add("prefill.x", rows * config.hidden_size, float, prefill)?,
        prefill_seq: layout.add("prefill.row_seq", rows, index, prefill)?,
        prefill_pos: layout.add("prefill.row_pos", rows, index, prefill)?,
        prefill_q: layout.add("prefill.q", rows * q_values, element, prefill)?,
        prefill_context: layout.add("prefill.context", rows * q_values, element, prefill)?,
        prefill_act: layout.add("prefill.act", rows * config.intermediate_size, element, prefill)?,
        last_rows: layout.add("prefill.last_rows", sequences, index, prefill)?,
        x: layout.add("x", sequences * config.hidden_size, float, both)?,
        row_seq: layout.add("row_seq", sequences, index, both)?,
        row_pos: layout.add("row_pos", sequences, index, both)?,
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
        rope: layout.add("rope", positions * config.head_dim, float, both)?,
        rope_offset: layout.add("rope_offset", sequences, index, both)?,
        condition: layout.add("condition", sequences * config.hidden_size, element, both)?,
        time: layout.add("flow.time", spec.steps.len() * dims.width, element, both)?,
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
        h: layout.add("flow.h", sequences * dims.width, float, decode)?,
        a: layout.add("flow.a", sequences * dims.mlp_width, float, decode)?,
        v_raw: layout.add("flow.v_raw", sequences * dims.token_dim, float, decode)?,
        tokens: layout.add("tokens", images * tokens * dims.token_dim, element, Life::ALWAYS)?,
        vae: layout.add("vae", vae_bytes, 1, Life::only(Stage::Image))?,
        taps: match spec.taps {
            false => None,
            true => {
                let per_step = spec.steps.len() * dims.token_dim;
                let all = Life::ALWAYS;
                Some(TapSlots {
                    norm: layout.add("tap.norm", rows.max(sequences) * config.hidden_size, element, all)?,
                    scratch: layout.add(
                        "tap.scratch",
                        rows.max(sequences) * config.hidden_size,
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

/// Bytes that [`Run::new`] will allocate.
pub fn plan(model: &NextStep, info: &DeviceInfo, spec: &RunSpec) -> Result<RunBytes> {
    let planned = plan_memory(model, info, spec)?;
    Ok(RunBytes { cache: 2 * planned.cache_bytes as u64, activations: planned.layout.bytes() as u64 })
}

/// A generation bound to device memory.
pub struct Run {
    model: Arc<NextStep>,
    stream: Box<dyn Stream>,
    sm_count: u32,
    spec: RunSpec,
    selection: Selection,
    arena: Arena,
    slots: Slots,
    cache: Cache,
    splits: usize,
    _cache_buffers: [Buffer; 2],
}

impl Run {
    /// Allocates, uploads the tables, embeds the evaluation times.
    pub fn new(
        model: Arc<NextStep>,
        device: &Arc<dyn Device>,
        selection: Selection,
        spec: RunSpec,
    ) -> Result<Run> {
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
        let mut run = Run {
            model,
            stream: device.stream()?,
            sm_count: info.sm_count,
            spec,
            selection,
            arena,
            slots,
            cache,
            splits,
            _cache_buffers: [keys, values],
        };
        run.upload_tables(device.as_ref())?;
        Ok(run)
    }

    fn upload_tables(&mut self, device: &dyn Device) -> Result<()> {
        let spec = self.spec.clone();
        let sequences = spec.prompts.len();
        let mut row_seq = Vec::new();
        let mut row_pos = Vec::new();
        let mut last_rows = Vec::new();
        for (sequence, prompt) in spec.prompts.iter().enumerate() {
            row_seq.extend(prompt.iter().map(|_| sequence as u32));
            row_pos.extend(0..prompt.len() as u32);
            last_rows.push(row_pos.len() as u32 - 1);
        }
        let ids: Vec<u32> = spec.prompts.concat();
        let lengths: Vec<u32> = spec.prompts.iter().map(|p| p.len() as u32).collect();
        let identity: Vec<u32> = (0..sequences as u32).collect();
        let rope = rope_table(&spec.frequencies, self.cache.positions, self.model.dtype);
        let guidance: Vec<f32> = spec.guidance.concat();
        let (state, barrier) = (GenerationState::default(), GridBarrier::default());
        let s = &self.slots;
        let uploads: [(Slot, &[u8]); 12] = [
            (s.ids, bytemuck::cast_slice(&ids)),
            (s.prefill_seq, bytemuck::cast_slice(&row_seq)),
            (s.prefill_pos, bytemuck::cast_slice(&row_pos)),
            (s.last_rows, bytemuck::cast_slice(&last_rows)),
            (s.row_seq, bytemuck::cast_slice(&identity)),
            // The first image token goes into the slot after the prompt.
            (s.row_pos, bytemuck::cast_slice(&lengths)),
            (s.rope, bytemuck::cast_slice(&rope)),
            (s.rope_offset, bytemuck::cast_slice(&spec.rope_offset)),
            (s.steps_table, bytemuck::cast_slice(&spec.steps)),
            (s.guidance, bytemuck::cast_slice(&guidance)),
            (s.state, bytemuck::bytes_of(&state)),
            (s.barrier, bytemuck::bytes_of(&barrier)),
        ];
        for (slot, bytes) in uploads {
            let span = self.arena.span(slot);
            if bytes.len() != span.bytes {
                return Err(Error::Internal(format!("table of {} bytes for {}", bytes.len(), span.bytes)));
            }
            self.stream.upload(span.ptr, bytes)?;
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
            self.stream.upload(span.ptr, bytemuck::cast_slice(draws))?;
        }
        self.stream.fill(self.arena.span(self.slots.arrivals), 0)?;
        let selection = self.stage_selection(Stage::Decode)?;
        let launch = self.launch(&selection);
        let time = self.arena.span(self.slots.time);
        self.model.flow.embed_times(&launch, device, self.stream.as_mut(), spec.sinusoid, time)
    }

    /// Variants of a stage. Fixed by the stage, never by the number of rows: see [`Selection::or`].
    fn stage_selection(&self, stage: Stage) -> Result<Selection> {
        let (rows, attention) = match stage {
            Stage::Prefill => ("tile", "plain"),
            Stage::Decode | Stage::Image => ("plain", "splitkv"),
        };
        let mut selection = self.selection.clone().or(&ops::attention::OP, attention)?;
        for op in [&ops::qkv::OP, &ops::o_proj::OP, &ops::gate_up::OP, &ops::down::OP, &ops::linear::OP] {
            selection = selection.or(op, rows)?;
        }
        Ok(selection)
    }

    fn launch<'a>(&self, selection: &'a Selection) -> Launch<'a> {
        Launch { selection, dtype: self.model.dtype, sm_count: self.sm_count, dependent: true }
    }

    /// The spec this run was made of.
    pub fn spec(&self) -> &RunSpec {
        &self.spec
    }

    /// The stream that everything runs on.
    pub fn stream(&mut self) -> &mut dyn Stream {
        self.stream.as_mut()
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.model.dtype
    }

    /// The cache, for verification.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    fn prefill_rows(&self) -> Rows {
        let s = &self.slots;
        Rows {
            rows: self.spec.prompts.iter().map(Vec::len).sum(),
            x: self.arena.span(s.prefill_x),
            row_seq: self.arena.span(s.prefill_seq),
            row_pos: self.arena.span(s.prefill_pos),
            q: self.arena.span(s.prefill_q),
            context: self.arena.span(s.prefill_context),
            act: self.arena.span(s.prefill_act),
            split: None,
        }
    }

    fn decode_rows(&self) -> Rows {
        let s = &self.slots;
        Rows {
            rows: self.spec.prompts.len(),
            x: self.arena.span(s.x),
            row_seq: self.arena.span(s.row_seq),
            row_pos: self.arena.span(s.row_pos),
            q: self.arena.span(s.q),
            context: self.arena.span(s.context),
            act: self.arena.span(s.act),
            split: Some(ops::attention::SplitScratch {
                splits: self.splits,
                partial: self.arena.span(s.partial),
                arrivals: self.arena.span(s.arrivals),
            }),
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

    /// Nodes from prompt ids to the residual rows that the first image token is sampled from. Without `embed`
    /// the residual stream is taken as it stands in memory.
    pub fn record_prefill(&self, embed: bool) -> Result<NodeList> {
        let mut list = NodeList::new();
        let selection = self.stage_selection(Stage::Prefill)?;
        let launch = self.launch(&selection);
        let rows = self.prefill_rows();
        if embed {
            let ids = self.arena.span(self.slots.ids);
            self.model.backbone.record_embed(&launch, &mut list, "prefill", ids, &rows)?;
        }
        self.model.backbone.record_layers(&launch, &mut list, "prefill", &rows, &self.cache)?;
        let gather = ops::gather_rows::Args {
            x: rows.x,
            index: self.arena.span(self.slots.last_rows),
            y: self.arena.span(self.slots.x),
            rows: self.spec.prompts.len(),
            source_rows: rows.rows,
            hidden: self.model.config.hidden_size,
        };
        list.push(ops::gather_rows::node(&launch, "prefill.gather_rows", &gather)?);
        Ok(list)
    }

    /// Final norm of all prompt rows into the `norm` tap; verification only.
    pub fn record_prefill_norm(&self) -> Result<NodeList> {
        let mut list = NodeList::new();
        let selection = self.stage_selection(Stage::Decode)?;
        let rows = self.prefill_rows();
        let taps = self.slots.taps.as_ref();
        let taps = taps.ok_or_else(|| Error::Internal("the norm of all prompt rows needs taps".into()))?;
        let (norm, scratch) = (Some(self.arena.span(taps.norm)), self.arena.span(taps.scratch));
        let launch = self.launch(&selection);
        let backbone = &self.model.backbone;
        backbone.record_condition(&launch, &mut list, "prefill", rows.x, rows.rows, None, norm, scratch)?;
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
        backbone.record_condition(&launch, list, "decode", x, rows, pos_embed, norm, condition)
    }

    /// Nodes from the condition to the sampled token and the next residual rows. `forced` replaces the state
    /// before every evaluation by the tap's contents.
    pub fn record_sample(&self, list: &mut NodeList, forced: bool) -> Result<()> {
        let selection = self.stage_selection(Stage::Decode)?;
        let launch = self.launch(&selection);
        let s = &self.slots;
        let span = |slot: Slot| self.arena.span(slot);
        let mut taps = self.buffers().taps;
        if !forced {
            taps.forced_x = None;
        }
        let (draw_slots, source) = match &self.spec.draws {
            Draws::Philox(source) => (1, Some(*source)),
            Draws::Recorded(_) => (self.spec.tokens_total(), None),
        };
        let buffers = FlowBuffers {
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
            draw_slots,
            state: span(s.state),
            barrier: span(s.barrier),
            h: span(s.h),
            a: span(s.a),
            v_raw: span(s.v_raw),
            tokens: span(s.tokens),
            x_next: span(s.x),
            use_norm: self.spec.use_norm,
            rescale: self.spec.rescale,
            taps,
        };
        self.model.flow.record(&launch, list, &buffers, source)
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
    pub fn record_image(&self) -> Result<(NodeList, super::vae::Decoded)> {
        let mut list = NodeList::new();
        let selection = self.stage_selection(Stage::Image)?;
        let launch = self.launch(&selection);
        let decoded = self.model.vae.record(
            &launch,
            &mut list,
            self.arena.span(self.slots.tokens),
            self.spec.images,
            self.spec.grid,
            self.arena.span(self.slots.vae),
        )?;
        Ok((list, decoded))
    }

    /// Runs a list once, calling `after` with every finished node: for taps.
    pub fn run_once(
        &mut self,
        list: &NodeList,
        mut after: impl FnMut(&Node, &mut dyn Stream) -> Result<()>,
    ) -> Result<()> {
        for node in list.nodes() {
            self.stream.launch(node)?;
            after(node, self.stream.as_mut())?;
        }
        self.stream.synchronize()
    }

    /// Declares a stage over: its buffers are filled with NaN if the spec asks for it.
    pub fn end_stage(&mut self, stage: Stage) -> Result<()> {
        if self.spec.poison {
            let dying: Vec<Span> = self.arena.dying_after(stage).collect();
            for span in dying {
                self.stream.fill(span, 0xff)?;
            }
        }
        Ok(())
    }

    /// The device's generation state, after everything enqueued so far.
    pub fn state(&mut self) -> Result<GenerationState> {
        let mut state = GenerationState::default();
        let span = self.arena.span(self.slots.state);
        self.stream.download(span.ptr, bytemuck::bytes_of_mut(&mut state))?;
        Ok(state)
    }
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

    /// Two tokens of the demo model with the replays in `order`; `cut` drops one edge of the token list first.
    fn tokens(order: ReplayOrder, cut: Option<(usize, usize)>) -> Vec<u8> {
        let options = EmulatedOptions { replay_order: order, ..EmulatedOptions::default() };
        let device: Arc<dyn Device> = Arc::new(EmulatedDevice::new(options).unwrap());
        let engine = Engine::load(&ModelSource::Demo, device.clone(), EngineOptions::default()).unwrap();
        let mut request = engine.request("a red circle on a blue background").unwrap();
        (request.width, request.height, request.seed) = (32, 16, 3);
        request.sampler.steps = 2;
        let spec = engine.prepare(&request).unwrap().spec;
        let mut run = Run::new(engine.model.clone(), &device, Selection::default(), spec).unwrap();
        let prefill = run.record_prefill(true).unwrap();
        let mut token = run.record_token(false).unwrap();
        if let Some((from, to)) = cut {
            token.remove_edge(from, to).unwrap();
        }
        let last = run.record_token(true).unwrap();
        for list in [prefill, token, last] {
            let executable = run.stream().instantiate(Arc::new(list)).unwrap();
            run.stream().replay(executable.as_ref()).unwrap();
        }
        let span = run.buffers().tokens;
        let mut bytes = vec![0; span.bytes];
        run.stream().download(span.ptr, &mut bytes).unwrap();
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
}
