//! Normalise, then the gated half of the MLP.

use super::Precision;
use super::linear::{linear_rows, silu};
use super::norm::rms_norm_rows;

/// Inputs of [`gate_up`].
#[derive(Clone, Copy, Debug)]
pub struct GateUp<'a> {
    /// Residual stream, `[rows, hidden_size]`.
    pub x: &'a [f32],
    /// `[hidden_size]`
    pub norm_weight: &'a [f32],
    /// `[intermediate_size, hidden_size]`
    pub gate: &'a [f32],
    /// `[intermediate_size, hidden_size]`
    pub up: &'a [f32],
    /// `[intermediate_size]`
    pub gate_bias: Option<&'a [f32]>,
    /// `[intermediate_size]`
    pub up_bias: Option<&'a [f32]>,
    /// Columns of `x`.
    pub hidden_size: usize,
    /// Of the norm.
    pub eps: f32,
}

/// `silu(gate h) * (up h)`, `[rows, intermediate_size]`.
pub fn gate_up<P: Precision>(i: &GateUp) -> Vec<f64> {
    let h = rms_norm_rows::<P>(i.x, i.norm_weight, i.eps);
    let gate = linear_rows::<P>(i.gate, i.gate_bias, &h, i.hidden_size);
    let up = linear_rows::<P>(i.up, i.up_bias, &h, i.hidden_size);
    gate.iter().zip(&up).map(|(&g, &u)| P::widen(P::store(P::store(silu::<P>(g)) * u))).collect()
}
