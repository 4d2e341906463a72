//! The demo model inside the library: a small trained NextStep, loaded by the same code as any checkpoint.

use crate::engine::{Engine, Load};
use crate::error::Result;

#[cfg(feature = "demo-model")]
mod files {
    macro_rules! file {
        ($name:literal) => {
            include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/tools/demo/model/", $name))
        };
    }
    macro_rules! text {
        ($name:literal) => {
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tools/demo/model/", $name))
        };
    }
    pub static CONFIG: &str = text!("config.json");
    pub static WEIGHTS: &[u8] = file!("model.safetensors");
    pub static TOKENIZER: &[u8] = file!("tokenizer.json");
    pub static TOKENIZER_CONFIG: &[u8] = file!("tokenizer_config.json");
    pub static VAE_CONFIG: &str = text!("vae/config.json");
    pub static VAE_WEIGHTS: &[u8] = file!("vae/model.safetensors");
}

/// Name of the embedded model.
pub const NAME: &str = "demo";

/// Loads the embedded model.
#[cfg(feature = "demo-model")]
pub(crate) fn load(load: Load<'_>) -> Result<Engine> {
    use crate::tokenizer::{Tokenizer, TokenizerFiles};
    use crate::weights::Checkpoint;
    use std::path::Path;
    let origin = Path::new("<embedded demo model>");
    let (config, vae_config) = configs()?;
    let checkpoint = Checkpoint::from_bytes("<embedded demo model>/model.safetensors", files::WEIGHTS)?;
    let vae = Checkpoint::from_bytes("<embedded demo model>/vae/model.safetensors", files::VAE_WEIGHTS)?;
    let tokenizer_files = TokenizerFiles {
        tokenizer: files::TOKENIZER,
        tokenizer_config: Some(files::TOKENIZER_CONFIG),
        special_tokens_map: None,
    };
    let tokenizer = Tokenizer::from_bytes(tokenizer_files, origin, crate::engine::token_ids(&config))?;
    Engine::assemble(NAME.into(), (config, checkpoint), (vae_config, vae), tokenizer, load)
}

/// Sizes of the embedded model.
#[cfg(feature = "demo-model")]
pub(crate) fn configs() -> Result<(crate::model::config::ModelConfig, crate::model::config::VaeConfig)> {
    use crate::model::config::{ModelConfig, VaeConfig};
    let origin = std::path::Path::new("<embedded demo model>");
    let config = ModelConfig::parse(&origin.join("config.json"), files::CONFIG)?;
    Ok((config, VaeConfig::parse(&origin.join("vae/config.json"), files::VAE_CONFIG)?))
}

/// Says that this build carries no demo model.
#[cfg(not(feature = "demo-model"))]
pub(crate) fn configs() -> Result<(crate::model::config::ModelConfig, crate::model::config::VaeConfig)> {
    Err(crate::error::Error::request("synthetic", "this build has no embedded demo model"))
}

/// Says that this build carries no demo model.
#[cfg(not(feature = "demo-model"))]
pub(crate) fn load(_load: Load<'_>) -> Result<Engine> {
    Err(crate::error::Error::request(
        "model",
        "this build has no embedded demo model (feature demo-model is off): give --model DIR",
    ))
}
