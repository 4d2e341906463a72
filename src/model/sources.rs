//! Input pictures of a generation: which rows of the prompt show them, and with which draws they are encoded.

use super::nextstep::NextStep;
use crate::error::{Error, Result};
use crate::image::RgbImage;
use crate::ops::embed::TEXT;

/// Input pictures and the prompt rows that hold them. `Default`: none.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// The pictures, each in its own size.
    pub pictures: Vec<RgbImage>,
    /// Where they are shown: branch by branch, in the order of their marks.
    pub places: Vec<Place>,
    /// Of every prompt row, all sequences one after another: its image token, counted over all places, or
    /// [`TEXT`].
    pub rows: Vec<u32>,
}

/// One showing of a picture. The images of a batch share it.
#[derive(Clone, Debug)]
pub struct Place {
    /// Index of the picture.
    pub picture: usize,
    /// Draw of the posterior, `[h, w, C]`; empty where the VAE takes its mean.
    pub draw: Vec<f32>,
    /// Image tokens before it.
    pub first_token: usize,
    /// Image tokens of it.
    pub tokens: usize,
}

impl Sources {
    /// Finds the places of `pictures`: `shown` names those of every branch, in order. `prompts` are the ids of every
    /// sequence, branch-major, `images` of them per branch. `draws` holds one posterior draw per place, `[C, h, w]` as
    /// the official code lays it out, or nothing where the VAE takes its mean.
    pub fn new(
        model: &NextStep,
        pictures: Vec<RgbImage>,
        shown: &[Vec<usize>],
        prompts: &[Vec<u32>],
        images: usize,
        draws: &[f32],
    ) -> Result<Sources> {
        let (channels, patch) = (model.config.latent_channels, model.config.latent_patch_size);
        let factor = model.vae_config.downsample_factor();
        let mut places = Vec::new();
        let mut branch_tokens = Vec::new();
        let (mut first_token, mut first_value) = (0, 0);
        for shown in shown {
            let branch_start = first_token;
            for &picture in shown {
                let size = pictures.get(picture).map(|p| (p.height() as usize, p.width() as usize));
                let Some((height, width)) = size else {
                    return Err(Error::Internal(format!("picture {picture} of {}", pictures.len())));
                };
                let (height, width) = (height / factor, width / factor);
                let values = channels * height * width;
                let draw = match draws {
                    [] => Vec::new(),
                    draws => {
                        let draw = draws.get(first_value..first_value + values);
                        let draw = draw.ok_or_else(|| Error::Internal("too few posterior draws".into()))?;
                        let pixels = height * width;
                        (0..values).map(|i| draw[i % channels * pixels + i / channels]).collect()
                    }
                };
                let tokens = height / patch * (width / patch);
                places.push(Place { picture, draw, first_token, tokens });
                first_token += tokens;
                first_value += values;
            }
            branch_tokens.push(branch_start..first_token);
        }
        let placeholder = model.config.image_placeholder_id;
        let mut rows = Vec::new();
        for (sequence, prompt) in prompts.iter().enumerate() {
            let range = branch_tokens.get(sequence / images.max(1)).cloned().unwrap_or(0..0);
            let mut next = range.clone();
            rows.extend(prompt.iter().map(|&id| match id == placeholder {
                true => next.next().map_or(TEXT, |token| token as u32),
                false => TEXT,
            }));
            let placeholders = prompt.iter().filter(|&&id| id == placeholder).count();
            if placeholders != range.len() {
                return Err(Error::Internal(format!(
                    "{placeholders} placeholders for {} image tokens",
                    range.len()
                )));
            }
        }
        Ok(Sources { pictures, places, rows })
    }

    /// Whether the same lists encode the pictures of both: only pixels and draws differ.
    pub(super) fn encode_like(&self, other: &Sources) -> bool {
        let size = |picture: &RgbImage| (picture.width(), picture.height());
        let shape = |place: &Place| (place.picture, place.draw.len(), place.first_token, place.tokens);
        self.pictures.iter().map(size).eq(other.pictures.iter().map(size))
            && self.places.iter().map(shape).eq(other.places.iter().map(shape))
    }

    /// Image tokens of all places.
    pub fn tokens(&self) -> usize {
        self.places.iter().map(|place| place.tokens).sum()
    }

    /// Values of all draws.
    pub fn draw_values(&self) -> usize {
        self.places.iter().map(|place| place.draw.len()).sum()
    }
}
