//! Cases of kind `pipeline`: a whole generation, stage by stage under teacher forcing.

use super::sources::read_sources;
use super::{CaseFile, Comparer, Context, Models, Outcome, Recorded, Tolerance};
use crate::device::{Copies, Device, Node, NodeList, Span, Stream};
use crate::error::Result;
use crate::model::nextstep::NextStep;
use crate::model::plan::{Draws, RunSpec};
use crate::model::run::Run;
use crate::ops::harness::{decode, encode};
use crate::ops::{DType, params};
use crate::prompt::Generation;
use crate::sampler::{Branches, GuidanceSchedule, Sampler, Solver, guidance_table, sinusoids};
use serde_json::Value;
use std::sync::Arc;

/// Prompt rows without their padding.
pub(super) struct PromptRows {
    /// Padded length.
    padded: usize,
    pub(super) ids: Vec<Vec<u32>>,
    /// Padding tokens in front of each row.
    padding: Vec<u32>,
}

/// What the metadata and the conditions of a case say, as a run of ours.
pub(super) struct Recording {
    pub(super) model: Arc<NextStep>,
    pub(super) rows: PromptRows,
    pub(super) spec: RunSpec,
    solver: Solver,
    guidance: Vec<[f32; 2]>,
}

impl Recording {
    /// Reads a case. `frequencies`: rotation frequencies to use instead of the recorded ones.
    pub(super) fn read(
        context: &Context<'_>,
        models: &mut Models,
        dtype: DType,
        frequencies: Option<Vec<f32>>,
    ) -> Result<Recording> {
        let case = context.case;
        let overrides = case.meta.get("config_overrides").cloned().unwrap_or(Value::Null);
        let model = models.load(context, case.text("model")?, case.text("vae")?, dtype, &overrides)?;
        let rows = prompt_rows(case)?;
        let hw = case.argument("hw").and_then(Value::as_array).map(|a| {
            a.iter().filter_map(Value::as_u64).map(|v| v as usize / model.down_factor()).collect::<Vec<_>>()
        });
        let Some([height, width]) = hw.as_deref() else {
            return Err(case.invalid("metadata: no hw"));
        };
        let tokens = height * width;
        let sampler = sampler(case)?;
        let steps = case.number("num_sampling_steps", 20.0) as u32;
        let shift = case.number("timesteps_shift", 1.0);
        let solver = Solver::new(sampler, steps, shift, case.number("noise_level", 0.8))?;
        let (cfg, cfg_img) = (case.number("cfg", 1.0), case.number("cfg_img", 1.0));
        let branches = Branches::from_scales(cfg, cfg_img)?.count();
        let images = rows.ids.len() / branches;
        let draws_per_token = sampler.draws_per_token(steps) as usize;
        let guidance = guidance_table(schedule(case, sampler)?, cfg, cfg_img, tokens);
        let spec = RunSpec {
            sources: read_sources(case, &model, &rows.ids, images)?,
            prompts: rows.ids.clone(),
            images,
            branches,
            grid: (*height, *width),
            steps: solver.steps.iter().map(Into::into).collect(),
            sinusoid: sinusoids(&network_times(&solver, dtype)),
            guidance: match case.has("cfg_schedule") {
                true => case.tensor("cfg_schedule")?.values.chunks_exact(2).map(|c| [c[0], c[1]]).collect(),
                false => guidance.clone(),
            },
            draws_per_token,
            draws: Draws::Recorded(recorded_draws(case, tokens, images, draws_per_token)?),
            use_norm: case.argument("use_norm").and_then(Value::as_bool).unwrap_or(false),
            rescale: false,
            frequencies: match frequencies {
                Some(frequencies) => frequencies,
                None => case.tensor("rope_inv_freq")?.values,
            },
            rope_offset: rows.padding.clone(),
            pos_embed: sampler.generation() == Generation::August,
            preview_every_rows: None,
            taps: true,
            poison: true,
        };
        Ok(Recording { model, rows, spec, solver, guidance })
    }
}

