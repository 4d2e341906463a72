//! Final norm and `lm_head`.

use super::Precision;
use super::linear::linear_row;
use super::norm::rms_norm;

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
    let (mut norm, mut logits) = (Vec::new(), Vec::new());
    for x in i.x.chunks_exact(i.hidden_size) {
        let h = rms_norm::<P>(x, i.norm_weight, i.eps);
        norm.extend(P::widen_all(&h));
        logits.extend(P::widen_all(&linear_row::<P>(i.weight, None, &h)));
    }
    (norm, logits)
}
