//! Pictures from PNG files.

use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use warpstep::image::RgbImage;

/// Most bytes that reading a picture may take.
const LIMIT_BYTES: usize = 256 << 20;

/// Reads an RGB or grey PNG without transparency.
pub fn read_picture(path: &Path) -> Result<RgbImage> {
    read(path).with_context(|| format!("picture {}", path.display()))
}

fn read(path: &Path) -> Result<RgbImage> {
    let file = File::open(path)?;
    // A FIFO or a device would keep the reader waiting.
    if !file.metadata()?.is_file() {
        bail!("is not a regular file");
    }
    let limits = png::Limits { bytes: LIMIT_BYTES };
    let mut decoder = png::Decoder::new_with_limits(BufReader::new(file), limits);
    decoder.set_transformations(png::Transformations::normalize_to_color8());
    let mut reader = decoder.read_info()?;
    let bytes = reader.output_buffer_size().filter(|&bytes| bytes <= LIMIT_BYTES);
    let mut data = vec![0; bytes.context("has too many pixels")?];
    let info = reader.next_frame(&mut data)?;
    data.truncate(info.buffer_size());
    let data = match info.color_type {
        png::ColorType::Rgb => data,
        png::ColorType::Grayscale => data.into_iter().flat_map(|v| [v; 3]).collect(),
        other => bail!("has colours of type {other:?}; RGB and grey without transparency are read"),
    };
    Ok(RgbImage::new(info.width, info.height, data)?)
}
