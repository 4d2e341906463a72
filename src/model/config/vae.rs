//! The VAE's `config.json`, in the official form (`ch`, `ch_mult`, ...) and in diffusers' (`block_out_channels`, ...),
//! and the search for the VAE's directory.

use super::fields::{Fields, read_config};
use super::{Error, ModelConfig, Path, PathBuf, Result};

/// GroupNorm groups, in every norm of the VAE.
const NUM_GROUPS: usize = 32;

/// The norm that the encoder applies to its mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct EncoderNorm {
    /// Side of the square of latent pixels that is normalised together with all channels.
    pub psz: usize,
}

/// Shape and constants of the VAE.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct VaeConfig {
    /// The file this was read from, for errors.
    #[serde(skip)]
    pub path: PathBuf,
    /// Channels that the encoder's `conv_in` makes of the image's three; the first level widens them by `ch_mult[0]`.
    pub ch: usize,
    /// Channels of each level, finest first: `ch * ch_mult[level]`.
    pub block_out_channels: Vec<usize>,
    /// Residual blocks per encoder level; the decoder has one more.
    pub num_res_blocks: usize,
    /// Channels of the latent.
    pub z_channels: usize,
    /// The model's latent is `(latent - shift_factor) * scaling_factor`.
    pub scaling_factor: f64,
    /// See `scaling_factor`.
    pub shift_factor: f64,
    /// Whether encoding takes the posterior's mean instead of a sample.
    pub deterministic: bool,
    /// The norm of the encoder's mean, if there is one.
    pub encoder_norm: Option<EncoderNorm>,
}

impl VaeConfig {
    /// Channels of an image: RGB.
    pub const IMAGE_CHANNELS: usize = 3;

    /// Reads `config.json` of a VAE directory.
    pub fn load(dir: impl AsRef<Path>) -> Result<VaeConfig> {
        let path = dir.as_ref().join("config.json");
        Self::parse(&path, &read_config(&path)?)
    }

    /// Reads the text of a config; `path` is what errors call it.
    ///
    /// The official classes fill absent keys with defaults, and disagree: the August 2025 one (and vLLM-Omni's) has
    /// scaling_factor 0.3611, shift_factor 0.1159, deterministic false, encoder_norm false, psz null; the February
    /// 2026 one has 1, 0, true, true, 1 when the *file* is missing. Absent keys of an existing official-style file
    /// get the August values here; a missing file is an error, because guessing between the two gives wrong colours.
    /// A diffusers-style file must state its scaling factor; encoder_norm and deterministic are extensions there
    /// and default to false.
    pub fn parse(path: &Path, text: &str) -> Result<VaeConfig> {
        let fields = Fields::parse(path, text)?;
        let diffusers = fields.raw("block_out_channels").is_some();
        let config = if diffusers { parse_diffusers(path, &fields)? } else { parse_official(path, &fields)? };
        let channels_key = if diffusers { "block_out_channels" } else { "ch" };
        let mut channels = std::iter::once(&config.ch).chain(&config.block_out_channels);
        if let Some(odd) = channels.find(|channels| !channels.is_multiple_of(NUM_GROUPS)) {
            let reason = format!("{odd} channels do not divide into the {NUM_GROUPS} groups of GroupNorm");
            return Err(fields.error(channels_key, reason));
        }
        if config.scaling_factor == 0.0 {
            return Err(fields.error("scaling_factor", "0: latents are divided by it".into()));
        }
        Ok(config)
    }

    /// Pixels per latent pixel, in each direction: one halving between levels.
    pub fn downsample_factor(&self) -> usize {
        1 << (self.block_out_channels.len() - 1)
    }
}

fn parse_official(path: &Path, fields: &Fields) -> Result<VaeConfig> {
    check_image_channels(fields, "out_ch")?;
    let ch = fields.optional_size("ch", 1..=8192)?.unwrap_or(128);
    let ch_mult = fields.sizes("ch_mult", 1..=64)?.unwrap_or(vec![1, 2, 4, 4]);
    check_levels(fields, "ch_mult", ch_mult.len())?;
    // "encoder_norm" without "psz" normalises each latent pixel over its channels: a patch of side 1.
    let psz = fields.optional_size("psz", 1..=64)?.unwrap_or(1);
    let encoder_norm = fields.optional_bool("encoder_norm")?.unwrap_or(false);
    Ok(VaeConfig {
        path: path.to_owned(),
        ch,
        block_out_channels: ch_mult.iter().map(|mult| ch * mult).collect(),
        num_res_blocks: fields.optional_size("num_res_blocks", 1..=64)?.unwrap_or(2),
        z_channels: fields.optional_size("z_channels", 1..=4096)?.unwrap_or(16),
        scaling_factor: fields.optional_number("scaling_factor")?.unwrap_or(0.3611),
        shift_factor: fields.optional_number("shift_factor")?.unwrap_or(0.1159),
        deterministic: fields.optional_bool("deterministic")?.unwrap_or(false),
        encoder_norm: encoder_norm.then_some(EncoderNorm { psz }),
    })
}

