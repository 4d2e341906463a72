//! The VAE encoder's moments to the image tokens that the model reads.

use super::Precision;
use num_traits::Float;

/// Sizes of the latent, of its normalised patches and of the patches that tokens hold.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Rows of the latent, a multiple of `patch` and `psz`.
    pub height: usize,
    /// Columns of the latent, a multiple of `patch` and `psz`.
    pub width: usize,
    /// Channels of the latent; the moments have twice as many.
    pub channels: usize,
    /// Side of the patch that one token holds.
    pub patch: usize,
    /// Side of the square that is normalised with all its channels; `None`: the mean is taken as it is.
    pub psz: Option<usize>,
}

/// What becomes of the moments. All but the tokens are `[height, width, channels]`.
#[derive(Clone, Debug)]
pub struct Latent<T> {
    /// Mean of the posterior, normalised.
    pub mean: Vec<T>,
    /// Its standard deviation; 0 without a draw.
    pub std: Vec<T>,
    /// `mean + std * draw`.
    pub sample: Vec<T>,
    /// `(sample - shift) * scale`, `[tokens, channels * patch^2]`, vectors ordered channel, row, column.
    pub tokens: Vec<T>,
}

/// Latent of `moments` `[height, width, 2 * channels]`; without `draw` `[height, width, channels]` the sample is the
/// mean. Each result is stored, but computed from values that were not.
pub fn encode_latent<P: Precision>(
    shape: &Shape,
    moments: &[P::T],
    draw: Option<&[P::T]>,
    (scale, shift): (f32, f32),
) -> Latent<P::T> {
    let Shape { height, width, channels, patch, psz } = *shape;
    let half = |offset: usize| -> Vec<P::T> {
        moments.chunks(2 * channels).flat_map(|pixel| pixel[offset..offset + channels].to_vec()).collect()
    };
    let (mut mean, log_variance) = (half(0), half(channels));
    if let Some(psz) = psz {
        for (y0, x0) in grid(height / psz, width / psz) {
            let at = |(dy, dx): (usize, usize)| ((y0 * psz + dy) * width + x0 * psz + dx) * channels;
            let inside: Vec<usize> =
                grid(psz, psz).flat_map(|d| (0..channels).map(move |c| at(d) + c)).collect();
            let count = P::constant(inside.len() as f64);
            let center = inside.iter().map(|&i| mean[i]).sum::<P::T>() / count;
            let variance = inside.iter().map(|&i| (mean[i] - center).powi(2)).sum::<P::T>() / count;
            let deviation = (variance + P::constant(1e-6)).sqrt();
            for i in inside {
                mean[i] = (mean[i] - center) / deviation;
            }
        }
    }
    let (low, high, two) = (P::constant(-30.0), P::constant(20.0), P::constant(2.0));
    let std: Vec<P::T> = match draw {
        Some(_) => log_variance.iter().map(|v| (v.max(low).min(high) / two).exp()).collect(),
        None => vec![P::constant(0.0); log_variance.len()],
    };
    let sample: Vec<P::T> = match draw {
        Some(draw) => mean.iter().zip(&std).zip(draw).map(|((&m, &s), &d)| m + s * d).collect(),
        None => mean.clone(),
    };
    let mut tokens = Vec::with_capacity(sample.len());
    for (token_y, token_x) in grid(height / patch, width / patch) {
        for c in 0..channels {
            for (dy, dx) in grid(patch, patch) {
                let pixel = (token_y * patch + dy) * width + token_x * patch + dx;
                tokens.push(P::store((sample[pixel * channels + c] - P::load(shift)) * P::load(scale)));
            }
        }
    }
    let stored = |values: Vec<P::T>| values.into_iter().map(P::store).collect();
    Latent { mean: stored(mean), std: stored(std), sample: stored(sample), tokens }
}

/// All (row, column) pairs in raster order.
fn grid(rows: usize, cols: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..rows).flat_map(move |r| (0..cols).map(move |c| (r, c)))
}

#[cfg(test)]
mod tests {
    use super::super::Exact;
    use super::super::unpatchify::{Shape as Tokens, unpatchify};
    use super::*;

    #[test]
    fn a_patch_is_normalised_with_its_channels() {
        // One pixel, two channels: -1 and 1 after the norm, but for eps.
        let shape = Shape { height: 1, width: 2, channels: 2, patch: 1, psz: Some(1) };
        let moments = [3.0, 5.0, 0.0, 0.0, 10.0, 10.0, 0.0, 0.0];
        let latent = encode_latent::<Exact>(&shape, &moments, None, (1.0, 0.0));
        assert!((latent.mean[1] - 1.0 / (1.0f64 + 1e-6).sqrt()).abs() < 1e-12);
        assert_eq!(latent.mean[0], -latent.mean[1]);
        assert_eq!(&latent.mean[2..], [0.0, 0.0]);
        // Together their values are 3, 5, 10, 10.
        let both = Shape { height: 2, width: 2, psz: Some(2), ..shape };
        let moments = [moments, moments].concat();
        let latent = encode_latent::<Exact>(&both, &moments, None, (1.0, 0.0));
        let deviation = (((16.0 + 4.0 + 9.0 + 9.0) / 4.0f64) + 1e-6).sqrt();
        assert!((latent.mean[0] + 4.0 / deviation).abs() < 1e-12);
    }

    #[test]
    fn log_variances_are_clamped_and_tokens_fold_back() {
        let shape = Shape { height: 2, width: 4, channels: 2, patch: 2, psz: None };
        let moments: Vec<f64> = (0..32).map(|i| if i % 4 < 2 { f64::from(i) } else { 100.0 }).collect();
        let draw = vec![0.5; 16];
        let latent = encode_latent::<Exact>(&shape, &moments, Some(&draw), (0.5, 1.0));
        assert!(latent.std.iter().all(|&s| (s - 10f64.exp()).abs() < 1e-9));
        let tokens = Tokens { images: 1, height: 2, width: 4, channels: 2, patch: 2 };
        assert_eq!(unpatchify::<Exact>(&tokens, &latent.tokens, 0.5, 1.0), latent.sample);
        assert_eq!(latent.mean, encode_latent::<Exact>(&shape, &moments, None, (0.5, 1.0)).sample);
    }
}
