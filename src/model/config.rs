//! `config.json` of the language model with its flow-matching head, and of the VAE, read into structs whose every
//! number was checked. Both generations of key names are understood; keys that no computation here depends on are
//! ignored (`auto_map` among them: no code is ever loaded), keys that ask for something unimplemented are errors.

mod fields;
mod vae;

pub use vae::{EncoderNorm, VaeConfig, check_vae_match, resolve_vae_dir};

use crate::error::{Error, Result};
use fields::Fields;
pub(crate) use fields::read_config;
use std::path::{Path, PathBuf};

/// Configs are a few KB; the training class writes a table of aspect ratios that takes some more.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Shape and constants of the transformer, its projectors and its flow-matching head.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ModelConfig {
    /// The file this was read from, for errors.
    #[serde(skip)]
    pub path: PathBuf,
    /// Width of the residual stream (D).
    pub hidden_size: usize,
    /// Width of the MLP (I).
    pub intermediate_size: usize,
    /// Decoder layers (L).
    pub num_hidden_layers: usize,
    /// Query heads (nq).
    pub num_attention_heads: usize,
    /// Key/value heads (nk); divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of a head (d). `num_attention_heads * head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Rows of `embed_tokens` and `lm_head` (V).
    pub vocab_size: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Whether q, k and v have biases.
    pub attention_bias: bool,
    /// Whether o_proj has one.
    pub o_attention_bias: bool,
    /// Whether gate, up and down have biases.
    pub mlp_bias: bool,
    /// Whether `lm_head` may be missing, `embed_tokens` then takes its place.
    pub tie_word_embeddings: bool,
    /// Whether a D x D layer `before_lm_head` precedes the LM head (February 2026 training class).
    pub use_mlp_before_lm_head: bool,
    /// Longest sequence the model was made for; nothing in the computation depends on it.
    pub max_position_embeddings: Option<usize>,
    /// Ids that end a text.
    pub eos_token_ids: Vec<u32>,
    /// `vae_name_or_path`; see [`resolve_vae_dir`].
    pub vae_name_or_path: Option<String>,
    /// Side of the latent patch that makes one image token (p).
    pub latent_patch_size: usize,
    /// Channels of the latent (C).
    pub latent_channels: usize,
    /// Id of begin-of-image.
    pub boi: u32,
    /// Id of end-of-image.
    pub eoi: u32,
    /// Id that stands for an image token in a prompt.
    pub image_placeholder_id: u32,
    /// Width of the flow-matching head (F).
    pub fm_head_dim: usize,
    /// Residual blocks of the flow-matching head (M).
    pub fm_head_layers: usize,
    /// Whether a position table is added to the hidden state before `image_out_projector`.
    pub use_gen_pos_embed: bool,
    /// Side of that table's grid (32: 1024 positions).
    pub base_image_grid_size: usize,
}

impl ModelConfig {
    /// Reads `config.json` of a model directory.
    pub fn load(dir: impl AsRef<Path>) -> Result<ModelConfig> {
        let path = dir.as_ref().join("config.json");
        Self::parse(&path, &fields::read_config(&path)?)
    }

    /// Reads the text of a config; `path` is what errors call it.
    pub fn parse(path: &Path, text: &str) -> Result<ModelConfig> {
        let fields = Fields::parse(path, text)?;
        refuse_unimplemented(&fields)?;

        let hidden_size = fields.size("hidden_size", 1..=65536)?;
        let num_attention_heads = fields.size("num_attention_heads", 1..=1024)?;
        let num_key_value_heads = fields.size("num_key_value_heads", 1..=1024)?;
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            let reason =
                format!("{num_key_value_heads} does not divide the {num_attention_heads} query heads");
            return Err(fields.error("num_key_value_heads", reason));
        }
        let head_dim = match fields.optional_size("head_dim", 1..=256)? {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
            None => {
                let reason = format!(
                    "{num_attention_heads} does not divide hidden_size {hidden_size}, and there is no head_dim"
                );
                return Err(fields.error("num_attention_heads", reason));
            }
        };
        if !head_dim.is_multiple_of(16) || head_dim > 256 {
            return Err(
                fields.error("head_dim", format!("{head_dim}: expected a multiple of 16 of at most 256"))
            );
        }

        let vocab_size = fields.size("vocab_size", 1..=1 << 24)?;
        let id = |key: &str| -> Result<u32> { Ok(fields.size(key, 0..=vocab_size - 1)? as u32) };
        let (boi, eoi, image_placeholder_id) = (id("boi")?, id("eoi")?, id("image_placeholder_id")?);
        if boi == eoi || boi == image_placeholder_id || eoi == image_placeholder_id {
            let reason = format!(
                "{image_placeholder_id}: must differ from boi {boi} and eoi {eoi}, which must differ too"
            );
            return Err(fields.error("image_placeholder_id", reason));
        }

        // Two families of classes wrote these files. The Llama one has biases where its keys say so, by default
        // none; the Qwen2 one has them on q, k and v, never on o, and writes no key for it.
        let qwen2 = is_qwen2_style(&fields);
        let attention_bias = fields.optional_bool("attention_bias")?.unwrap_or(qwen2);
        let o_attention_bias = fields.optional_bool("o_attention_bias")?.unwrap_or(attention_bias && !qwen2);

