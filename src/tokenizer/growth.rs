//! How much longer a tokenizer may make a text, asked before it is given one: a file of a megabyte can hold steps that
//! turn a sentence into gigabytes, and memory that cannot be had ends the process.

use serde_json::Value;

/// Bytes of normalised text per byte of text. Of Unicode's own forms NFKC makes most, 11.
const MAX_FACTOR: usize = 16;
/// Bytes that normalizers put in front of a text.
const MAX_ADDED_BYTES: usize = 4096;
/// Ids that post-processors put around a text.
const MAX_ADDED_IDS: usize = 1024;
/// Bytes of a token. Qwen's longest has 256.
const MAX_TOKEN_BYTES: usize = 4096;

/// Refuses a tokenizer that makes more of a text than [`MAX_FACTOR`] and its fellows allow, or of which that is not known.
pub(super) fn check(tokenizer: &tokenizers::Tokenizer) -> Result<(), String> {
    // As they are written to a file: in the crate's own types half of what matters is private.
    let written = |value: Result<Value, serde_json::Error>| value.map_err(|e| e.to_string());
    if let Some(normalizer) = tokenizer.get_normalizer() {
        let mut growth = Growth { factor: 1, added: 0 };
        growth.normalizer(&written(serde_json::to_value(normalizer))?)?;
    }
    if let Some(processor) = tokenizer.get_post_processor() {
        let ids = added_ids(&written(serde_json::to_value(processor))?)?;
        if ids > MAX_ADDED_IDS {
            return Err(format!(
                "the post-processor puts {ids} ids around a text, more than {MAX_ADDED_IDS}"
            ));
        }
    }
    match tokenizer.get_vocab(true).into_keys().max_by_key(String::len) {
        Some(token) if token.len() > MAX_TOKEN_BYTES => {
            Err(format!("a token has {} bytes, more than {MAX_TOKEN_BYTES}", token.len()))
        }
        _ => Ok(()),
    }
}

/// The most that a text of n bytes can become: factor * n + added bytes.
struct Growth {
    factor: usize,
    added: usize,
}

impl Growth {
    fn normalizer(&mut self, step: &Value) -> Result<(), String> {
        let kind = step["type"].as_str().unwrap_or_default();
        let (factor, added) = match kind {
            "Sequence" => {
                return items(&step["normalizers"]).iter().try_for_each(|step| self.normalizer(step));
            }
            "Strip" | "StripAccents" | "Nmt" => (1, 0),
            // UAX #15, table of the maximum expansion in UTF-8.
            "NFC" | "NFD" => (3, 0),
            "NFKC" | "NFKD" => (11, 0),
            // One character to three at the most; a space before and behind each.
            "Lowercase" | "BertNormalizer" => (3, 0),
            "ByteLevel" => (2, 0),
            "Prepend" => (1, length(&step["prepend"])),
            "Replace" => {
                let content = length(&step["content"]);
                match &step["pattern"]["String"] {
                    Value::String(pattern) if !pattern.is_empty() => {
                        (content.div_ceil(pattern.len()).max(1), 0)
                    }
                    // An expression may match nothing at all, before each character and at the end.
                    _ => (content.saturating_add(1), content),
                }
            }
            _ => {
                return Err(format!(
                    "normalizer {kind:?}: how long a text becomes is not known, so it is not run"
                ));
            }
        };
        self.factor = self.factor.saturating_mul(factor);
        self.added = self.added.saturating_mul(factor).saturating_add(added);
        if self.factor > MAX_FACTOR || self.added > MAX_ADDED_BYTES {
            return Err(format!(
                "up to {kind} the normalizers make {} bytes per byte and {} more of a text, the limits are \
                 {MAX_FACTOR} and {MAX_ADDED_BYTES}",
                self.factor, self.added
            ));
        }
        Ok(())
    }
}

/// The ids that a post-processor puts around one text.
fn added_ids(step: &Value) -> Result<usize, String> {
    let kind = step["type"].as_str().unwrap_or_default();
    match kind {
        "ByteLevel" => Ok(0),
        "BertProcessing" | "RobertaProcessing" => Ok(2),
        "Sequence" => items(&step["processors"])
            .iter()
            .try_fold(0usize, |sum, step| Ok(sum.saturating_add(added_ids(step)?))),
        "TemplateProcessing" => {
            let mut texts = 0;
            let mut ids = 0usize;
            for piece in items(&step["single"]) {
                match piece["SpecialToken"]["id"].as_str() {
                    Some(token) => {
                        let token = &step["special_tokens"][token];
                        ids = ids.saturating_add(items(&token["ids"]).len());
                    }
                    None => texts += 1,
                }
            }
            if texts > 1 {
                return Err(format!("the post-processor's template repeats a text {texts} times"));
            }
            Ok(ids)
        }
        _ => Err(format!("post-processor {kind:?}: what it puts around a text is not known")),
    }
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn length(text: &Value) -> usize {
    text.as_str().map_or(0, str::len)
}
