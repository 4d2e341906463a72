//! Crops and figures against Pillow's and scikit-image's, which `tools/golden/images.py` recorded once.

use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use warpstep::image::{ResizeMode, RgbImage, prepare};
use warpstep::metrics::{psnr, ssim};

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/images").join(name)
}

/// The script's `formula`.
fn formula(width: u32, height: u32) -> RgbImage {
    let value = |x: u32, y: u32, c: u32| (x * 11 + y * 7 + c * 50 + x * y + x * x * y / 16) % 256;
    let all = (0..height).flat_map(|y| (0..width).flat_map(move |x| (0..3).map(move |c| (x, y, c))));
    RgbImage::new(width, height, all.map(|(x, y, c)| value(x, y, c) as u8).collect()).unwrap()
}

/// The script's `disturbed`.
fn disturbed(picture: &RgbImage, share: f64) -> RgbImage {
    let tenths = (share * 10.0).round() as u32;
    let (width, height) = (picture.width(), picture.height());
    let all = (0..height).flat_map(|y| (0..width).flat_map(move |x| (0..3).map(move |c| (x, y, c))));
    let error = |(x, y, c): (u32, u32, u32)| (x * 5 + y * 3 + c * 2 + x * y * (c + 1)) % 23 * tenths / 10;
    let sum = |(&value, at): (&u8, _)| (u32::from(value) + error(at)).min(255) as u8;
    RgbImage::new(width, height, picture.data().iter().zip(all).map(sum).collect()).unwrap()
}

#[test]
fn twenty_centre_crops_are_pillows() {
    let bytes = std::fs::read(golden("crops.safetensors")).unwrap();
    let crops = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(crops.len(), 20);
    for (name, crop) in crops.tensors() {
        let (size, side) = name.split_once('_').unwrap();
        let (width, height) = size.split_once('x').unwrap();
        let side: u32 = side.parse().unwrap();
        let image = formula(width.parse().unwrap(), height.parse().unwrap());
        let got = prepare(&image, ResizeMode::Crop { width: side, height: side }).unwrap();
        assert_eq!(crop.shape(), [side as usize, side as usize, 3], "{name}");
        let apart = got.data().iter().zip(crop.data()).map(|(a, b)| a.abs_diff(*b)).max();
        assert_eq!(apart, Some(0), "{name}: levels apart");
    }
}

#[test]
fn psnr_and_ssim_are_those_of_scikit_image() {
    let text = std::fs::read_to_string(golden("metrics.json")).unwrap();
    let rows: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    assert_eq!(rows.len(), 5);
    for row in rows {
        let number = |key: &str| row[key].as_f64().unwrap();
        let a = formula(number("width") as u32, number("height") as u32);
        let b = disturbed(&a, number("share"));
        for (name, got) in [("psnr", psnr(&a, &b).unwrap()), ("ssim", ssim(&a, &b).unwrap())] {
            assert!((got - number(name)).abs() < 1e-9, "{name} is {got} of {row}");
        }
    }
}
