//! Reading the recorded tensors.

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

fn bytes(name: &str) -> Vec<u8> {
    let path = format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The entry of `cases/index.json` about a case.
pub fn index_entry(case: &str) -> Value {
    let all: Vec<Value> = serde_json::from_slice(&bytes("cases/index.json")).unwrap();
    all.into_iter().find(|entry| entry["name"] == case).unwrap()
}

/// A safetensors file.
pub struct Golden(Vec<u8>);

impl Golden {
    pub fn open(name: &str) -> Golden {
        Golden(bytes(&format!("{name}.safetensors")))
    }

    /// A tensor, widened to f32.
    pub fn find(&self, name: &str) -> Option<Vec<f32>> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let view = file.tensor(name).ok()?;
        let data = view.data();
        Some(match view.dtype() {
            Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            Dtype::BF16 => {
                let half = |b: &[u8]| half::bf16::from_le_bytes(b.try_into().unwrap()).to_f32();
                data.chunks_exact(2).map(half).collect()
            }
            other => panic!("{name}: {other:?}"),
        })
    }

    pub fn get(&self, name: &str) -> Vec<f32> {
        self.find(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }
}

pub fn max_error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    // NaN must not hide behind max().
    assert!(found.iter().all(|v| !v.is_nan()), "NaN in the result");
    found.iter().zip(expected).map(|(f, e)| (f - e).abs()).fold(0.0, f32::max)
}

pub fn mean_error(found: &[f32], expected: &[f32]) -> f32 {
    found.iter().zip(expected).map(|(f, e)| (f - e).abs()).sum::<f32>() / found.len() as f32
}
