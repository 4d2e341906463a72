//! Pictures from disk: PNG, JPEG and WebP, told apart by their content.

use super::RgbImage;
use crate::error::{Error, Result};
use ::image::codecs::{jpeg::JpegDecoder, png::PngDecoder, webp::WebPDecoder};
use ::image::{DynamicImage, ImageDecoder, ImageFormat, ImageResult, Limits};
use std::fs::File;
use std::io::{Cursor, Read};
use std::path::Path;

/// Most memory that a decoder may take beside the pixels: profiles, EXIF, rows. A profile that inflates beyond it is
/// passed over, and the time until then has to be short.
const DECODER_BYTES: u64 = 4 << 20;

/// What a file may ask for; checked before its pixels are unpacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageLimits {
    /// Bytes of the file.
    pub max_file_bytes: u64,
    /// Pixels of either side.
    pub max_side: u32,
    /// Pixels altogether; a pixel takes up to 8 bytes while it is decoded.
    pub max_pixels: u64,
}

impl Default for ImageLimits {
    /// 64 MiB, 16384 pixels a side, 2^26 pixels (8192x8192).
    fn default() -> ImageLimits {
        ImageLimits { max_file_bytes: 64 << 20, max_side: 16384, max_pixels: 1 << 26 }
    }
}

/// Reads a PNG, JPEG or WebP file as 8-bit RGB.
///
/// EXIF orientation is applied, transparency is composited on white, 16-bit samples are rounded to 8 bits, colour
/// profiles are not applied. Animated files are refused: taking one frame would silently drop the others.
///
/// Errors: [`Error::Io`] if the file cannot be read, otherwise [`Error::Image`] with the file's name and the reason.
pub fn load_image(path: &Path, limits: &ImageLimits) -> Result<RgbImage> {
    let fail = |reason: String| Error::Image { path: path.into(), reason };
    let file = File::open(path).map_err(Error::io(path))?;
    let info = file.metadata().map_err(Error::io(path))?;
    // A FIFO or a device would keep the reader waiting or never end.
    if !info.is_file() {
        return Err(fail("is not a regular file".into()));
    }
    let mut bytes = Vec::new();
    // The file may grow between the two calls.
    let most = limits.max_file_bytes.saturating_add(1);
    if info.len() < most {
        file.take(most).read_to_end(&mut bytes).map_err(Error::io(path))?;
    }
    if info.len() >= most || bytes.len() as u64 >= most {
        return Err(fail(format!("has {} bytes, at most {} are read", info.len(), limits.max_file_bytes)));
    }
    decode(&bytes, limits).map_err(fail)
}

/// The picture in a file's bytes, or what is wrong with them.
pub(super) fn decode(bytes: &[u8], limits: &ImageLimits) -> Result<RgbImage, String> {
    if bytes.is_empty() {
        return Err("is empty (0 bytes)".into());
    }
    let reader = || Cursor::new(bytes);
    let mut allowed = Limits::no_limits();
    allowed.max_alloc = Some(DECODER_BYTES);
    let picture = match ::image::guess_format(bytes) {
        Ok(ImageFormat::Png) => {
            // From IHDR, whose place is fixed: the decoder would report its own limits without the numbers.
            if let (Some(&[a, b, c, d, e, f, g, h]), Some(b"IHDR")) = (bytes.get(16..24), bytes.get(12..16)) {
                check_size(u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes([e, f, g, h]), limits)?;
            }
            let decoder = named("PNG", bytes, PngDecoder::with_limits(reader(), allowed))?;
            refuse_animation("PNG", named("PNG", bytes, decoder.is_apng())?)?;
            unpack("PNG", bytes, decoder, limits)?
        }
        Ok(ImageFormat::Jpeg) => {
            let decoder = named("JPEG", bytes, JpegDecoder::new(reader()))?;
            // The decoder fills what is missing with grey. In the coded data 0xff is never followed by 0xd9 or 0xda.
            let scan = bytes.windows(2).rposition(|pair| pair == [0xff, 0xda]).unwrap_or(0);
            if !bytes[scan..].windows(2).any(|pair| pair == [0xff, 0xd9]) {
                return Err(format!("is a truncated JPEG: no end marker in {} bytes", bytes.len()));
            }
            unpack("JPEG", bytes, decoder, limits)?
        }
        Ok(ImageFormat::WebP) => {
            let decoder = named("WebP", bytes, WebPDecoder::new(reader()))?;
            refuse_animation("WebP", decoder.has_animation())?;
            unpack("WebP", bytes, decoder, limits)?
        }
        _ => return Err(format!("is none of PNG, JPEG, WebP by its content ({} bytes)", bytes.len())),
    };
    let (width, height) = (picture.width(), picture.height());
    let data = if picture.color().has_alpha() { on_white(&picture) } else { picture.into_rgb8().into_raw() };
    RgbImage::new(width, height, data).map_err(|error| error.to_string())
}

fn named<T>(format: &str, bytes: &[u8], result: ImageResult<T>) -> Result<T, String> {
    result.map_err(|error| format!("is not a readable {format} ({} bytes): {error}", bytes.len()))
}

fn refuse_animation(format: &str, animated: bool) -> Result<(), String> {
    if animated { Err(format!("is an animated {format}; save the wanted frame as a still")) } else { Ok(()) }
}

fn check_size(width: u32, height: u32, limits: &ImageLimits) -> Result<(), String> {
    let pixels = u64::from(width) * u64::from(height);
    if width.max(height) > limits.max_side || pixels > limits.max_pixels {
        return Err(format!(
            "has {width}x{height} pixels; at most {} a side and {} altogether are read",
            limits.max_side, limits.max_pixels
        ));
    }
    Ok(())
}

/// Checks the size, then unpacks the pixels and turns them upright.
fn unpack(
    format: &str,
    bytes: &[u8],
    mut decoder: impl ImageDecoder,
    limits: &ImageLimits,
) -> Result<DynamicImage, String> {
    let (width, height) = decoder.dimensions();
    check_size(width, height, limits)?;
    let orientation = named(format, bytes, decoder.orientation())?;
    let mut picture = named(format, bytes, DynamicImage::from_decoder(decoder))?;
    picture.apply_orientation(orientation);
    Ok(picture)
}

/// [height, width, 3] of a picture with transparency; rounded to nearest, as Pillow's `paste` with a mask.
fn on_white(picture: &DynamicImage) -> Vec<u8> {
    let blend = |value: u8, alpha: u8| {
        let (value, alpha) = (u32::from(value), u32::from(alpha));
        ((value * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    picture.to_rgba8().pixels().flat_map(|p| [0, 1, 2].map(|c| blend(p[c], p[3]))).collect()
}
