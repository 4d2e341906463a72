//! Test and bench cases of `flow_chain`: random heads, every branch count and option, against the reference.

use super::{Args, OP, exchange_bytes, node};
use crate::device::Span;
use crate::error::Result;
use crate::ops::harness::{Case, Check, Rig, Scale, Tensor, compare, within};
use crate::ops::params::{GenerationState, GridBarrier, SolverStep};
use crate::ops::shared;
use crate::ops::{DType, Launch};
use crate::reference::flow_chain::{Inputs, Step, sample_token};
use crate::reference::flow_head::{Block, Layer, Trunk};
use crate::reference::{Exact, PlainBf16, PlainF32};

/// Which step takes a draw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Noise {
    /// None: an ODE.
    None,
    /// All but the last, and the last has none stored: as `aug` does.
    ButLast,
    /// All of them.
    All,
}

/// One test shape.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub steps: usize,
    pub images: usize,
    pub branches: usize,
    pub width: usize,
    pub mlp_width: usize,
    pub blocks: usize,
    pub token_dim: usize,
    pub hidden: usize,
    pub noise: Noise,
    pub use_norm: bool,
    pub rescale: bool,
    pub forced: bool,
    /// Draws of every token are stored, not only of this one.
    pub recorded: bool,
    /// Added to all of input_proj's bias: the layer norms must not lose the variance beside it.
    pub offset: f32,
}

/// Tokens of the picture, and the one that is made.
const TOKENS: usize = 3;
const TOKEN: usize = 1;
/// cfg and cfg_img of every token; only the made one's may be used.
const GUIDANCE: [[f32; 2]; TOKENS] = [[f32::NAN; 2], [2.5, 1.5], [f32::NAN; 2]];

pub(super) const BASE: Shape = Shape {
    steps: 2,
    images: 1,
    branches: 2,
    width: 96,
    mlp_width: 96,
    blocks: 2,
    token_dim: 64,
    hidden: 64,
    noise: Noise::ButLast,
    use_norm: true,
    rescale: false,
    forced: false,
    recorded: false,
    offset: 0.0,
};

pub(super) fn cases() -> Vec<Case> {
    let small = [
        Shape { steps: 1, branches: 1, blocks: 1, token_dim: 16, noise: Noise::None, ..BASE },
        BASE,
        Shape { branches: 3, noise: Noise::All, recorded: true, ..BASE },
        Shape { images: 2, width: 72, mlp_width: 144, blocks: 1, rescale: true, use_norm: false, ..BASE },
        Shape {
            images: 2,
            branches: 3,
            width: 80,
            mlp_width: 80,
            blocks: 1,
            rescale: true,
            noise: Noise::All,
            ..BASE
        },
        // Nothing is a multiple of the vector width.
        Shape {
            steps: 1,
            images: 3,
            width: 75,
            mlp_width: 115,
            blocks: 1,
            token_dim: 13,
            hidden: 37,
            ..BASE
        },
        Shape { steps: 3, forced: true, noise: Noise::All, blocks: 1, ..BASE },
        Shape { steps: 1, blocks: 1, offset: 1000.0, ..BASE },
        // A second pass for the sequences beyond eight stages over rows that the first has just read.
        Shape { steps: 1, images: 5, width: 40, mlp_width: 56, blocks: 1, token_dim: 16, ..BASE },
    ];
    let medium = [
        Shape { steps: 5, width: 128, mlp_width: 512, blocks: 4, ..BASE },
        Shape {
            steps: 5,
            images: 5,
            branches: 1,
            width: 192,
            mlp_width: 384,
            blocks: 3,
            noise: Noise::None,
            ..BASE
        },
        // Two passes of eight sequences and three, then of eight and seven.
        Shape { images: 5, branches: 2, width: 128, mlp_width: 96, recorded: true, ..BASE },
        Shape { images: 5, branches: 3, rescale: true, hidden: 256, ..BASE },
        Shape { images: 7, branches: 1, width: 80, mlp_width: 80, hidden: 75, noise: Noise::All, ..BASE },
        // Rows longer than the shared memory for them: chunks, also in the norm.
        Shape { steps: 1, images: 4, width: 4136, mlp_width: 40, blocks: 1, ..BASE },
        Shape { steps: 1, images: 3, branches: 1, width: 40, mlp_width: 10_251, blocks: 1, ..BASE },
    ];
    // The large head's width with two of its 24 blocks: the rest would be more of the same.
    let wide = Shape { steps: 1, width: 2048, mlp_width: 2048, blocks: 2, hidden: 5120, ..BASE };
    let real = [
        Shape { width: 1536, mlp_width: 1536, blocks: 12, hidden: 5120, ..BASE },
        Shape { width: 1024, mlp_width: 1024, blocks: 6, hidden: 5120, ..BASE },
        Shape { branches: 3, ..wide },
        Shape { mlp_width: 4 * 2048, ..wide },
    ];
    let mut cases = Vec::new();
    for &dtype in DType::ALL {
        cases.extend(small.map(|s| make_case(s, "plain", dtype, Scale::Small)));
        cases.extend(medium.map(|s| make_case(s, "plain", dtype, Scale::Medium)));
    }
    cases.extend(real.map(|s| make_case(s, "plain", DType::Bf16, Scale::Real)));
    for variant in ["ring", "resident"] {
        let bf16 = DType::Bf16;
        cases.extend(ring_small().map(|s| make_case(s, variant, bf16, Scale::Small)));
        cases.extend(ring_medium().map(|s| make_case(s, variant, bf16, Scale::Medium)));
        cases.extend(ring_real().map(|s| make_case(s, variant, bf16, Scale::Real)));
    }
    cases
}

