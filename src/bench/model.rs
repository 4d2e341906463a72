//! A whole model: the latency of one token by parts and position, the prompt, the VAE, and pictures from end to end.

use super::bytes::{OpBytes, count, total};
use super::ceilings::{Ceilings, random_buffer};
use super::samples::{Effort, Row, time};
use crate::device::{Copies, Device, Executable, NodeList, Stream};
use crate::engine::MAX_POSITIONS;
use crate::error::{Error, Result};
use crate::model::backbone::rope_frequencies;
use crate::model::flow_head::DrawSource;
use crate::model::nextstep::NextStep;
use crate::model::plan::{Draws, RunSpec};
use crate::model::run::Run;
use crate::model::sources::Sources;
use crate::ops::bench::{self, Random};
use crate::ops::params::GenerationState;
use crate::ops::product::{Layout, ProductScratch, Weight};
use crate::ops::{self, DType, Launch, Selection};
use crate::request::SamplerConfig;
use crate::sampler::{GuidanceSchedule, Sampler, sinusoids};
use crate::weights::pack::{Pairing, Tiles};
use std::collections::BTreeSet;
use std::mem::offset_of;
use std::sync::Arc;
use std::time::Instant;

/// What is generated, and what of it is timed.
#[derive(Clone, Debug)]
pub struct Options {
    /// Network evaluations per token.
    pub steps: u32,
    /// Guidance branches, 1 to 3.
    pub branches: usize,
    /// Pictures in the batch.
    pub images: usize,
    /// Tokens of every prompt.
    pub prompt: usize,
    /// Filled cache slots at which the last token is timed, prompt included.
    pub positions: Vec<usize>,
    /// Width and height in pixels of the pictures that are decoded.
    pub sizes: Vec<(usize, usize)>,
    /// Whether pictures are made from end to end.
    pub end_to_end: bool,
    /// Variants chosen by name.
    pub kernels: Selection,
    /// How often a row is timed.
    pub effort: Effort,
    /// How often a picture is made; all must have the same tokens and pixels.
    pub pictures: usize,
    /// Of weights and prompts.
    pub seed: u64,
}

/// The settings of one generation with prompts of random ids.
pub fn spec(model: &NextStep, options: &Options, grid: (usize, usize)) -> Result<RunSpec> {
    let config = &model.config;
    let (images, branches) = (options.images, options.branches);
    if images == 0 || !(1..=3).contains(&branches) || options.prompt == 0 {
        let reason = format!("{images} images, {branches} branches, prompts of {} tokens", options.prompt);
        return Err(Error::request("bench", reason));
    }
    let sampler = SamplerConfig {
        sampler: Sampler::Aug,
        steps: options.steps,
        guidance_scale: if branches > 1 { 7.5 } else { 1.0 },
        image_guidance_scale: if branches > 2 { 1.5 } else { 1.0 },
        guidance_schedule: GuidanceSchedule::Constant,
        timesteps_shift: 1.0,
        noise_level: None,
        use_norm: false,
        rescale: false,
    };
    let solver = sampler.solver()?;
    let times = match model.dtype {
        DType::F32 => solver.times.clone(),
        DType::Bf16 => solver.times_bf16(),
    };
    let special = [config.boi, config.eoi, config.image_placeholder_id];
    let ids: Vec<u32> = (0..config.vocab_size as u32).filter(|id| !special.contains(id)).collect();
    if ids.is_empty() {
        return Err(Error::request("bench", "the vocabulary has no words"));
    }
    let mut state = options.seed ^ 0x9e37_79b9_7f4a_7c15;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ids[(state >> 33) as usize % ids.len()]
    };
    // As in a request: the images of a batch have one prompt per branch.
    let mut prompts: Vec<Vec<u32>> = Vec::with_capacity(images * branches);
    for _ in 0..branches {
        let prompt: Vec<u32> = (0..options.prompt).map(|_| next()).collect();
        prompts.extend(std::iter::repeat_n(prompt, images));
    }
    Ok(RunSpec {
        rope_offset: vec![0; prompts.len()],
        sources: Sources::default(),
        prompts,
        images,
        branches,
        grid,
        steps: solver.steps.iter().map(Into::into).collect(),
        sinusoid: sinusoids(&times),
        guidance: sampler.guidance(grid.0 * grid.1),
        draws_per_token: Sampler::Aug.draws_per_token(options.steps) as usize,
        draws: Draws::Philox(DrawSource {
            seed: options.seed,
            base_offset: 0,
            first_image: 0,
            round_bf16: false,
        }),
        use_norm: false,
        rescale: false,
        frequencies: rope_frequencies(config.rope_theta, config.head_dim),
        pos_embed: config.use_gen_pos_embed,
        preview_every_rows: None,
        taps: false,
        poison: false,
    })
}

