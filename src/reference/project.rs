//! A product added into the residual stream: the output projection (`o_proj`) and the MLP's `down`.

use super::Precision;
use super::linear::linear_rows;

/// Inputs of [`project`].
#[derive(Clone, Copy, Debug)]
pub struct Project<'a> {
    /// `[rows, inner]`
    pub input: &'a [f32],
    /// `[hidden_size, inner]`
    pub weight: &'a [f32],
    /// `[hidden_size]`
    pub bias: Option<&'a [f32]>,
    /// Residual stream before, `[rows, hidden_size]`; float whatever the storage type is.
    pub x: &'a [f32],
    /// Columns of `input`.
    pub inner: usize,
    /// Columns of `x`.
    pub hidden_size: usize,
}

/// `x + (weight input + bias)`, `[rows, hidden_size]`.
pub fn project<P: Precision>(i: &Project) -> Vec<f64> {
    let y = linear_rows::<P>(i.weight, i.bias, &P::load_all(i.input), i.inner);
    y.into_iter().zip(i.x).map(|(y, &x)| P::widen(P::load(x) + y)).collect()
}