/// Widths of whole 32: tiles and segments with tails, every number of sequences and branches, more than one pass.
fn ring_small() -> [Shape; 9] {
    [
        Shape { steps: 1, branches: 1, blocks: 1, token_dim: 16, noise: Noise::None, ..BASE },
        Shape { steps: 4, width: 64, mlp_width: 96, blocks: 1, ..BASE },
        Shape { branches: 3, blocks: 1, width: 32, noise: Noise::All, recorded: true, ..BASE },
        Shape { images: 2, width: 96, mlp_width: 160, blocks: 1, rescale: true, use_norm: false, ..BASE },
        // Six sequences and three, with outputs and a token that nothing divides.
        Shape {
            images: 3,
            branches: 3,
            width: 64,
            mlp_width: 32,
            blocks: 1,
            token_dim: 13,
            hidden: 37,
            rescale: true,
            noise: Noise::All,
            ..BASE
        },
        Shape { steps: 3, width: 32, mlp_width: 64, forced: true, noise: Noise::All, blocks: 1, ..BASE },
        Shape { steps: 1, blocks: 1, width: 64, mlp_width: 64, offset: 1000.0, ..BASE },
        // More segments than there are stages, and in an evaluation than may stay: the ring goes round, and is full
        // before the producer has to wait for a norm to be done with its vectors.
        Shape { steps: 2, width: 32, mlp_width: 1024, blocks: 3, token_dim: 16, ..BASE },
        // Eight sequences and one.
        Shape {
            steps: 1,
            images: 9,
            branches: 1,
            width: 32,
            mlp_width: 64,
            blocks: 1,
            token_dim: 16,
            ..BASE
        },
    ]
}

fn ring_medium() -> [Shape; 5] {
    [
        // Rings of four stages go round a hundred times.
        Shape { steps: 5, width: 192, mlp_width: 544, blocks: 4, ..BASE },
        Shape { steps: 3, images: 5, branches: 1, width: 576, mlp_width: 192, blocks: 3, ..BASE },
        Shape { images: 4, branches: 2, width: 320, mlp_width: 96, recorded: true, ..BASE },
        Shape { images: 2, branches: 3, width: 96, mlp_width: 1056, rescale: true, hidden: 256, ..BASE },
        Shape { images: 7, branches: 1, width: 96, mlp_width: 96, hidden: 75, noise: Noise::All, ..BASE },
    ]
}