/// Most tokens of a picture, as in any request.
const MAX_TOKENS: usize = 16_384;

/// The grid of tokens of a picture.
pub fn grid(model: &NextStep, (width, height): (usize, usize)) -> Result<(usize, usize)> {
    let unit = model.down_factor();
    if width == 0 || height == 0 || !width.is_multiple_of(unit) || !height.is_multiple_of(unit) {
        let reason = format!("{width}x{height}: both sides must be multiples of {unit}");
        return Err(Error::request("size", reason));
    }
    let grid = (height / unit, width / unit);
    match grid.0.checked_mul(grid.1) {
        Some(tokens) if tokens <= MAX_TOKENS => Ok(grid),
        _ => Err(Error::request("size", format!("{width}x{height}: more than {MAX_TOKENS} tokens"))),
    }
}

/// Times everything that `options` ask for; `done` is shown every row as it is finished.
pub fn run(
    device: &Arc<dyn Device>,
    model: &Arc<NextStep>,
    options: &Options,
    ceilings: &Ceilings,
    done: &mut dyn FnMut(&Row),
) -> Result<Vec<Row>> {
    let mut rows = Rows { rows: Vec::new(), ceilings, done };
    let limit = if model.config.use_gen_pos_embed { model.backbone.pos_rows() } else { usize::MAX };
    tokens(device, model, options, limit, &mut rows)?;
    for &size in &options.sizes {
        let (height, width) = grid(model, size)?;
        if height * width > limit {
            rows.push(Row {
                test: format!("image {}x{}", size.0, size.1),
                note: format!("the model has positions for {limit} tokens"),
                ..Row::default()
            });
            continue;
        }
        pictures(device, model, options, size, &mut rows)?;
    }
    Ok(rows.rows)
}

fn separator(note: &str) -> &'static str {
    if note.is_empty() { "" } else { "; " }
}

struct Rows<'a> {
    rows: Vec<Row>,
    ceilings: &'a Ceilings,
    done: &'a mut dyn FnMut(&Row),
}

impl Rows<'_> {
    fn push(&mut self, mut row: Row) {
        // Bytes and operations together bound a row from below; where operations do, the note says so.
        let math_ms = row.flops as f64 / self.ceilings.gemm.tflop_per_s() / 1e9;
        if row.flops > 0 && math_ms > self.ceilings.floor_ms(row.bytes) {
            row.note += &format!("{}floor by operations {math_ms:.3} ms", separator(&row.note));
        }
        (self.done)(&row);
        self.rows.push(row);
    }
}

/// Kernels that a list runs, each once: which variants were timed is never left to a guess.
fn kernels_of(list: &NodeList) -> String {
    let symbols: BTreeSet<&str> = list.nodes().iter().map(|node| node.kernel.symbol).collect();
    symbols.into_iter().collect::<Vec<_>>().join(" ")
}

/// A list ready to be replayed, and what it moves.
struct Part {
    executable: Box<dyn Executable>,
    kernels: String,
    ops: Vec<OpBytes>,
}

fn part(run: &mut Run, list: NodeList, context: usize) -> Result<Part> {
    let (kernels, ops) = (kernels_of(&list), count(run, &list, context));
    Ok(Part { executable: run.instantiate(list)?, kernels, ops })
}

