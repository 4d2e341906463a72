//! `tokenizer.json` and `prompts.json`: token ids, exactly.

use super::Line;
use crate::engine::token_ids;
use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::prompt::{Generation, Grid, Prompt, PromptRow, build_rows, official_padding};
use crate::sampler::Branches;
use crate::tokenizer::{ModelTokenIds, Tokenizer};
use serde_json::Value;
use std::path::Path;

/// Pixels per token and side of all fixture models.
const DOWN_FACTOR: u32 = 16;

/// Positions that the fixtures' prompts may take; none comes near.
const POSITIONS: usize = 8192;

fn read(path: &Path) -> Result<Value> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::InvalidCase { path: path.into(), reason: format!("not JSON: {e}") })
}

/// The tokenizer in a folder. Folders of tokenizer files alone have the ids of the tiny model.
pub(super) fn tokenizer(root: &Path, name: &str) -> Result<Tokenizer> {
    let dir = root.join(name);
    let ids = match ModelConfig::load(&dir) {
        Ok(config) => token_ids(&config),
        Err(Error::Io { .. }) => {
            ModelTokenIds { vocab_size: 528, boi: 501, eoi: 502, image_placeholder_id: 503 }
        }
        Err(error) => return Err(error),
    };
    Tokenizer::from_dir(&dir, ids)
}

/// One line: how many of `total` differ.
fn line(case: &str, tensor: String, total: usize, wrong: usize) -> Line {
    Line {
        case: case.into(),
        tensor,
        shape: vec![total],
        variants: "host".into(),
        max_error: wrong as f64,
        mean_error: wrong as f64 / total.max(1) as f64,
        allowed_max: 0.0,
        allowed_mean: None,
        off_share: None,
        allowed_share: None,
        ok: wrong == 0 && total > 0,
    }
}

/// Every recorded text of every tokenizer folder: ids with and without special tokens, and decoding.
pub(super) fn tokenizers(path: &Path, root: &Path) -> Result<Vec<Line>> {
    let all = read(path)?;
    let invalid = |reason: &str| Error::InvalidCase { path: path.into(), reason: reason.into() };
    let folders = all.as_object().ok_or_else(|| invalid("not an object"))?;
    let mut lines = Vec::new();
    for (folder, texts) in folders {
        let tokenizer = tokenizer(root, folder)?;
        let texts = texts.as_array().ok_or_else(|| invalid("no list of texts"))?;
        let mut wrong = 0;
        for entry in texts {
            let text = entry.get("text").and_then(Value::as_str).ok_or_else(|| invalid("no text"))?;
            let (ids, plain) = (numbers(entry.get("ids")), numbers(entry.get("ids_no_special")));
            let decoded = entry.get("decoded").and_then(Value::as_str);
            let same = tokenizer.encode(text, true)? == ids
                && tokenizer.encode(text, false)? == plain
                && Some(tokenizer.decode(&ids, false)?.as_str()) == decoded;
            wrong += usize::from(!same);
        }
        lines.push(line("tokenizer", format!("{folder} texts"), texts.len(), wrong));
    }
    Ok(lines)
}

fn numbers(value: Option<&Value>) -> Vec<u32> {
    value
        .and_then(Value::as_array)
        .map(|list| list.iter().filter_map(Value::as_u64).map(|v| v as u32).collect())
        .unwrap_or_default()
}

/// Every recorded batch of prompt rows of both generations, padding and mask included.
pub(super) fn prompts(path: &Path, root: &Path) -> Result<Vec<Line>> {
    let all = read(path)?;
    let invalid = |reason: &str| Error::InvalidCase { path: path.into(), reason: reason.into() };
    let cases = all.as_array().ok_or_else(|| invalid("not a list"))?;
    let mut lines = Vec::new();
    for (index, case) in cases.iter().enumerate() {
        let text = |key: &str| case.get(key).and_then(Value::as_str).ok_or_else(|| invalid("no name"));
        let (folder, generation) = (text("tokenizer")?, text("generation")?);
        let tokenizer = tokenizer(root, folder)?;
        let generation = if generation == "feb" { Generation::February } else { Generation::August };
        let (rows, mask) = batch(case, &tokenizer, generation).map_err(|e| invalid(&e.to_string()))?;
        let list = |key: &str| -> Vec<Vec<u32>> {
            let rows = case.get(key).and_then(Value::as_array);
            rows.map(|rows| rows.iter().map(|row| numbers(Some(row))).collect()).unwrap_or_default()
        };
        let (ids, recorded_mask) = (list("input_ids"), list("attention_mask"));
        let differ = |ours: &[Vec<u32>], theirs: &[Vec<u32>]| {
            ours.len().abs_diff(theirs.len()) + ours.iter().zip(theirs).filter(|(a, b)| a != b).count()
        };
        lines.push(line("prompts", format!("{index}.input_ids"), ids.len(), differ(&rows, &ids)));
        let wrong = differ(&mask, &recorded_mask);
        lines.push(line("prompts", format!("{index}.attention_mask"), recorded_mask.len(), wrong));
    }
    Ok(lines)
}

/// Ids, or mask, of every row of a batch.
type Rows = Vec<Vec<u32>>;

/// A batch as the official code lays it out: branch by branch, caption by caption, image by image; padded left.
fn batch(case: &Value, tokenizer: &Tokenizer, generation: Generation) -> Result<(Rows, Rows)> {
    let argument = |key: &str| case.get("args").and_then(|a| a.get(key));
    let captions: Vec<&str> = match argument("captions") {
        Some(Value::String(caption)) => vec![caption],
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let pixels = |key: &str| numbers(case.get(key));
    let images: Vec<Grid> = match pixels("image_wh")[..] {
        [width, height] => vec![Grid::from_pixels(width, height, DOWN_FACTOR)?],
        _ => Vec::new(),
    };
    let target = match pixels("target_hw_pixels")[..] {
        [height, width] => Grid::from_pixels(width, height, DOWN_FACTOR)?,
        _ => return Err(Error::request("size", "no target_hw_pixels")),
    };
    let scale = |key: &str| argument(key).and_then(Value::as_f64).unwrap_or(1.0);
    let branches = Branches::from_scales(scale("cfg"), scale("cfg_img"))?;
    let repeat = argument("num_images_per_caption").and_then(Value::as_u64).unwrap_or(1) as usize;
    let mut by_branch: Vec<Vec<PromptRow>> = vec![Vec::new(); branches.count()];
    for caption in captions {
        let prompt = Prompt {
            caption,
            positive_prompt: argument("positive_prompt").and_then(Value::as_str),
            negative_prompt: argument("negative_prompt").and_then(Value::as_str),
            images: &images,
            target,
            branches,
        };
        for (row, rows) in
            build_rows(tokenizer, generation, &prompt, POSITIONS)?.into_iter().zip(&mut by_branch)
        {
            rows.extend(std::iter::repeat_n(row, repeat));
        }
    }
    let rows: Vec<PromptRow> = by_branch.into_iter().flatten().collect();
    let padding = official_padding(&rows.iter().map(|row| row.ids.len()).collect::<Vec<_>>());
    let pad = tokenizer.pad().map_or(0, |token| token.id);
    let padded = rows.iter().zip(&padding).map(|(row, &n)| [vec![pad; n], row.ids.clone()].concat());
    let mask = rows.iter().zip(&padding).map(|(row, &n)| [vec![0; n], vec![1; row.ids.len()]].concat());
    Ok((padded.collect(), mask.collect()))
}
