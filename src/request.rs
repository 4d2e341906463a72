//! What a caller asks for, checked before anything is allocated.
//!
//! [`GenerateRequest`] is complete: every field has a value and every value has an effect, or the request is refused with
//! the field's name. [`RequestFields`] is what users write (JSON, command line, a picture's metadata), under our names
//! or the official ones, with gaps that [`Defaults`] fill.

mod defaults;
mod fields;

pub use defaults::{Defaults, ModelKind, Preset};
pub use fields::RequestFields;

use crate::error::{Error, Result};
use crate::image::RgbImage;
use crate::prompt::{Grid, IMAGE_MARK};
use crate::rng::MAX_IMAGES_PER_BATCH;
use crate::sampler::{
    Branches, DEFAULT_NOISE_LEVEL, GuidanceSchedule, Sampler, Solver, check_settings, guidance_table,
};
use serde::Serialize;
use std::fmt::Write;
use std::num::NonZeroU32;

/// A picture, or `n` of them, to be generated from text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GenerateRequest {
    /// The caption. Empty is allowed and means an unconditional picture.
    pub prompt: String,
    /// Text of the rows that guidance leads away from.
    #[serde(serialize_with = "none_as_empty")]
    pub negative_prompt: Option<String>,
    /// Added to the caption after a space.
    #[serde(serialize_with = "none_as_empty")]
    pub positive_prompt: Option<String>,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Number of pictures.
    pub n: u32,
    /// Index of the first one in the batch whose noise is used: image I of a batch can be made again alone.
    pub first_image: u32,
    /// Seed of the noise.
    pub seed: u64,
    /// Pictures to be edited, in the order of their `<image>` marks in the prompt; where the prompt has no mark they
    /// stand in front of it. Each keeps its size. They are no part of what a picture remembers.
    #[serde(skip)]
    pub images: Vec<RgbImage>,
    /// Send a preview after every so many rows of tokens, each at the cost of a VAE decode. It changes no picture, so it
    /// is no part of what a picture remembers.
    #[serde(skip)]
    pub preview_every_rows: Option<NonZeroU32>,
    /// Hand back the image tokens beside the pictures. It changes no picture either.
    #[serde(skip)]
    pub keep_tokens: bool,
    /// How every image token is sampled.
    #[serde(flatten)]
    pub sampler: SamplerConfig,
}

/// How image tokens are sampled from the flow-matching head.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SamplerConfig {
    /// Which official sampler.
    pub sampler: Sampler,
    /// Network evaluations per image token.
    pub steps: u32,
    /// Text guidance (`cfg`); 1 is none.
    pub guidance_scale: f64,
    /// Guidance towards the input picture (`cfg_img`); 1 is none.
    pub image_guidance_scale: f64,
    /// How guidance changes over the picture.
    pub guidance_schedule: GuidanceSchedule,
    /// Warp of the time grid; 1 is none.
    pub timesteps_shift: f64,
    /// Strength of the noise of `sde` and `cps`, 0 to 1; `None` is 0.8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub noise_level: Option<f64>,
    /// Normalise every sampled token.
    pub use_norm: bool,
    /// Shrink the guided velocity to the conditional one's length where it is longer.
    pub rescale: bool,
}

/// Most image tokens of one input picture: 2048x2048 pixels of the released models.
const MAX_SOURCE_TOKENS: usize = 16_384;

/// What a loaded model and its host allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Pixels per image token and side: 2^(VAE levels - 1) times the latent patch size.
    pub down_factor: u32,
    /// Most image tokens of one picture.
    pub max_image_tokens: usize,
    /// Rows of the table of image positions (`gen_pos_embed`), where the model uses one: a picture with more tokens
    /// has no position for the rest.
    pub position_table_rows: Option<usize>,
    /// Most pictures per request.
    pub max_images: u32,
    /// Longest prompt, negative prompt or positive prompt.
    pub max_prompt_bytes: usize,
}

impl Limits {
    /// The limits of a model. `position_table_rows`: size of its table of image positions, if it uses one.
    pub fn new(down_factor: u32, position_table_rows: Option<usize>) -> Limits {
        Limits {
            down_factor,
            max_image_tokens: 16_384,
            position_table_rows,
            max_images: 64,
            max_prompt_bytes: 32 << 10,
        }
    }
}