/// Random values in the cache and the residual rows, so that a position can be timed without making all tokens
/// before it.
fn fill_state(device: &Arc<dyn Device>, run: &mut Run) -> Result<()> {
    let sms = device.info().sm_count;
    let (cache, x, dtype) = (*run.cache(), run.buffers().decode.x, run.dtype());
    let random = |seed| Random { seed, mean: 0.0, deviation: 1.0 };
    for (seed, span, dtype) in [(11, cache.keys, dtype), (12, cache.values, dtype), (13, x, DType::F32)] {
        run.enqueue(&bench::fill(sms, dtype, span, random(seed))?)?;
    }
    run.stream().synchronize()
}

fn tokens(
    device: &Arc<dyn Device>,
    model: &Arc<NextStep>,
    options: &Options,
    limit: usize,
    rows: &mut Rows<'_>,
) -> Result<()> {
    let Some(&longest) = options.positions.iter().max() else { return Ok(()) };
    if let Some(short) = options.positions.iter().find(|&&position| position <= options.prompt) {
        let reason = format!("{short}: a token comes after its prompt of {} tokens", options.prompt);
        return Err(Error::request("positions", reason));
    }
    if longest > MAX_POSITIONS {
        return Err(Error::request("positions", format!("{longest}: at most {MAX_POSITIONS}")));
    }
    let tokens = longest - options.prompt;
    let spec = spec(model, options, (1, tokens))?;
    let mut run = Run::new(model.clone(), device, options.kernels.clone(), spec)?;
    fill_state(device, &mut run)?;
    prefill(&mut run, options, rows)?;
    let shape = format!(
        "{} images x {} branches, {} evaluations, prompt {}",
        options.images, options.branches, options.steps, options.prompt
    );
    let lm_head = lm_head(device, model, options)?;
    let mut last = Vec::new();
    for &position in &options.positions {
        let index = (position - options.prompt - 1).min(limit - 1);
        let (row_pos, state) = (run.buffers().decode.row_pos, run.buffers().state);
        let slots = vec![position as u32 - 1; row_pos.bytes / 4];
        let token = state.slice(offset_of!(GenerationState, token), size_of::<u32>());
        let place = |stream: &mut dyn Stream| {
            stream.put(row_pos, bytemuck::cast_slice(&slots))?;
            // No more than this: what a token before reported stays to be seen.
            stream.put(token, bytemuck::bytes_of(&(index as u32)))
        };
        let mut lists: [NodeList; 4] = std::array::from_fn(|_| NodeList::new());
        run.record_step(&mut lists[0])?;
        run.record_condition(&mut lists[1])?;
        run.record_sample(&mut lists[2], false)?;
        lists[3] = run.record_token(false)?;
        // Of two the last node moves on to the next slot, so that the place is set before every run. Not of the others:
        // uploads wait for one another, and work of microseconds would then be timed on a stream that has run dry.
        let parts = [("LLM decoder", true), ("projector", false), ("FM head", false), ("total", true)];
        let mut medians = [0.0; 4];
        for ((list, (name, moves_on)), median) in lists.into_iter().zip(parts).zip(&mut medians) {
            let nodes = list.len();
            let part = part(&mut run, list, position)?;
            place(run.stream())?;
            let mut before = |stream: &mut dyn Stream| if moves_on { place(stream) } else { Ok(()) };
            let samples_ms = time(run.stream(), &options.effort, &mut before, &mut |stream| {
                stream.replay(part.executable.as_ref())
            })?;
            // Times of tokens that went wrong would be times of nothing.
            run.check_tokens()?;
            let row = Row {
                test: format!("token @{position}: {name}"),
                variant: part.kernels,
                dtype: model.dtype.name().into(),
                shape: shape.clone(),
                bytes: total(&part.ops, OpBytes::floor),
                samples_ms,
                note: format!("{nodes} nodes"),
                ..Row::default()
            };
            *median = row.median();
            rows.push(row);
        }
        rows.push(Row { test: format!("token @{position}: LM head"), ..lm_head.clone() });
        last.push((position, medians));
    }
    for row in accumulated(&last, options.prompt) {
        rows.push(row);
    }
    Ok(())
}

