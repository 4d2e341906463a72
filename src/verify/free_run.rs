//! A recorded case run freely: only the prompt and the draws are given, every stage lives on its own results.
//!
//! This is how honest a low precision is told: teacher forcing hides what errors do to the stages after them.

use super::pipeline::{Recording, read};
use super::{CaseFile, Context, Models, VerifyOptions};
use crate::device::{Device, NodeList};
use crate::error::{Error, Result};
use crate::image::RgbImage;
use crate::model::backbone::rope_frequencies;
use crate::model::run::Run;
use crate::ops::DType;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// What a free run leaves behind, by the names of the fixtures' README.
pub type Tensors = BTreeMap<&'static str, Vec<f32>>;

/// Runs a `pipeline` or `picture` case in `dtype` with its recorded draws. Returns `prefill.norm` (real rows
/// only), `decode.norm`, `cond`, `tokens` and `image` (channels last).
pub fn free_run(
    path: &Path,
    device: &Arc<dyn Device>,
    options: &VerifyOptions,
    models: &mut Models,
    dtype: DType,
) -> Result<Tensors> {
    let case = CaseFile::open(path)?;
    let root = match &options.model_root {
        Some(root) => root.clone(),
        None => path.parent().and_then(Path::parent).map(Path::to_path_buf).unwrap_or_default(),
    };
    let context = Context { device, root: &root, options, case: &case };
    Ok(drive(&context, models, dtype)?.tensors)
}

/// A free run's tensors and its picture.
pub(super) struct FreeRun {
    pub(super) tensors: Tensors,
    /// Rotation frequencies that were used: the engine's own.
    pub(super) frequencies: Vec<f32>,
    /// The pictures, B of them.
    pub(super) pictures: Vec<RgbImage>,
    /// The kernels that wrote the tokens and the pictures.
    pub(super) kernels: [&'static str; 2],
}

/// Runs the case of `context` freely.
pub(super) fn drive(context: &Context<'_>, models: &mut Models, dtype: DType) -> Result<FreeRun> {
    let case = context.case;
    let model = models.load(
        context,
        case.text("model")?,
        case.text("vae")?,
        dtype,
        case.meta.get("config_overrides").unwrap_or(&serde_json::Value::Null),
    )?;
    let frequencies = rope_frequencies(model.config.rope_theta, model.config.head_dim);
    let recording = Recording::read(context, models, dtype, Some(frequencies.clone()))?;
    let rows: usize = recording.rows.ids.iter().map(Vec::len).sum();
    let mut run = Run::new(model.clone(), context.device, context.options.selection.clone(), recording.spec)?;
    let buffers = run.buffers();
    let norm = buffers.norm.ok_or_else(|| Error::Internal("run without taps".into()))?;
    let hidden = model.config.hidden_size;
    let row_bytes = hidden * dtype.bytes();
    let sequences = run.spec().prompts.len();
    let mut tensors = Tensors::new();

    run.encode_sources()?;
    let list = run.record_prefill(true)?;
    run.run_once(&list, |_, _| Ok(()))?;
    let list = run.record_prefill_norm()?;
    run.run_once(&list, |_, _| Ok(()))?;
    tensors.insert("prefill.norm", read(run.stream(), norm.slice(0, rows * row_bytes), dtype)?);

    let (mut condition_list, mut rest) = (NodeList::new(), NodeList::new());
    run.record_condition(&mut condition_list)?;
    run.record_sample(&mut rest, false)?;
    run.record_step(&mut rest)?;
    let tokens = run.spec().tokens_total();
    let (mut norms, mut conditions) = (Vec::new(), Vec::new());
    // One pass more than there are tokens: the official code also norms the step after the last one.
    for token in 0..=tokens {
        run.run_once(&condition_list, |_, _| Ok(()))?;
        if token > 0 {
            norms.extend(read(run.stream(), norm.slice(0, sequences * row_bytes), dtype)?);
        }
        if token < tokens {
            conditions.extend(read(run.stream(), buffers.condition, dtype)?);
            run.run_once(&rest, |_, _| Ok(()))?;
        }
    }
    tensors.insert("decode.norm", norms);
    tensors.insert("cond", conditions);
    tensors.insert("tokens", read(run.stream(), buffers.tokens, dtype)?);

    let (list, decoded) = run.record_image()?;
    run.run_once(&list, |_, _| Ok(()))?;
    tensors.insert("image", read(run.stream(), decoded.image, dtype)?);
    let pictures = decoded.download(run.stream())?;
    let kernels = [rest.writer(buffers.tokens), list.writer(decoded.rgb)];
    Ok(FreeRun { tensors, frequencies, pictures, kernels })
}
