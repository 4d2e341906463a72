//! Grouped-query attention of single rows over a cache.

use super::Precision;
use num_traits::Float;

/// Inputs of [`attention`].
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// `[rows, heads, head_dim]`
    pub q: &'a [f32],
    /// `[sequences, kv heads, capacity, head_dim]`
    pub k_cache: &'a [f32],
    /// `[sequences, kv heads, capacity, head_dim]`
    pub v_cache: &'a [f32],
    /// Sequence of every row.
    pub row_seq: &'a [u32],
    /// Last slot that the row sees.
    pub row_pos: &'a [u32],
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Slots per sequence and head.
    pub capacity: usize,
    /// Factor on the scores.
    pub scale: f32,
}

/// `softmax(scale * q k^T) v` over slots `0..=row_pos`, `[rows, heads, head_dim]`.
pub fn attention<P: Precision>(i: &Attention) -> Vec<f64> {
    let d = i.head_dim;
    let heads_per_kv_head = i.num_attention_heads / i.num_key_value_heads;
    let mut out = Vec::new();
    for (row, (&seq, &last)) in i.row_seq.iter().zip(i.row_pos).enumerate() {
        for head in 0..i.num_attention_heads {
            let q = P::load_all(&i.q[(row * i.num_attention_heads + head) * d..][..d]);
            let kv_head = seq as usize * i.num_key_value_heads + head / heads_per_kv_head;
            let slots = 0..=last as usize;
            let slot = |cache, t: usize| -> Vec<P::T> {
                let cache: &[f32] = cache;
                P::load_all(&cache[(kv_head * i.capacity + t) * d..][..d])
            };
            let scores: Vec<P::T> = slots
                .clone()
                .map(|t| {
                    let k = slot(i.k_cache, t);
                    q.iter().zip(&k).map(|(&a, &b)| a * b).sum::<P::T>() * P::load(i.scale)
                })
                .collect();
            let max = scores.iter().copied().fold(P::T::neg_infinity(), P::T::max);
            let weights: Vec<P::T> = scores.iter().map(|&s| (s - max).exp()).collect();
            let total: P::T = weights.iter().copied().sum();
            let mut sums = vec![P::constant(0.0); d];
            for t in slots {
                for (sum, v) in sums.iter_mut().zip(slot(i.v_cache, t)) {
                    *sum += weights[t] / total * v;
                }
            }
            out.extend(sums.iter().map(|&s| P::widen(P::store(s))));
        }
    }
    out
}