/// The LM head over one row per sequence, on weights of its own: image models are loaded without them.
fn lm_head(device: &Arc<dyn Device>, model: &NextStep, options: &Options) -> Result<Row> {
    let (config, dtype, sm_count) = (&model.config, model.dtype, device.info().sm_count);
    let (rows, hidden, vocab) = (options.images * options.branches, config.hidden_size, config.vocab_size);
    let mut stream = device.stream()?;
    let mut random = |label: &str, dtype: DType, elements: usize, deviation: f32| {
        let values = Random { seed: elements as u64, mean: 0.0, deviation };
        random_buffer(device, stream.as_mut(), label, dtype, elements * dtype.bytes(), values)
    };
    let x = random("bench.lm_head.x", DType::F32, rows * hidden, 1.0)?;
    let norm_w = random("bench.lm_head.norm", dtype, hidden, 1.0)?;
    // Random values are the same weights whether packed or not; packed, a last tile is filled up.
    let layout = Layout::to_load(&ops::lm_head::OP, &options.kernels, dtype, hidden);
    let elements = match layout {
        Layout::Rows => vocab * hidden,
        Layout::Tiles => Tiles::new(vocab, hidden, Pairing::Neighbours)?.bytes() / dtype.bytes(),
    };
    let w = random("bench.lm_head.w", dtype, elements, 1.0 / (hidden as f32).sqrt())?;
    let logits = device.alloc(rows * vocab * 4, "bench.lm_head.logits")?;
    let (floats, counters) = ProductScratch::sizes(sm_count, rows);
    let partial = device.alloc(floats * 4, "bench.lm_head.partial")?;
    let arrivals = device.alloc(counters * 4, "bench.lm_head.arrivals")?;
    stream.set(arrivals.span(), 0)?;
    let args = ops::lm_head::Args {
        x: x.span(),
        norm_w: norm_w.span(),
        w: Weight { span: w.span(), layout },
        norm_out: None,
        logits: logits.span(),
        rows,
        hidden,
        vocab,
        eps: config.rms_norm_eps,
        scratch: Some(ProductScratch { partial: partial.span(), arrivals: arrivals.span(), next: None }),
    };
    let launch = Launch { selection: &options.kernels, dtype, sm_count, dependent: true };
    let node = ops::lm_head::node(&launch, "bench.lm_head", &args)?;
    let samples_ms =
        time(stream.as_mut(), &options.effort, &mut |_| Ok(()), &mut |stream| super::launch(stream, &node))?;
    Ok(Row {
        variant: node.kernel.symbol.into(),
        dtype: dtype.name().into(),
        bytes: (vocab * hidden * dtype.bytes()) as u64,
        samples_ms,
        note: "for text, at any position; image tokens need none, and no sum here counts it".into(),
        ..Row::default()
    })
}

/// Seconds to make all tokens up to each position, by the trapezoid rule over the last-token latencies.
fn accumulated(last: &[(usize, [f64; 4])], prompt: usize) -> Vec<Row> {
    let mut sorted = last.to_vec();
    sorted.sort_by_key(|(position, _)| *position);
    let mut rows = Vec::new();
    let (mut all, mut without) = (0.0, 0.0);
    let mut previous: Option<(usize, [f64; 4])> = None;
    for (position, medians) in sorted {
        let total = |m: &[f64; 4]| m[3];
        let decoder = |m: &[f64; 4]| m[0] + m[1];
        let (from, before) = previous.unwrap_or((prompt, medians));
        let tokens = (position - from) as f64;
        all += tokens * (total(&before) + total(&medians)) / 2.0;
        without += tokens * (decoder(&before) + decoder(&medians)) / 2.0;
        for (name, ms) in [("with", all), ("without", without)] {
            rows.push(Row {
                test: format!("tokens {prompt}..{position}: accumulated {name} FM head"),
                samples_ms: vec![ms],
                note: "computed from the medians above (trapezoid)".into(),
                ..Row::default()
            });
        }
        previous = Some((position, medians));
    }
    rows
}