        let use_gen_pos_embed = fields.optional_bool("use_gen_pos_embed")?.unwrap_or(false);
        if use_gen_pos_embed && !hidden_size.is_multiple_of(4) {
            let reason =
                format!("{hidden_size}: the position table of use_gen_pos_embed needs a multiple of 4");
            return Err(fields.error("hidden_size", reason));
        }
        Ok(ModelConfig {
            path: path.to_owned(),
            hidden_size,
            intermediate_size: fields.size("intermediate_size", 1..=1 << 20)?,
            num_hidden_layers: fields.size("num_hidden_layers", 1..=4096)?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size,
            rms_norm_eps: fields.positive("rms_norm_eps", Some(1e-6))? as f32,
            rope_theta: rope_theta(&fields)?,
            attention_bias,
            o_attention_bias,
            mlp_bias: fields.optional_bool("mlp_bias")?.unwrap_or(false),
            tie_word_embeddings: fields.optional_bool("tie_word_embeddings")?.unwrap_or(false),
            use_mlp_before_lm_head: fields.optional_bool("use_mlp_before_lm_head")?.unwrap_or(false),
            max_position_embeddings: fields.optional_size("max_position_embeddings", 1..=1 << 30)?,
            eos_token_ids: fields.ids("eos_token_id", vocab_size)?,
            vae_name_or_path: fields.optional_string("vae_name_or_path")?,
            latent_patch_size: either_size(&fields, "latent_patch_size", "patch_size", 1..=64, 2, 1)?,
            latent_channels: either_size(&fields, "latent_channels", "num_channels", 1..=4096, 16, 16)?,
            boi,
            eoi,
            image_placeholder_id,
            fm_head_dim: fields.optional_size("fm_head_dim", 1..=65536)?.unwrap_or(1536),
            fm_head_layers: fields.optional_size("fm_head_layers", 1..=4096)?.unwrap_or(12),
            use_gen_pos_embed,
            base_image_grid_size: fields.optional_size("base_image_grid_size", 1..=1024)?.unwrap_or(32),
        })
    }

    /// Numbers in one image token (K): a p x p patch of the latent.
    pub fn token_dim(&self) -> usize {
        self.latent_channels * self.latent_patch_size * self.latent_patch_size
    }

    /// Output width of q_proj.
    pub fn q_size(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Output width of k_proj and of v_proj.
    pub fn kv_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Rows of the table `gen_pos_embed`.
    pub fn gen_pos_rows(&self) -> usize {
        self.base_image_grid_size * self.base_image_grid_size
    }
}

/// Keys that change the computation in a way that neither the official code nor this engine implements.
fn refuse_unimplemented(fields: &Fields) -> Result<()> {
    if let Some(act) = fields.optional_string("hidden_act")?
        && act != "silu"
    {
        return Err(fields.error("hidden_act", format!("{act:?}: expected \"silu\"")));
    }
    for key in ["attention_use_qk_norm", "use_sliding_window"] {
        if fields.optional_bool(key)? == Some(true) {
            return Err(fields.error(key, "true: not implemented, in the official code neither".into()));
        }
    }
    Ok(())
}

/// Whether a class derived from transformers' Qwen2 config wrote the file: by its name, or by keys that only
/// such a class has (`max_window_layers` is Qwen2's, the other two belong to the February 2026 training class).
fn is_qwen2_style(fields: &Fields) -> bool {
    let model_type = fields.raw("model_type").and_then(|value| value.as_str()).unwrap_or_default();
    let qwen2_keys = ["max_window_layers", "num_channels", "hw_aspect_ratios_ids"];
    model_type.starts_with("qwen2")
        || model_type == "stepx_llama"
        || qwen2_keys.iter().any(|key| fields.raw(key).is_some())
}

/// A key of the released classes, else its name in the training class; each has its own default there, and the
/// training class is recognised by either of its keys.
fn either_size(
    fields: &Fields,
    key: &'static str,
    training_key: &'static str,
    range: std::ops::RangeInclusive<usize>,
    default: usize,
    training_default: usize,
) -> Result<usize> {
    let training_class = fields.raw("patch_size").is_some() || fields.raw("num_channels").is_some();
    let (first, second) =
        (fields.optional_size(key, range.clone())?, fields.optional_size(training_key, range)?);
    if let (Some(first), Some(second)) = (first, second)
        && first != second
    {
        return Err(fields.error(key, format!("{first}, but {training_key}, its other name, is {second}")));
    }
    Ok(first.or(second).unwrap_or(if training_class { training_default } else { default }))
}

/// `rope_theta`, at the top or in transformers 5's `rope_parameters`. Scaled rotary embeddings are refused: the
/// official inference code reads `rope_scaling` and then computes without it, so a file that sets it means
/// something that nobody has run.
fn rope_theta(fields: &Fields) -> Result<f64> {
    let mut nested = None;
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(rope) = fields.optional_object(key)? else { continue };
        let kind = match rope.optional_string("rope_type")? {
            None => rope.optional_string("type")?,
            kind => kind,
        };
        if let Some(kind) = kind.filter(|kind| kind != "default") {
            let reason = format!(
                "type {kind:?} is not implemented (the official code ignores it); expected null or \"default\""
            );
            return Err(fields.error(key, reason));
        }
        nested = nested.or(rope.optional_positive("rope_theta")?);
    }
    match (fields.optional_positive("rope_theta")?, nested) {
        (Some(top), Some(nested)) if top != nested => {
            Err(fields.error("rope_theta", format!("{top}, but rope_parameters.rope_theta is {nested}")))
        }
        (top, nested) => Ok(top.or(nested).unwrap_or(10_000.0)),
    }
}
