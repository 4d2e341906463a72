//! One text generation bound to a device.
//!
//! A [`TextRun`] has the transformer's passes, memory plan and cache in common with a [`Run`](super::run::Run). Its
//! token list embeds the id that the host chose from the last logits, so unlike the image loop it waits for the host
//! once per token. Position and lengths live in device memory; no list is ever rebuilt.
//!
//! What may be launched is as in a [`Run`](super::run): lists name its own buffers and its model's weights, its tables
//! are written by it alone, and the token list is replayed at most `max_tokens` times. An id that the vocabulary lacks
//! gives NaN.

use super::arena::{Arena, Layout, Life, Slot, Stage};
use super::backbone::{Cache, Rows, rope_table};
use super::lm_head::{LmHead, Logits};
use super::nextstep::NextStep;
use super::plan::{RunBytes, SourceSlots, plan_sources, product_rows};
use super::run::{SourceParts, stage_selection};
use super::sources::Sources;
use crate::device::{Buffer, Copies, Device, DeviceInfo, Executable, NodeList, Span, Stream};
use crate::error::{Error, Result};
use crate::ops::params::GenerationState;
use crate::ops::product::ProductScratch;
use crate::ops::{self, Launch, Selection};
use std::sync::Arc;

/// Everything that decides one text generation.
#[derive(Clone, Debug)]
pub struct TextSpec {
    /// Token ids of every sequence.
    pub prompts: Vec<Vec<u32>>,
    /// Input pictures and the rows of `prompts` that show them.
    pub sources: Sources,
    /// Most tokens that are written to a sequence.
    pub max_tokens: usize,
    /// Rotation frequencies, `[d / 2]`.
    pub frequencies: Vec<f32>,
    /// Added to every position of a sequence for its rotation angles (padding that the official code counts).
    pub rope_offset: Vec<u32>,
    /// Allocate the buffers that verification reads.
    pub taps: bool,
    /// Fill buffers with NaN when their planned life ends.
    pub poison: bool,
}

struct Slots {
    ids: Slot,
    prefill_x: Slot,
    prefill_seq: Slot,
    prefill_pos: Slot,
    prefill_q: Slot,
    prefill_normed: Slot,
    prefill_context: Slot,
    prefill_act: Slot,
    last_rows: Slot,
    next_ids: Slot,
    x: Slot,
    row_seq: Slot,
    row_pos: Slot,
    normed: Slot,
    q: Slot,
    context: Slot,
    act: Slot,
    partial: Slot,
    arrivals: Slot,
    product_partial: Slot,
    product_arrivals: Slot,
    rope: Slot,
    rope_offset: Slot,
    state: Slot,
    hidden: Slot,
    logits: Slot,
    sources: Option<SourceSlots>,
    taps: Option<TapSlots>,
}

/// Of all prompt rows; verification only.
struct TapSlots {
    norm: Slot,
    hidden: Slot,
    logits: Slot,
}

struct Planned {
    layout: Layout,
    slots: Slots,
    capacity: usize,
    splits: usize,
    cache_bytes: usize,
}

