//! Final norm and `image_out_projector`.

use super::Precision;
use super::linear::linear_row;
use super::norm::rms_norm;

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
    let (mut norm, mut condition) = (Vec::new(), Vec::new());
    for x in i.x.chunks_exact(i.hidden_size) {
        let mut h = rms_norm::<P>(x, i.norm_weight, i.eps);
        norm.extend(P::widen_all(&h));
        if let Some(row) = i.pos_embed {
            for (h, &e) in h.iter_mut().zip(row) {
                *h = P::store(*h + P::load(e));
            }
        }
        condition.extend(P::widen_all(&linear_row::<P>(i.weight, Some(i.bias), &h)));
    }
    (norm, condition)
}
