//! Final norm and `image_out_projector`.

use super::Precision;
use super::linear::linear_rows;
use super::norm::rms_norm_rows;

/// Inputs of [`out_proj`].
#[derive(Clone, Copy, Debug)]
pub struct OutProj<'a> {
    /// Residual stream of the last row of every sequence, `[sequences, hidden_size]`.
    pub x: &'a [f32],
    /// `[hidden_size]`
    pub norm_weight: &'a [f32],
    /// The position row of the token, `[hidden_size]`.
    pub pos_embed: Option<&'a [f32]>,
    /// `[hidden_size, hidden_size]`
    pub weight: &'a [f32],
    /// `[hidden_size]`
    pub bias: &'a [f32],
    /// Columns of `x`.
    pub hidden_size: usize,
    /// Of the norm.
    pub eps: f32,
}

/// The normalised rows, and the conditions made of them; both `[sequences, hidden_size]`.
pub fn out_proj<P: Precision>(i: &OutProj) -> (Vec<f64>, Vec<f64>) {
    let mut h = rms_norm_rows::<P>(i.x, i.norm_weight, i.eps);
    let norm = P::widen_all(&h);
    if let Some(row) = i.pos_embed {
        for (h, &e) in h.iter_mut().zip(row.iter().cycle()) {
            *h = P::store(*h + P::load(e));
        }
    }
    (norm, P::widen_all(&linear_rows::<P>(i.weight, Some(i.bias), &h, i.hidden_size)))
}
