//! Resampling as Pillow does it, to the bit: 22-bit fixed-point weights, horizontal pass first, 8-bit intermediate.
//!
//! Source: Pillow's `Resample.c`. Exactness matters because the official code prepares its inputs with Pillow.

use super::RgbImage;
use crate::error::Result;

/// Fraction bits of a weight: 8 of the value and 2 for overshoot of negative lobes leave 22 of 32.
const PRECISION_BITS: u32 = 22;

/// A resampling filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filter {
    Box,
    Bicubic,
    Lanczos,
}

impl Filter {
    /// Reach to either side, in source pixels at scale 1.
    fn support(self) -> f64 {
        match self {
            Filter::Box => 0.5,
            Filter::Bicubic => 2.0,
            Filter::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        match self {
            Filter::Box => f64::from(u8::from(x > -0.5 && x <= 0.5)),
            Filter::Bicubic => {
                const A: f64 = -0.5;
                let x = x.abs();
                if x < 1.0 {
                    ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
                } else if x < 2.0 {
                    (((x - 5.0) * x + 8.0) * x - 4.0) * A
                } else {
                    0.0
                }
            }
            Filter::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Filter::Lanczos => 0.0,
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 { 1.0 } else { (x * std::f64::consts::PI).sin() / (x * std::f64::consts::PI) }
}

/// The source pixels that make one target pixel.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

fn taps(from: u32, to: u32, filter: Filter) -> Vec<Taps> {
    let scale = f64::from(from) / f64::from(to);
    // Shrinking stretches the filter over all the pixels that it replaces (antialiasing).
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    (0..to)
        .map(|target| {
            let center = (f64::from(target) + 0.5) * scale;
            let first = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(from as usize);
            let raw: Vec<f64> = (first..end)
                .map(|source| filter.weight((source as f64 - center + 0.5) * (1.0 / stretch)))
                .collect();
            let sum: f64 = raw.iter().sum();
            let one = f64::from(1 << PRECISION_BITS);
            let weights = raw.iter().map(|w| if sum == 0.0 { *w } else { w / sum });
            // Half away from zero by truncation, in Pillow's order of operations.
            let weights = weights.map(|w| if w < 0.0 { -0.5 + w * one } else { 0.5 + w * one } as i32);
            Taps { first, weights: weights.collect() }
        })
        .collect()
}

fn level(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// `image` at another size, pixels.
pub(super) fn resize(image: &RgbImage, width: u32, height: u32, filter: Filter) -> Result<RgbImage> {
    const HALF: i32 = 1 << (PRECISION_BITS - 1);
    let mut row_bytes = image.width as usize * 3;
    let mut data = image.data.clone();
    if width != image.width {
        let taps = taps(image.width, width, filter);
        let mut out = Vec::with_capacity(width as usize * image.height as usize * 3);
        for row in data.chunks_exact(row_bytes) {
            for tap in &taps {
                let mut sums = [HALF; 3];
                for (pixel, weight) in row[tap.first * 3..].chunks_exact(3).zip(&tap.weights) {
                    for (sum, &value) in sums.iter_mut().zip(pixel) {
                        *sum += i32::from(value) * weight;
                    }
                }
                out.extend(sums.map(level));
            }
        }
        data = out;
        row_bytes = width as usize * 3;
    }
    if height != image.height {
        let mut out = Vec::with_capacity(row_bytes * height as usize);
        let mut sums = vec![HALF; row_bytes];
        for tap in taps(image.height, height, filter) {
            sums.fill(HALF);
            for (row, weight) in data[tap.first * row_bytes..].chunks_exact(row_bytes).zip(&tap.weights) {
                for (sum, &value) in sums.iter_mut().zip(row) {
                    *sum += i32::from(value) * weight;
                }
            }
            out.extend(sums.iter().map(|&sum| level(sum)));
        }
        data = out;
    }
    RgbImage::new(width, height, data)
}

/// The middle of `image`, which is at least as large; an odd rest goes to the right and the bottom.
pub(super) fn crop_middle(image: &RgbImage, width: u32, height: u32) -> Result<RgbImage> {
    let (left, top) = ((image.width - width) as usize / 2, (image.height - height) as usize / 2);
    let rows = image.data.chunks_exact(image.width as usize * 3).skip(top).take(height as usize);
    let data = rows.flat_map(|row| &row[left * 3..(left + width as usize) * 3]).copied().collect();
    RgbImage::new(width, height, data)
}
