//! Kinds of files that no encoder here writes (`tools/golden/images.py` does), and EXIF in JPEG and WebP.

use super::goldens::golden;
use super::{exif, load, refusal};
use image::codecs::{jpeg::JpegEncoder, webp::WebPEncoder};
use image::{ExtendedColorType, ImageEncoder};
use warpstep::image::{ImageLimits, RgbImage, load_image};

/// The colours of the script's `quarters`, row by row.
const QUARTERS: [[u8; 3]; 4] = [[220, 40, 30], [30, 160, 60], [40, 60, 200], [240, 220, 50]];

fn read(name: &str) -> RgbImage {
    load_image(&golden(name), &ImageLimits::default()).unwrap()
}

fn pixel(image: &RgbImage, x: u32, y: u32) -> [u8; 3] {
    let at = ((y * image.width() + x) * 3) as usize;
    image.data()[at..at + 3].try_into().unwrap()
}

/// The middles of the quarters, where a lossy file has its colour to within the rounding of its transform.
fn assert_quarters(image: &RgbImage, levels: u8) {
    assert_eq!((image.width(), image.height()), (32, 32));
    for (index, expected) in QUARTERS.iter().enumerate() {
        let (x, y) = (index as u32 % 2 * 16 + 8, index as u32 / 2 * 16 + 8);
        let found = pixel(image, x, y);
        let apart = found.iter().zip(expected).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert!(apart <= levels, "quarter {index} is {found:?}, not {expected:?}");
    }
}

#[test]
fn a_progressive_jpeg_is_read() {
    assert_quarters(&read("progressive.jpg"), 3);
}

#[test]
fn a_cmyk_jpeg_is_read_in_its_colours() {
    assert_quarters(&read("cmyk.jpg"), 4);
}

#[test]
fn a_lossy_webp_is_read() {
    assert_quarters(&read("lossy.webp"), 6);
}

#[test]
fn an_interlaced_png_is_read_exactly() {
    let image = read("interlaced.png");
    assert_quarters(&image, 0);
    for (x, y) in (0..32).flat_map(|y| (0..32).map(move |x| (x, y))) {
        assert_eq!(pixel(&image, x, y), QUARTERS[(y / 16 * 2 + x / 16) as usize], "{x}, {y}");
    }
}

#[test]
fn an_animated_webp_is_refused() {
    assert!(refusal(&std::fs::read(golden("animated.webp")).unwrap()).contains("animated WebP"));
}

#[test]
fn a_gif_named_png_is_refused() {
    let reason = refusal(&std::fs::read(golden("still.gif")).unwrap());
    assert!(reason.contains("none of PNG, JPEG, WebP"), "{reason}");
}

#[test]
fn an_svg_named_png_is_refused() {
    let svg = br#"<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="16" height="16"/>"#;
    assert!(refusal(svg).contains("none of PNG, JPEG, WebP"));
}

#[test]
fn html_named_png_is_refused() {
    assert!(refusal(b"<!doctype html><title>404 Not Found</title>").contains("none of PNG, JPEG, WebP"));
}

#[test]
fn a_png_signature_alone_is_refused() {
    assert!(refusal(b"\x89PNG\r\n\x1a\n").contains("8 bytes"));
}

#[test]
fn one_pixel_is_read_and_a_column_too_high_is_not() {
    let one = super::png(1, 1, &[1, 2, 3], ExtendedColorType::Rgb8);
    assert_eq!(load("a.png", &one).unwrap().data(), [1, 2, 3]);
    let column = super::png(1, 65535, &vec![9; 3 * 65535], ExtendedColorType::Rgb8);
    assert!(refusal(&column).contains("1x65535"));
}

#[test]
fn a_webp_with_transparency_is_composited_on_white() {
    let mut bytes = Vec::new();
    let encoder = WebPEncoder::new_lossless(&mut bytes);
    encoder.write_image(&[9, 9, 9, 0, 0, 100, 255, 128], 2, 1, ExtendedColorType::Rgba8).unwrap();
    assert_eq!(load("a.webp", &bytes).unwrap().data(), [255, 255, 255, 127, 177, 255]);
}

