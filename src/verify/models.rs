//! Models that cases name, loaded once per dtype and override.

use super::Context;
use crate::error::{Error, Result};
use crate::model::config::{ModelConfig, VaeConfig, resolve_vae_dir};
use crate::model::nextstep::NextStep;
use crate::model::upload::Uploader;
use crate::ops::DType;
use crate::weights::{Checkpoint, ModelWeights, OpenOptions, VaeWeights};
use serde_json::Value;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// Loaded models, by what distinguishes them.
#[derive(Default)]
pub struct Models {
    loaded: Vec<(Key, Arc<NextStep>)>,
}

#[derive(PartialEq)]
struct Key {
    model: PathBuf,
    vae: PathBuf,
    dtype: DType,
    overrides: String,
}

impl Models {
    /// The model of a case.
    pub(super) fn load(
        &mut self,
        context: &Context<'_>,
        model: &str,
        vae: &str,
        dtype: DType,
        overrides: &Value,
    ) -> Result<Arc<NextStep>> {
        let (model, vae) = (folder(context, model)?, folder(context, vae)?);
        self.load_dirs(context, model, vae, dtype, overrides)
    }

    fn load_dirs(
        &mut self,
        context: &Context<'_>,
        model: PathBuf,
        vae: PathBuf,
        dtype: DType,
        overrides: &Value,
    ) -> Result<Arc<NextStep>> {
        let key = Key { model, vae, dtype, overrides: overrides.to_string() };
        if let Some((_, loaded)) = self.loaded.iter().find(|(k, _)| *k == key) {
            return Ok(loaded.clone());
        }
        let mut config = ModelConfig::load(&key.model)?;
        for (name, value) in overrides.as_object().into_iter().flatten() {
            match (name.as_str(), value.as_bool()) {
                ("use_gen_pos_embed", Some(on)) => config.use_gen_pos_embed = on,
                _ => return Err(context.case.invalid(format!("config override {name} is not known"))),
            }
        }
        let vae_config = VaeConfig::load(&key.vae)?;
        let open = OpenOptions { mmap: true };
        let checkpoint = Checkpoint::open(&key.model, open)?;
        let vae_checkpoint = Checkpoint::open(&key.vae, open)?;
        let weights = ModelWeights::new(checkpoint, &config)?;
        let vae_weights = VaeWeights::new(vae_checkpoint, &vae_config)?;
        let selection = &context.options.selection;
        let up = Uploader::new(context.device.clone(), dtype, selection)?.with_threads(None)?;
        let (weights, vae_weights) = ((&config, &weights), (&vae_config, &vae_weights));
        let loaded = Arc::new(NextStep::load(up, weights, vae_weights, true)?);
        self.loaded.push((key, loaded.clone()));
        Ok(loaded)
    }

    /// The model of a case that names no VAE: its config says where one is.
    pub(super) fn load_without_vae(
        &mut self,
        context: &Context<'_>,
        model: &str,
        dtype: DType,
    ) -> Result<Arc<NextStep>> {
        let dir = folder(context, model)?;
        let vae = resolve_vae_dir(&dir, &ModelConfig::load(&dir)?, None)?;
        self.load_dirs(context, dir, vae, dtype, &Value::Null)
    }
}

/// A folder below the model root; case files are data, so they may not lead out of it.
pub(super) fn folder(context: &Context<'_>, name: &str) -> Result<PathBuf> {
    let relative = Path::new(name);
    if !relative.components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir)) {
        return Err(context.case.invalid(format!("model folder {name:?} leaves the model root")));
    }
    let path = context.root.join(relative);
    if !path.is_dir() {
        return Err(Error::io(&path)(std::io::Error::from(std::io::ErrorKind::NotFound)));
    }
    Ok(path)
}
