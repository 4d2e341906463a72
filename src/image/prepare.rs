//! Pictures brought to a size that the model takes: sides in whole tokens of 16 pixels.

use super::RgbImage;
use super::resize::{Filter, crop_middle, resize};
use crate::error::{Error, Result};

/// Pixels of a token's side: 8 of the VAE times 2 of the patch.
const TOKEN_PIXELS: u32 = 16;
/// Most pixels of a resized picture, before it is cropped: very elongated inputs grow far beyond the target.
const MAX_RESIZED_PIXELS: f64 = (1u64 << 26) as f64;

/// Height and width in tokens of the grids that the February code trained on at 256 pixels (its `aspect_ratio`).
pub const BUCKETS: [(u32, u32); 17] = [
    (8, 32),
    (9, 28),
    (10, 25),
    (11, 23),
    (12, 21),
    (13, 19),
    (14, 18),
    (15, 17),
    (16, 16),
    (17, 15),
    (18, 14),
    (19, 13),
    (21, 12),
    (23, 11),
    (25, 10),
    (28, 9),
    (32, 8),
];

/// What to do with a picture's size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ResizeMode {
    /// Keep it; sides that are not multiples of 16 pixels are an error.
    #[default]
    None,
    /// Fill this size, in pixels, and crop the middle. Of a square this is the August code's `process_images`:
    /// box halving while both sides are at least twice the target, then bicubic.
    Crop {
        /// Pixels, a multiple of 16.
        width: u32,
        /// Pixels, a multiple of 16.
        height: u32,
    },
    /// Fill the nearest of the [`BUCKETS`] and crop the middle, by Lanczos as the February training code does.
    Bucket {
        /// Side of the square bucket in tokens: 16 (256 pixels) or 32 (512 pixels).
        base: u32,
    },
}

/// Width and height in pixels of the bucket nearest to a picture of this size. Nearest by the ratio of the ratios, so
/// that a picture and its transpose get transposed buckets. `base` in tokens: 16 or 32.
pub fn nearest_bucket(width: u32, height: u32, base: u32) -> Result<(u32, u32)> {
    if base != 16 && base != 32 {
        let reason = format!("buckets are defined at base 16 and 32 tokens (256 and 512 pixels), not {base}");
        return Err(Error::request("resize", reason));
    }
    if width == 0 || height == 0 {
        return Err(Error::request("image", format!("{width}x{height} pixels have no aspect ratio")));
    }
    let wanted = (f64::from(width) / f64::from(height)).ln();
    let distance = |&(h, w): &(u32, u32)| ((f64::from(w) / f64::from(h)).ln() - wanted).abs();
    let nearest = BUCKETS.into_iter().min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or((16, 16));
    let pixels = TOKEN_PIXELS * base / 16;
    Ok((nearest.1 * pixels, nearest.0 * pixels))
}

/// Brings a picture to the size that `mode` asks for. Errors are [`Error::InvalidRequest`] and name the sizes.
pub fn prepare(image: &RgbImage, mode: ResizeMode) -> Result<RgbImage> {
    match mode {
        ResizeMode::None => {
            let (width, height) = (image.width, image.height);
            if !in_whole_tokens(width, height) {
                let reason = format!(
                    "has {width}x{height} pixels; both sides must be multiples of {TOKEN_PIXELS}: choose a resize mode"
                );
                return Err(Error::request("image", reason));
            }
            Ok(image.clone())
        }
        ResizeMode::Crop { width, height } => {
            if !in_whole_tokens(width, height) {
                let reason =
                    format!("to {width}x{height} pixels: both sides must be multiples of {TOKEN_PIXELS}");
                return Err(Error::request("resize", reason));
            }
            let mut image = image.clone();
            while image.width / 2 >= width && image.height / 2 >= height {
                image = resize(&image, image.width / 2, image.height / 2, Filter::Box)?;
            }
            fill(&image, width, height, Filter::Bicubic)
        }
        ResizeMode::Bucket { base } => {
            let (width, height) = nearest_bucket(image.width, image.height, base)?;
            fill(image, width, height, Filter::Lanczos)
        }
    }
}

fn in_whole_tokens(width: u32, height: u32) -> bool {
    [width, height].iter().all(|&side| side > 0 && side.is_multiple_of(TOKEN_PIXELS))
}

/// Resizes until the target is just covered, keeping the aspect ratio, and crops the middle.
fn fill(image: &RgbImage, width: u32, height: u32, filter: Filter) -> Result<RgbImage> {
    let (from_width, from_height) = (f64::from(image.width), f64::from(image.height));
    let scale = (f64::from(width) / from_width).max(f64::from(height) / from_height);
    // Half to even, as Python rounds.
    let (to_width, to_height) =
        ((from_width * scale).round_ties_even(), (from_height * scale).round_ties_even());
    if to_width * to_height > MAX_RESIZED_PIXELS {
        let reason = format!(
            "has {}x{} pixels: to fill {width}x{height} it would grow to {to_width}x{to_height}, above {MAX_RESIZED_PIXELS} pixels",
            image.width, image.height
        );
        return Err(Error::request("image", reason));
    }
    crop_middle(&resize(image, to_width as u32, to_height as u32, filter)?, width, height)
}