/// Operations of prompts of `prompt` tokens: two per weight and row, and the causal half of attention.
fn prefill_flops(run: &Run, model: &NextStep, prompt: usize) -> u64 {
    let c = &model.config;
    let layer = c.hidden_size * (c.q_size() + 2 * c.kv_size())
        + c.q_size() * c.hidden_size
        + 3 * c.hidden_size * c.intermediate_size;
    let rows = run.prompt_tokens().prefilled as u64;
    rows * (2 * layer as u64 + 2 * (c.q_size() * prompt) as u64) * c.num_hidden_layers as u64
}

fn prefill(run: &mut Run, options: &Options, rows: &mut Rows<'_>) -> Result<()> {
    let list = run.record_prefill(true)?;
    let part = part(run, list, options.prompt)?;
    let samples_ms = time(run.stream(), &options.effort, &mut |_| Ok(()), &mut |stream| {
        stream.replay(part.executable.as_ref())
    })?;
    let model = run.model();
    rows.push(Row {
        // What a batch shares is copied from one image to the others, and only counted in the bytes.
        test: format!("prefill {}x{}", run.spec().branches, options.prompt),
        variant: part.kernels,
        dtype: run.dtype().name().into(),
        shape: format!("{} rows", run.prompt_tokens().prefilled),
        bytes: total(&part.ops, OpBytes::floor),
        flops: prefill_flops(run, &model, options.prompt),
        samples_ms,
        ..Row::default()
    });
    Ok(())
}

