//! A Linear layer, and the dot products that every projection uses.

use super::Precision;
use crate::parallel::split_rows;
use num_traits::Float;

/// Outputs that are added up side by side, each along K in order: a single sum waits for every one of its additions.
const ABREAST: usize = 8;
/// Products from which on more threads are worth their start.
const WORTH_A_THREAD: usize = 1 << 18;

/// `sum_k rows[n][k] * input[k]` for each of N rows, in the order of k.
fn dots<P: Precision, const N: usize>(rows: [&[f32]; N], input: &[P::T]) -> [P::T; N] {
    let rows = rows.map(|row| &row[..input.len()]);
    let mut sums = [P::constant(0.0); N];
    for (k, &v) in input.iter().enumerate() {
        for (sum, row) in sums.iter_mut().zip(rows) {
            *sum += P::load(row[k]) * v;
        }
    }
    sums
}

/// One row through a Linear layer: `weight` is `[outputs, inner]`, `bias` `[outputs]`; the result is stored.
pub fn linear_row<P: Precision>(weight: &[f32], bias: Option<&[f32]>, input: &[P::T]) -> Vec<P::T> {
    let mut outputs = vec![P::constant(0.0); weight.len() / input.len()];
    let work = |group: usize, outputs: &mut [P::T]| {
        let first = group * ABREAST;
        let row = |n: usize| &weight[(first + n) * input.len()..];
        match outputs.as_chunks_mut::<ABREAST>() {
            ([whole], []) => *whole = dots::<P, ABREAST>(std::array::from_fn(row), input),
            _ => outputs.iter_mut().enumerate().for_each(|(n, out)| [*out] = dots::<P, 1>([row(n)], input)),
        }
        for (n, out) in outputs.iter_mut().enumerate() {
            *out = P::store(bias.map_or(*out, |b| *out + P::load(b[first + n])));
        }
    };
    if weight.len() < WORTH_A_THREAD {
        outputs.chunks_mut(ABREAST).enumerate().for_each(|(group, outputs)| work(group, outputs));
    } else {
        split_rows(&mut outputs, ABREAST, work);
    }
    outputs
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

#[cfg(test)]
mod tests {
    use super::super::{Exact, PlainF32};
    use super::*;

    #[test]
    fn every_output_is_the_sum_in_the_order_of_k() {
        // Less than one group, groups with a remainder, and enough for several threads.
        for (outputs, inner) in [(3, 5), (8, 1), (21, 64), (4099, 65)] {
            let values = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
            let (weight, bias, input) =
                (values(outputs * inner, 0.7), values(outputs, 0.3), values(inner, 0.9));
            let expected = |o: usize| {
                let mut sum = 0.0;
                for k in 0..inner {
                    sum += weight[o * inner + k] * input[k];
                }
                sum + bias[o]
            };
            let expected: Vec<f32> = (0..outputs).map(expected).collect();
            assert_eq!(linear_row::<PlainF32>(&weight, Some(&bias), &input), expected);
            let exact = linear_row::<Exact>(&weight, Some(&bias), &Exact::load_all(&input));
            assert!(exact.iter().zip(&expected).all(|(e, &f)| (e - f64::from(f)).abs() < 1e-4));
        }
    }
}