/// The base head whole; two of the blocks of the others, the rest would be more of the same.
fn ring_real() -> [Shape; 4] {
    let base = Shape { width: 1536, mlp_width: 1536, hidden: 5120, ..BASE };
    let wide = Shape { steps: 1, width: 2048, mlp_width: 2048, blocks: 2, hidden: 5120, ..BASE };
    [
        Shape { steps: 4, blocks: 12, ..base },
        Shape { width: 1024, mlp_width: 1024, blocks: 2, branches: 3, ..base },
        Shape { branches: 3, ..wide },
        Shape { images: 4, mlp_width: 4 * 2048, blocks: 1, ..wide },
    ]
}

fn make_case(s: Shape, variant: &'static str, dtype: DType, scale: Scale) -> Case {
    let per_evaluation = 2 * s.blocks * s.width * s.mlp_width + 2 * s.width * s.token_dim;
    let bytes = (s.steps * per_evaluation + s.hidden * s.token_dim) * dtype.bytes();
    let flops = 2 * s.images * (s.steps * s.branches * per_evaluation + s.hidden * s.token_dim);
    let flag = u8::from;
    let label = format!(
        "steps={},images={},branches={},width={},mlp_width={},blocks={},token_dim={},hidden={},noise={:?},norm={},\
         rescale={},forced={},recorded={},offset={}",
        s.steps,
        s.images,
        s.branches,
        s.width,
        s.mlp_width,
        s.blocks,
        s.token_dim,
        s.hidden,
        s.noise,
        flag(s.use_norm),
        flag(s.rescale),
        flag(s.forced),
        flag(s.recorded),
        s.offset
    );
    let run = move |rig: &mut Rig, launch: &Launch| {
        let head = RandomHead::new(rig, launch.dtype, s)?;
        head.check(rig, launch)
    };
    shared::case(&OP, variant, dtype, scale, (bytes as u64, flops as u64), label, run)
}

/// A random head and the inputs of one token, on the device.
pub(super) struct RandomHead {
    shape: Shape,
    dtype: DType,
    weights: [Tensor; 12],
    modulation: Tensor,
    draws: Tensor,
    forced_x: Option<Tensor>,
    steps: Vec<SolverStep>,
    steps_table: Span,
    guidance: Span,
}

/// Where a launch wrote.
pub(super) struct Written {
    pub state: Span,
    pub trace_v_raw: Span,
    pub trace_v: Span,
    pub trace_x: Span,
    pub sampled: Span,
    pub tokens: Span,
    pub x_next: Span,
}

impl RandomHead {
    pub fn new(rig: &mut Rig, dtype: DType, s: Shape) -> Result<RandomHead> {
        let (f, h, k, l) = (s.width, s.mlp_width, s.token_dim, s.blocks);
        let fan = |inner: usize| 1.0 / (inner as f32).sqrt();
        let gains: Vec<f32> = rig.normal(l * f, 0.2).iter().map(|v| 1.0 + v).collect();
        let b_in: Vec<f32> = rig.normal(f, 0.5).iter().map(|v| s.offset + v).collect();
        let weights = [
            rig.random("w_in", dtype, f * k, fan(k))?,
            rig.input("b_in", dtype, b_in)?,
            rig.input("ln_w", dtype, gains)?,
            rig.random("ln_b", dtype, l * f, 0.2)?,
            rig.random("w0", dtype, l * h * f, fan(f))?,
            rig.random("b0", dtype, l * h, 0.2)?,
            rig.random("w2", dtype, l * f * h, fan(h))?,
            rig.random("b2", dtype, l * f, 0.2)?,
            rig.random("w_out", dtype, k * f, fan(f))?,
            rig.random("b_out", dtype, k, 0.2)?,
            rig.random("w_next", dtype, s.hidden * k, fan(k))?,
            rig.random("b_next", dtype, s.hidden, 0.2)?,
        ];
        let sequences = s.images * s.branches;
        let modulation = rig.random("modulation", dtype, s.steps * sequences * (3 * l + 2) * f, 0.4)?;
        let draws_per_slot = s.draws_per_slot();
        let slots = if s.recorded { TOKENS } else { 1 };
        let draws = rig.random("draws", DType::F32, slots * draws_per_slot * s.images * k, 1.0)?;
        let forced_x = if s.forced {
            Some(rig.random("forced_x", DType::F32, s.steps * s.images * k, 1.0)?)
        } else {
            None
        };
        let steps: Vec<SolverStep> = (0..s.steps)
            .map(|n| {
                let last = n + 1 == s.steps;
                let noisy = s.noise == Noise::All || (s.noise == Noise::ButLast && !last);
                let noise = if noisy { 0.4 - 0.1 * n as f32 } else { 0.0 };
                SolverStep { keep: 0.9 + 0.02 * n as f32, velocity: 0.3 + 0.05 * n as f32, noise, pad: 0 }
            })
            .collect();
        let steps_table = rig.bytes("steps_table", bytemuck::cast_slice(&steps))?;
        let guidance = rig.bytes("guidance", bytemuck::cast_slice(&GUIDANCE))?;
        Ok(RandomHead { shape: s, dtype, weights, modulation, draws, forced_x, steps, steps_table, guidance })
    }