/// Runs one case.
pub(super) fn run(context: &Context<'_>, models: &mut Models) -> Result<Outcome> {
    let case = context.case;
    let dtype = context.dtype();
    let recording = Recording::read(context, models, dtype, None)?;
    let mut comparer = Comparer::new(case);
    comparer.tensor("cfg_schedule", &recording.guidance.concat(), "host", Tolerance::Max(1e-6))?;
    comparer.tensor("fm.t_net", &network_times(&recording.solver, dtype), "host", Tolerance::Exact)?;
    let selection = context.options.selection.clone();
    let mut run = Run::new(recording.model.clone(), context.device, selection, recording.spec)?;
    let mut stages =
        Stages { case, device: context.device, rows: recording.rows, dtype, comparer: &mut comparer };
    stages.sources(&mut run)?;
    stages.prefill(&mut run)?;
    stages.decode(&mut run)?;
    stages.sample(&mut run)?;
    stages.image(&mut run)?;
    Ok(Outcome::Ran(comparer.finish(&required(case)?)))
}

/// The tensors that must have been compared: all that are recorded (a small case leaves out layers, norms and the
/// picture before rounding) but what a run is given, what repeats others, and the norms inside
/// the products, whose q, k, v and MLP outputs are compared.
fn required(case: &CaseFile) -> Result<Vec<String>> {
    let given = |name: &str| name.starts_with("draw.") || matches!(name, "rope_inv_freq" | "input_image_u8");
    let repeated = |name: &str| {
        let step = name.strip_prefix("decode").and_then(|n| n.split_once('.'));
        step.is_some_and(|(step, tensor)| !step.is_empty() && matches!(tensor, "inputs_embeds" | "norm"))
    };
    let inside = |name: &str| name.ends_with(".in_norm");
    Ok(case.names()?.into_iter().filter(|n| !given(n) && !repeated(n) && !inside(n)).collect())
}

/// Rows of `input_ids` where `attention_mask` is 1.
fn prompt_rows(case: &CaseFile) -> Result<PromptRows> {
    let (shape, ids) = case.integers("input_ids")?;
    let (_, mask) = case.integers("attention_mask")?;
    let [_, padded] = shape[..] else {
        return Err(case.invalid(format!("input_ids has shape {shape:?}")));
    };
    let mut rows = PromptRows { padded, ids: Vec::new(), padding: Vec::new() };
    for (ids, mask) in ids.chunks_exact(padded).zip(mask.chunks_exact(padded)) {
        let padding = mask.iter().take_while(|&&m| m == 0).count();
        if mask[padding..].contains(&0) {
            return Err(case.invalid("attention_mask is not left padding"));
        }
        rows.ids.push(ids[padding..].iter().map(|&id| id as u32).collect());
        rows.padding.push(padding as u32);
    }
    Ok(rows)
}

/// The times that the network of a model in `dtype` is given.
pub(super) fn network_times(solver: &Solver, dtype: DType) -> Vec<f32> {
    match dtype {
        DType::F32 => solver.times.clone(),
        DType::Bf16 => solver.times_bf16(),
    }
}

/// The sampler that the case's generation and arguments mean.
fn sampler(case: &CaseFile) -> Result<Sampler> {
    Ok(match (case.text("generation")?, case.argument("sde_type").and_then(Value::as_str)) {
        ("aug", _) => Sampler::Aug,
        ("hf11", _) => Sampler::Hf11,
        ("feb", Some("sde") | None) => Sampler::Sde,
        ("feb", Some("cps")) => Sampler::Cps,
        ("feb", Some(_)) => Sampler::Ode,
        (other, _) => return Err(case.invalid(format!("generation {other:?}"))),
    })
}

/// The guidance schedule: the official name `linear` means two things.
fn schedule(case: &CaseFile, sampler: Sampler) -> Result<GuidanceSchedule> {
    Ok(match case.argument("cfg_schedule").and_then(Value::as_str) {
        None | Some("constant") => GuidanceSchedule::Constant,
        Some("linear") if sampler.generation() == Generation::August => GuidanceSchedule::Linear,
        Some("linear") => GuidanceSchedule::LinearRising,
        Some(other) => return Err(case.invalid(format!("cfg_schedule {other:?}"))),
    })
}

