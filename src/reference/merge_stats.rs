//! GroupNorm's statistics from those of the channels of every tile of pixels.

use super::Precision;
use num_traits::Float;

/// Rows and columns of a tile.
pub const TILE: (usize, usize) = (8, 16);

/// Pixels of every tile of a picture, row by row; those at its right and lower edge may be cut.
pub fn tile_pixels(height: usize, width: usize) -> Vec<usize> {
    let ends = |size: usize, tile: usize| (0..size).step_by(tile).map(move |at| tile.min(size - at));
    ends(height, TILE.0).flat_map(|rows| ends(width, TILE.1).map(move |cols| rows * cols)).collect()
}

/// Mean and `1 / sqrt(var + eps)` of every image and group, `[images, groups, 2]`, of `partial`
/// `[images, tiles, channels, 2]`: mean and sum of squared deviations.
pub fn merge_stats<P: Precision>(
    partial: &[P::T],
    (height, width): (usize, usize),
    channels: usize,
    groups: usize,
    eps: f32,
) -> Vec<P::T> {
    let pixels: Vec<P::T> = tile_pixels(height, width).into_iter().map(|n| P::constant(n as f64)).collect();
    let group_channels = channels / groups;
    let count = P::constant((height * width * group_channels) as f64);
    let mut stats = Vec::new();
    for image in partial.chunks(pixels.len() * channels * 2) {
        for group in 0..groups {
            let parts = || {
                image.chunks(channels * 2).zip(&pixels).flat_map(|(tile, &n)| {
                    tile[group * group_channels * 2..][..group_channels * 2]
                        .chunks(2)
                        .map(move |part| (n, part[0], part[1]))
                })
            };
            let mean = parts().map(|(n, mean, _)| n * mean).sum::<P::T>() / count;
            let deviations = parts().map(|(n, m, m2)| m2 + n * (m - mean) * (m - mean)).sum::<P::T>();
            stats.push(mean);
            stats.push(P::constant(1.0) / (deviations / count + P::load(eps)).sqrt());
        }
    }
    stats
}

#[cfg(test)]
mod tests {
    use super::super::Exact;
    use super::super::group_stats::group_stats;
    use super::*;

    #[test]
    fn merged_tiles_are_the_statistics_of_all_values() {
        // 9 x 17 pixels are four tiles: 8x16, 8x1, 1x16, 1x1.
        let (height, width, channels) = (9, 17, 4);
        assert_eq!(tile_pixels(height, width), [128, 8, 16, 1]);
        let value = |y: usize, x: usize, c: usize| ((y * 31 + x * 17 + c * 7) % 23) as f64 - 3.0;
        let mut all = Vec::new();
        for y in 0..height {
            for x in 0..width {
                all.extend((0..channels).map(|c| value(y, x, c)));
            }
        }
        let mut partial = Vec::new();
        for (y0, x0) in [(0, 0), (0, 16), (8, 0), (8, 16)] {
            for c in 0..channels {
                let values: Vec<f64> = (y0..height.min(y0 + 8))
                    .flat_map(|y| (x0..width.min(x0 + 16)).map(move |x| value(y, x, c)))
                    .collect();
                let mean = values.iter().sum::<f64>() / values.len() as f64;
                partial.extend([mean, values.iter().map(|v| (v - mean) * (v - mean)).sum()]);
            }
        }
        let merged = merge_stats::<Exact>(&partial, (height, width), channels, 2, 1e-6);
        let direct = group_stats::<Exact>(&all, 1, channels, 2, 1e-6);
        assert!(merged.iter().zip(&direct).all(|(m, d)| (m - d).abs() < 1e-12), "{merged:?} {direct:?}");
    }
}
