//! Cases of kind `text`: logits of a whole prompt, greedy continuations fed with the recorded ids, and one run freely.

use super::pipeline::read;
use super::text::tokenizer;
use super::{Comparer, Context, Models, Outcome, Tolerance};
use crate::error::Result;
use crate::model::backbone::rope_frequencies;
use crate::model::sources::Sources;
use crate::model::text::{TextRun, TextSpec};
use crate::ops::DType;
use crate::prompt::official_padding;
use crate::text::argmax;
use serde_json::Value;

/// The tensors that must have been compared.
const REQUIRED: [&str; 8] = [
    "input_ids",
    "attention_mask",
    "norm",
    "logits_all",
    "greedy_ids",
    "greedy_logits",
    "greedy_margin",
    "official_generate_ids",
];

fn tolerance(dtype: DType) -> Tolerance {
    match dtype {
        DType::F32 => Tolerance::Scaled { max: LARGEST_F32, of_largest: 2e-6 },
        DType::Bf16 => Tolerance::Stream { mean: 0.02, max: LARGEST_BF16 },
    }
}

const LARGEST_F32: f64 = 2e-5;
const LARGEST_BF16: f64 = 0.15;

fn widened(ids: &[i64]) -> Vec<f32> {
    ids.iter().map(|&id| id as f32).collect()
}

