//! The flow-matching head of the official code: v(x, t, c), one row at a time, with every intermediate stored where
//! that code stores it.

use super::Precision;
use super::flow_modulation::modulation;
use super::linear::{linear_row, silu};

/// Added to the variance by every LayerNorm of the head and of `use_norm`.
pub const LAYER_NORM_EPS: f64 = 1e-6;
/// Width of the sinusoid of a time.
const SINUSOID_WIDTH: usize = 256;

/// A Linear layer.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// `[outputs, inner]`
    pub weight: &'a [f32],
    /// `[outputs]`
    pub bias: &'a [f32],
}

impl Layer<'_> {
    /// `weight x + bias`, stored.
    pub fn apply<P: Precision>(&self, x: &[P::T]) -> Vec<P::T> {
        linear_row::<P>(self.weight, Some(self.bias), x)
    }
}

/// One residual block, without its modulation.
#[derive(Clone, Copy, Debug)]
pub struct Block<'a> {
    /// `in_ln`: gain and offset, `[width]` each.
    pub norm: Layer<'a>,
    /// `mlp.0`: width to MLP width.
    pub mlp0: Layer<'a>,
    /// `mlp.2`: MLP width to width.
    pub mlp2: Layer<'a>,
}

/// What depends on x: input projection, blocks, final layer.
#[derive(Clone, Debug)]
pub struct Trunk<'a> {
    /// `input_proj`: token to width.
    pub input: Layer<'a>,
    /// `res_blocks`.
    pub blocks: Vec<Block<'a>>,
    /// `final_layer.linear`: width to token.
    pub output: Layer<'a>,
}

/// The whole head.
#[derive(Clone, Debug)]
pub struct FlowHead<'a> {
    /// `time_embed.mlp.0`
    pub time0: Layer<'a>,
    /// `time_embed.mlp.2`
    pub time2: Layer<'a>,
    /// `cond_embed`
    pub cond: Layer<'a>,
    /// All `adaLN_modulation.1`: every block's shift, scale, gate, then the final shift and scale.
    pub modulation: Layer<'a>,
    /// The rest.
    pub trunk: Trunk<'a>,
}

/// `[cos(t f_i)], [sin(t f_i)]` with `f_i = exp(-ln(10000) i / 128)`, stored.
pub fn sinusoid<P: Precision>(t: f32) -> Vec<P::T> {
    let half = SINUSOID_WIDTH / 2;
    let angle = |i: usize| P::load(t) * P::constant((-(10_000f64.ln()) * i as f64 / half as f64).exp());
    use num_traits::Float;
    let cosines = (0..half).map(|i| P::store(angle(i).cos()));
    cosines.chain((0..half).map(|i| P::store(angle(i).sin()))).collect()
}

/// `(x - mean) / sqrt(variance + eps)`, not stored; the variance is the biased one.
pub fn standardize<P: Precision>(x: &[P::T]) -> Vec<P::T> {
    use num_traits::Float;
    let count = P::constant(x.len() as f64);
    let mean = x.iter().copied().sum::<P::T>() / count;
    let variance = x.iter().map(|&v| (v - mean) * (v - mean)).sum::<P::T>() / count;
    let deviation = (variance + P::constant(LAYER_NORM_EPS)).sqrt();
    x.iter().map(|&v| (v - mean) / deviation).collect()
}

/// `normed * (1 + scale) + shift`, stored after each operation.
fn modulate<P: Precision>(normed: &[P::T], shift: &[P::T], scale: &[P::T]) -> Vec<P::T> {
    let one = P::constant(1.0);
    let scaled = normed.iter().zip(scale).map(|(&n, &s)| P::store(n * P::store(one + s)));
    scaled.zip(shift).map(|(n, &s)| P::store(n + s)).collect()
}

impl Trunk<'_> {
    /// The velocity of state `x` under the modulations of its time and condition.
    pub fn velocity<P: Precision>(&self, x: &[P::T], modulation: &[P::T]) -> Vec<P::T> {
        let x: Vec<P::T> = x.iter().map(|&v| P::store(v)).collect();
        let mut h = self.input.apply::<P>(&x);
        let width = h.len();
        let mut thirds = modulation.chunks_exact(width);
        let mut next = || thirds.next().unwrap_or(&[]);
        for block in &self.blocks {
            let (shift, scale, gate) = (next(), next(), next());
            let affine = block.norm.weight.iter().zip(block.norm.bias);
            let normed: Vec<P::T> = standardize::<P>(&h)
                .iter()
                .zip(affine)
                .map(|(&n, (&gain, &offset))| P::store(n * P::load(gain) + P::load(offset)))
                .collect();
            let u = modulate::<P>(&normed, shift, scale);
            let hidden = block.mlp0.apply::<P>(&u);
            let hidden: Vec<P::T> = hidden.iter().map(|&v| P::store(silu::<P>(v))).collect();
            let update = block.mlp2.apply::<P>(&hidden);
            for ((h, update), &gate) in h.iter_mut().zip(update).zip(gate) {
                *h = P::store(*h + P::store(gate * update));
            }
        }
        let (shift, scale) = (next(), next());
        let normed: Vec<P::T> = standardize::<P>(&h).iter().map(|&n| P::store(n)).collect();
        self.output.apply::<P>(&modulate::<P>(&normed, shift, scale))
    }
}

impl FlowHead<'_> {
    /// `time_embed(t)`. `t` is what the network is given: rounded to bf16 in a bf16 model.
    pub fn time_embedding<P: Precision>(&self, t: f32) -> Vec<P::T> {
        let hidden = self.time0.apply::<P>(&sinusoid::<P>(t));
        let hidden: Vec<P::T> = hidden.iter().map(|&v| P::store(silu::<P>(v))).collect();
        self.time2.apply::<P>(&hidden)
    }

    /// One evaluation: v(x, t, c).
    pub fn velocity<P: Precision>(&self, x: &[P::T], t: f32, c: &[P::T]) -> Vec<P::T> {
        let time = self.time_embedding::<P>(t);
        let cond = self.cond.apply::<P>(c);
        let modulation = modulation::<P>(self.modulation.weight, self.modulation.bias, &time, &cond);
        self.trunk.velocity::<P>(x, &modulation)
    }
}
