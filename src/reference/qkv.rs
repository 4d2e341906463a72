//! Normalise, project to q, k and v, rotate q and k.

use super::Precision;
use super::linear::linear_rows;
use super::norm::rms_norm_rows;

/// Inputs of [`qkv`].
#[derive(Clone, Copy, Debug)]
pub struct Qkv<'a> {
    /// Residual stream, `[rows, hidden_size]`.
    pub x: &'a [f32],
    /// `[hidden_size]`
    pub norm_weight: &'a [f32],
    /// q rows, k rows, v rows: `[(heads + 2 kv heads) * head_dim, hidden_size]`.
    pub weight: &'a [f32],
    /// `[(heads + 2 kv heads) * head_dim]`
    pub bias: Option<&'a [f32]>,
    /// Cosines then sines of every position, `[positions, head_dim]`.
    pub rope: &'a [f32],
    /// Position (row of `rope`) of every row, `[rows]`.
    pub positions: &'a [u32],
    /// Columns of `x`.
    pub hidden_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Of the norm.
    pub eps: f32,
}

/// Results of [`qkv`], one row after the other.
#[derive(Clone, Debug, Default)]
pub struct Projected {
    /// `[rows, heads, head_dim]`
    pub q: Vec<f64>,
    /// `[rows, kv heads, head_dim]`
    pub k: Vec<f64>,
    /// `[rows, kv heads, head_dim]`
    pub v: Vec<f64>,
}

/// q, k and v of every row; q and k rotated to the row's position.
pub fn qkv<P: Precision>(i: &Qkv) -> Projected {
    let q_width = i.num_attention_heads * i.head_dim;
    let kv_width = i.num_key_value_heads * i.head_dim;
    let mut out = Projected::default();
    let normed = rms_norm_rows::<P>(i.x, i.norm_weight, i.eps);
    let projected = linear_rows::<P>(i.weight, i.bias, &normed, i.hidden_size);
    for (all, &position) in projected.chunks_exact(q_width + 2 * kv_width).zip(i.positions) {
        let angles = &i.rope[position as usize * i.head_dim..][..i.head_dim];
        let rotated = |heads: &[P::T]| {
            heads
                .chunks_exact(i.head_dim)
                .flat_map(|h| rotate::<P>(h, angles))
                .map(P::widen)
                .collect::<Vec<_>>()
        };
        out.q.extend(rotated(&all[..q_width]));
        out.k.extend(rotated(&all[q_width..][..kv_width]));
        out.v.extend(P::widen_all(&all[q_width + kv_width..]));
    }
    out
}

/// The "rotate halves" form: element j turns with element j + head_dim / 2.
fn rotate<P: Precision>(head: &[P::T], angles: &[f32]) -> Vec<P::T> {
    let half = head.len() / 2;
    (0..head.len())
        .map(|j| {
            let (cosine, sine) = (P::load(angles[j % half]), P::load(angles[half + j % half]));
            let turned = if j < half { -head[j + half] } else { head[j - half] };
            P::store(head[j] * cosine + turned * sine)
        })
        .collect()
}
