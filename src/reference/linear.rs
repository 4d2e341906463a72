//! A Linear layer, and the dot product that every projection uses.

use super::Precision;
use num_traits::Float;

/// `sum_k weight[k] * input[k]`, in the order of k.
pub fn dot<P: Precision>(weight: &[f32], input: &[P::T]) -> P::T {
    weight.iter().zip(input).map(|(&w, &v)| P::load(w) * v).sum()
}

/// One row through a Linear layer: `weight` is `[outputs, inner]`, `bias` `[outputs]`; the result is stored.
pub fn linear_row<P: Precision>(weight: &[f32], bias: Option<&[f32]>, input: &[P::T]) -> Vec<P::T> {
    weight
        .chunks_exact(input.len())
        .enumerate()
        .map(|(o, row)| {
            let sum = dot::<P>(row, input);
            P::store(bias.map_or(sum, |b| sum + P::load(b[o])))
        })
        .collect()
}

/// `x * sigmoid(x)`, not stored.
pub fn silu<P: Precision>(x: P::T) -> P::T {
    x / (P::constant(1.0) + (-x).exp())
}

/// Inputs of [`linear`].
#[derive(Clone, Copy, Debug)]
pub struct Linear<'a> {
    /// `[rows, inner]`
    pub x: &'a [f32],
    /// `[outputs, inner]`
    pub weight: &'a [f32],
    /// `[outputs]`
    pub bias: Option<&'a [f32]>,
    /// Columns of `x`.
    pub inner: usize,
    /// Whether SiLU follows.
    pub silu: bool,
}

/// `y[m] = act(weight x[m] + bias)`, `[rows, outputs]`.
pub fn linear<P: Precision>(i: &Linear) -> Vec<f64> {
    let mut y = Vec::new();
    for x in i.x.chunks_exact(i.inner) {
        for v in linear_row::<P>(i.weight, i.bias, &P::load_all(x)) {
            y.push(P::widen(if i.silu { P::store(silu::<P>(v)) } else { v }));
        }
    }
    y
}