/// `[T, draws, B, K]`: initial noise first. Draws shared by the captions of a batch are tiled.
fn recorded_draws(case: &CaseFile, tokens: usize, images: usize, per_token: usize) -> Result<Vec<f32>> {
    let noise = case.tensor("draw.noise")?;
    let steps = if case.has("draw.step") { Some(case.tensor("draw.step")?) } else { None };
    let [t, rows, k] = noise.shape[..] else {
        return Err(case.invalid(format!("draw.noise has shape {:?}", noise.shape)));
    };
    let recorded_steps = steps.as_ref().map_or(0, |s| s.shape[1]);
    if t != tokens || !images.is_multiple_of(rows) || recorded_steps + 1 < per_token {
        return Err(
            case.invalid(format!("draws {:?}, {recorded_steps} steps for {tokens} tokens", noise.shape))
        );
    }
    let mut draws = Vec::with_capacity(tokens * per_token * images * k);
    for token in 0..tokens {
        for draw in 0..per_token {
            let source = match (draw, &steps) {
                (0, _) | (_, None) => noise.at(token),
                (d, Some(steps)) => {
                    let row = steps.at(token);
                    &row[(d - 1) * rows * k..d * rows * k]
                }
            };
            // Rows are caption-major: image j of every caption takes draw row j.
            for image in 0..images {
                draws.extend_from_slice(&source[image % rows * k..][..k]);
            }
        }
    }
    Ok(draws)
}

/// The stages of a case, and what they share.
pub(super) struct Stages<'a, 'b> {
    pub(super) case: &'a CaseFile,
    pub(super) device: &'b Arc<dyn Device>,
    rows: PromptRows,
    pub(super) dtype: DType,
    pub(super) comparer: &'b mut Comparer<'a>,
}

impl Stages<'_, '_> {
    fn hidden_tolerance(&self) -> Tolerance {
        match self.dtype {
            DType::F32 => Tolerance::Scaled { max: 2e-5, of_largest: 2e-6 },
            DType::Bf16 => Tolerance::Stream { mean: 0.02, max: 0.15 },
        }
    }

    fn velocity_tolerance(&self) -> Tolerance {
        match self.dtype {
            DType::F32 => Tolerance::Max(2e-5),
            // Velocities of the trained model reach 5; its README section accepts twice the maximum.
            DType::Bf16 if self.case.text("model").is_ok_and(|m| m.starts_with("demo")) => {
                Tolerance::MeanMax { mean: 0.01, max: 0.12 }
            }
            DType::Bf16 => Tolerance::MeanMax { mean: 0.01, max: 0.06 },
        }
    }

    /// Real (unpadded) rows of a recorded `[S, Lp, ...]` tensor, concatenated.
    fn real_rows(&self, recorded: &Recorded) -> Vec<f32> {
        let width = recorded.values.len() / (self.rows.ids.len() * self.rows.padded);
        let mut values = Vec::new();
        for (s, &padding) in self.rows.padding.iter().enumerate() {
            let row = recorded.at(s);
            values.extend_from_slice(&row[padding as usize * width..]);
        }
        values
    }

    /// The same of a `[S, heads, Lp, d]` tensor, as `[row, heads, d]`.
    fn real_heads(&self, recorded: &Recorded) -> Vec<f32> {
        let (heads, d) = (recorded.shape[1], recorded.shape[3]);
        let length = recorded.shape[2];
        let mut values = Vec::new();
        for s in 0..self.rows.ids.len() {
            let skip = if length == self.rows.padded { self.rows.padding[s] as usize } else { 0 };
            for p in skip..length {
                for h in 0..heads {
                    values.extend_from_slice(&recorded.at(s)[(h * length + p) * d..][..d]);
                }
            }
        }
        values
    }

    fn compare_rows(&mut self, name: &str, got: &[f32], variants: &str) -> Result<()> {
        let recorded = self.case.tensor(name)?;
        let expected = self.real_rows(&recorded);
        self.comparer.values(name, recorded.shape, got, &expected, variants, self.hidden_tolerance());
        Ok(())
    }

