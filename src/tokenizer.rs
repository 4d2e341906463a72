//! The checkpoint's tokenizer: text to ids and back, exactly as the official code's fast tokenizer does it.
//!
//! A thin wrapper over the crate `tokenizers` that treats the three files (`tokenizer.json`, `tokenizer_config.json`,
//! `special_tokens_map.json`) as untrusted: sizes are bounded, those of what becomes of a text too, the ids that the model's config names must be the ones
//! that the tokenizer gives, and a split pattern that runs away is an error instead of a silently different result. It
//! knows the NextStep special tokens, and nothing of prompts.

mod growth;
mod split_guard;

use crate::error::{Error, Result};
use split_guard::SplitGuard;
use std::collections::BTreeMap;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// Largest tokenizer file read; the released one has 7 MB.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// Longest text encoded at once. A caption with its picture's placeholders stays far below.
pub const MAX_TEXT_BYTES: usize = 1 << 20;

const IMAGE_AREA: &str = "<|image_area|>";
const BEGIN_OF_IMAGE: &str = "<|begin_of_image|>";
const END_OF_IMAGE: &str = "<|end_of_image|>";
const IMAGE_PLACEHOLDER: &str = "<|image_placeholder|>";

/// Special tokens around a prompt that the model has rewritten; not every tokenizer has them.
pub const BEGIN_OF_REFINEMENT: &str = "<|begin_of_prompt_refinement|>";
/// Its end.
pub const END_OF_REFINEMENT: &str = "<|end_of_prompt_refinement|>";
/// Special tokens around what the model thinks before it draws.
pub const BEGIN_OF_THINKING: &str = "<|begin_of_thinking|>";
/// Its end.
pub const END_OF_THINKING: &str = "<|end_of_thinking|>";

/// What `config.json` says about token ids; the tokenizer must agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModelTokenIds {
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Id of `<|begin_of_image|>`.
    pub boi: u32,
    /// Id of `<|end_of_image|>`.
    pub eoi: u32,
    /// Id of `<|image_placeholder|>`.
    pub image_placeholder_id: u32,
}

/// The tokenizer files of a checkpoint, as bytes.
#[derive(Clone, Copy, Debug)]
pub struct TokenizerFiles<'a> {
    /// `tokenizer.json`.
    pub tokenizer: &'a [u8],
    /// `tokenizer_config.json`, if there is one.
    pub tokenizer_config: Option<&'a [u8]>,
    /// `special_tokens_map.json`, if there is one.
    pub special_tokens_map: Option<&'a [u8]>,
}

/// A loaded tokenizer. Shared freely between threads.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    guard: SplitGuard,
    path: PathBuf,
    ids: ModelTokenIds,
    bos: Option<Token>,
    eos: Option<Token>,
    pad: Option<Token>,
    /// Contents of the special tokens by id.
    special: BTreeMap<u32, String>,
}

