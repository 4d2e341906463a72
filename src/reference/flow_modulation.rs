//! The modulations of the flow head: one Linear of `silu(time + cond)`.

use super::Precision;
use super::linear::{linear_row, silu};

/// `weight silu(time + cond) + bias`, for one time and one condition. The sum and its SiLU are stored, as in the
/// official code, which holds both in the model's type.
pub fn modulation<P: Precision>(weight: &[f32], bias: &[f32], time: &[P::T], cond: &[P::T]) -> Vec<P::T> {
    let y = time.iter().zip(cond).map(|(&t, &c)| P::store(t + c));
    let s: Vec<P::T> = y.map(|y| P::store(silu::<P>(y))).collect();
    linear_row::<P>(weight, Some(bias), &s)
}
