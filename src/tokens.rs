//! Image tokens in files: what the transformer made of a request, before the VAE turns it into pixels.
//!
//! A file is in the safetensors format. Its one tensor, `tokens` `[images, rows * columns, K]` in f32 or bf16, holds the
//! tokens as they were fed back: row after row of the picture, channel-major inside a token (the official layout). Its
//! metadata has JSON under `warpstep` that says what they belong to; [`ImageTokens`] has the fields.

use crate::error::{Error, Result};
use crate::files::write_atomically;
use crate::image::Metadata;
use crate::ops::DType;
use crate::ops::harness::{decode, encode};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

/// Value of the description's `format`.
const FORMAT: &str = "warpstep image tokens 1";
/// Key of the metadata.
const DESCRIPTION: &str = "warpstep";
/// Name of the tensor.
const TENSOR: &str = "tokens";
/// Largest file that is read: 64 pictures of 16,384 tokens in f32, and room for the header.
const MAX_FILE_BYTES: u64 = 320 << 20;

/// The metadata's one entry, as JSON.
#[derive(Serialize, Deserialize)]
struct Description {
    format: String,
    model: String,
    rows: usize,
    columns: usize,
    #[serde(flatten)]
    layout: TokenLayout,
    use_norm: bool,
    pictures: Vec<Metadata>,
}

/// What a token is, which the model that decodes it must agree with.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLayout {
    /// Channels of the latent.
    #[serde(rename = "latent_channels")]
    pub channels: usize,
    /// Side of the square of latent pixels that a token holds.
    #[serde(rename = "latent_patch_size")]
    pub patch: usize,
    /// The latent is `token / scale + shift`.
    #[serde(rename = "scaling_factor")]
    pub scale: f64,
    /// See `scale`.
    #[serde(rename = "shift_factor")]
    pub shift: f64,
}

impl TokenLayout {
    /// Whether a model of the other layout can decode these tokens. Numbers that went through text are near, not equal.
    pub fn agrees(&self, other: &TokenLayout) -> bool {
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-12 * a.abs().max(b.abs());
        (self.channels, self.patch) == (other.channels, other.patch)
            && near(self.scale, other.scale)
            && near(self.shift, other.shift)
    }

    /// Values of a token, K.
    pub fn token_dim(&self) -> usize {
        self.channels.saturating_mul(self.patch).saturating_mul(self.patch)
    }
}

/// The tokens of a batch of pictures of one size.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageTokens {
    /// Name of the model that made them.
    pub model: String,
    /// Element type they were computed in.
    pub dtype: DType,
    /// Pictures.
    pub images: usize,
    /// Rows and columns of tokens.
    pub grid: (usize, usize),
    /// What a token is.
    pub layout: TokenLayout,
    /// Whether every token was normalised.
    pub use_norm: bool,
    /// `[images, rows * columns, K]`.
    pub values: Vec<f32>,
    /// What each picture is to remember of its making; empty: nothing.
    pub notes: Vec<Metadata>,
}

impl ImageTokens {
    /// Writes a file; on any error the destination is as it was.
    pub fn save(&self, path: &Path) -> Result<()> {
        let (rows, columns) = self.grid;
        let shape = vec![self.images, rows * columns, self.layout.token_dim()];
        let dtype = match self.dtype {
            DType::F32 => Dtype::F32,
            DType::Bf16 => Dtype::BF16,
        };
        let bytes = encode(self.dtype, self.values.clone()).0;
        let fail = |reason: String| Error::Tokens { path: path.into(), reason };
        let view = TensorView::new(dtype, shape, &bytes).map_err(|e| fail(e.to_string()))?;
        let description = Description {
            format: FORMAT.into(),
            model: self.model.clone(),
            rows,
            columns,
            layout: self.layout,
            use_norm: self.use_norm,
            pictures: self.notes.clone(),
        };
        // One entry, because the crate writes several in any order: equal requests make equal files.
        let text = serde_json::to_string(&description).map_err(|e| fail(e.to_string()))?;
        let metadata = HashMap::from([(DESCRIPTION.to_owned(), text)]);
        let file = safetensors::serialize([(TENSOR, view)], Some(metadata));
        let file = file.map_err(|e| fail(e.to_string()))?;
        write_atomically(path, |out| out.write_all(&file).map_err(Error::io(path)))
    }

    /// Reads a file and checks it against itself: every size, and that every value is finite.
    pub fn load(path: &Path) -> Result<ImageTokens> {
        let fail = |reason: String| Error::Tokens { path: path.into(), reason };
        let file = File::open(path).map_err(Error::io(path))?;
        let info = file.metadata().map_err(Error::io(path))?;
        if !info.is_file() {
            return Err(fail("is not a regular file".into()));
        }
        if info.len() > MAX_FILE_BYTES {
            return Err(fail(format!("has {} bytes, at most {MAX_FILE_BYTES} are read", info.len())));
        }
        let mut bytes = Vec::new();
        file.take(MAX_FILE_BYTES).read_to_end(&mut bytes).map_err(Error::io(path))?;
        parse(&bytes).map_err(fail)
    }

