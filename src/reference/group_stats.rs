//! GroupNorm's statistics in two passes: the mean, then the mean squared deviation from it.

use super::Precision;
use num_traits::Float;

/// Mean and `1 / sqrt(var + eps)` of every image and group, `[images, groups, 2]`, of `x`
/// `[images, pixels, channels]`. Kept as single floats by the kernels, so nothing is rounded to the storage type.
pub fn group_stats<P: Precision>(
    x: &[P::T],
    images: usize,
    channels: usize,
    groups: usize,
    eps: f32,
) -> Vec<P::T> {
    let group_channels = channels / groups;
    let image_len = x.len() / images;
    let mut stats = Vec::with_capacity(images * groups * 2);
    for image in x.chunks(image_len) {
        for group in 0..groups {
            let values = || {
                image.chunks(channels).flat_map(|p| &p[group * group_channels..][..group_channels]).copied()
            };
            let count = P::constant((image_len / groups) as f64);
            let mean = values().sum::<P::T>() / count;
            let variance = values().map(|v| (v - mean) * (v - mean)).sum::<P::T>() / count;
            stats.push(mean);
            stats.push(P::constant(1.0) / (variance + P::load(eps)).sqrt());
        }
    }
    stats
}

#[cfg(test)]
mod tests {
    use super::super::Exact;
    use super::*;

    #[test]
    fn groups_and_images_are_kept_apart() {
        // Two images of two pixels, two groups of two channels.
        let x = [1.0, 3.0, 10.0, 10.0, 5.0, 7.0, 10.0, 10.0, 0.0, 0.0, 2.0, 2.0, 0.0, 0.0, 4.0, 4.0];
        let stats = group_stats::<Exact>(&x, 2, 4, 2, 0.0);
        assert_eq!(&stats[..2], [4.0, 1.0 / 5.0f64.sqrt()]);
        assert_eq!((stats[2], stats[4], stats[6]), (10.0, 0.0, 3.0));
        assert_eq!(stats[7], 1.0);
    }
}