fn plan_memory(model: &NextStep, info: &DeviceInfo, spec: &TextSpec) -> Result<Planned> {
    let (config, element) = (&model.config, model.dtype.bytes());
    let (float, index) = (size_of::<f32>(), size_of::<u32>());
    let sequences = spec.prompts.len();
    let rows: usize = spec.prompts.iter().map(Vec::len).sum();
    let longest = spec.prompts.iter().map(Vec::len).max().unwrap_or(0);
    if sequences == 0 || spec.prompts.iter().any(Vec::is_empty) || spec.rope_offset.len() != sequences {
        return Err(Error::Internal(format!("{sequences} text prompts of {rows} tokens in all")));
    }
    // The last token is never fed back, but a slot for it keeps `advance` inside the cache.
    let too_long = || Error::request("max_tokens", "the key/value cache overflows");
    let capacity = longest.checked_add(spec.max_tokens).ok_or_else(too_long)?;
    let capacity = capacity.checked_next_multiple_of(16).ok_or_else(too_long)?;
    let positions = capacity + spec.rope_offset.iter().copied().max().unwrap_or(0) as usize;
    let heads_kv = config.num_key_value_heads;
    let cache_bytes = [config.num_hidden_layers, sequences, capacity, heads_kv * config.head_dim, element]
        .into_iter()
        .try_fold(1usize, usize::checked_mul)
        .ok_or_else(too_long)?;
    // For one sequence: the order of summation must not depend on how many there are.
    let splits = ops::attention::splits(info.sm_count, 1, heads_kv, capacity);
    let q_values = config.num_attention_heads * config.head_dim;
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    let partial = sequences * config.num_attention_heads * splits * (config.head_dim + 2);
    // Taps run the products of few rows on whole prompts.
    let wide = product_rows(model, sequences, &[rows, spec.sources.tokens()]);
    let wide = if spec.taps { wide.max(rows) } else { wide };
    let (product_floats, counters) = ProductScratch::sizes(info.sm_count, wide);
    let (prefill, decode) = (Life::only(Stage::Prefill), Life::only(Stage::Decode));
    let both = Life::between(Stage::Prefill, Stage::Decode);
    let mut layout = Layout::default();
    let mut add = |label: &str, elements, bytes, life| layout.add(label, elements, bytes, life);
    let mut slots = Slots {
        ids: add("prefill.ids", rows, index, prefill)?,
        prefill_x: add("prefill.x", rows * hidden, float, prefill)?,
        prefill_seq: add("prefill.row_seq", rows, index, prefill)?,
        prefill_pos: add("prefill.row_pos", rows, index, prefill)?,
        prefill_q: add("prefill.q", rows * q_values, element, prefill)?,
        prefill_normed: add("prefill.normed", rows * hidden, element, prefill)?,
        prefill_context: add("prefill.context", rows * q_values, element, prefill)?,
        prefill_act: add("prefill.act", rows * config.intermediate_size, element, prefill)?,
        last_rows: add("prefill.last_rows", sequences, index, prefill)?,
        next_ids: add("next_ids", sequences, index, decode)?,
        x: add("x", sequences * hidden, float, both)?,
        row_seq: add("row_seq", sequences, index, both)?,
        row_pos: add("row_pos", sequences, index, both)?,
        normed: add("normed", sequences * hidden, element, decode)?,
        q: add("q", sequences * q_values, element, decode)?,
        context: add("context", sequences * q_values, element, decode)?,
        act: add("act", sequences * config.intermediate_size, element, decode)?,
        partial: add("attention.partial", partial, float, both)?,
        arrivals: add("attention.arrivals", sequences * heads_kv, index, both)?,
        product_partial: add("product.partial", product_floats, float, both)?,
        product_arrivals: add("product.arrivals", counters, index, both)?,
        rope: add("rope", positions * config.head_dim, float, both)?,
        rope_offset: add("rope_offset", sequences, index, both)?,
        state: add("state", 1, size_of::<GenerationState>(), both)?,
        hidden: add("text.hidden", sequences * hidden, element, both)?,
        logits: add("text.logits", sequences * vocab, float, both)?,
        sources: None,
        taps: match spec.taps {
            false => None,
            true => Some(TapSlots {
                norm: add("tap.norm", rows * hidden, element, both)?,
                hidden: add("tap.hidden", rows * hidden, element, both)?,
                logits: add("tap.logits", rows * vocab, float, both)?,
            }),
        },
    };
    slots.sources = plan_sources(model, &spec.sources, rows, &mut layout)?;
    Ok(Planned { layout, slots, capacity, splits, cache_bytes })
}

/// Bytes that [`TextRun::new`] will allocate.
pub fn plan(model: &NextStep, info: &DeviceInfo, spec: &TextSpec) -> Result<RunBytes> {
    let planned = plan_memory(model, info, spec)?;
    Ok(RunBytes { cache: 2 * planned.cache_bytes as u64, activations: planned.layout.bytes() as u64 })
}