#[test]
fn deep_transparent_pictures_are_rounded_and_composited() {
    let samples = |values: [u16; 4]| values.iter().flat_map(|v| v.to_ne_bytes()).collect::<Vec<u8>>();
    let deep = super::png(1, 1, &samples([0, 257 * 100, u16::MAX, 257 * 128]), ExtendedColorType::Rgba16);
    assert_eq!(load("a.png", &deep).unwrap().data(), [127, 177, 255]);
    let grey = super::png(1, 2, &samples([257 * 7, u16::MAX, 257 * 7, 0]), ExtendedColorType::La16);
    assert_eq!(load("a.png", &grey).unwrap().data(), [7, 7, 7, 255, 255, 255]);
}

/// Six colours, `a` to `f`, which differ by far more than a JPEG's rounding.
const LETTERS: [[u8; 3]; 6] =
    [[230, 40, 40], [40, 200, 60], [50, 60, 220], [240, 230, 60], [30, 30, 30], [235, 235, 235]];

/// What EXIF says of the first row and column of a picture stored as a b c / d e f gives the upright one.
const UPRIGHT: [&str; 8] =
    ["abc/def", "cba/fed", "fed/cba", "def/abc", "ad/be/cf", "da/eb/fc", "fc/eb/da", "cf/be/ad"];

/// The stored picture, in blocks of 16 pixels, the size of a JPEG's coding unit.
fn stored() -> Vec<u8> {
    (0..32).flat_map(|y| (0..48).flat_map(move |x| LETTERS[y / 16 * 3 + x / 16])).collect()
}

fn assert_upright(bytes: &[u8], name: &str, orientation: usize, levels: u8) {
    let image = load(name, bytes).unwrap();
    let rows: Vec<&str> = UPRIGHT[orientation - 1].split('/').collect();
    let expected = (rows[0].len() as u32 * 16, rows.len() as u32 * 16);
    assert_eq!((image.width(), image.height()), expected, "{name}, orientation {orientation}");
    for (y, row) in rows.iter().enumerate() {
        for (x, letter) in row.bytes().enumerate() {
            let found = pixel(&image, x as u32 * 16 + 8, y as u32 * 16 + 8);
            let wanted = LETTERS[usize::from(letter - b'a')];
            let apart = found.iter().zip(wanted).map(|(a, b)| a.abs_diff(b)).max().unwrap();
            assert!(
                apart <= levels,
                "{name}, orientation {orientation}: {found:?} at {x}, {y}, not {wanted:?}"
            );
        }
    }
}

#[test]
fn all_eight_exif_orientations_of_a_jpeg_are_applied() {
    for orientation in 1..=8 {
        let mut bytes = Vec::new();
        let mut encoder = JpegEncoder::new_with_quality(&mut bytes, 95);
        encoder.set_exif_metadata(exif(orientation as u8)).unwrap();
        encoder.write_image(&stored(), 48, 32, ExtendedColorType::Rgb8).unwrap();
        assert_upright(&bytes, "a.jpg", orientation, 4);
    }
}

#[test]
fn all_eight_exif_orientations_of_a_webp_are_applied() {
    for orientation in 1..=8 {
        let mut bytes = Vec::new();
        let mut encoder = WebPEncoder::new_lossless(&mut bytes);
        encoder.set_exif_metadata(exif(orientation as u8)).unwrap();
        encoder.write_image(&stored(), 48, 32, ExtendedColorType::Rgb8).unwrap();
        assert_upright(&bytes, "a.webp", orientation, 0);
    }
}

#[test]
fn an_orientation_that_exif_does_not_define_changes_nothing() {
    for orientation in [0, 9, 255] {
        let mut bytes = Vec::new();
        let mut encoder = WebPEncoder::new_lossless(&mut bytes);
        encoder.set_exif_metadata(exif(orientation)).unwrap();
        encoder.write_image(&stored(), 48, 32, ExtendedColorType::Rgb8).unwrap();
        assert_eq!(load("a.webp", &bytes).unwrap().data(), stored(), "orientation {orientation}");
    }
}