    /// Runs the token into fresh outputs.
    pub fn run(&self, rig: &mut Rig, launch: &Launch) -> Result<Written> {
        let (args, written) = self.args(rig, 0)?;
        rig.run(&node(launch, "test.flow_chain", &args)?)?;
        Ok(written)
    }

    /// The arguments of a launch into fresh outputs, after `made` exchanges.
    pub fn args(&self, rig: &mut Rig, made: u64) -> Result<(Args, Written)> {
        let s = self.shape;
        let sequences = s.images * s.branches;
        let per_step = s.steps * s.images * s.token_dim;
        let state = GenerationState { token: TOKEN as u32, ..Default::default() };
        let written = Written {
            state: rig.bytes("state", bytemuck::bytes_of(&state))?,
            trace_v_raw: rig.output("trace_v_raw", DType::F32, s.branches * per_step)?,
            trace_v: rig.output("trace_v", DType::F32, per_step)?,
            trace_x: rig.output("trace_x", DType::F32, per_step)?,
            sampled: rig.output("sampled", DType::F32, s.images * s.token_dim)?,
            tokens: rig.output("tokens", self.dtype, s.images * TOKENS * s.token_dim)?,
            x_next: rig.output("x_next", DType::F32, sequences * s.hidden)?,
        };
        let [w_in, b_in, ln_w, ln_b, w0, b0, w2, b2, w_out, b_out, w_next, b_next] =
            self.weights.each_ref().map(|t| t.span);
        let args = Args {
            modulation: self.modulation.span,
            w_in,
            b_in,
            ln_w,
            ln_b,
            w0,
            b0,
            w2,
            b2,
            w_out,
            b_out,
            steps_table: self.steps_table,
            guidance: self.guidance,
            draws: self.draws.span,
            forced_x: self.forced_x.as_ref().map(|t| t.span),
            state: written.state,
            // As an odd number of earlier barriers leaves it: the next one wraps.
            barrier: rig.bytes(
                "barrier",
                bytemuck::bytes_of(&GridBarrier { count: 1 << 31, ..Default::default() }),
            )?,
            exchange: {
                let mut bytes =
                    vec![0; exchange_bytes((s.width, s.mlp_width, s.token_dim), s.images, s.branches)];
                bytes[..8].copy_from_slice(&made.to_le_bytes());
                rig.bytes("exchange", &bytes)?
            },
            h: rig.output("h", DType::F32, sequences * s.width)?,
            a: rig.output("a", DType::F32, sequences * s.mlp_width)?,
            v_raw: rig.output("v_raw", DType::F32, sequences * s.token_dim)?,
            trace_v_raw: Some(written.trace_v_raw),
            trace_v: Some(written.trace_v),
            trace_x: Some(written.trace_x),
            sampled: Some(written.sampled),
            tokens: written.tokens,
            w_next,
            b_next,
            x_next: written.x_next,
            steps: s.steps,
            images: s.images,
            branches: s.branches,
            width: s.width,
            mlp_width: s.mlp_width,
            blocks: s.blocks,
            token_dim: s.token_dim,
            hidden: s.hidden,
            tokens_total: TOKENS,
            draws_per_slot: s.draws_per_slot(),
            draw_slots: if s.recorded { TOKENS } else { 1 },
            use_norm: s.use_norm,
            rescale: s.rescale,
        };
        Ok((args, written))
    }
}