impl SamplerConfig {
    /// The guidance branches; refuses what the official code does not define, and settings without effect.
    pub fn branches(&self) -> Result<Branches> {
        Branches::from_scales(self.guidance_scale, self.image_guidance_scale)
    }

    /// The solver of every image token.
    pub fn solver(&self) -> Result<Solver> {
        Solver::new(self.sampler, self.steps, self.timesteps_shift, self.noise_level_or_default())
    }

    /// Text and image guidance for every image token, [T, 2].
    pub fn guidance(&self, tokens: usize) -> Vec<[f32; 2]> {
        guidance_table(self.guidance_schedule, self.guidance_scale, self.image_guidance_scale, tokens)
    }

    /// The noise level in force.
    pub fn noise_level_or_default(&self) -> f64 {
        self.noise_level.unwrap_or(DEFAULT_NOISE_LEVEL)
    }

    fn validate(&self) -> Result<()> {
        check_settings(self.sampler, self.steps, self.timesteps_shift, self.noise_level_or_default())?;
        let branches = self.branches()?;
        if self.noise_level.is_some() && !self.sampler.uses_noise_level() {
            let reason =
                format!("has no effect on sampler {}; only sde and cps take it", self.sampler.name());
            return Err(Error::request("noise_level", reason));
        }
        let given = [
            ("rescale", self.rescale),
            ("guidance_schedule", self.guidance_schedule != GuidanceSchedule::Constant),
        ];
        if let Some((field, _)) = given.into_iter().find(|&(_, given)| given)
            && branches == Branches::Conditional
        {
            return Err(Error::request(field, "has no effect without guidance (guidance_scale is 1)"));
        }
        Ok(())
    }
}

impl GenerateRequest {
    /// Checks a request against the limits.
    pub fn validate(&self, limits: &Limits) -> Result<()> {
        self.validate_with_pictures(limits, self.images.len())?;
        self.source_grids(limits).map(drop)
    }

    /// The input pictures' sizes in tokens.
    pub fn source_grids(&self, limits: &Limits) -> Result<Vec<Grid>> {
        source_grids(&self.images, limits)
    }

    /// Checks a request that comes with `pictures` input pictures.
    pub fn validate_with_pictures(&self, limits: &Limits, pictures: usize) -> Result<()> {
        self.check_texts(limits)?;
        self.grid(limits)?;
        if self.n == 0 || self.n > limits.max_images {
            return Err(Error::request(
                "n",
                format!("is {}; allowed are 1 to {}", self.n, limits.max_images),
            ));
        }
        if u64::from(self.first_image) + u64::from(self.n) > u64::from(MAX_IMAGES_PER_BATCH) {
            let reason = format!(
                "is {} with n {}; a batch has at most {MAX_IMAGES_PER_BATCH} images",
                self.first_image, self.n
            );
            return Err(Error::request("first_image", reason));
        }
        self.sampler.validate()?;

        let has_negative = self.negative_prompt.as_deref().is_some_and(|text| !text.is_empty());
        if has_negative && self.sampler.branches()? == Branches::Conditional {
            let reason = "has no effect without guidance (guidance_scale is 1)";
            return Err(Error::request("negative_prompt", reason));
        }
        if pictures == 0 && self.sampler.image_guidance_scale > 1.0 {
            let reason = format!(
                "is {}, but there is no input picture to guide towards",
                self.sampler.image_guidance_scale
            );
            return Err(Error::request("image_guidance_scale", reason));
        }
        Ok(())
    }

    /// The picture's size in tokens.
    pub fn grid(&self, limits: &Limits) -> Result<Grid> {
        let grid = Grid::from_pixels(self.width, self.height, limits.down_factor)?;
        // Sides are at most 2^32 - 1, so the product fits in 64 bits.
        let tokens = u64::from(grid.height) * u64::from(grid.width);
        let refuse = |reason: String| {
            let (columns, rows) = (grid.width, grid.height);
            let size = format!("{}x{} pixels are {columns} x {rows} image tokens", self.width, self.height);
            Err(Error::request("size", format!("{size}, {reason}")))
        };
        if tokens > limits.max_image_tokens as u64 {
            return refuse(format!("more than the {} this model makes", limits.max_image_tokens));
        }
        if let Some(rows) = limits.position_table_rows.filter(|&rows| tokens > rows as u64) {
            return refuse(format!(
                "but the model's table of image positions (gen_pos_embed) has {rows} rows"
            ));
        }
        Ok(grid)
    }

