//! Final norm and `lm_head`.

use super::Precision;
use super::linear::linear_rows;
use super::norm::rms_norm_rows;

/// Inputs of [`lm_head`].
#[derive(Clone, Copy, Debug)]
pub struct LmHead<'a> {
    /// Residual stream of the last row of every sequence, `[sequences, hidden_size]`.
    pub x: &'a [f32],
    /// `[hidden_size]`
    pub norm_weight: &'a [f32],
    /// `[vocab_size, hidden_size]`
    pub weight: &'a [f32],
    /// Columns of `x`.
    pub hidden_size: usize,
    /// Of the norm.
    pub eps: f32,
}

/// The normalised rows, `[sequences, hidden_size]`, and their logits, `[sequences, vocab_size]`.
pub fn lm_head<P: Precision>(i: &LmHead) -> (Vec<f64>, Vec<f64>) {
    let h = rms_norm_rows::<P>(i.x, i.norm_weight, i.eps);
    let logits = linear_rows::<P>(i.weight, None, &h, i.hidden_size);
    (P::widen_all(&h), P::widen_all(&logits))
}
