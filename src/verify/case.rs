//! A recorded case: a safetensors file whose metadata describes how it was made.

use crate::error::{Error, Result};
use crate::ops::DType;
use half::bf16;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A case held in memory.
pub struct CaseFile {
    /// Name, as reported.
    pub name: String,
    /// `pipeline`, `fmnet`, `samplers`, `vae`, `text`, `center_crop`, `picture`.
    pub kind: String,
    /// Dtype that the official code ran in.
    pub dtype: DType,
    /// The whole description.
    pub meta: Value,
    path: PathBuf,
    bytes: Vec<u8>,
}

/// A recorded tensor, widened.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// Shape.
    pub shape: Vec<usize>,
    /// Values in row-major order.
    pub values: Vec<f32>,
}

impl Recorded {
    /// Row `index` of the first axis.
    pub fn at(&self, index: usize) -> &[f32] {
        let row = self.values.len() / self.shape[0].max(1);
        &self.values[index * row..(index + 1) * row]
    }
}

/// Cases are small; anything larger is not one.
const MAX_CASE_BYTES: u64 = 1 << 30;

impl CaseFile {
    /// Reads and checks a file.
    pub fn open(path: &Path) -> Result<CaseFile> {
        let invalid = |reason: String| Error::InvalidCase { path: path.into(), reason };
        let info = std::fs::metadata(path).map_err(Error::io(path))?;
        if !info.is_file() || info.len() > MAX_CASE_BYTES {
            return Err(invalid(format!("not a file of at most {MAX_CASE_BYTES} bytes")));
        }
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| invalid(e.to_string()))?;
        let text = header
            .metadata()
            .as_ref()
            .and_then(|m| m.get("case"))
            .ok_or_else(|| invalid("no \"case\" in the metadata".into()))?;
        let meta: Value = serde_json::from_str(text).map_err(|e| invalid(format!("metadata: {e}")))?;
        SafeTensors::deserialize(&bytes).map_err(|e| invalid(e.to_string()))?;
        let stem = path.file_stem().and_then(|s| s.to_str()).unwrap_or_default().to_string();
        let field = |key: &str| meta.get(key).and_then(Value::as_str).map(str::to_string);
        let kind = field("kind").ok_or_else(|| invalid("metadata: no kind".into()))?;
        let dtype = match field("dtype").as_deref() {
            Some("bfloat16") => DType::Bf16,
            Some("float32") | None => DType::F32,
            Some(other) => return Err(invalid(format!("metadata: dtype {other:?}"))),
        };
        Ok(CaseFile { name: stem, kind, dtype, meta, path: path.into(), bytes })
    }

    /// An error about this case.
    pub fn invalid(&self, reason: impl Into<String>) -> Error {
        Error::InvalidCase { path: self.path.clone(), reason: reason.into() }
    }

    fn tensors(&self) -> Result<SafeTensors<'_>> {
        SafeTensors::deserialize(&self.bytes).map_err(|e| self.invalid(e.to_string()))
    }

    /// Names of all tensors.
    pub fn names(&self) -> Result<Vec<String>> {
        Ok(self.tensors()?.names().into_iter().map(str::to_string).collect())
    }

    /// Whether a tensor is recorded.
    pub fn has(&self, name: &str) -> bool {
        self.tensors().is_ok_and(|t| t.tensor(name).is_ok())
    }

    /// A floating-point or byte tensor, widened to f32.
    pub fn tensor(&self, name: &str) -> Result<Recorded> {
        let all = self.tensors()?;
        let view = all.tensor(name).map_err(|_| self.invalid(format!("tensor {name} is not recorded")))?;
        let data = view.data();
        let values = match view.dtype() {
            Dtype::F32 => {
                data.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect()
            }
            Dtype::BF16 => data.chunks_exact(2).map(|c| bf16::from_le_bytes([c[0], c[1]]).to_f32()).collect(),
            Dtype::U8 => data.iter().map(|&b| f32::from(b)).collect(),
            other => return Err(self.invalid(format!("tensor {name} has element type {other:?}"))),
        };
        if view.shape().is_empty() || view.shape().contains(&0) {
            return Err(self.invalid(format!("tensor {name} has shape {:?}", view.shape())));
        }
        Ok(Recorded { shape: view.shape().to_vec(), values })
    }

    /// An int64 tensor with its shape.
    pub fn integers(&self, name: &str) -> Result<(Vec<usize>, Vec<i64>)> {
        let all = self.tensors()?;
        let view = all.tensor(name).map_err(|_| self.invalid(format!("tensor {name} is not recorded")))?;
        if view.dtype() != Dtype::I64 {
            return Err(self.invalid(format!("tensor {name} has element type {:?}", view.dtype())));
        }
        let mut bytes = [0; 8];
        let values = view
            .data()
            .chunks_exact(8)
            .map(|c| {
                bytes.copy_from_slice(c);
                i64::from_le_bytes(bytes)
            })
            .collect();
        Ok((view.shape().to_vec(), values))
    }

    /// A field of the description.
    pub fn text(&self, key: &str) -> Result<&str> {
        self.meta.get(key).and_then(Value::as_str).ok_or_else(|| self.invalid(format!("metadata: no {key}")))
    }

    /// An argument of the official call.
    pub fn argument(&self, key: &str) -> Option<&Value> {
        self.meta.get("kwargs").and_then(|k| k.get(key)).filter(|v| !v.is_null())
    }

    /// A numeric argument, or its default.
    pub fn number(&self, key: &str, default: f64) -> f64 {
        self.argument(key).and_then(Value::as_f64).unwrap_or(default)
    }
}