    /// The request that makes image `index` of this one alone: the same noise, so the same picture.
    pub fn single(&self, index: u32) -> GenerateRequest {
        GenerateRequest { n: 1, first_image: self.first_image.saturating_add(index), ..self.clone() }
    }

    /// One text block in the line format that picture viewers read: prompt, negative prompt, settings.
    pub fn webui_parameters(&self, model: &str) -> String {
        let mut text = self.prompt.clone();
        if let Some(positive) = self.positive_prompt.as_deref().filter(|positive| !positive.is_empty()) {
            text.push(' ');
            text += positive;
        }
        if let Some(negative) = self.negative_prompt.as_deref().filter(|negative| !negative.is_empty()) {
            text += "\nNegative prompt: ";
            text += negative;
        }
        // Writing to a String cannot fail.
        let _ = write!(text, "\n{}, Model: {}, RNG: torch-cuda", self.describe(), one_line(model));
        text
    }

    /// The settings in one line, without the texts.
    pub fn describe(&self) -> String {
        let s = &self.sampler;
        let mut line = format!(
            "Steps: {}, Sampler: {}, CFG scale: {}, Seed: {}, Size: {}x{}, Image: {}",
            s.steps,
            s.sampler.name(),
            s.guidance_scale,
            self.seed,
            self.width,
            self.height,
            self.first_image,
        );
        if self.n > 1 {
            let _ = write!(line, "-{}", u64::from(self.first_image) + u64::from(self.n) - 1);
        }
        if s.image_guidance_scale != 1.0 {
            let _ = write!(line, ", Image CFG scale: {}", s.image_guidance_scale);
        }
        if s.guidance_schedule != GuidanceSchedule::Constant {
            let _ = write!(line, ", CFG schedule: {}", s.guidance_schedule.name());
        }
        if s.sampler.uses_noise_level() {
            let _ = write!(line, ", Noise level: {}", s.noise_level_or_default());
        }
        let _ = write!(line, ", Shift: {}, Use norm: {}", s.timesteps_shift, s.use_norm);
        if s.rescale {
            line += ", CFG rescale: true";
        }
        line
    }

    fn check_texts(&self, limits: &Limits) -> Result<()> {
        for (field, text) in [
            ("prompt", Some(&self.prompt)),
            ("negative_prompt", self.negative_prompt.as_ref()),
            ("positive_prompt", self.positive_prompt.as_ref()),
        ] {
            let Some(text) = text else { continue };
            if text.len() > limits.max_prompt_bytes {
                let reason =
                    format!("has {} bytes, at most {} are taken", text.len(), limits.max_prompt_bytes);
                return Err(Error::request(field, reason));
            }
            if let Some(position) = text.find('\0') {
                return Err(Error::request(field, format!("has a NUL character at byte {position}")));
            }
            if field != "prompt" && text.contains(IMAGE_MARK) {
                let reason = format!("contains {IMAGE_MARK}; pictures belong into the prompt");
                return Err(Error::request(field, reason));
            }
        }
        Ok(())
    }
}

/// Sizes in tokens of input pictures, of a request of any kind.
pub(crate) fn source_grids(images: &[RgbImage], limits: &Limits) -> Result<Vec<Grid>> {
    if images.len() > limits.max_images as usize {
        let reason = format!("are {}; at most {} are read", images.len(), limits.max_images);
        return Err(Error::request("images", reason));
    }
    let size = |(index, image): (usize, &RgbImage)| {
        let (width, height) = (image.width(), image.height());
        let refuse = |reason: String| {
            Error::request("images", format!("number {index} is {width}x{height} pixels; {reason}"))
        };
        let factor = limits.down_factor;
        let grid = Grid::from_pixels(width, height, factor)
            .map_err(|_| refuse(format!("both sides must divide by {factor}: choose a resize mode")))?;
        match grid.tokens() > MAX_SOURCE_TOKENS {
            true => Err(refuse(format!("that is more than {MAX_SOURCE_TOKENS} image tokens"))),
            false => Ok(grid),
        }
    };
    images.iter().enumerate().map(size).collect()
}

/// An absent text is written as an empty one, which reads back as absent; left out, it would become a default.
fn none_as_empty<S: serde::Serializer>(text: &Option<String>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(text.as_deref().unwrap_or(""))
}

/// A name that cannot break the settings line.
fn one_line(name: &str) -> String {
    name.chars().map(|c| if c.is_control() || c == ',' { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests;
