//! How close two pictures are: PSNR and SSIM. Knows pixels and nothing of models.

use crate::error::{Error, Result};
use crate::image::RgbImage;

/// Side of the SSIM window.
const WINDOW: usize = 11;
/// Standard deviation of the window's Gaussian, in pixels.
const SIGMA: f64 = 1.5;
/// Largest value of a pixel.
const PEAK: f64 = 255.0;

fn check_sizes(a: &RgbImage, b: &RgbImage) -> Result<()> {
    if (a.width(), a.height()) == (b.width(), b.height()) {
        return Ok(());
    }
    let reason = format!(
        "are {}x{} and {}x{} pixels; pictures to compare have one size",
        a.width(),
        a.height(),
        b.width(),
        b.height()
    );
    Err(Error::request("images", reason))
}

/// Peak signal-to-noise ratio over all values, in dB; infinite where the pictures are equal.
pub fn psnr(a: &RgbImage, b: &RgbImage) -> Result<f64> {
    check_sizes(a, b)?;
    let square = |(&a, &b): (&u8, &u8)| (f64::from(a) - f64::from(b)).powi(2);
    let sum: f64 = a.data().iter().zip(b.data()).map(square).sum();
    Ok(10.0 * (PEAK * PEAK / (sum / a.data().len() as f64)).log10())
}

/// Structural similarity (Wang et al. 2004): Gaussian windows of 11x11 pixels that lie inside the picture, K1 0.01 and
/// K2 0.03, the mean over windows and the three channels. Refuses pictures smaller than a window.
pub fn ssim(a: &RgbImage, b: &RgbImage) -> Result<f64> {
    check_sizes(a, b)?;
    let (width, height) = (a.width() as usize, a.height() as usize);
    if width < WINDOW || height < WINDOW {
        let reason = format!("are {width}x{height} pixels; SSIM needs at least {WINDOW}x{WINDOW}");
        return Err(Error::request("images", reason));
    }
    let (c1, c2) = ((0.01 * PEAK).powi(2), (0.03 * PEAK).powi(2));
    let mut sum = 0.0;
    let mut windows = 0usize;
    for channel in 0..3 {
        let plane = |image: &RgbImage| -> Vec<f64> {
            image.data().iter().skip(channel).step_by(3).map(|&v| f64::from(v)).collect()
        };
        let (x, y) = (plane(a), plane(b));
        let product = |p: &[f64], q: &[f64]| -> Vec<f64> { p.iter().zip(q).map(|(p, q)| p * q).collect() };
        let [mx, my, xx, yy, xy] = [x.clone(), y.clone(), product(&x, &x), product(&y, &y), product(&x, &y)]
            .map(|plane| blur(&plane, width, height));
        for i in 0..mx.len() {
            let (ux, uy) = (mx[i], my[i]);
            let (vx, vy, vxy) = (xx[i] - ux * ux, yy[i] - uy * uy, xy[i] - ux * uy);
            sum += (2.0 * ux * uy + c1) * (2.0 * vxy + c2) / ((ux * ux + uy * uy + c1) * (vx + vy + c2));
        }
        windows += mx.len();
    }
    Ok(sum / windows as f64)
}

/// Weighted means of all windows inside a plane: `[height - 10, width - 10]`.
fn blur(plane: &[f64], width: usize, height: usize) -> Vec<f64> {
    let radius = (WINDOW / 2) as f64;
    let weight = |i: usize| (-0.5 * ((i as f64 - radius) / SIGMA).powi(2)).exp();
    let total: f64 = (0..WINDOW).map(weight).sum();
    let weights: Vec<f64> = (0..WINDOW).map(|i| weight(i) / total).collect();
    let mean = |at: &dyn Fn(usize) -> f64| weights.iter().enumerate().map(|(i, w)| w * at(i)).sum::<f64>();
    let columns = width - WINDOW + 1;
    let rows: Vec<f64> =
        (0..height * columns).map(|i| mean(&|k| plane[i / columns * width + i % columns + k])).collect();
    (0..(height - WINDOW + 1) * columns).map(|i| mean(&|k| rows[i + k * columns])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 19x14 pixels that vary in every direction, and the same with a pattern of errors.
    fn pictures() -> (RgbImage, RgbImage) {
        let value = |x: usize, y: usize, c: usize| (x * 11 + y * 7 + c * 50 + x * y) % 256;
        let error = |x: usize, y: usize, c: usize| (x * 5 + y * 3 + c * 2 + x * y * c) % 23;
        let all = || (0..14).flat_map(|y| (0..19).flat_map(move |x| (0..3).map(move |c| (x, y, c))));
        let a = all().map(|(x, y, c)| value(x, y, c) as u8).collect();
        let b = all().map(|(x, y, c)| (value(x, y, c) + error(x, y, c)).min(255) as u8).collect();
        (RgbImage::new(19, 14, a).unwrap(), RgbImage::new(19, 14, b).unwrap())
    }

    #[test]
    fn figures_are_those_of_scikit_image() {
        // scikit-image 0.26.0: peak_signal_noise_ratio(a, b, data_range=255) and structural_similarity(a, b,
        // channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False).
        let (a, b) = pictures();
        assert!((psnr(&a, &b).unwrap() - 26.114300215633254).abs() < 1e-9, "{}", psnr(&a, &b).unwrap());
        assert!((ssim(&a, &b).unwrap() - 0.9881392878984393).abs() < 1e-9, "{}", ssim(&a, &b).unwrap());
    }

    #[test]
    fn equal_pictures_are_perfect_and_other_sizes_refused() {
        let (a, _) = pictures();
        assert_eq!(psnr(&a, &a).unwrap(), f64::INFINITY);
        assert!((ssim(&a, &a).unwrap() - 1.0).abs() < 1e-12);
        let turned = RgbImage::new(14, 19, a.data().to_vec()).unwrap();
        assert!(psnr(&a, &turned).is_err() && ssim(&a, &turned).is_err());
        let small = RgbImage::new(10, 10, vec![7; 300]).unwrap();
        assert!(ssim(&small, &small).is_err());
    }
}