    fn prefill(&mut self, run: &mut Run) -> Result<()> {
        self.compare_ids(run)?;
        let buffers = run.buffers();
        let rows = buffers.prefill;
        let dtype = self.dtype;
        // The embedding itself, then its recorded output as the input of the layers.
        let list = run.record_prefill(true)?;
        for node in list.nodes() {
            run.enqueue(node)?;
            if node.writes.contains(&rows.x) {
                let got = read(run.stream(), rows.x, DType::F32)?;
                self.compare_rows("prefill.inputs_embeds", &got, node.kernel.symbol)?;
                break;
            }
        }
        let inputs = self.real_rows(&self.case.tensor("prefill.inputs_embeds")?);
        run.stream().put(rows.x, bytemuck::cast_slice(&inputs))?;
        let list = run.record_prefill(false)?;
        let mut taps = Taps::new(&inputs);
        run.run_once(&list, |node, stream| taps.collect(node, "prefill", stream, &rows, dtype))?;
        self.compare_layers("prefill", &taps)?;
        let writer = list.writer(run.cache().keys);
        self.compare_cache(run, "prefill", writer)?;
        self.compare_rotations(run)?;
        if !self.case.has("prefill.norm") {
            return Ok(());
        }
        let norm = buffers.norm.ok_or_else(|| self.case.invalid("run without taps"))?;
        let list = run.record_prefill_norm()?;
        run.run_once(&list, |_, _| Ok(()))?;
        let hidden = inputs.len() / rows.rows;
        let got = read(run.stream(), norm.slice(0, rows.rows * hidden * dtype.bytes()), dtype)?;
        self.compare_rows("prefill.norm", &got, list.writer(norm))
    }

    /// Token ids and padding as recorded; that our own prompt code builds them is what `prompts.json` tests.
    fn compare_ids(&mut self, run: &Run) -> Result<()> {
        let mut ids = Vec::new();
        let mut mask = Vec::new();
        for (prompt, &padding) in run.spec().prompts.iter().zip(&self.rows.padding) {
            ids.extend(prompt.iter().map(|&id| id as f32));
            mask.push(padding as f32);
        }
        let expected = self.expected_ids()?;
        let shape = vec![self.rows.ids.len(), self.rows.padded];
        self.comparer.values("input_ids", shape.clone(), &ids, &expected.0, "host", Tolerance::Exact);
        self.comparer.values("attention_mask", shape, &mask, &expected.1, "host", Tolerance::Exact);
        Ok(())
    }

    fn expected_ids(&self) -> Result<(Vec<f32>, Vec<f32>)> {
        let (_, ids) = self.case.integers("input_ids")?;
        let (_, mask) = self.case.integers("attention_mask")?;
        let real: Vec<f32> =
            ids.iter().zip(&mask).filter(|(_, m)| **m == 1).map(|(i, _)| *i as f32).collect();
        let padding =
            mask.chunks_exact(self.rows.padded).map(|row| row.iter().filter(|m| **m == 0).count() as f32);
        Ok((real, padding.collect()))
    }

    fn compare_layers(&mut self, stage: &str, taps: &Taps) -> Result<()> {
        for (layer, (variant, values)) in taps.layers.iter().enumerate() {
            let name = format!("{stage}.layer{layer}");
            if !self.case.has(&name) {
                continue;
            }
            let recorded = self.case.tensor(&name)?;
            let expected =
                if stage == "prefill" { self.real_rows(&recorded) } else { recorded.values.clone() };
            let tolerance = self.hidden_tolerance();
            self.comparer.values(&name, recorded.shape, values, &expected, variant, tolerance);
        }
        for (name, values, variant) in &taps.first {
            let name = format!("{stage}.l0.{name}");
            if !self.case.has(&name) {
                continue;
            }
            let recorded = self.case.tensor(&name)?;
            let expected = match (recorded.shape.len(), stage) {
                (4, _) => self.real_heads(&recorded),
                (_, "prefill") => self.real_rows(&recorded),
                _ => recorded.values.clone(),
            };
            let tolerance = self.hidden_tolerance();
            self.comparer.values(&name, recorded.shape, values, &expected, variant, tolerance);
        }
        Ok(())
    }

    /// Keys and values of layer 0, read back from the cache: of the whole prompt, or of the first image token.
    fn compare_cache(&mut self, run: &mut Run, stage: &str, kernel: &str) -> Result<()> {
        let cache = *run.cache();
        let (key_name, value_name) = (format!("{stage}.l0.k_rope"), format!("{stage}.l0.v"));
        if !self.case.has(&key_name) {
            return Ok(());
        }
        let recorded = self.case.tensor(&key_name)?;
        let (heads, d) = (recorded.shape[1], recorded.shape[3]);
        let slots = cache.capacity;
        let layer = cache.sequences * heads * slots * d * self.dtype.bytes();
        for (name, span) in [(key_name, cache.keys), (value_name, cache.values)] {
            let all = read(run.stream(), span.slice(0, layer), self.dtype)?;
            let mut got = Vec::new();
            for (s, prompt) in self.rows.ids.iter().enumerate() {
                let range = if stage == "prefill" { 0..prompt.len() } else { prompt.len()..prompt.len() + 1 };
                for p in range {
                    for h in 0..heads {
                        got.extend_from_slice(&all[((s * heads + h) * slots + p) * d..][..d]);
                    }
                }
            }
            let recorded = self.case.tensor(&name)?;
            let expected = match recorded.shape.len() {
                4 => self.real_heads(&recorded),
                _ if stage == "prefill" => self.real_rows(&recorded),
                _ => recorded.values.clone(),
            };
            let tolerance = self.hidden_tolerance();
            self.comparer.values(&name, recorded.shape, &got, &expected, kernel, tolerance);
        }
        Ok(())
    }

