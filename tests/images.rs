//! Pictures that users hand over: every kind that is read, and one named test per kind that is refused.

#[path = "images/bombs.rs"]
mod bombs;
#[path = "images/goldens.rs"]
mod goldens;
#[path = "images/kinds.rs"]
mod kinds;

use image::codecs::{jpeg::JpegEncoder, png::PngEncoder, webp::WebPEncoder};
use image::metadata::Orientation;
use image::{ExtendedColorType, ImageEncoder};
use proptest::prelude::*;
use std::path::Path;
use warpstep::image::{BUCKETS, ImageLimits, ResizeMode, RgbImage, load_image, nearest_bucket, prepare};
use warpstep::{Error, Result};

/// Writes the bytes under a name and reads them as a picture.
fn load(name: &str, bytes: &[u8]) -> Result<RgbImage> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    load_image(&path, &ImageLimits::default())
}

/// The reason of a refusal, which names the file.
fn refusal(bytes: &[u8]) -> String {
    match load("given.png", bytes) {
        Err(Error::Image { path, reason }) => {
            assert!(path.ends_with("given.png"));
            reason
        }
        other => panic!("{other:?}"),
    }
}

/// 3 x 2 pixels, all different.
const RGB: [u8; 18] = [255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 8, 7, 100, 110, 120, 250, 251, 252];

fn png(width: u32, height: u32, data: &[u8], color: ExtendedColorType) -> Vec<u8> {
    let mut out = Vec::new();
    PngEncoder::new(&mut out).write_image(data, width, height, color).unwrap();
    out
}

fn rgb_png() -> Vec<u8> {
    png(3, 2, &RGB, ExtendedColorType::Rgb8)
}

/// 16 x 16 pixels of one grey level.
fn jpeg() -> Vec<u8> {
    let mut out = Vec::new();
    JpegEncoder::new(&mut out).write_image(&[90; 768], 16, 16, ExtendedColorType::Rgb8).unwrap();
    out
}

fn webp() -> Vec<u8> {
    let mut out = Vec::new();
    WebPEncoder::new_lossless(&mut out).write_image(&RGB, 3, 2, ExtendedColorType::Rgb8).unwrap();
    out
}

