//! RMSNorm as the official code rounds it: the normalised value is stored, then multiplied by the weight.

use super::Precision;
use num_traits::Float;

/// `store(x / sqrt(mean(x^2) + eps)) * weight`, stored. `x` and `weight` are one row, `[hidden_size]`.
pub fn rms_norm<P: Precision>(x: &[f32], weight: &[f32], eps: f32) -> Vec<P::T> {
    let squares: P::T = x.iter().map(|&v| P::load(v) * P::load(v)).sum();
    let mean = squares / P::constant(x.len() as f64);
    let rms = (mean + P::load(eps)).sqrt();
    x.iter().zip(weight).map(|(&v, &w)| P::store(P::store(P::load(v) / rms) * P::load(w))).collect()
}

/// [`rms_norm`] of every row of `x`, one after another.
pub fn rms_norm_rows<P: Precision>(x: &[f32], weight: &[f32], eps: f32) -> Vec<P::T> {
    x.chunks_exact(weight.len()).flat_map(|row| rms_norm::<P>(row, weight, eps)).collect()
}