fn pictures(
    device: &Arc<dyn Device>,
    model: &Arc<NextStep>,
    options: &Options,
    size: (usize, usize),
    rows: &mut Rows<'_>,
) -> Result<()> {
    let name = format!("{}x{}", size.0, size.1);
    let spec = spec(model, options, grid(model, size)?)?;
    let tokens = spec.tokens_total();
    let setup = Instant::now();
    let mut run = Run::new(model.clone(), device, options.kernels.clone(), spec.clone())?;
    let token_list = run.record_token(false)?;
    let token_ops = count(&run, &token_list, options.prompt + tokens / 2);
    let (prefill_list, last_list) = (run.record_prefill(true)?, run.record_token(true)?);
    let prefill = part(&mut run, prefill_list, options.prompt)?;
    let token = part(&mut run, token_list, options.prompt + tokens / 2)?;
    let last = part(&mut run, last_list, options.prompt + tokens)?;
    let (image_list, decoded) = run.record_image()?;
    let image = part(&mut run, image_list, 0)?;
    run.stream().synchronize()?;
    let setup_ms = setup.elapsed().as_secs_f64() * 1e3;

    let sms = device.info().sm_count;
    let random = Random { seed: 21, mean: 0.0, deviation: 1.0 };
    let latents = run.buffers().tokens;
    let dtype = run.dtype();
    run.enqueue(&bench::fill(sms, dtype, latents, random)?)?;
    let samples_ms = time(run.stream(), &options.effort, &mut |_| Ok(()), &mut |stream| {
        stream.replay(image.executable.as_ref())
    })?;
    let image_bytes = total(&image.ops, |op| op.weights + op.activations);
    rows.push(Row {
        test: format!("VAE decode {name}"),
        variant: image.kernels.clone(),
        dtype: dtype.name().into(),
        shape: format!("{} images", options.images),
        bytes: image_bytes,
        flops: total(&image.ops, |op| op.flops),
        samples_ms,
        note: "bytes: every op reads its input and writes its output once".into(),
        ..Row::default()
    });
    if !options.end_to_end {
        return Ok(());
    }

    let mut rgb = vec![0; decoded.rgb.bytes];
    let mut samples_ms = Vec::new();
    let mut enqueue_us = Vec::new();
    let mut first_bits: Option<Vec<u8>> = None;
    for picture in 0..options.pictures.max(1) {
        let start = Instant::now();
        // As a session does with its next request: the tables of this one's prompts lie where the VAE works later. What
        // was not wiped keeps no prompt, so that all of them are prefilled again.
        run.rebind(spec.clone())?;
        let stream = run.stream();
        stream.replay(prefill.executable.as_ref())?;
        let enqueuing = Instant::now();
        for _ in 1..tokens {
            stream.replay(token.executable.as_ref())?;
        }
        enqueue_us.push(enqueuing.elapsed().as_secs_f64() * 1e6 / (tokens.max(2) - 1) as f64);
        stream.replay(last.executable.as_ref())?;
        stream.replay(image.executable.as_ref())?;
        stream.get(decoded.rgb, &mut rgb)?;
        samples_ms.push(start.elapsed().as_secs_f64() * 1e3);
        run.check_tokens()?;
        let mut bits = vec![0; latents.bytes];
        run.stream().get(latents, &mut bits)?;
        bits.extend_from_slice(&rgb);
        same_bits(picture, first_bits.get_or_insert_with(|| bits.clone()), &bits)?;
    }
    let bytes = total(&prefill.ops, OpBytes::floor)
        + (tokens as u64 - 1) * total(&token_ops, OpBytes::floor)
        + total(&last.ops, OpBytes::floor)
        + image_bytes;
    enqueue_us.sort_by(f64::total_cmp);
    let host = match device.info().kind {
        // There every launch runs where it is enqueued.
        "emulated" => String::new(),
        _ => format!("; enqueuing a token took {:.1} us", enqueue_us[enqueue_us.len() / 2]),
    };
    let same = match samples_ms.len() {
        1 => String::new(),
        made => format!("; {made} pictures, {} tokens, the same bits", made * tokens),
    };
    let bits = fingerprint(first_bits.as_deref().unwrap_or_default());
    rows.push(Row {
        test: format!("image {name}"),
        variant: kernels_list(&[&prefill, &token, &image]),
        dtype: dtype.name().into(),
        shape: format!("{tokens} tokens, prompt {}, {} evaluations", options.prompt, options.steps),
        bytes,
        samples_ms,
        note: format!(
            "wall clock from token ids to RGB on the host, without tokenizer, PNG and {setup_ms:.0} ms of \
             set-up{host}{same}; bits {bits:016x}"
        ),
        ..Row::default()
    });
    Ok(())
}

/// Fails if a picture, made of the same numbers as the first, has other tokens or pixels.
fn same_bits(picture: usize, first: &[u8], again: &[u8]) -> Result<()> {
    match first.iter().zip(again).filter(|(a, b)| a != b).count() {
        0 => Ok(()),
        differ => Err(Error::Device(format!(
            "picture {picture} was made of the same numbers as picture 0, and {differ} of {} bytes of its tokens and \
             pixels are others",
            first.len()
        ))),
    }
}