    /// The rotary table against the cosines and sines of the prompt's positions and of the first image token's.
    /// The official table repeats its halves; ours has them once.
    fn compare_rotations(&mut self, run: &mut Run) -> Result<()> {
        let cache = *run.cache();
        let d = run.spec().frequencies.len() * 2;
        let table = read(run.stream(), cache.rope, DType::F32)?;
        for (stage, first, count) in [("prefill", 0, self.rows.padded), ("decode0", self.rows.padded, 1)] {
            for (name, half) in [("rope_cos", 0), ("rope_sin", d / 2)] {
                let name = format!("{stage}.{name}");
                if !self.case.has(&name) {
                    continue;
                }
                let got: Vec<f32> =
                    (first..first + count).flat_map(|p| table[p * d + half..][..d / 2].repeat(2)).collect();
                // Cosines of two libraries differ in the last place, which bf16 may round apart by one of its own.
                let tolerance = match self.dtype {
                    DType::F32 => Tolerance::Max(2e-7),
                    DType::Bf16 => Tolerance::Max(1.0 / 256.0),
                };
                self.comparer.tensor(&name, &got, "host", tolerance)?;
            }
        }
        Ok(())
    }

    /// Every decode step from its recorded input, and the condition that follows from each.
    fn decode(&mut self, run: &mut Run) -> Result<()> {
        let inputs = self.case.tensor("decode.inputs_embeds")?;
        let tokens = inputs.shape[0];
        if tokens > run.spec().tokens_total() {
            return Err(self.case.invalid(format!("{tokens} decode steps of {}", run.spec().tokens_total())));
        }
        let dtype = self.dtype;
        let buffers = run.buffers();
        let norm = buffers.norm.ok_or_else(|| self.case.invalid("run without taps"))?;
        let hidden = inputs.values.len() / (tokens * self.rows.ids.len());
        let row_bytes = self.rows.ids.len() * hidden * dtype.bytes();
        let mut condition_list = NodeList::new();
        run.record_condition(&mut condition_list)?;
        let mut step_list = NodeList::new();
        run.record_step(&mut step_list)?;
        let (mut norms, mut conditions) = (Vec::new(), Vec::new());
        for token in 0..tokens {
            run.run_once(&condition_list, |_, _| Ok(()))?;
            conditions.extend(read(run.stream(), buffers.condition.slice(0, row_bytes), dtype)?);
            if token > 0 {
                norms.extend(read(run.stream(), norm.slice(0, row_bytes), dtype)?);
            }
            run.stream().put(buffers.decode.x, bytemuck::cast_slice(inputs.at(token)))?;
            let mut taps = Taps::new(inputs.at(token));
            let stage = format!("decode{token}");
            let tapped = self.case.has(&format!("{stage}.layer0"));
            run.run_once(&step_list, |node, stream| match tapped {
                true => taps.collect(node, "decode", stream, &buffers.decode, dtype),
                false => Ok(()),
            })?;
            if tapped {
                self.compare_layers(&stage, &taps)?;
                if token == 0 {
                    self.compare_cache(run, &stage, step_list.writer(run.cache().keys))?;
                }
            }
        }
        // The norm of the last step, which nobody uses, is recorded as well.
        self.rewind(run, tokens.saturating_sub(1))?;
        run.run_once(&condition_list, |_, _| Ok(()))?;
        norms.extend(read(run.stream(), norm.slice(0, row_bytes), dtype)?);
        let tolerance = self.hidden_tolerance();
        if self.case.has("decode.norm") {
            self.comparer.tensor("decode.norm", &norms, condition_list.writer(norm), tolerance)?;
        }
        let kernel = condition_list.writer(buffers.condition);
        self.comparer.tensor("cond", &conditions, kernel, self.condition_tolerance()?)
    }

