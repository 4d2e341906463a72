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

/// Rows that are added up side by side, each along K in order: their values lie beside each other in memory, so a vector
/// register takes several of them.
const ROWS: usize = 8;
/// Outputs that share a read of those values.
const OUTPUTS: usize = 4;

/// `sum_k weights[n][k] * columns[k][m]` for each of N outputs and [`ROWS`] rows, in the order of k.
#[inline(always)]
fn products<P: Precision, const N: usize>(
    weights: [&[f32]; N],
    columns: &[[P::T; ROWS]],
) -> [[P::T; ROWS]; N] {
    let weights = weights.map(|row| &row[..columns.len()]);
    let mut sums = [[P::constant(0.0); ROWS]; N];
    for (k, column) in columns.iter().enumerate() {
        for (sums, row) in sums.iter_mut().zip(weights) {
            let weight = P::load(row[k]);
            for (sum, &v) in sums.iter_mut().zip(column) {
                *sum += weight * v;
            }
        }
    }
    sums
}

/// [`products`] with registers of twice the width. The results are the same: nothing is fused or reordered.
///
/// # Safety
///
/// The processor has AVX2.
#[target_feature(enable = "avx2")]
unsafe fn products_avx2<P: Precision, const N: usize>(
    weights: [&[f32]; N],
    columns: &[[P::T; ROWS]],
) -> [[P::T; ROWS]; N] {
    products::<P, N>(weights, columns)
}

/// What [`linear_row`] makes of every row of `inputs` (`[rows, inner]`), to the bit: `[rows, outputs]`. Each weight is
/// read once for eight rows instead of once for each.
pub fn linear_rows<P: Precision>(
    weight: &[f32],
    bias: Option<&[f32]>,
    inputs: &[P::T],
    inner: usize,
) -> Vec<P::T> {
    let (rows, width) = (inputs.len() / inner, weight.len() / inner);
    if rows < ROWS / 2 {
        return inputs.chunks_exact(inner).flat_map(|row| linear_row::<P>(weight, bias, row)).collect();
    }
    // [groups][inner][ROWS]; rows that the last group lacks are zeros.
    let groups: Vec<Vec<[P::T; ROWS]>> = inputs
        .chunks(ROWS * inner)
        .map(|group| {
            let value =
                |m: usize, k: usize| group.get(m * inner + k).copied().unwrap_or_else(|| P::constant(0.0));
            (0..inner).map(|k| std::array::from_fn(|m| value(m, k))).collect()
        })
        .collect();
    let wide = is_x86_feature_detected!("avx2");
    // [outputs, rows]
    let mut turned = vec![P::constant(0.0); rows * width];
    split_rows(&mut turned, OUTPUTS * rows, |group, turned| {
        let first = group * OUTPUTS;
        // A last group of fewer outputs computes its last one several times.
        let count = turned.len() / rows;
        let weights: [&[f32]; OUTPUTS] =
            std::array::from_fn(|n| &weight[(first + n.min(count - 1)) * inner..]);
        for (m, columns) in groups.iter().enumerate() {
            let sums = if wide {
                // SAFETY: the processor has it.
                unsafe { products_avx2::<P, OUTPUTS>(weights, columns) }
            } else {
                products::<P, OUTPUTS>(weights, columns)
            };
            for (n, (turned, sums)) in turned.chunks_exact_mut(rows).zip(sums).enumerate() {
                for (out, sum) in turned[m * ROWS..].iter_mut().zip(sums) {
                    *out = P::store(bias.map_or(sum, |b| sum + P::load(b[first + n])));
                }
            }
        }
    });
    (0..rows * width).map(|at| turned[at % width * rows + at / width]).collect()
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
    let y = linear_rows::<P>(i.weight, i.bias, &P::load_all(i.x), i.inner);
    y.into_iter().map(|v| P::widen(if i.silu { P::store(silu::<P>(v)) } else { v })).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Exact, PlainBf16, PlainF32};
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

    #[test]
    fn rows_together_are_what_each_is_alone() {
        // Less than a group of outputs or rows, remainders of both, whole groups of both.
        for (rows, outputs, inner) in [(1, 3, 5), (4, 1, 7), (5, 6, 3), (8, 8, 64), (17, 13, 33)] {
            let values = |n: usize, step: f32| (0..n).map(|i| (i as f32 * step).sin()).collect::<Vec<f32>>();
            let (weight, bias, inputs) =
                (values(outputs * inner, 0.7), values(outputs, 0.3), values(rows * inner, 0.9));
            fn check<P: Precision>(weight: &[f32], bias: Option<&[f32]>, inputs: &[f32], inner: usize) {
                let inputs = P::load_all(inputs);
                let alone: Vec<f64> = inputs
                    .chunks_exact(inner)
                    .flat_map(|row| P::widen_all(&linear_row::<P>(weight, bias, row)))
                    .collect();
                assert_eq!(P::widen_all(&linear_rows::<P>(weight, bias, &inputs, inner)), alone);
                // And without the registers that this machine may have.
                let columns: Vec<[P::T; ROWS]> = (0..inner).map(|k| [inputs[k]; ROWS]).collect();
                let [sums] = products::<P, 1>([weight], &columns);
                let first = P::store(bias.map_or(sums[0], |b| sums[0] + P::load(b[0])));
                assert_eq!(P::widen(first), alone[0]);
            }
            for bias in [None, Some(&bias[..])] {
                check::<Exact>(&weight, bias, &inputs, inner);
                check::<PlainF32>(&weight, bias, &inputs, inner);
                check::<PlainBf16>(&weight, bias, &inputs, inner);
            }
        }
    }
}
