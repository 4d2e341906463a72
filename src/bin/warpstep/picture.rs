//! Pictures that a command is given.

use anyhow::Result;
use std::path::Path;
use warpstep::image::{ImageLimits, RgbImage, load_image};

/// Reads a PNG, JPEG or WebP file.
pub fn read_picture(path: &Path) -> Result<RgbImage> {
    Ok(load_image(path, &ImageLimits::default())?)
}