    /// Of the conditions of a case that says how far PyTorch's float32 puts them from its float64 (metadata
    /// `rounding`): four times that, where it is more than any other hidden state is allowed. They have gone through the
    /// whole model, and it is its weights that decide what becomes of a rounding on the way. Two computations in another
    /// order are each as far from the truth, twice that from each other; the largest of a few thousand errors is no
    /// steadier than by another factor of two.
    fn condition_tolerance(&self) -> Result<Tolerance> {
        let (DType::F32, Some(rounding)) = (self.dtype, self.case.meta.get("rounding")) else {
            return Ok(self.hidden_tolerance());
        };
        let cond = rounding.get("cond").and_then(Value::as_f64).filter(|r| (0.0..=1e-4).contains(r));
        let cond = cond.ok_or_else(|| {
            self.case.invalid(format!("metadata: rounding is {rounding}, not a \"cond\" of at most 1e-4"))
        })?;
        Ok(match self.hidden_tolerance() {
            Tolerance::Scaled { max, of_largest } => {
                Tolerance::Scaled { max: max.max(4.0 * cond), of_largest }
            }
            other => other,
        })
    }

    /// Sets the token index that sampling reads.
    fn rewind(&self, run: &mut Run, token: usize) -> Result<()> {
        if token >= run.spec().tokens_total() {
            return Err(self.case.invalid(format!("token {token} of {}", run.spec().tokens_total())));
        }
        let state = params::GenerationState { token: token as u32, ..Default::default() };
        let span = run.buffers().state;
        run.stream().put(span, bytemuck::bytes_of(&state))
    }

    /// Every token's sampler from its recorded condition and draws.
    fn sample(&mut self, run: &mut Run) -> Result<()> {
        let cond = self.case.tensor("cond")?;
        let tokens = cond.shape[0];
        let traced = self.case.tensor("fm.x_net")?;
        let (traced_tokens, steps) = (traced.shape[0], traced.shape[1]);
        let buffers = run.buffers();
        let dtype = self.dtype;
        let (mut v_raw, mut v, mut x, mut x_net, mut out) = (vec![], vec![], vec![], vec![], vec![]);
        let mut embeds = Vec::new();
        let mut kernel = "";
        let states = if self.case.has("fm.x") { Some(self.case.tensor("fm.x")?) } else { None };
        for token in 0..tokens {
            self.rewind(run, token)?;
            let (bytes, _) = encode(dtype, cond.at(token).to_vec());
            run.stream().put(buffers.condition, &bytes)?;
            let forced = token < traced_tokens;
            if let (true, Some(span)) = (forced, buffers.taps.forced_x) {
                let states = self.states_before(token, &traced, states.as_ref());
                run.stream().put(span, bytemuck::cast_slice(&states))?;
                // What the network is given: the state rounded to the model's dtype.
                x_net.extend(encode(dtype, states).1);
            }
            let mut list = NodeList::new();
            run.record_sample(&mut list, forced)?;
            kernel = list.writer(buffers.tokens);
            run.run_once(&list, |_, _| Ok(()))?;
            let mut tap = |span: Option<Span>| match span {
                Some(span) => read(run.stream(), span, DType::F32),
                None => Err(self.case.invalid("run without taps")),
            };
            if forced {
                v_raw.extend(tap(buffers.taps.v_raw)?);
                v.extend(tap(buffers.taps.v)?);
                x.extend(tap(buffers.taps.x)?);
            }
            out.extend(tap(buffers.taps.sampled)?);
            embeds.extend(read(run.stream(), buffers.decode.x, DType::F32)?);
        }
        let velocity = self.velocity_tolerance();
        let hidden = self.hidden_tolerance();
        self.comparer.tensor("fm.x_net", &x_net, "host", Tolerance::Exact)?;
        self.comparer.tensor("fm.v_raw", &v_raw, kernel, velocity)?;
        self.comparer.tensor("fm.v", &v, kernel, self.guided_tolerance())?;
        if let Some(recorded) = states {
            // Recorded before every evaluation: the first is the noise, the others follow from our own steps.
            let count = recorded.shape[1];
            let row = recorded.values.len() / (traced_tokens * count);
            let mut kept = Vec::with_capacity(recorded.values.len());
            for (token, after) in x.chunks_exact(row * steps).enumerate() {
                kept.extend_from_slice(&recorded.at(token)[..row]);
                kept.extend_from_slice(&after[..row * (count - 1)]);
            }
            self.comparer.tensor("fm.x", &kept, kernel, self.guided_tolerance())?;
        }
        self.comparer.tensor("fm.out", &out, kernel, self.guided_tolerance())?;
        let stored = read(run.stream(), buffers.tokens, dtype)?;
        self.comparer.tensor("tokens", &stored, kernel, self.guided_tolerance())?;
        self.comparer.tensor("decode.inputs_embeds", &embeds, kernel, hidden)
    }