    /// Whether a model of this layout can decode them; `path` is named in the error.
    pub fn check_layout(&self, path: &Path, layout: &TokenLayout) -> Result<()> {
        if self.layout.agrees(layout) {
            return Ok(());
        }
        let (a, b) = (&self.layout, layout);
        let reason = format!(
            "hold {} channels x {} x {} with scale {} and shift {}; this model takes {} x {} x {} with {} and {}",
            a.channels, a.patch, a.patch, a.scale, a.shift, b.channels, b.patch, b.patch, b.scale, b.shift
        );
        Err(Error::Tokens { path: path.into(), reason })
    }
}

/// The tokens in a file's bytes, or what is wrong with them.
fn parse(bytes: &[u8]) -> Result<ImageTokens, String> {
    let read = |e: safetensors::SafeTensorError| format!("is no safetensors file: {e}");
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(read)?;
    let text = header.metadata().as_ref().and_then(|m| m.get(DESCRIPTION));
    let text = text.ok_or_else(|| format!("has no metadata {DESCRIPTION:?}"))?;
    let description: Description =
        serde_json::from_str(text).map_err(|e| format!("has metadata {DESCRIPTION:?}: {e}"))?;
    let Description { format, model, rows, columns, layout, use_norm, pictures: notes } = description;
    if format != FORMAT {
        return Err(format!("has format {format:?}; expected {FORMAT:?}"));
    }
    let file = SafeTensors::deserialize(bytes).map_err(read)?;
    let tensor = file.tensor(TENSOR).map_err(|_| format!("has no tensor {TENSOR:?}"))?;
    let dtype = match tensor.dtype() {
        Dtype::F32 => DType::F32,
        Dtype::BF16 => DType::Bf16,
        other => return Err(format!("has {TENSOR:?} of type {other:?}; expected F32 or BF16")),
    };
    let shape = tensor.shape();
    let expected = usize::checked_mul(rows, columns).filter(|&tokens| tokens > 0);
    let images = match shape {
        &[images, tokens, dim] if images > 0 && Some(tokens) == expected && dim == layout.token_dim() => {
            images
        }
        _ => {
            return Err(format!(
                "has {TENSOR:?} of shape {shape:?}; expected [images, {rows} * {columns}, {} * {}^2]",
                layout.channels, layout.patch
            ));
        }
    };
    if !notes.is_empty() && notes.len() != images {
        return Err(format!("describes {} pictures and holds {images}", notes.len()));
    }
    let values = decode(dtype, tensor.data());
    if let Some(index) = values.iter().position(|value| !value.is_finite()) {
        return Err(format!("has {} at index {index} of {TENSOR:?}", values[index]));
    }
    Ok(ImageTokens { model, dtype, images, grid: (rows, columns), layout, use_norm, values, notes })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> ImageTokens {
        ImageTokens {
            model: "a model".into(),
            dtype: DType::Bf16,
            images: 2,
            grid: (3, 1),
            layout: TokenLayout { channels: 4, patch: 2, scale: 0.3611, shift: 0.1159 },
            use_norm: true,
            values: (0..2 * 3 * 16).map(|i| i as f32 / 4.0 - 3.0).collect(),
            notes: vec![Metadata { parameters: "a\nb".into(), json: "{}".into() }; 2],
        }
    }

    #[test]
    fn a_file_comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        for dtype in [DType::F32, DType::Bf16] {
            let saved = ImageTokens { dtype, notes: Vec::new(), ..tokens() };
            saved.save(&path).unwrap();
            assert_eq!(ImageTokens::load(&path).unwrap(), saved);
        }
        tokens().save(&path).unwrap();
        assert_eq!(ImageTokens::load(&path).unwrap(), tokens());
    }

    #[test]
    fn what_does_not_fit_together_is_refused_with_the_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let check = |bytes: &[u8], expected: &str| {
            std::fs::write(&path, bytes).unwrap();
            match ImageTokens::load(&path) {
                Err(Error::Tokens { reason, .. }) => assert!(reason.contains(expected), "{reason}"),
                other => panic!("{expected}: {other:?}"),
            }
        };
        let good = dir.path().join("good");
        tokens().save(&good).unwrap();
        let good = std::fs::read(good).unwrap();
        // Of equal length, so that the header's length stays right.
        let changed = |from: &str, to: &str| {
            let mut bytes = good.clone();
            let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).expect(from);
            bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
            bytes
        };
        check(b"", "no safetensors file");
        check(&good[..good.len() - 1], "no safetensors file");
        check(&changed("tokens 1", "tokens 9"), "tokens 9");
        check(&changed(r#"columns\":1"#, r#"columns\":2"#), "[2, 3, 16]; expected [images, 3 * 2");
        check(&changed(r#"rows\":3"#, r#"rows\":x"#), "metadata \"warpstep\"");
        check(&changed(r#"rows\":3"#, r#"rowz\":3"#), "missing field `rows`");
        check(&changed(r#"size\":2"#, r#"size\":1"#), "4 * 1^2");
        check(&changed("\"tokens\":{", "\"tokenz\":{"), "no tensor");
        check(&changed("\"warpstep\"", "\"warpstop\""), "no metadata");
        let mut infinite = good.clone();
        let end = infinite.len();
        infinite[end - 2..].copy_from_slice(&0x7f80u16.to_le_bytes());
        check(&infinite, "inf at index 95");
        let other = TokenLayout { scale: 1.0, ..tokens().layout };
        let refused = tokens().check_layout(Path::new("a"), &other).unwrap_err().to_string();
        assert!(refused.contains("0.3611") && refused.contains("with 1 and"), "{refused}");
    }
}