/// A number for tokens and pixels (64-bit FNV-1a), by which two runs tell whether they made the same.
fn fingerprint(bits: &[u8]) -> u64 {
    bits.iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

fn kernels_list(parts: &[&Part]) -> String {
    let symbols: BTreeSet<&str> = parts.iter().flat_map(|part| part.kernels.split(' ')).collect();
    symbols.into_iter().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::super::ceilings::Sizes;
    use super::super::synthetic;
    use super::*;
    use crate::device::emulated::{EmulatedDevice, EmulatedOptions};

    fn options() -> Options {
        Options {
            steps: 2,
            branches: 2,
            images: 1,
            prompt: 5,
            positions: vec![6, 12],
            sizes: vec![(32, 16), (16, 16)],
            end_to_end: true,
            kernels: Selection::default(),
            effort: Effort { warm_up: 0, repeats: 2, seconds: 10.0, in_flight: 1 },
            pictures: 3,
            seed: 1,
        }
    }

    fn bench(options: &Options) -> Result<Vec<Row>> {
        let device: Arc<dyn Device> = Arc::new(EmulatedDevice::new(EmulatedOptions::default())?);
        let configs = synthetic::configs("tiny", None)?;
        let model = synthetic::model(&device, &configs, DType::Bf16, &options.kernels, options.seed)?;
        let ceilings = Ceilings::measure(&device, &options.effort, Sizes::for_device(device.as_ref()))?;
        run(&device, &Arc::new(model), options, &ceilings, &mut |_| {})
    }

    #[test]
    fn pictures_made_after_one_another_and_after_the_vae_was_timed_have_the_same_bits() {
        let rows = bench(&options()).unwrap();
        for (name, tokens) in [("image 32x16", 6), ("image 16x16", 3)] {
            let row = rows.iter().find(|row| row.test == name).unwrap();
            assert_eq!(row.samples_ms.len(), 3);
            assert!(
                row.note.contains(&format!("3 pictures, {tokens} tokens, the same bits")),
                "{}",
                row.note
            );
        }
    }

    #[test]
    fn every_part_of_a_token_is_timed_at_every_position_or_none_is() {
        let rows = bench(&Options { sizes: Vec::new(), ..options() }).unwrap();
        for position in [6, 12] {
            for part in ["LLM decoder", "projector", "FM head", "total", "LM head"] {
                let name = format!("token @{position}: {part}");
                let row = rows.iter().find(|row| row.test == name).unwrap();
                assert!(row.samples_ms.len() == 2 && row.bytes > 0, "{row:?}");
            }
        }
        assert!(
            bench(&Options { sizes: Vec::new(), positions: Vec::new(), ..options() }).unwrap().is_empty()
        );
    }

    #[test]
    fn runs_of_the_same_numbers_have_the_same_fingerprint() {
        let bits = |options: &Options| {
            let rows =
                bench(&Options { positions: Vec::new(), sizes: vec![(32, 16)], ..options.clone() }).unwrap();
            let note = &rows.iter().find(|row| row.test == "image 32x16").unwrap().note;
            note[note.find("bits ").unwrap()..].to_owned()
        };
        let single = Options { pictures: 1, ..options() };
        assert_eq!(bits(&single), bits(&single));
        assert_ne!(bits(&single), bits(&Options { seed: 2, ..single.clone() }));
        assert_eq!(fingerprint(b"a"), 0xaf63_dc4c_8601_ec8c);
    }

    #[test]
    fn rows_are_shown_as_they_are_returned() {
        let device: Arc<dyn Device> = Arc::new(EmulatedDevice::new(EmulatedOptions::default()).unwrap());
        let options = Options { sizes: vec![(32, 16)], end_to_end: false, ..options() };
        let configs = synthetic::configs("tiny", None).unwrap();
        let model = synthetic::model(&device, &configs, DType::Bf16, &options.kernels, 1).unwrap();
        // So slow a product that operations bound every row that counts any.
        let row = |bytes, flops| Row { bytes, flops, samples_ms: vec![1.0], ..Row::default() };
        let ceilings = Ceilings { copy: row(1 << 40, 0), read: row(1, 0), gemm: row(1, 1) };
        let mut shown = Vec::new();
        let rows = run(&device, &Arc::new(model), &options, &ceilings, &mut |row| shown.push(row.clone()));
        let told = |rows: &[Row]| -> Vec<_> {
            rows.iter().map(|row| (row.test.clone(), row.note.clone())).collect()
        };
        assert_eq!(told(&shown), told(&rows.unwrap()));
        assert!(shown.iter().any(|row| row.note.contains("floor by operations")));
    }

    #[test]
    fn a_changed_bit_is_an_error_that_counts() {
        assert!(same_bits(1, &[1, 2, 3], &[1, 2, 3]).is_ok());
        let error = same_bits(7, &[1, 2, 3], &[1, 3, 4]).unwrap_err().to_string();
        assert!(error.contains("picture 7") && error.contains("2 of 3 bytes"), "{error}");
    }
}
