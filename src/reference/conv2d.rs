//! Convolution of channels-last pictures: normalisation and swish of the input, enlargement, zero border, weights,
//! bias, residual, each as a step of its own.

use super::Precision;
use crate::parallel::split_rows;
use num_traits::Float;

/// How the sides of the output follow from those of the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resample {
    /// They are equal.
    Same,
    /// Twice as long: the input is enlarged first, each pixel repeated.
    Up,
    /// Half as long: every second pixel, with zeros only right of and below the input; 3x3 only.
    Down,
}

/// What a convolution computes; the shapes follow from it.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Pictures.
    pub images: usize,
    /// Rows of the output; `resample` gives the input's.
    pub height: usize,
    /// Columns of the output.
    pub width: usize,
    /// Channels of the input.
    pub c_in: usize,
    /// Channels of the output.
    pub c_out: usize,
    /// 3, with one pixel of zeros around the input, or 1.
    pub ksize: usize,
    /// Enlarging or reducing.
    pub resample: Resample,
}

impl Shape {
    /// Rows and columns of the input.
    pub fn input_size(&self) -> (usize, usize) {
        match self.resample {
            Resample::Same => (self.height, self.width),
            Resample::Up => (self.height / 2, self.width / 2),
            Resample::Down => (self.height * 2, self.width * 2),
        }
    }
}

/// GroupNorm applied to the input, with swish after it or not.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a, T> {
    /// Mean and 1 / std of every image and group, `[images, groups, 2]`.
    pub stats: &'a [T],
    /// Scale `[c_in]`.
    pub gamma: &'a [T],
    /// Offset `[c_in]`.
    pub beta: &'a [T],
    /// Groups of channels.
    pub groups: usize,
    /// x * sigmoid(x) afterwards.
    pub silu: bool,
}

/// The normalised input, `[pixels, channels]` of one image. Not rounded: the kernels keep it in registers.
pub fn normalise<P: Precision>(norm: &Norm<P::T>, image: usize, x: &[P::T], channels: usize) -> Vec<P::T> {
    let one = P::constant(1.0);
    let group_channels = channels / norm.groups;
    let value = |c: usize, v: P::T| {
        let stats = (image * norm.groups + c / group_channels) * 2;
        let v = (v - norm.stats[stats]) * norm.stats[stats + 1] * norm.gamma[c] + norm.beta[c];
        if norm.silu { v / (one + (-v).exp()) } else { v }
    };
    x.chunks(channels).flat_map(|pixel| pixel.iter().enumerate().map(|(c, &v)| value(c, v))).collect()
}

