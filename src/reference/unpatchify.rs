//! Image tokens to the latent that the VAE decodes.

use super::Precision;

/// Sizes of the latent and of the square patch that one token holds.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Pictures.
    pub images: usize,
    /// Rows of the latent, a multiple of `patch`.
    pub height: usize,
    /// Columns of the latent, a multiple of `patch`.
    pub width: usize,
    /// Channels of the latent.
    pub channels: usize,
    /// Side of a patch.
    pub patch: usize,
}

/// Latent `[images, height, width, channels]` of `tokens` `[images, tokens, channels * patch^2]`, whose vectors are
/// ordered channel, row, column; `tokens / scale + shift`, stored.
pub fn unpatchify<P: Precision>(shape: &Shape, tokens: &[P::T], scale: f32, shift: f32) -> Vec<P::T> {
    let Shape { images, height, width, channels, patch } = *shape;
    let mut latent = vec![P::constant(0.0); images * height * width * channels];
    let mut next = tokens.iter();
    for image in 0..images {
        for (token_y, token_x) in grid(height / patch, width / patch) {
            for c in 0..channels {
                for (dy, dx) in grid(patch, patch) {
                    let pixel = (image * height + token_y * patch + dy) * width + token_x * patch + dx;
                    if let Some(&v) = next.next() {
                        latent[pixel * channels + c] = P::store(v / P::load(scale) + P::load(shift));
                    }
                }
            }
        }
    }
    latent
}

/// All (row, column) pairs in raster order.
fn grid(rows: usize, cols: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..rows).flat_map(move |r| (0..cols).map(move |c| (r, c)))
}

#[cfg(test)]
mod tests {
    use super::super::Exact;
    use super::*;

    #[test]
    fn tokens_are_raster_ordered_and_their_channels_come_first() {
        // A 2x4 latent of two channels from two tokens: values 0..8 and 8..16.
        let shape = Shape { images: 1, height: 2, width: 4, channels: 2, patch: 2 };
        let tokens: Vec<f64> = (0..16).map(f64::from).collect();
        let latent = unpatchify::<Exact>(&shape, &tokens, 0.5, 1.0);
        let values: Vec<f64> = latent.iter().map(|v| (v - 1.0) / 2.0).collect();
        assert_eq!(values, [0., 4., 1., 5., 8., 12., 9., 13., 2., 6., 3., 7., 10., 14., 11., 15.]);
    }
}
