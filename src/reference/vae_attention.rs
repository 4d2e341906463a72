//! Single-head attention over the pixels of a picture, one query at a time.

use super::Precision;
use crate::parallel::split_rows;
use num_traits::Float;

/// `softmax(scale * q k^T) v`, stored; all four are `[images, pixels, channels]`.
pub fn vae_attention<P: Precision>(
    q: &[P::T],
    k: &[P::T],
    v: &[P::T],
    pixels: usize,
    channels: usize,
    scale: f32,
) -> Vec<P::T> {
    let zero = P::constant(0.0);
    let mut out = vec![zero; q.len()];
    split_rows(&mut out, channels, |row, out| {
        let image = row / pixels * pixels * channels;
        let query = &q[row * channels..][..channels];
        let keys = k[image..][..pixels * channels].chunks(channels);
        let scores: Vec<P::T> = keys
            .map(|key| query.iter().zip(key).map(|(&a, &b)| a * b).sum::<P::T>() * P::load(scale))
            .collect();
        let largest = scores.iter().fold(P::T::neg_infinity(), |m, &s| m.max(s));
        let weights: Vec<P::T> = scores.iter().map(|&s| (s - largest).exp()).collect();
        let total: P::T = weights.iter().copied().sum();
        for (value, &weight) in v[image..][..pixels * channels].chunks(channels).zip(&weights) {
            for (o, &x) in out.iter_mut().zip(value) {
                *o += weight / total * x;
            }
        }
        out.iter_mut().for_each(|o| *o = P::store(*o));
    });
    out
}

#[cfg(test)]
mod tests {
    use super::super::Exact;
    use super::*;

    #[test]
    fn weights_follow_the_scores_of_the_own_image() {
        // One channel, two images of two pixels; q = 0 weighs both keys alike, a large q picks the larger key.
        let q = [0.0, 1000.0, 0.0, 0.0];
        let k = [1.0, 2.0, 1.0, 2.0];
        let v = [1.0, 3.0, 10.0, 30.0];
        assert_eq!(vae_attention::<Exact>(&q, &k, &v, 2, 1, 1.0), [2.0, 3.0, 20.0, 20.0]);
    }
}
