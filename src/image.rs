//! Pictures on disk: PNG files out, with the request inside, and that text back; PNG, JPEG and WebP files in, brought
//! to a size that the model takes.
//!
//! A file appears under its name only when it is whole ([`crate::files`]). Two text chunks carry what made the picture: `parameters`, the line format that viewers read, and
//! `warpstep`, JSON for ourselves. This module knows neither requests nor how pixels come about.

mod prepare;
mod read;
mod resize;

pub use prepare::{BUCKETS, ResizeMode, nearest_bucket, prepare};
pub use read::{ImageLimits, load_image};

use crate::error::{Error, Result};
use crate::files::write_atomically;
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, Write};
use std::path::Path;

/// Keyword of the viewers' text.
const PARAMETERS: &str = "parameters";
/// Keyword of our JSON.
const WARPSTEP: &str = "warpstep";
/// Most memory that reading a picture's text may take, the decoder's own buffers included.
const READ_LIMIT_BYTES: usize = 64 << 20;
/// Longest text of one chunk, after decompression.
const TEXT_LIMIT_BYTES: usize = 4 << 20;

/// 8-bit RGB pixels.
#[derive(Clone, PartialEq, Eq)]
pub struct RgbImage {
    width: u32,
    height: u32,
    /// [height, width, 3]
    data: Vec<u8>,
}

impl std::fmt::Debug for RgbImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RgbImage({}x{})", self.width, self.height)
    }
}

impl RgbImage {
    /// Wraps pixels, [height, width, 3].
    pub fn new(width: u32, height: u32, data: Vec<u8>) -> Result<RgbImage> {
        let bytes = u64::from(width).checked_mul(u64::from(height)).and_then(|pixels| pixels.checked_mul(3));
        if bytes != Some(data.len() as u64) || data.is_empty() {
            let reason = format!("of {width}x{height} pixels do not have {} bytes", data.len());
            return Err(Error::request("images", reason));
        }
        Ok(RgbImage { width, height, data })
    }

    /// Pixels in a row.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// The pixels, [height, width, 3].
    pub fn data(&self) -> &[u8] {
        &self.data
    }
}

/// What a picture says about its making.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Metadata {
    /// The line format that viewers read, under the keyword `parameters`.
    pub parameters: String,
    /// JSON under the keyword `warpstep`: every field of the request, and what ran it.
    pub json: String,
}

/// What [`read_png_info`] finds in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PngInfo {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Text under the keyword `parameters`, if there is any.
    pub parameters: Option<String>,
    /// Text under the keyword `warpstep`, if there is any; not checked to be JSON.
    pub json: Option<String>,
}

/// Writes a PNG file. On any error the destination is as it was and no other file is left behind.
pub fn write_png(path: &Path, image: &RgbImage, metadata: Option<&Metadata>) -> Result<()> {
    write_atomically(path, |file| {
        encode_png(file, image, metadata).map_err(|error| match error {
            png::EncodingError::IoError(cause) => Error::Io { path: path.into(), cause },
            other => Error::Image { path: path.into(), reason: other.to_string() },
        })
    })
}

/// Writes the bytes of a PNG file.
fn encode_png(
    out: impl Write,
    image: &RgbImage,
    metadata: Option<&Metadata>,
) -> Result<(), png::EncodingError> {
    let mut encoder = png::Encoder::new(out, image.width, image.height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    for (keyword, text) in
        metadata.into_iter().flat_map(|m| [(PARAMETERS, &m.parameters), (WARPSTEP, &m.json)])
    {
        // Readers disagree about Latin-1 in tEXt; iTXt is UTF-8 for all of them.
        if text.is_ascii() {
            encoder.add_text_chunk(keyword.into(), text.clone())?;
        } else {
            encoder.add_itxt_chunk(keyword.into(), text.clone())?;
        }
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&image.data)?;
    writer.finish()
}

/// Reads size and text of a PNG file to its end, without unpacking the pixels.
pub fn read_png_info(path: &Path) -> Result<PngInfo> {
    let file = File::open(path).map_err(Error::io(path))?;
    // A FIFO or a device would keep the reader waiting or never end.
    if !file.metadata().map_err(Error::io(path))?.is_file() {
        return Err(Error::Image { path: path.into(), reason: "is not a regular file".into() });
    }
    read_info(BufReader::new(file), path)
}

/// [`read_png_info`] of any reader; `path` is named in errors.
fn read_info(file: impl BufRead + Seek, path: &Path) -> Result<PngInfo> {
    let fail = |error: png::DecodingError| match error {
        png::DecodingError::IoError(cause) if cause.kind() != std::io::ErrorKind::UnexpectedEof => {
            Error::Io { path: path.into(), cause }
        }
        other => Error::Image { path: path.into(), reason: other.to_string() },
    };
    let limits = png::Limits { bytes: READ_LIMIT_BYTES };
    let mut reader = png::Decoder::new_with_limits(BufReader::new(file), limits).read_info().map_err(fail)?;
    reader.finish().map_err(fail)?;
    let info = reader.info();
    Ok(PngInfo {
        width: info.width,
        height: info.height,
        parameters: find_text(info, PARAMETERS).map_err(fail)?,
        json: find_text(info, WARPSTEP).map_err(fail)?,
    })
}

/// The first text under a keyword, in any of the three kinds of chunk: picture tools change one into another.
fn find_text(info: &png::Info, keyword: &str) -> Result<Option<String>, png::DecodingError> {
    if let Some(chunk) = info.uncompressed_latin1_text.iter().find(|chunk| chunk.keyword == keyword) {
        return Ok(Some(chunk.text.clone()));
    }
    if let Some(chunk) = info.utf8_text.iter().find(|chunk| chunk.keyword == keyword) {
        let mut chunk = chunk.clone();
        chunk.decompress_text_with_limit(TEXT_LIMIT_BYTES)?;
        return chunk.get_text().map(Some);
    }
    if let Some(chunk) = info.compressed_latin1_text.iter().find(|chunk| chunk.keyword == keyword) {
        let mut chunk = chunk.clone();
        chunk.decompress_text_with_limit(TEXT_LIMIT_BYTES)?;
        return chunk.get_text().map(Some);
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