/// A text generation bound to device memory.
pub struct TextRun {
    model: Arc<NextStep>,
    stream: Box<dyn Stream>,
    sm_count: u32,
    spec: TextSpec,
    selection: Selection,
    arena: Arena,
    slots: Slots,
    cache: Cache,
    splits: usize,
    _cache_buffers: [Buffer; 2],
}

impl TextRun {
    /// Allocates and uploads the tables.
    pub fn new(
        model: Arc<NextStep>,
        device: &Arc<dyn Device>,
        selection: Selection,
        spec: TextSpec,
    ) -> Result<TextRun> {
        model.check_device(device)?;
        let info = device.info();
        let Planned { layout, slots, capacity, splits, cache_bytes } = plan_memory(&model, &info, &spec)?;
        let keys = device.alloc(cache_bytes, "cache.keys")?;
        let values = device.alloc(cache_bytes, "cache.values")?;
        let arena = layout.bind(device.as_ref(), "arena")?;
        let offset = spec.rope_offset.iter().copied().max().unwrap_or(0) as usize;
        let cache = Cache {
            keys: keys.span(),
            values: values.span(),
            sequences: spec.prompts.len(),
            capacity,
            rope: arena.span(slots.rope),
            positions: capacity + offset,
            rope_offset: arena.span(slots.rope_offset),
        };
        let mut run = TextRun {
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
        run.upload_tables()?;
        Ok(run)
    }

    fn upload_tables(&mut self) -> Result<()> {
        let prompts = &self.spec.prompts;
        let (mut row_seq, mut row_pos, mut last_rows) = (Vec::new(), Vec::new(), Vec::new());
        for (sequence, prompt) in prompts.iter().enumerate() {
            row_seq.extend(prompt.iter().map(|_| sequence as u32));
            row_pos.extend(0..prompt.len() as u32);
            last_rows.push(row_pos.len() as u32 - 1);
        }
        let ids: Vec<u32> = prompts.concat();
        // The first written token goes into the slot after the prompt.
        let lengths: Vec<u32> = prompts.iter().map(|p| p.len() as u32).collect();
        let identity: Vec<u32> = (0..prompts.len() as u32).collect();
        let rope = rope_table(&self.spec.frequencies, self.cache.positions, self.model.dtype);
        let state = GenerationState::default();
        let s = &self.slots;
        let uploads: [(Slot, &[u8]); 9] = [
            (s.ids, bytemuck::cast_slice(&ids)),
            (s.prefill_seq, bytemuck::cast_slice(&row_seq)),
            (s.prefill_pos, bytemuck::cast_slice(&row_pos)),
            (s.last_rows, bytemuck::cast_slice(&last_rows)),
            (s.row_seq, bytemuck::cast_slice(&identity)),
            (s.row_pos, bytemuck::cast_slice(&lengths)),
            (s.rope, bytemuck::cast_slice(&rope)),
            (s.rope_offset, bytemuck::cast_slice(&self.spec.rope_offset)),
            (s.state, bytemuck::bytes_of(&state)),
        ];
        for (slot, bytes) in uploads {
            let span = self.arena.span(slot);
            if bytes.len() != span.bytes {
                return Err(Error::Internal(format!("table of {} bytes for {}", bytes.len(), span.bytes)));
            }
            self.stream.put(span, bytes)?;
        }
        for counters in [s.arrivals, s.product_arrivals] {
            self.stream.set(self.arena.span(counters), 0)?;
        }
        let parts = SourceParts::new(&self.model, &self.arena, &self.slots.sources, &self.spec.sources);
        parts.upload(self.stream.as_mut(), &self.spec.sources.rows)
    }

    fn launch<'a>(&self, selection: &'a Selection) -> Launch<'a> {
        Launch { selection, dtype: self.model.dtype, sm_count: self.sm_count, dependent: true }
    }

    fn scratch(&self) -> Option<ProductScratch> {
        Some(ProductScratch {
            partial: self.arena.span(self.slots.product_partial),
            arrivals: self.arena.span(self.slots.product_arrivals),
            next: None,
        })
    }

    fn head(&self) -> Result<&LmHead> {
        self.model.text.as_ref().ok_or_else(|| Error::Internal("text from a model without LM head".into()))
    }

    /// Enqueues a list that this run recorded.
    pub fn enqueue(&mut self, list: &NodeList) -> Result<()> {
        // SAFETY: see the module.
        list.nodes().iter().try_for_each(|node| unsafe { self.stream.launch(node) })
    }

    /// Prepares a list that this run recorded. The executable goes before the run.
    pub fn instantiate(&mut self, list: NodeList) -> Result<Box<dyn Executable>> {
        // SAFETY: see the module.
        unsafe { self.stream.instantiate(Arc::new(list)) }
    }

    /// The stream that everything runs on.
    pub fn stream(&mut self) -> &mut dyn Stream {
        self.stream.as_mut()
    }

    /// Encodes the input pictures. `between` is called before each and may end it.
    pub fn encode_sources(&mut self, between: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let selection = stage_selection(&self.model, &self.selection, Stage::Prefill)?;
        let launch = self.launch(&selection);
        let parts = SourceParts::new(&self.model, &self.arena, &self.slots.sources, &self.spec.sources);
        parts.encode(&launch, self.stream.as_mut(), between)
    }

    fn prefill_rows(&self) -> Rows {
        let span = |slot: Slot| self.arena.span(slot);
        let s = &self.slots;
        Rows {
            rows: self.spec.prompts.iter().map(Vec::len).sum(),
            x: span(s.prefill_x),
            row_seq: span(s.prefill_seq),
            row_pos: span(s.prefill_pos),
            normed: span(s.prefill_normed),
            q: span(s.prefill_q),
            context: span(s.prefill_context),
            act: span(s.prefill_act),
            split: None,
            scratch: self.scratch(),
        }
    }

    fn decode_rows(&self) -> Rows {
        let span = |slot: Slot| self.arena.span(slot);
        let s = &self.slots;
        Rows {
            rows: self.spec.prompts.len(),
            x: span(s.x),
            row_seq: span(s.row_seq),
            row_pos: span(s.row_pos),
            normed: span(s.normed),
            q: span(s.q),
            context: span(s.context),
            act: span(s.act),
            split: Some(ops::attention::SplitScratch {
                splits: self.splits,
                partial: span(s.partial),
                arrivals: span(s.arrivals),
            }),
            scratch: self.scratch(),
        }
    }

    fn record_logits(&self, list: &mut NodeList, label: &str) -> Result<()> {
        let selection = stage_selection(&self.model, &self.selection, Stage::Decode)?;
        let io = Logits {
            x: self.arena.span(self.slots.x),
            rows: self.spec.prompts.len(),
            norm_out: None,
            hidden: self.arena.span(self.slots.hidden),
            logits: self.arena.span(self.slots.logits),
            scratch: self.scratch(),
        };
        let (config, norm) = (&self.model.config, self.model.backbone.final_norm());
        self.head()?.record(&self.launch(&selection), list, label, (config, norm), &io)
    }

    /// Nodes from the prompts, and the tokens of encoded pictures, to the logits of the first token to be written.
    pub fn record_prefill(&self) -> Result<NodeList> {
        let mut list = NodeList::new();
        let selection = stage_selection(&self.model, &self.selection, Stage::Prefill)?;
        let launch = self.launch(&selection);
        let rows = self.prefill_rows();
        let parts = SourceParts::new(&self.model, &self.arena, &self.slots.sources, &self.spec.sources);
        let source = parts.record_rows(&launch, &mut list, self.scratch())?;
        let backbone = &self.model.backbone;
        backbone.record_embed(
            &launch,
            &mut list,
            "prefill",
            self.arena.span(self.slots.ids),
            source,
            &rows,
        )?;
        backbone.record_layers(&launch, &mut list, "prefill", &rows, &self.cache)?;
        let gather = ops::gather_rows::Args {
            x: rows.x,
            index: self.arena.span(self.slots.last_rows),
            y: self.arena.span(self.slots.x),
            rows: self.spec.prompts.len(),
            source_rows: rows.rows,
            hidden: self.model.config.hidden_size,
        };
        list.push(ops::gather_rows::node(&launch, "prefill.gather_rows", &gather)?);
        self.record_logits(&mut list, "prefill")?;
        Ok(list)
    }

    /// The list of one token, replayed unchanged: the ids of [`set_next`](Self::set_next) through the transformer, to
    /// the logits of the token after.
    pub fn record_token(&self) -> Result<NodeList> {
        let mut list = NodeList::new();
        let selection = stage_selection(&self.model, &self.selection, Stage::Decode)?;
        let launch = self.launch(&selection);
        let rows = self.decode_rows();
        let backbone = &self.model.backbone;
        let ids = self.arena.span(self.slots.next_ids);
        backbone.record_embed(&launch, &mut list, "decode", ids, None, &rows)?;
        backbone.record_layers(&launch, &mut list, "decode", &rows, &self.cache)?;
        self.record_logits(&mut list, "decode")?;
        let advance = ops::advance::Args {
            state: self.arena.span(self.slots.state),
            row_pos: rows.row_pos,
            rows: rows.rows,
        };
        list.push(ops::advance::node(&launch, "decode.advance", &advance)?);
        Ok(list)
    }

    /// Nodes from all prompt rows to their norms and logits, after prefill; verification only.
    pub fn record_prompt_logits(&self) -> Result<(NodeList, TextTaps)> {
        let taps = self.slots.taps.as_ref();
        let taps = taps.ok_or_else(|| Error::Internal("the logits of all prompt rows need taps".into()))?;
        let (norm, hidden, logits) =
            (self.arena.span(taps.norm), self.arena.span(taps.hidden), self.arena.span(taps.logits));
        let rows = self.prefill_rows();
        let io = Logits {
            x: rows.x,
            rows: rows.rows,
            norm_out: Some(norm),
            hidden,
            logits,
            scratch: self.scratch(),
        };
        let mut list = NodeList::new();
        let selection = stage_selection(&self.model, &self.selection, Stage::Decode)?;
        let (config, norm_w) = (&self.model.config, self.model.backbone.final_norm());
        self.head()?.record(&self.launch(&selection), &mut list, "prompt", (config, norm_w), &io)?;
        Ok((list, TextTaps { norm, logits }))
    }

    /// The ids, one per sequence, that the next token list embeds.
    pub fn set_next(&mut self, ids: &[u32]) -> Result<()> {
        let span = self.arena.span(self.slots.next_ids);
        if size_of_val(ids) != span.bytes {
            return Err(Error::Internal(format!("{} ids for {} bytes", ids.len(), span.bytes)));
        }
        self.stream.put(span, bytemuck::cast_slice(ids))
    }

    /// Where the logits are, `[sequences, V]` f32.
    pub fn logits_span(&self) -> Span {
        self.arena.span(self.slots.logits)
    }

    /// The logits of everything enqueued so far, `[sequences, V]`.
    pub fn logits(&mut self) -> Result<Vec<f32>> {
        let span = self.logits_span();
        let mut logits = vec![0f32; span.bytes / size_of::<f32>()];
        self.stream.get(span, bytemuck::cast_slice_mut(&mut logits))?;
        Ok(logits)
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
}

impl Drop for TextRun {
    fn drop(&mut self) {
        // The device may still be working in memory that is about to be freed; an error changes nothing here.
        let _ = self.stream.synchronize();
    }
}

/// Spans that verification reads.
#[derive(Clone, Copy, Debug)]
pub struct TextTaps {
    /// `[rows, D]` E: final norm of every prompt row.
    pub norm: Span,
    /// `[rows, V]` f32.
    pub logits: Span,
}
