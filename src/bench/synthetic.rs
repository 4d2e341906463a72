//! Models of true shapes with random weights, made on the device: what time and bytes depend on, without a checkpoint.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::model::config::{ModelConfig, VaeConfig, check_vae_match};
use crate::model::nextstep::NextStep;
use crate::ops::{DType, Selection};
use std::path::Path;
use std::sync::Arc;

/// NextStep-1-Large: a Qwen2.5-14B backbone, a flow head of 12 x 1536, tokens of 2 x 2 x 16 latent values.
const LARGE: &str = r#"{"model_type": "nextstep", "vocab_size": 152064, "hidden_size": 5120,
    "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "attention_bias": true, "o_attention_bias": false,
    "latent_patch_size": 2, "latent_channels": 16, "fm_head_dim": 1536, "fm_head_layers": 12, "boi": 151667,
    "eoi": 151668, "image_placeholder_id": 151669}"#;

/// The VAE of the released models: channels 128 x (1, 2, 4, 4).
const LARGE_VAE: &str = "{}";

/// Small enough for a quick look at the bench itself.
const TINY: &str = r#"{"model_type": "nextstep", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": true,
    "o_attention_bias": false, "latent_patch_size": 2, "latent_channels": 16, "fm_head_dim": 64,
    "fm_head_layers": 2, "boi": 1, "eoi": 2, "image_placeholder_id": 3}"#;

const TINY_VAE: &str = r#"{"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}"#;

/// The names that [`configs`] knows.
pub const NAMES: [&str; 3] = ["14b", "demo", "tiny"];

/// Configs of a named shape, with `layers` decoder layers instead of its own where given.
pub fn configs(name: &str, layers: Option<usize>) -> Result<(ModelConfig, VaeConfig)> {
    let parse = |config: &str, vae: &str| -> Result<(ModelConfig, VaeConfig)> {
        let origin = Path::new("<synthetic>");
        Ok((ModelConfig::parse(origin, config)?, VaeConfig::parse(origin, vae)?))
    };
    let (mut config, vae) = match name {
        "14b" => parse(LARGE, LARGE_VAE)?,
        "demo" => crate::demo::configs()?,
        "tiny" => parse(TINY, TINY_VAE)?,
        _ => {
            let reason = format!("unknown shape {name:?}; known: {}", NAMES.join(", "));
            return Err(Error::request("synthetic", reason));
        }
    };
    match layers {
        Some(layers) if !(1..=4096).contains(&layers) => {
            return Err(Error::request("layers", format!("{layers}: 1 to 4096")));
        }
        Some(layers) => config.num_hidden_layers = layers,
        None => {}
    }
    check_vae_match(&config, &vae)?;
    Ok((config, vae))
}

/// A model of these shapes with random weights.
pub fn model(
    device: &Arc<dyn Device>,
    (config, vae): &(ModelConfig, VaeConfig),
    dtype: DType,
    kernels: &Selection,
    seed: u64,
) -> Result<NextStep> {
    NextStep::random(device, (config, vae), dtype, kernels, seed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::paper::PaperDevice;

    #[test]
    fn the_14b_takes_the_bytes_that_its_shapes_say() {
        let paper: Arc<dyn Device> = Arc::new(PaperDevice::new(132));
        let model =
            model(&paper, &configs("14b", None).unwrap(), DType::Bf16, &Selection::default(), 1).unwrap();
        // performance: 48 layers with q, k, v biases and norms, embedding and final norm, both projectors, flow
        // head of 157 228 096, VAE of 49 545 475 + 34 274 208. The LM head is not loaded.
        let backbone: u64 = 48 * (275_251_200 + 7_168 + 2 * 5_120) + 778_567_680 + 5_120;
        let projectors = 26_219_520 + 332_800;
        let head = 157_228_096;
        let vae = 49_545_475 + 34_274_208;
        // The VAE's probes are identities of 128 and 512 channels with a bias.
        let probes = 128 * 129 + 512 * 513;
        let tensors = 2 * (backbone + projectors + head + vae + probes);
        // Packed for a kernel, they may take up to 2 % more.
        let found = model.weight_bytes();
        assert!((tensors..=tensors + tensors / 50).contains(&found), "{found} bytes for {tensors}");
    }

    #[test]
    fn unknown_shapes_and_no_layers_are_refused() {
        assert!(configs("13b", None).unwrap_err().to_string().contains("14b, demo, tiny"));
        assert!(configs("tiny", Some(0)).is_err());
        assert_eq!(configs("14b", Some(2)).unwrap().0.num_hidden_layers, 2);
    }
}
