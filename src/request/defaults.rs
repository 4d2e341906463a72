//! The values a request takes where the user names none: one block per released model, and the official examples' as presets.
//!
//! The official function defaults (256 pixels, guidance 1, 20 steps) are nobody's pictures; users mean the published
//! examples, so those are what stands here. Sources: the README of August 2025, `inference/inference.py` of February 2026.

use super::SamplerConfig;
use crate::sampler::{GuidanceSchedule, Sampler};

/// The models whose example settings are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ModelKind {
    /// The small trained model inside the binary.
    Demo,
    /// NextStep-1-Large, text to image.
    NextStep1Large,
    /// NextStep-1-Large-Edit.
    NextStep1LargeEdit,
    /// NextStep-1.1, text to image.
    NextStep11,
}

/// Example settings by task, for models that are not recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Preset {
    /// Text to image.
    T2i,
    /// Editing.
    Edit,
}

impl Preset {
    /// The preset of a name: `t2i` or `edit`.
    pub fn from_name(name: &str) -> Option<Preset> {
        match name {
            "t2i" => Some(Preset::T2i),
            "edit" => Some(Preset::Edit),
            _ => None,
        }
    }

    /// The settings.
    pub fn defaults(self) -> Defaults {
        match self {
            Preset::T2i => AUGUST_T2I,
            Preset::Edit => AUGUST_EDIT,
        }
    }
}

impl ModelKind {
    /// The model of a checkpoint folder. The released 14B models have one and the same config, so their folder or
    /// repository name tells them apart; the demo model is known by its width.
    pub fn recognise(name: &str, hidden_size: usize) -> Option<ModelKind> {
        let name = name.to_ascii_lowercase();
        match hidden_size {
            192 => Some(ModelKind::Demo),
            5120 if name.contains("nextstep-1.1") => Some(ModelKind::NextStep11),
            5120 if name.contains("nextstep-1-large-edit") => Some(ModelKind::NextStep1LargeEdit),
            5120 if name.contains("nextstep-1-large") => Some(ModelKind::NextStep1Large),
            _ => None,
        }
    }
}

/// A value for every field that may be left out. Prompt and seed have none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Defaults {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Added to the caption.
    pub positive_prompt: Option<&'static str>,
    /// Text of the negative rows.
    pub negative_prompt: Option<&'static str>,
    /// Everything about sampling.
    pub sampler: SamplerConfig,
}

/// The August text-to-image example.
const AUGUST_T2I: Defaults = Defaults {
    width: 512,
    height: 512,
    positive_prompt: Some("masterpiece, film grained, best quality."),
    negative_prompt: Some(
        "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst \
         quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry.",
    ),
    sampler: SamplerConfig {
        sampler: Sampler::Aug,
        steps: 50,
        guidance_scale: 7.5,
        image_guidance_scale: 1.0,
        guidance_schedule: GuidanceSchedule::Constant,
        timesteps_shift: 1.0,
        noise_level: None,
        use_norm: true,
        rescale: false,
    },
};

/// The August editing example.
const AUGUST_EDIT: Defaults = Defaults {
    positive_prompt: None,
    negative_prompt: Some("Copy original image."),
    sampler: SamplerConfig { image_guidance_scale: 2.0, timesteps_shift: 3.2, ..AUGUST_T2I.sampler },
    ..AUGUST_T2I
};

/// The February script.
const FEBRUARY_T2I: Defaults = Defaults {
    positive_prompt: None,
    negative_prompt: Some(
        "lowres, bad anatomy, bad hands, bad texts, bad layout, error, missing fingers, extra digit, fewer digits, \
         cropped, worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry.",
    ),
    sampler: SamplerConfig { sampler: Sampler::Sde, steps: 30, use_norm: false, ..AUGUST_T2I.sampler },
    ..AUGUST_T2I
};

/// What the demo model was trained for: 4 x 4 tokens, normalised, no quality words. Five Euler steps draw as many right
/// pictures as ten, or as twenty of `aug` (tools/demo/README.md, "Measured"), in a quarter of the time.
const DEMO: Defaults = Defaults {
    width: 64,
    height: 64,
    positive_prompt: None,
    negative_prompt: None,
    sampler: SamplerConfig { sampler: Sampler::Ode, steps: 5, guidance_scale: 2.0, ..AUGUST_T2I.sampler },
};

impl Defaults {
    /// The settings of a known model.
    pub fn for_model(kind: ModelKind) -> Defaults {
        match kind {
            ModelKind::Demo => DEMO,
            ModelKind::NextStep1Large => AUGUST_T2I,
            ModelKind::NextStep1LargeEdit => AUGUST_EDIT,
            ModelKind::NextStep11 => FEBRUARY_T2I,
        }
    }

    /// The settings of a recognised model, else those of text to image.
    pub fn for_checkpoint(name: &str, hidden_size: usize) -> Defaults {
        ModelKind::recognise(name, hidden_size).map_or(AUGUST_T2I, Defaults::for_model)
    }
}