fn parse_diffusers(path: &Path, fields: &Fields) -> Result<VaeConfig> {
    check_image_channels(fields, "out_channels")?;
    let block_out_channels = fields.sizes("block_out_channels", 1..=1 << 16)?.unwrap_or_default();
    check_levels(fields, "block_out_channels", block_out_channels.len())?;
    if let Some(groups) = fields.optional_size("norm_num_groups", 1..=1 << 16)?
        && groups != NUM_GROUPS
    {
        return Err(fields.error("norm_num_groups", format!("{groups}: expected {NUM_GROUPS}")));
    }
    if let Some(act) = fields.optional_string("act_fn")?
        && act != "silu"
    {
        return Err(fields.error("act_fn", format!("{act:?}: expected \"silu\"")));
    }
    for (key, wanted) in
        [("use_quant_conv", false), ("use_post_quant_conv", false), ("mid_block_add_attention", true)]
    {
        if fields.optional_bool(key)?.is_some_and(|value| value != wanted) {
            return Err(fields.error(key, format!("{}: this VAE has it {wanted}", !wanted)));
        }
    }
    // In this class an absent psz switches the norm off.
    let encoder_norm = fields.optional_bool("encoder_norm")?.unwrap_or(false);
    let psz = fields.optional_size("psz", 1..=64)?.filter(|_| encoder_norm);
    let scaling_factor = fields.optional_number("scaling_factor")?;
    Ok(VaeConfig {
        path: path.to_owned(),
        ch: block_out_channels[0],
        block_out_channels,
        num_res_blocks: fields.size("layers_per_block", 1..=64)?,
        z_channels: fields.size("latent_channels", 1..=4096)?,
        scaling_factor: scaling_factor
            .ok_or_else(|| fields.error("scaling_factor", "missing; there is no safe default".into()))?,
        shift_factor: fields.optional_number("shift_factor")?.unwrap_or(0.0),
        deterministic: fields.optional_bool("deterministic")?.unwrap_or(false),
        encoder_norm: psz.map(|psz| EncoderNorm { psz }),
    })
}

fn check_image_channels(fields: &Fields, out_key: &str) -> Result<()> {
    for key in ["in_channels", out_key] {
        fields.optional_size(key, VaeConfig::IMAGE_CHANNELS..=VaeConfig::IMAGE_CHANNELS)?;
    }
    Ok(())
}

fn check_levels(fields: &Fields, key: &str, levels: usize) -> Result<()> {
    match levels {
        1..=8 => Ok(()),
        _ => Err(fields.error(key, format!("{levels} levels: expected 1 to 8"))),
    }
}

/// Checks that the VAE makes the latents that the model was trained on.
pub fn check_vae_match(model: &ModelConfig, vae: &VaeConfig) -> Result<()> {
    if model.latent_channels == vae.z_channels {
        return Ok(());
    }
    let reason = format!(
        "{}, but the model ({}) has latent_channels {}: this VAE belongs to another model",
        vae.z_channels,
        model.path.display(),
        model.latent_channels
    );
    Err(Error::InvalidConfig { path: vae.path.clone(), field: "z_channels".into(), reason })
}

/// Where the VAE of a model lies: at `chosen` if the user named a directory, else at `vae_name_or_path` (relative
/// to the model), else at `vae/` inside the model directory. A name on a hub, or a path of the machine where the
/// model was made, is not followed anywhere: nothing is downloaded.
pub fn resolve_vae_dir(model_dir: &Path, model: &ModelConfig, chosen: Option<&Path>) -> Result<PathBuf> {
    let default = model_dir.join("vae");
    let candidates = match (chosen, model.vae_name_or_path.as_deref()) {
        (Some(chosen), _) => vec![chosen.to_owned()],
        // `join` keeps an absolute name as it is.
        (None, Some(name)) if !name.is_empty() => vec![model_dir.join(name), default],
        (None, _) => vec![default],
    };
    if let Some(found) = candidates.iter().find(|dir| dir.is_dir()) {
        return Ok(found.clone());
    }
    let tried: Vec<_> = candidates.iter().map(|dir| crate::weights::escape(&dir.to_string_lossy())).collect();
    Err(Error::InvalidConfig {
        path: model.path.clone(),
        field: "vae_name_or_path".into(),
        reason: format!(
            "no VAE directory; tried {}. Copy the VAE to one of these, or name its directory",
            tried.join(" and ")
        ),
    })
}