/// A special token: its text and its id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// The text that stands for it.
    pub text: String,
    /// Its id.
    pub id: u32,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("path", &self.path).field("bos", &self.bos).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads the tokenizer files of a model directory.
    pub fn from_dir(dir: &Path, ids: ModelTokenIds) -> Result<Tokenizer> {
        let tokenizer = read_limited(&dir.join("tokenizer.json"))?.ok_or_else(|| Error::Tokenizer {
            path: dir.join("tokenizer.json"),
            reason: "not found; the fast tokenizer's single file is needed, vocab.json and merges.txt are not read"
                .into(),
        })?;
        let tokenizer_config = read_limited(&dir.join("tokenizer_config.json"))?;
        let special_tokens_map = read_limited(&dir.join("special_tokens_map.json"))?;
        let files = TokenizerFiles {
            tokenizer: &tokenizer,
            tokenizer_config: tokenizer_config.as_deref(),
            special_tokens_map: special_tokens_map.as_deref(),
        };
        Tokenizer::from_bytes(files, dir, ids)
    }

    /// Builds a tokenizer from the files' bytes. `dir` is named in errors.
    pub fn from_bytes(files: TokenizerFiles, dir: &Path, ids: ModelTokenIds) -> Result<Tokenizer> {
        let path = dir.join("tokenizer.json");
        let fail = |reason: String| Error::Tokenizer { path: path.clone(), reason };
        if files.tokenizer.len() as u64 > MAX_FILE_BYTES {
            return Err(fail(format!("{} bytes, more than {MAX_FILE_BYTES}", files.tokenizer.len())));
        }
        // What is no JSON at all makes the crate panic in some places; this says where it is wrong. A whole value, since
        // what is skipped may hold bytes that are no text.
        let _: serde_json::Value =
            serde_json::from_slice(files.tokenizer).map_err(|e| fail(e.to_string()))?;
        let parsed =
            contained(|| tokenizers::Tokenizer::from_bytes(files.tokenizer).map_err(|e| e.to_string()));
        let mut inner = parsed.map_err(&fail)?;
        // The official calls name their own padding and truncate nothing, whatever the file holds.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| fail(e.to_string()))?;
        growth::check(&inner).map_err(&fail)?;
        let guard = SplitGuard::new(&inner).map_err(&fail)?;

        let special: BTreeMap<u32, String> = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special)
            .map(|(id, token)| (id, token.content))
            .collect();
        check_ids(&inner, &special, ids).map_err(&fail)?;

        let names = SpecialNames::read(&files, dir)?;
        let token = |text: Option<String>, key: &str| -> Result<Option<Token>> {
            let Some(text) = text else { return Ok(None) };
            let id = inner.token_to_id(&text).ok_or_else(|| {
                fail(format!("{key} {text:?} of the tokenizer's settings is not in the vocabulary"))
            })?;
            Ok(Some(Token { text, id }))
        };
        let bos = token(names.bos, "bos_token")?;
        let eos = token(names.eos, "eos_token")?;
        let pad = token(names.pad, "pad_token")?;
        let tokenizer = Tokenizer { inner, guard, path, ids, bos, eos, pad, special };
        // What surrounds every text: the post-processor has ids of its own, in no vocabulary.
        let around = tokenizer.encode("", true)?;
        match around.into_iter().find(|&id| tokenizer.is_of_picture(id)) {
            Some(id) => {
                Err(tokenizer
                    .fail(format!("the post-processor puts {id}, a picture's token, around every text")))
            }
            None => Ok(tokenizer),
        }
    }

    /// The ids of a text. `add_special_tokens`: let the tokenizer put its own tokens around it (most have none).
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        if text.len() > MAX_TEXT_BYTES {
            let reason = format!("has {} bytes, at most {MAX_TEXT_BYTES} are encoded", text.len());
            return Err(Error::request("prompt", reason));
        }
        let encoding = contained(|| {
            self.guard.check(&self.inner, text)?;
            self.inner.encode_fast(text, add_special_tokens).map_err(|e| e.to_string())
        });
        let encoding = encoding.map_err(|reason| self.fail(reason))?;
        let ids = encoding.get_ids();
        // Those of the vocabulary are; a post-processor's may be anything.
        match ids.iter().find(|&&id| id as usize >= self.ids.vocab_size) {
            Some(id) => {
                let rows = self.ids.vocab_size;
                Err(self.fail(format!(
                    "the post-processor puts id {id} around a text, the embedding table has {rows} rows"
                )))
            }
            None => Ok(ids.to_vec()),
        }
    }

    /// The text of ids. Special tokens are written out unless `skip_special_tokens`.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        let text = contained(|| self.inner.decode(ids, skip_special_tokens).map_err(|e| e.to_string()));
        text.map_err(|reason| self.fail(reason))
    }

    /// The first special token that the text would be cut at, if any.
    pub fn special_token_in(&self, text: &str) -> Result<Option<Token>> {
        self.special_token_but(text, &[])
    }

    /// The first special token of a text that is none of those `allowed`.
    pub(crate) fn special_token_but(&self, text: &str, allowed: &[&str]) -> Result<Option<Token>> {
        let ids = self.encode(text, false)?;
        let special = |id| self.special(id).map(|text| Token { text: text.to_owned(), id });
        Ok(ids.into_iter().filter_map(special).find(|token| !allowed.contains(&token.text.as_str())))
    }

    /// The text of a special token; `None` for an ordinary one.
    pub fn special(&self, id: u32) -> Option<&str> {
        self.special.get(&id).map(String::as_str)
    }

    /// Number of tokens, special ones included.
    pub fn vocabulary(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The special token with this text.
    pub fn special_id(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text).filter(|&id| self.special(id) == Some(text))
    }

    /// Whether a token belongs to the layout of pictures.
    pub(crate) fn is_of_picture(&self, id: u32) -> bool {
        let ids = self.ids;
        [ids.boi, ids.eoi, ids.image_placeholder_id].contains(&id) || self.special(id) == Some(IMAGE_AREA)
    }

    /// The ids that the model's config names.
    pub fn model_ids(&self) -> ModelTokenIds {
        self.ids
    }

    /// The `bos_token` of the tokenizer's settings. Qwen's own has none.
    pub fn bos(&self) -> Option<&Token> {
        self.bos.as_ref()
    }

    /// The `eos_token` of the tokenizer's settings.
    pub fn eos(&self) -> Option<&Token> {
        self.eos.as_ref()
    }

    /// The `pad_token` of the tokenizer's settings. Rows here are never padded; the official ones are.
    pub fn pad(&self) -> Option<&Token> {
        self.pad.as_ref()
    }

    /// The text in front of a generated picture: its area in tokens, height first. Begin-of-image follows as an id.
    pub(crate) fn image_area(height: u32, width: u32) -> String {
        format!("{IMAGE_AREA}{height}*{width}")
    }

    /// The text that stands for a given picture of height x width tokens.
    pub(crate) fn image_string(height: u32, width: u32) -> String {
        let placeholders = IMAGE_PLACEHOLDER.repeat(height as usize * width as usize);
        format!("{}{BEGIN_OF_IMAGE}{placeholders}{END_OF_IMAGE}", Tokenizer::image_area(height, width))
    }

    fn fail(&self, reason: String) -> Error {
        Error::Tokenizer { path: self.path.clone(), reason }
    }
}