/// `y = w * act(norm(x)) + bias (+ residual)`, stored. `x` `[images, h_in, w_in, c_in]`, `w`
/// `[c_out, ksize, ksize, c_in]`, the result `[images, height, width, c_out]`.
pub fn conv2d<P: Precision>(
    shape: &Shape,
    x: &[P::T],
    norm: Option<&Norm<P::T>>,
    w: &[P::T],
    bias: &[P::T],
    residual: Option<&[P::T]>,
) -> Vec<P::T> {
    let Shape { images, height, width, c_in, c_out, ksize, resample } = *shape;
    let (in_height, in_width) = shape.input_size();
    // The taps move over the input, or over the enlarged input, `stride` pixels at a time.
    let (shift, border, stride) = match resample {
        Resample::Same => (0, ksize / 2, 1),
        Resample::Up => (1, ksize / 2, 1),
        Resample::Down => (0, 0, 2),
    };
    let (rows, cols) = (in_height << shift, in_width << shift);
    // Output channels innermost, so that the product below runs along memory: [ky, kx, c_in, c_out].
    let taps = ksize * ksize;
    let mut transposed = vec![P::constant(0.0); w.len()];
    for n in 0..c_out {
        for k in 0..taps * c_in {
            transposed[k * c_out + n] = w[n * taps * c_in + k];
        }
    }

    let mut y = Vec::with_capacity(images * height * width * c_out);
    for image in 0..images {
        let x = &x[image * in_height * in_width * c_in..][..in_height * in_width * c_in];
        let normalised = norm.map(|norm| normalise::<P>(norm, image, x, c_in));
        let x = normalised.as_deref().unwrap_or(x);
        let mut out = vec![P::constant(0.0); height * width * c_out];
        split_rows(&mut out, width * c_out, |row, sums| {
            for pixel in sums.chunks_mut(c_out) {
                pixel.copy_from_slice(bias);
            }
            for ky in 0..ksize {
                // Row of the enlarged input under this tap; outside there are zeros.
                let Some(from) = (row * stride + ky).checked_sub(border).filter(|&r| r < rows) else {
                    continue;
                };
                for c in 0..c_in {
                    for kx in 0..ksize {
                        let weights = &transposed[((ky * ksize + kx) * c_in + c) * c_out..][..c_out];
                        for (col, sums) in sums.chunks_mut(c_out).enumerate() {
                            let at = (col * stride + kx).checked_sub(border).filter(|&at| at < cols);
                            let Some(at) = at else { continue };
                            let value = x[((from >> shift) * in_width + (at >> shift)) * c_in + c];
                            for (sum, &weight) in sums.iter_mut().zip(weights) {
                                *sum += value * weight;
                            }
                        }
                    }
                }
            }
        });
        y.extend(out);
    }
    match residual {
        Some(residual) => y.iter().zip(residual).map(|(&v, &r)| P::store(v + r)).collect(),
        None => y.into_iter().map(P::store).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Exact;
    use super::*;

    #[test]
    fn a_3x3_filter_sees_zeros_outside_and_its_neighbours_inside() {
        let shape =
            Shape { images: 1, height: 2, width: 3, c_in: 1, c_out: 1, ksize: 3, resample: Resample::Same };
        let x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        // Sum of the left neighbour and ten times the one below.
        let w = [0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 10.0, 0.0];
        let y = conv2d::<Exact>(&shape, &x, None, &w, &[0.5], None);
        assert_eq!(y, [40.5, 51.5, 62.5, 0.5, 4.5, 5.5]);
    }

    #[test]
    fn upsampling_repeats_pixels_and_the_residual_is_added() {
        let shape =
            Shape { images: 1, height: 2, width: 4, c_in: 2, c_out: 1, ksize: 1, resample: Resample::Up };
        let x = [1.0, 10.0, 2.0, 20.0];
        let residual = [0.0, 0.0, 0.0, 0.0, 100.0, 0.0, 0.0, 0.0];
        let y = conv2d::<Exact>(&shape, &x, None, &[1.0, 1.0], &[0.0], Some(&residual));
        assert_eq!(y, [11.0, 11.0, 22.0, 22.0, 111.0, 11.0, 22.0, 22.0]);
    }

    #[test]
    fn downsampling_pads_right_and_below_only() {
        let shape =
            Shape { images: 1, height: 1, width: 2, c_in: 1, c_out: 1, ksize: 3, resample: Resample::Down };
        let x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
        // Row 0 once, row 1 ten times; the third row and, for the last pixel, the third column are zeros.
        let w = [1.0, 1.0, 1.0, 10.0, 10.0, 10.0, 100.0, 100.0, 100.0];
        let y = conv2d::<Exact>(&shape, &x, None, &w, &[0.25], None);
        assert_eq!(y, [6.25 + 180.0, 7.25 + 150.0]);
    }

    #[test]
    fn zeros_are_put_around_the_normalised_input() {
        // The norm maps 3 to 0 and the border must be 0, not (0 - 3) * 2.
        let shape =
            Shape { images: 1, height: 1, width: 1, c_in: 1, c_out: 1, ksize: 3, resample: Resample::Same };
        let norm = Norm { stats: &[3.0, 2.0], gamma: &[1.0], beta: &[0.0], groups: 1, silu: false };
        let y = conv2d::<Exact>(&shape, &[3.0], Some(&norm), &[1.0; 9], &[0.0], None);
        assert_eq!(y, [0.0]);
        let norm = Norm { beta: &[1.0], silu: true, ..norm };
        let y = conv2d::<Exact>(&shape, &[3.0], Some(&norm), &[1.0; 9], &[0.0], None);
        assert!((y[0] - 1.0 / (1.0 + (-1.0f64).exp())).abs() < 1e-15);
    }
}