/// A PNG by the lower encoder, for what the other does not write.
fn raw_png(set: impl FnOnce(&mut png::Encoder<'_, &mut Vec<u8>>), frames: usize, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, 2, 1);
    set(&mut encoder);
    let mut writer = encoder.write_header().unwrap();
    for _ in 0..frames {
        writer.write_image_data(data).unwrap();
    }
    writer.finish().unwrap();
    out
}

#[test]
fn png_and_lossless_webp_come_back_exactly_whatever_the_name() {
    for (name, bytes) in [("a.png", rgb_png()), ("a.jpg", rgb_png()), ("a.webp", webp()), ("a", webp())] {
        let image = load(name, &bytes).unwrap();
        assert_eq!((image.width(), image.height(), image.data()), (3, 2, &RGB[..]), "{name}");
    }
}

#[test]
fn a_jpeg_of_one_level_is_read() {
    let image = load("a.png", &jpeg()).unwrap();
    assert_eq!((image.width(), image.height()), (16, 16));
    assert!(image.data().iter().all(|v| v.abs_diff(90) <= 1), "{:?}", image.data());
}

#[test]
fn grey_and_16_bit_are_read() {
    let grey = load("a.png", &png(2, 1, &[0, 77], ExtendedColorType::L8)).unwrap();
    assert_eq!(grey.data(), [0, 0, 0, 77, 77, 77]);
    let deep: Vec<u8> = [0u16, 257 * 99, u16::MAX].iter().flat_map(|v| v.to_ne_bytes()).collect();
    let deep = load("a.png", &png(1, 1, &deep, ExtendedColorType::Rgb16)).unwrap();
    assert_eq!(deep.data(), [0, 99, 255]);
}

#[test]
fn transparency_is_composited_on_white() {
    let rgba = load("a.png", &png(2, 1, &[9, 9, 9, 0, 0, 100, 255, 128], ExtendedColorType::Rgba8)).unwrap();
    // (100 x 128 + 255 x 127) / 255 = 177.2
    assert_eq!(rgba.data(), [255, 255, 255, 127, 177, 255]);
    let grey = load("a.png", &png(2, 1, &[7, 255, 7, 0], ExtendedColorType::La8)).unwrap();
    assert_eq!(grey.data(), [7, 7, 7, 255, 255, 255]);
}

#[test]
fn palettes_are_read_with_and_without_transparency() {
    let palette = |transparent: bool| {
        raw_png(
            |encoder| {
                encoder.set_color(png::ColorType::Indexed);
                encoder.set_palette(vec![1, 2, 3, 200, 210, 220]);
                if transparent {
                    encoder.set_trns(vec![0, 255]);
                }
            },
            1,
            &[1, 0],
        )
    };
    assert_eq!(load("a.png", &palette(false)).unwrap().data(), [200, 210, 220, 1, 2, 3]);
    assert_eq!(load("a.png", &palette(true)).unwrap().data(), [200, 210, 220, 255, 255, 255]);
}

/// EXIF data with nothing but an orientation.
fn exif(orientation: u8) -> Vec<u8> {
    [&b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0"[..], &[orientation, 0, 0, 0, 0, 0, 0]].concat()
}

#[test]
fn all_eight_exif_orientations_are_applied() {
    // The stored picture is a b c / d e f. What EXIF says of its first row and column gives the upright one.
    let upright =
        ["abc/def", "cba/fed", "fed/cba", "def/abc", "ad/be/cf", "da/eb/fc", "fc/eb/da", "cf/be/ad"];
    let letter = |name: char| RGB[(name as usize - 'a' as usize) * 3..][..3].to_vec();
    for (orientation, upright) in (1..).zip(upright) {
        assert!(Orientation::from_exif(orientation).is_some());
        let mut bytes = Vec::new();
        let mut encoder = PngEncoder::new(&mut bytes);
        encoder.set_exif_metadata(exif(orientation)).unwrap();
        encoder.write_image(&RGB, 3, 2, ExtendedColorType::Rgb8).unwrap();
        let image = load("a.png", &bytes).unwrap();
        let expected: Vec<u8> = upright.chars().filter(|c| *c != '/').flat_map(letter).collect();
        assert_eq!(image.height() as usize, upright.split('/').count(), "orientation {orientation}");
        assert_eq!(image.data(), expected, "orientation {orientation}");
    }
}

#[test]
fn an_empty_file_is_refused() {
    assert!(refusal(b"").contains("0 bytes"));
}

#[test]
fn files_of_other_kinds_are_refused_under_any_name() {
    for other in [&b"<svg/>"[..], b"GIF89a\x01\0\x01\0", b"<!doctype html>", b"BM123456", &[0; 64]] {
        let reason = refusal(other);
        assert!(reason.contains("none of PNG, JPEG, WebP"), "{reason}");
    }
}

#[test]
fn every_truncation_is_refused() {
    for (format, bytes) in [("PNG", rgb_png()), ("JPEG", jpeg()), ("WebP", webp())] {
        // The last 12 bytes of a PNG, IEND, say nothing; a JPEG's end marker is two bytes, a WebP chunk may be padded.
        let end = bytes.len() - if format == "PNG" { 12 } else { 2 };
        for length in 16..end {
            assert!(load("a", &bytes[..length]).is_err(), "{format} cut to {length} of {}", bytes.len());
        }
    }
    assert!(refusal(&jpeg()[..600]).contains("600 bytes"));
}

#[test]
fn a_wrong_checksum_is_refused() {
    let mut bytes = rgb_png();
    let at = bytes.windows(4).position(|w| w == b"IDAT").unwrap();
    bytes[at + 6] ^= 1;
    assert!(refusal(&bytes).contains("PNG"));
}

#[test]
fn huge_dimensions_are_refused_from_the_header() {
    let mut bytes = rgb_png();
    bytes[16..24].copy_from_slice(&[0, 0, 0xff, 0xff, 0, 0, 0xff, 0xff]);
    let start = std::time::Instant::now();
    let reason = refusal(&bytes);
    assert!(reason.contains("65535x65535") && reason.contains("16384"), "{reason}");
    assert!(start.elapsed().as_millis() < 50, "{:?}", start.elapsed());
    let mut bytes = jpeg();
    let at = bytes.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
    bytes[at + 5..at + 9].copy_from_slice(&[0xff; 4]);
    assert!(refusal(&bytes).contains("65535x65535"));
}

#[test]
fn limits_on_pixels_and_bytes_hold() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.png");
    std::fs::write(&path, rgb_png()).unwrap();
    let with = |change: fn(&mut ImageLimits)| {
        let mut limits = ImageLimits::default();
        change(&mut limits);
        load_image(&path, &limits).map_err(|e| e.to_string())
    };
    assert!(with(|l| l.max_pixels = 6).is_ok());
    assert!(with(|l| l.max_pixels = 5).unwrap_err().contains("5 altogether"));
    assert!(with(|l| l.max_side = 2).unwrap_err().contains("3x2"));
    assert!(with(|l| l.max_file_bytes = 20).unwrap_err().contains("at most 20"));
}

#[test]
fn an_animated_png_is_refused() {
    let bytes = raw_png(|encoder| encoder.set_animated(2, 0).unwrap(), 2, &[1, 2]);
    assert!(refusal(&bytes).contains("animated PNG"));
}

#[test]
fn directories_devices_and_missing_files_are_refused() {
    for path in ["/dev/zero", "/", "/nowhere/a.png"] {
        assert!(load_image(Path::new(path), &ImageLimits::default()).is_err(), "{path}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn no_mutation_makes_a_decoder_panic(
        which in 0usize..3,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = [rgb_png(), jpeg(), webp()][which].clone();
        for (index, value) in changes {
            let at = index.index(bytes.len());
            bytes[at] = value;
        }
        // Small, so that a mutated size costs nothing.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, &bytes).unwrap();
        let limits = ImageLimits { max_pixels: 1 << 16, ..ImageLimits::default() };
        if let Ok(image) = load_image(&path, &limits) {
            prop_assert!(image.data().len() as u64 <= 3 * limits.max_pixels);
        }
    }
}

fn plain(width: u32, height: u32) -> RgbImage {
    RgbImage::new(width, height, vec![50; (width * height * 3) as usize]).unwrap()
}

#[test]
fn sizes_that_do_not_divide_need_a_mode() {
    assert_eq!(prepare(&plain(32, 16), ResizeMode::None).unwrap(), plain(32, 16));
    let message = prepare(&plain(17, 16), ResizeMode::None).unwrap_err().to_string();
    assert!(message.contains("17x16") && message.contains("resize mode"), "{message}");
    for (width, height) in [(0, 16), (40, 16)] {
        let message = prepare(&plain(32, 32), ResizeMode::Crop { width, height }).unwrap_err().to_string();
        assert!(message.contains(&format!("{width}x{height}")), "{message}");
    }
}

#[test]
fn a_sliver_that_would_grow_beyond_bounds_is_refused() {
    let result = prepare(&plain(1, 16384), ResizeMode::Crop { width: 512, height: 512 });
    assert!(matches!(result, Err(Error::InvalidRequest { field: "image", .. })), "{result:?}");
}

#[test]
fn a_crop_has_the_size_that_was_asked_for() {
    for (from, to) in [((100, 37), (32, 48)), ((33, 200), (64, 16)), ((5, 3), (16, 16))] {
        let image = prepare(&plain(from.0, from.1), ResizeMode::Crop { width: to.0, height: to.1 }).unwrap();
        assert_eq!(image, plain(to.0, to.1), "{from:?} to {to:?}");
    }
}

#[test]
fn each_bucket_is_its_own_nearest_and_pictures_get_its_size() {
    for (height, width) in BUCKETS {
        assert_eq!(nearest_bucket(width, height, 16).unwrap(), (width * 16, height * 16));
        assert_eq!(nearest_bucket(width, height, 32).unwrap(), (width * 32, height * 32));
    }
    // 16:9 lies between 19x13 (1.46) and 21x12 (1.75).
    assert_eq!(nearest_bucket(1920, 1080, 32).unwrap(), (672, 384));
    assert_eq!(prepare(&plain(192, 108), ResizeMode::Bucket { base: 16 }).unwrap(), plain(336, 192));
    assert!(nearest_bucket(1, 1, 24).unwrap_err().to_string().contains("24"));
}