    /// After guidance an error of one branch counts cfg times.
    fn guided_tolerance(&self) -> Tolerance {
        let scale = self.case.number("cfg", 1.0) + (self.case.number("cfg", 1.0) - 1.0).max(0.0);
        match (self.dtype, self.velocity_tolerance()) {
            (DType::Bf16, Tolerance::MeanMax { mean, max }) => {
                Tolerance::MeanMax { mean: mean * scale, max: max * scale }
            }
            (_, tolerance) => tolerance,
        }
    }

    /// `[N, B, K]`: the state before every evaluation of a token. Where float32 states are recorded apart from
    /// what the network was given, August lacks the last one.
    fn states_before(&self, token: usize, traced: &Recorded, states: Option<&Recorded>) -> Vec<f32> {
        let mut before = states.map(|s| s.at(token).to_vec()).unwrap_or_default();
        before.extend_from_slice(&traced.at(token)[before.len()..]);
        before
    }

    /// Recorded tokens to pixels.
    fn image(&mut self, run: &mut Run) -> Result<()> {
        let buffers = run.buffers();
        let tokens = self.case.tensor("tokens")?;
        let (bytes, _) = encode(self.dtype, tokens.values);
        run.stream().put(buffers.tokens, &bytes)?;
        let (list, decoded) = run.record_image()?;
        run.run_once(&list, |_, _| Ok(()))?;
        super::vae::compare_decoded(
            self.comparer,
            run.stream(),
            &list,
            &decoded,
            self.dtype,
            ["latents", if self.case.has("image") { "image" } else { "" }, "image_u8"],
        )
    }
}

/// Outputs collected while a list runs.
struct Taps {
    /// Residual stream after the last node that added to it.
    stream: Vec<f32>,
    /// Residual stream after every layer, and the kernel that wrote it.
    layers: Vec<(&'static str, Vec<f32>)>,
    /// Layer 0: recorded name, values, kernel.
    first: Vec<(&'static str, Vec<f32>, &'static str)>,
}

impl Taps {
    /// `inputs`: the residual stream before the first layer.
    fn new(inputs: &[f32]) -> Taps {
        Taps { stream: inputs.to_vec(), layers: Vec::new(), first: Vec::new() }
    }

    /// What `node` left: the norms are inside the products and reach no memory; what the residual products add is
    /// the difference they make.
    fn collect(
        &mut self,
        node: &Node,
        stage: &str,
        stream: &mut dyn Stream,
        rows: &crate::model::backbone::Rows,
        dtype: DType,
    ) -> Result<()> {
        let Some(rest) = node.label.strip_prefix(stage).and_then(|l| l.strip_prefix(".layer")) else {
            return Ok(());
        };
        let Some((layer, op)) = rest.split_once('.') else {
            return Ok(());
        };
        let kernel = node.kernel.symbol;
        if matches!(op, "o_proj" | "down") {
            let after = read(stream, rows.x, DType::F32)?;
            if layer == "0" {
                let added = after.iter().zip(&self.stream).map(|(after, before)| after - before).collect();
                self.first.push((if op == "down" { "mlp_out" } else { "attn_out" }, added, kernel));
            }
            if op == "down" {
                self.layers.push((kernel, after.clone()));
            }
            self.stream = after;
        }
        match (layer, op) {
            ("0", "qkv") => self.first.push(("q_rope", read(stream, rows.q, dtype)?, kernel)),
            ("0", "attention") => self.first.push(("attn_ctx", read(stream, rows.context, dtype)?, kernel)),
            _ => {}
        }
        Ok(())
    }
}

/// Downloads a span.
pub(super) fn read(stream: &mut dyn Stream, span: Span, dtype: DType) -> Result<Vec<f32>> {
    let mut bytes = vec![0; span.bytes];
    stream.get(span, &mut bytes)?;
    Ok(decode(dtype, &bytes))
}