/// Runs one case.
pub(super) fn run(context: &Context<'_>, models: &mut Models) -> Result<Outcome> {
    let (case, dtype) = (context.case, context.dtype());
    let folder = case.text("model")?;
    let model = models.load_without_vae(context, folder, dtype)?;
    let mut comparer = Comparer::new(case);

    // The rows are made of the texts; the model is given what was recorded.
    let tokenizer = tokenizer(context.root, folder)?;
    let texts = case.meta.get("texts").and_then(Value::as_array).cloned().unwrap_or_default();
    let texts = texts.iter().filter_map(Value::as_str).map(|text| tokenizer.encode(text, true));
    let own = texts.collect::<Result<Vec<_>>>()?;
    let padding = official_padding(&own.iter().map(Vec::len).collect::<Vec<_>>());
    let pad = tokenizer.pad().map_or(0, |token| token.id);
    let (mut own_ids, mut own_mask) = (Vec::new(), Vec::new());
    for (ids, &padding) in own.iter().zip(&padding) {
        own_ids.extend(std::iter::repeat_n(pad as f32, padding).chain(ids.iter().map(|&id| id as f32)));
        own_mask.extend(std::iter::repeat_n(0.0, padding).chain(ids.iter().map(|_| 1.0)));
    }
    let (shape, ids) = case.integers("input_ids")?;
    let (_, mask) = case.integers("attention_mask")?;
    let [sequences, padded] = shape[..] else {
        return Err(case.invalid(format!("input_ids has shape {shape:?}")));
    };
    if sequences * padded == 0 || mask.len() != ids.len() {
        return Err(case.invalid(format!("{} ids with a mask of {}", ids.len(), mask.len())));
    }
    comparer.values("input_ids", shape.clone(), &own_ids, &widened(&ids), "host", Tolerance::Exact);
    comparer.values("attention_mask", shape, &own_mask, &widened(&mask), "host", Tolerance::Exact);
    let mut prompts: Vec<Vec<u32>> = Vec::new();
    for (ids, mask) in ids.chunks_exact(padded).zip(mask.chunks_exact(padded)) {
        prompts.push(ids.iter().zip(mask).filter(|(_, m)| **m == 1).map(|(&id, _)| id as u32).collect());
    }
    let padding: Vec<usize> = prompts.iter().map(|prompt| padded - prompt.len()).collect();

    let (shape, recorded) = case.integers("greedy_ids")?;
    let [_, steps] = shape[..] else {
        return Err(case.invalid(format!("greedy_ids has shape {shape:?}")));
    };
    let margins = case.tensor("greedy_margin")?;
    if recorded.len() != sequences * steps || margins.values.len() != recorded.len() || steps == 0 {
        return Err(case.invalid(format!("{} greedy ids, {:?} margins", recorded.len(), margins.shape)));
    }
    let frequencies = match case.has("rope_inv_freq") {
        true => case.tensor("rope_inv_freq")?.values,
        false => rope_frequencies(model.config.rope_theta, model.config.head_dim),
    };
    let spec = |prompts: Vec<Vec<u32>>, padding: &[usize], taps| TextSpec {
        sources: Sources::default(),
        rope_offset: padding.iter().map(|&padding| padding as u32).collect(),
        prompts,
        max_tokens: steps,
        frequencies: frequencies.clone(),
        taps,
        poison: true,
    };
    let selection = &context.options.selection;
    let new = |spec| TextRun::new(model.clone(), context.device, selection.clone(), spec);

    // Every prompt row.
    let mut run = new(spec(prompts.clone(), &padding, true))?;
    let prefill = run.record_prefill()?;
    run.enqueue(&prefill)?;
    let (list, taps) = run.record_prompt_logits()?;
    run.enqueue(&list)?;
    let kernel = list.writer(taps.logits);
    let norm = read(run.stream(), taps.norm, dtype)?;
    let logits = read(run.stream(), taps.logits, DType::F32)?;
    for (name, got, kernel) in [("norm", norm, list.writer(taps.norm)), ("logits_all", logits, kernel)] {
        let all = case.tensor(name)?;
        let width = all.values.len() / (sequences * padded);
        let real = padding.iter().enumerate().flat_map(|(s, &padding)| &all.at(s)[padding * width..]);
        let expected: Vec<f32> = real.copied().collect();
        comparer.values(name, all.shape.clone(), &got, &expected, kernel, tolerance(dtype));
    }

    // Every step from the recorded ids.
    let token = run.record_token()?;
    let kernel = token.writer(run.logits_span());
    let token = run.instantiate(token)?;
    let vocab = model.config.vocab_size;
    let mut steps_logits: Vec<Vec<f32>> = vec![Vec::new(); sequences];
    for step in 0..steps {
        let logits = run.logits()?;
        for (all, logits) in steps_logits.iter_mut().zip(logits.chunks_exact(vocab)) {
            all.extend(logits);
        }
        let next: Vec<u32> = (0..sequences).map(|s| recorded[s * steps + step] as u32).collect();
        run.set_next(&next)?;
        run.stream().replay(token.as_ref())?;
    }
    let logits = steps_logits.concat();
    comparer.tensor("greedy_logits", &logits, kernel, tolerance(dtype))?;
    let (mut best, mut gaps) = (Vec::new(), Vec::new());
    for logits in logits.chunks_exact(vocab) {
        let first = argmax(logits).map_or(usize::MAX, |id| id as usize);
        let second = logits.iter().enumerate().filter(|(id, _)| *id != first).map(|(_, &logit)| logit);
        gaps.push(logits.get(first).copied().unwrap_or(f32::NAN) - second.fold(f32::NEG_INFINITY, f32::max));
        best.push(first as f32);
    }
    // A gap is between two logits.
    let (allowed, twice) = match dtype {
        DType::F32 => (LARGEST_F32, Tolerance::Max(2.0 * LARGEST_F32)),
        DType::Bf16 => (LARGEST_BF16, Tolerance::MeanMax { mean: 0.04, max: 2.0 * LARGEST_BF16 }),
    };
    comparer.tensor("greedy_margin", &gaps, kernel, twice)?;
    let close = |index: usize| f64::from(margins.values[index]) < allowed;
    if (0..recorded.len()).all(close) {
        return Err(case.invalid("no greedy id has a margin above the tolerance: nothing to compare"));
    }
    let expected = widened(&recorded);
    let decided: Vec<f32> = (0..best.len()).map(|i| if close(i) { expected[i] } else { best[i] }).collect();
    comparer.values("greedy_ids", shape, &decided, &expected, kernel, Tolerance::Exact);

    // One row by itself, without padding, on its own ids.
    let (shape, official) = case.integers("official_generate_ids")?;
    let row = prompts.iter().position(|prompt| {
        let prompt = prompt.iter().map(|&id| i64::from(id));
        official.len() > prompt.len() && official.iter().copied().zip(prompt).all(|(a, b)| a == b)
    });
    let Some(row) = row.filter(|&row| official.len() <= prompts[row].len() + steps) else {
        return Err(case.invalid("official_generate_ids continue none of the rows"));
    };
    let written = &official[prompts[row].len()..];
    let mut run = new(spec(vec![prompts[row].clone()], &[0], false))?;
    let mut list = run.record_prefill()?;
    let mut got: Vec<i64> = prompts[row].iter().map(|&id| i64::from(id)).collect();
    for (step, &id) in written.iter().enumerate() {
        let executable = run.instantiate(list)?;
        run.stream().replay(executable.as_ref())?;
        let own = argmax(&run.logits()?).map_or(-1, i64::from);
        let same_text = written[..step] == recorded[row * steps..][..step];
        if own != id && same_text && close(row * steps + step) {
            // A toss-up went the other way, and with it all that follows.
            got.extend(&written[step..]);
            break;
        }
        got.push(own);
        run.set_next(&[own.max(0) as u32])?;
        list = run.record_token()?;
    }
    let expected = widened(&official);
    comparer.values("official_generate_ids", shape, &widened(&got), &expected, kernel, Tolerance::Exact);
    Ok(Outcome::Ran(comparer.finish(&REQUIRED.map(String::from))))
}