/// Runs code of the crate `tokenizers`, which panics on some files and texts (`expect` and `todo!` in its readers and
/// post-processors): for us that is a file that cannot be used. It keeps nothing that a panic could leave half done.
fn contained<T>(call: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(call))
        .unwrap_or_else(|_| Err("the crate `tokenizers` panicked; this file or text is beyond it".into()))
}

/// Every id must have a row in the embedding table, and the image tokens must be the config's.
fn check_ids(
    inner: &tokenizers::Tokenizer,
    special: &BTreeMap<u32, String>,
    ids: ModelTokenIds,
) -> Result<(), String> {
    if let Some((token, id)) = inner.get_vocab(true).into_iter().max_by_key(|&(_, id)| id)
        && id as usize >= ids.vocab_size
    {
        return Err(format!("token {token:?} has id {id}, the embedding table has {} rows", ids.vocab_size));
    }
    let wanted = [
        (IMAGE_AREA, None),
        (BEGIN_OF_IMAGE, Some(("boi", ids.boi))),
        (END_OF_IMAGE, Some(("eoi", ids.eoi))),
        (IMAGE_PLACEHOLDER, Some(("image_placeholder_id", ids.image_placeholder_id))),
    ];
    for (text, config) in wanted {
        let id = inner.token_to_id(text).ok_or_else(|| format!("special token {text} is missing"))?;
        if special.get(&id).map(String::as_str) != Some(text) {
            return Err(format!("{text} (id {id}) is an ordinary token; it must be a special one"));
        }
        if let Some((key, expected)) = config
            && expected != id
        {
            return Err(format!("{text} has id {id}, but {key} in config.json is {expected}"));
        }
    }
    Ok(())
}

/// The named special tokens of the two settings files.
#[derive(Default)]
struct SpecialNames {
    bos: Option<String>,
    eos: Option<String>,
    pad: Option<String>,
}

impl SpecialNames {
    /// transformers' order: `special_tokens_map.json` overrides, but is not even read where `tokenizer_config.json`
    /// lists its added tokens.
    fn read(files: &TokenizerFiles, dir: &Path) -> Result<SpecialNames> {
        let mut names = SpecialNames::default();
        let config = parse(files.tokenizer_config, dir.join("tokenizer_config.json"))?;
        names.take(&config, &dir.join("tokenizer_config.json"))?;
        if !config.contains_key("added_tokens_decoder") {
            let map = parse(files.special_tokens_map, dir.join("special_tokens_map.json"))?;
            names.take(&map, &dir.join("special_tokens_map.json"))?;
        }
        Ok(names)
    }

    fn take(&mut self, settings: &serde_json::Map<String, serde_json::Value>, path: &Path) -> Result<()> {
        for (key, slot) in
            [("bos_token", &mut self.bos), ("eos_token", &mut self.eos), ("pad_token", &mut self.pad)]
        {
            use serde_json::Value;
            *slot = match settings.get(key) {
                None => continue,
                Some(Value::Null) => None,
                Some(Value::String(text)) => Some(text.clone()),
                Some(Value::Object(token)) if token.get("content").is_some_and(Value::is_string) => {
                    token.get("content").and_then(Value::as_str).map(str::to_owned)
                }
                Some(other) => {
                    let reason = format!("{key} is {other}; expected a string, a token or null");
                    return Err(Error::Tokenizer { path: path.into(), reason });
                }
            };
        }
        Ok(())
    }
}

fn parse(bytes: Option<&[u8]>, path: PathBuf) -> Result<serde_json::Map<String, serde_json::Value>> {
    let Some(bytes) = bytes else { return Ok(serde_json::Map::new()) };
    serde_json::from_slice(bytes).map_err(|e| Error::Tokenizer { path, reason: e.to_string() })
}

/// A regular file's bytes up to the limit; `None` if there is no such file.
fn read_limited(path: &Path) -> Result<Option<Vec<u8>>> {
    let metadata = match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(Error::io(path))?,
    };
    let fail = |reason: String| Error::Tokenizer { path: path.into(), reason };
    if !metadata.is_file() {
        return Err(fail("is not a regular file".into()));
    }
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(Error::io(path))?;
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(fail(format!("has {} bytes, at most {MAX_FILE_BYTES} are read", metadata.len())));
    }
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests;
