//! What `inspect` says of a checkpoint: its config, its size by part and by element type, and what looks wrong.

use super::{Checkpoint, Dtype, ModelWeights, OpenOptions, Part, TensorSpec, VaeWeights, convert};
use crate::error::Result;
use crate::model::config::{ModelConfig, VaeConfig, check_vae_match, resolve_vae_dir};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A model directory with its VAE, or a VAE directory alone.
#[derive(Debug, Serialize)]
pub struct ModelSummary {
    /// The language model and flow head; none for a VAE directory.
    pub model: Option<CheckpointSummary<ModelConfig>>,
    /// The VAE, if one was found.
    pub vae: Option<CheckpointSummary<VaeConfig>>,
    /// What a user should know before using it.
    pub warnings: Vec<String>,
}

/// One checkpoint.
#[derive(Debug, Serialize)]
pub struct CheckpointSummary<C> {
    /// Directory that was read.
    pub path: PathBuf,
    /// Its config, with defaults filled in.
    pub config: C,
    /// Files that hold the tensors.
    pub files: Vec<PathBuf>,
    /// Number of tensors.
    pub tensors: usize,
    /// Stored bytes by element type.
    pub bytes_by_dtype: BTreeMap<Dtype, u64>,
    /// Parameters by part.
    pub parameters: BTreeMap<Part, u64>,
}

impl<C> CheckpointSummary<C> {
    fn new(path: &Path, config: C, checkpoint: &Checkpoint, specs: &[TensorSpec]) -> CheckpointSummary<C> {
        let mut bytes_by_dtype = BTreeMap::new();
        for tensor in checkpoint.tensors() {
            *bytes_by_dtype.entry(tensor.dtype()).or_default() += tensor.byte_len() as u64;
        }
        let mut parameters = BTreeMap::new();
        for spec in specs {
            *parameters.entry(spec.part).or_default() += spec.elements() as u64;
        }
        let files = checkpoint.files().map(Path::to_owned).collect();
        CheckpointSummary {
            path: path.to_owned(),
            config,
            files,
            tensors: specs.len(),
            bytes_by_dtype,
            parameters,
        }
    }

    /// All parameters.
    pub fn parameter_count(&self) -> u64 {
        self.parameters.values().sum()
    }
}

/// Opens and checks everything in `dir` as the engine would. With `check_values`, which reads every byte, tensors
/// that hold NaN or infinity, or nothing but zeros, become warnings.
pub fn describe(dir: &Path, options: OpenOptions, check_values: bool) -> Result<ModelSummary> {
    let mut warnings = Vec::new();
    let mut check = |checkpoint: &Checkpoint| -> Result<()> {
        if check_values {
            warnings.extend(odd_values(checkpoint)?);
        }
        Ok(())
    };
    let mut describe_vae = |dir: &Path| -> Result<(CheckpointSummary<VaeConfig>, bool)> {
        let config = VaeConfig::load(dir)?;
        let weights = VaeWeights::new(Checkpoint::open(dir, options)?, &config)?;
        check(weights.checkpoint())?;
        let summary = CheckpointSummary::new(dir, config, weights.checkpoint(), weights.specs());
        Ok((summary, weights.has_encoder()))
    };

    if is_vae_dir(dir)? {
        let (vae, has_encoder) = describe_vae(dir)?;
        warnings.extend(encoder_warning(has_encoder));
        return Ok(ModelSummary { model: None, vae: Some(vae), warnings });
    }
    let config = ModelConfig::load(dir)?;
    let vae_dir = resolve_vae_dir(dir, &config, None);
    let mut notes = Vec::new();
    let vae = match vae_dir {
        Ok(vae_dir) => {
            let (vae, has_encoder) = describe_vae(&vae_dir)?;
            check_vae_match(&config, &vae.config)?;
            notes.extend(encoder_warning(has_encoder));
            Some(vae)
        }
        Err(error) => {
            notes.push(error.to_string());
            None
        }
    };
    let weights = ModelWeights::new(Checkpoint::open(dir, options)?, &config)?;
    check(weights.checkpoint())?;
    if weights.find("gen_pos_embed").is_some() && !config.use_gen_pos_embed {
        notes.push("gen_pos_embed is stored, but use_gen_pos_embed is false: it is not used".into());
    }
    let model = CheckpointSummary::new(dir, config, weights.checkpoint(), weights.specs());
    warnings.extend(notes);
    Ok(ModelSummary { model: Some(model), vae, warnings })
}

/// Whether `dir/config.json` is a VAE's: it has no `hidden_size`, but one of the VAE's own keys.
fn is_vae_dir(dir: &Path) -> Result<bool> {
    let path = dir.join("config.json");
    let text = crate::model::config::read_config(&path)?;
    let keys: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let has = |key: &str| keys.get(key).is_some();
    Ok(!has("hidden_size") && (has("ch_mult") || has("z_channels") || has("block_out_channels")))
}

fn encoder_warning(has_encoder: bool) -> Option<String> {
    (!has_encoder).then(|| "the VAE has no encoder: it makes images from text, but cannot edit any".into())
}

/// One line for each tensor with values that no trained model has.
fn odd_values(checkpoint: &Checkpoint) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    for tensor in checkpoint.tensors() {
        let (mut nan, mut infinite, mut zero) = (0usize, 0usize, 0usize);
        let mut piece = vec![0f32; 1 << 16];
        let elements = tensor.elements();
        for start in (0..elements).step_by(piece.len()) {
            let end = elements.min(start + piece.len());
            let values = &mut piece[..end - start];
            convert::write_range_as(&tensor, start..end, Dtype::F32, bytemuck::cast_slice_mut(values))?;
            for x in values {
                nan += usize::from(x.is_nan());
                infinite += usize::from(x.is_infinite());
                zero += usize::from(*x == 0.0);
            }
        }
        let name = super::escape(tensor.name());
        if nan + infinite > 0 {
            warnings.push(format!("{name}: {nan} NaN and {infinite} infinite of {elements} values"));
        } else if zero == elements && elements > 0 && name.ends_with("weight") {
            warnings.push(format!("{name}: all {elements} values are zero"));
        }
    }
    Ok(warnings)
}