impl RandomHead {
    fn inputs(&self) -> Inputs<'_> {
        let s = self.shape;
        let (f, h) = (s.width, s.mlp_width);
        let [w_in, b_in, ln_w, ln_b, w0, b0, w2, b2, w_out, b_out, w_next, b_next] =
            self.weights.each_ref().map(|t| t.values.as_slice());
        let blocks = (0..s.blocks).map(|m| {
            let at = |len: usize| m * len..(m + 1) * len;
            Block {
                norm: Layer { weight: &ln_w[at(f)], bias: &ln_b[at(f)] },
                mlp0: Layer { weight: &w0[at(h * f)], bias: &b0[at(h)] },
                mlp2: Layer { weight: &w2[at(f * h)], bias: &b2[at(f)] },
            }
        });
        let slot = self.draws.values.len() / if s.recorded { TOKENS } else { 1 };
        let draws =
            if s.recorded { &self.draws.values[TOKEN * slot..][..slot] } else { &self.draws.values[..] };
        Inputs {
            trunk: Trunk {
                input: Layer { weight: w_in, bias: b_in },
                blocks: blocks.collect(),
                output: Layer { weight: w_out, bias: b_out },
            },
            next: Layer { weight: w_next, bias: b_next },
            modulation: &self.modulation.values,
            steps: Vec::new(),
            guidance: GUIDANCE[TOKEN],
            draws,
            forced_x: self.forced_x.as_ref().map(|t| t.values.as_slice()),
            images: s.images,
            branches: s.branches,
            token_dim: s.token_dim,
            use_norm: s.use_norm,
            rescale: s.rescale,
        }
    }

    /// Runs the token and compares everything that the op writes with the reference.
    fn check(&self, rig: &mut Rig, launch: &Launch) -> Result<Vec<Check>> {
        let s = self.shape;
        let written = self.run(rig, launch)?;
        let mut inputs = self.inputs();
        let step = |t: &SolverStep| Step { keep: t.keep, velocity: t.velocity, noise: t.noise };
        inputs.steps = self.steps.iter().map(step).collect();
        let exact = sample_token::<Exact>(&inputs);
        let plain = match self.dtype {
            DType::F32 => sample_token::<PlainF32>(&inputs),
            DType::Bf16 => sample_token::<PlainBf16>(&inputs),
        };
        // Rows of the other tokens stay as they were: NaN.
        let scatter = |token: &[f64]| -> Vec<f64> {
            let mut all = vec![f64::NAN; s.images * TOKENS * s.token_dim];
            for (image, row) in token.chunks_exact(s.token_dim).enumerate() {
                all[(image * TOKENS + TOKEN) * s.token_dim..][..s.token_dim].copy_from_slice(row);
            }
            all
        };
        let f32s = DType::F32;
        let tokens = rig.read(written.tokens, self.dtype)?;
        let state: Vec<f32> =
            rig.read_bytes(written.state)?.chunks_exact(4).map(|c| f32::from(c[0])).collect();
        let mut expected_state = vec![0.0; state.len()];
        expected_state[0] = TOKEN as f64;
        Ok(vec![
            compare("v_raw", self.dtype, &rig.read(written.trace_v_raw, f32s)?, &exact.v_raw, &plain.v_raw),
            compare("v", self.dtype, &rig.read(written.trace_v, f32s)?, &exact.v, &plain.v),
            compare("x", self.dtype, &rig.read(written.trace_x, f32s)?, &exact.x, &plain.x),
            compare("sampled", self.dtype, &rig.read(written.sampled, f32s)?, &exact.sampled, &plain.sampled),
            compare("tokens", self.dtype, &tokens, &scatter(&exact.token), &scatter(&plain.token)),
            compare("x_next", self.dtype, &rig.read(written.x_next, f32s)?, &exact.x_next, &plain.x_next),
            within("state", &state, &expected_state, 0.0),
        ])
    }
}

impl Shape {
    fn draws_per_slot(&self) -> usize {
        match self.noise {
            Noise::None => 1,
            Noise::ButLast => self.steps,
            Noise::All => self.steps + 1,
        }
    }
}
