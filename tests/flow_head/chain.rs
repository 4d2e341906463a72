//! The flow head's ops on the emulated device: uploads a head, runs one token, reads everything back.

use crate::golden::Golden;
use std::sync::Arc;
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions};
use warpstep::device::{Node, Span};
use warpstep::ops::harness::{Rig, Tensor, encode};
use warpstep::ops::params::{GenerationState, GridBarrier, SolverStep};
use warpstep::ops::{DType, Launch, Selection, flow_chain, flow_modulation, linear};
use warpstep::reference::flow_head::{Block, FlowHead, Layer, Trunk};

/// Width of the sinusoid of a time.
const SINUSOID: usize = 256;
const TOKEN_DIM: usize = 64;

/// Weight and bias.
type Pair = (Vec<f32>, Vec<f32>);

/// The weights of a flow head, rounded to the element type; those of all blocks one after the other.
pub struct Head {
    pub width: usize,
    pub mlp_width: usize,
    pub blocks: usize,
    pub hidden: usize,
    time0: Pair,
    time2: Pair,
    cond: Pair,
    modulation: Pair,
    input: Pair,
    norm: Pair,
    mlp0: Pair,
    mlp2: Pair,
    output: Pair,
    next: Pair,
}

impl Head {
    pub fn load(file: &Golden, dtype: DType) -> Head {
        let get = |name: String| encode(dtype, file.get(&name)).1;
        let pair = |name: &str| (get(format!("{name}.weight")), get(format!("{name}.bias")));
        let net = |name: &str| pair(&format!("image_head.net.{name}"));
        let exists = |m: usize| file.find(&format!("image_head.net.res_blocks.{m}.in_ln.bias")).is_some();
        let blocks = (0..).take_while(|&m| exists(m)).count();
        let stacked = |part: &str, last: Option<&str>| {
            let mut all: Pair = Default::default();
            let of_blocks = (0..blocks).map(|m| format!("res_blocks.{m}.{part}"));
            for name in of_blocks.chain(last.map(str::to_string)) {
                let (weight, bias) = net(&name);
                all.0.extend(weight);
                all.1.extend(bias);
            }
            all
        };
        let cond = net("cond_embed");
        let width = cond.1.len();
        let mlp0 = stacked("mlp.0", None);
        Head {
            width,
            mlp_width: mlp0.1.len() / blocks,
            blocks,
            hidden: cond.0.len() / width,
            time0: net("time_embed.mlp.0"),
            time2: net("time_embed.mlp.2"),
            cond,
            modulation: stacked("adaLN_modulation.1", Some("final_layer.adaLN_modulation.1")),
            input: net("input_proj"),
            norm: stacked("in_ln", None),
            mlp0,
            mlp2: stacked("mlp.2", None),
            output: net("final_layer.linear"),
            next: pair("image_in_projector"),
        }
    }

    /// One block that does nothing and an output layer that is the identity, as wide as a token.
    pub fn identity(width: usize) -> Head {
        let layer = |diagonal: f32| -> Pair {
            let value = |i: usize| if i / width == i % width { diagonal } else { 0.0 };
            ((0..width * width).map(value).collect(), vec![0.0; width])
        };
        Head {
            width,
            mlp_width: width,
            blocks: 1,
            hidden: width,
            time0: Default::default(),
            time2: Default::default(),
            cond: layer(0.0),
            modulation: Default::default(),
            input: layer(1.0),
            norm: (vec![1.0; width], vec![0.0; width]),
            mlp0: layer(0.0),
            mlp2: layer(0.0),
            output: layer(1.0),
            next: layer(1.0),
        }
    }

    pub fn reference(&self) -> FlowHead<'_> {
        fn layer(pair: &Pair) -> Layer<'_> {
            Layer { weight: &pair.0, bias: &pair.1 }
        }
        let block = |m: usize| {
            let part = |pair: &'_ Pair| (pair.0.len() / self.blocks, pair.1.len() / self.blocks);
            let at = |pair: &'_ Pair| {
                let (weight, bias) = part(pair);
                (m * weight..(m + 1) * weight, m * bias..(m + 1) * bias)
            };
            let [norm, mlp0, mlp2] = [&self.norm, &self.mlp0, &self.mlp2].map(|pair| {
                let (weight, bias) = at(pair);
                Layer { weight: &pair.0[weight], bias: &pair.1[bias] }
            });
            Block { norm, mlp0, mlp2 }
        };
        FlowHead {
            time0: layer(&self.time0),
            time2: layer(&self.time2),
            cond: layer(&self.cond),
            modulation: layer(&self.modulation),
            trunk: Trunk {
                input: layer(&self.input),
                blocks: (0..self.blocks).map(block).collect(),
                output: layer(&self.output),
            },
        }
    }
}

/// The inputs of one token. Defaults: one branch, one token, no guidance, no options.
#[derive(Clone)]
pub struct Token {
    pub modulation: Span,
    pub draws: Vec<f32>,
    pub steps: Vec<SolverStep>,
    pub images: usize,
    pub branches: usize,
    pub guidance: [f32; 2],
    pub forced_x: Option<Vec<f32>>,
    pub use_norm: bool,
    pub rescale: bool,
    /// Index of the token, and what `nonfinite` holds before it.
    pub token: u32,
    pub nonfinite: u32,
}

impl Token {
    pub fn new(modulation: Span, draws: Vec<f32>) -> Token {
        Token {
            modulation,
            draws,
            steps: Vec::new(),
            images: 1,
            branches: 1,
            guidance: [1.0; 2],
            forced_x: None,
            use_norm: false,
            rescale: false,
            token: 0,
            nonfinite: 0,
        }
    }
}

/// What a token's launch wrote.
pub struct Sampled {
    pub v_raw: Vec<f32>,
    pub v: Vec<f32>,
    pub x: Vec<f32>,
    pub sampled: Vec<f32>,
    pub x_next: Vec<f32>,
    pub h: Vec<f32>,
    pub nonfinite: u32,
}

/// A device and the head on it.
pub struct Chain<'a> {
    head: &'a Head,
    dtype: DType,
    sm_count: u32,
    rig: Rig,
    selection: Selection,
}

fn rig(sm_count: u32) -> Rig {
    let options = EmulatedOptions { sm_count, ..EmulatedOptions::default() };
    Rig::new(Arc::new(EmulatedDevice::new(options).unwrap()), 1).unwrap()
}

fn launch_node(rig: &mut Rig, node: &Node) {
    // SAFETY: over buffers of the rig, in the sizes that the ops ask for; the only index, the token's, is in range.
    unsafe { rig.launch(node) }.unwrap();
}

impl<'a> Chain<'a> {
    pub fn new(head: &'a Head, dtype: DType, sm_count: u32) -> Chain<'a> {
        Chain { head, dtype, sm_count, rig: rig(sm_count), selection: Selection::default() }
    }

    pub fn upload(&mut self, name: &str, values: Vec<f32>) -> Span {
        self.rig.input(name, self.dtype, values).unwrap().span
    }

    pub fn read(&mut self, span: Span) -> Vec<f32> {
        self.rig.read(span, self.dtype).unwrap()
    }

    fn upload_f32(&mut self, name: &str, values: Vec<f32>) -> Span {
        let Tensor { span, .. } = self.rig.input(name, DType::F32, values).unwrap();
        span
    }

    fn pair(&mut self, name: &str, pair: &Pair) -> (Span, Span) {
        (self.upload(name, pair.0.clone()), self.upload(name, pair.1.clone()))
    }

    /// A Linear layer of all rows of x.
    fn linear(&mut self, x: Span, inner: usize, layer: &Pair, silu: bool) -> Span {
        let (w, bias) = self.pair("layer", layer);
        let outputs = layer.1.len();
        let rows = x.bytes / (inner * self.dtype.bytes());
        let y = self.rig.output("y", self.dtype, rows * outputs).unwrap();
        let (w, bias) = (w.into(), Some(bias));
        let args = linear::Args { x, w, bias, y, rows, outputs, inner, silu, out_f32: false, scratch: None };
        let launch = Launch {
            selection: &self.selection,
            dtype: self.dtype,
            sm_count: self.sm_count,
            dependent: false,
        };
        launch_node(&mut self.rig, &linear::node(&launch, "linear", &args).unwrap());
        y
    }

    /// `time_embed` of all rows.
    pub fn time_embedding(&mut self, sinusoids: &[f32]) -> Span {
        let head = self.head;
        let x = self.upload("sinusoids", sinusoids.to_vec());
        let hidden = self.linear(x, SINUSOID, &head.time0, true);
        self.linear(hidden, head.width, &head.time2, false)
    }

    /// `cond_embed` of all rows.
    pub fn condition(&mut self, c: &[f32]) -> Span {
        let head = self.head;
        let x = self.upload("c", c.to_vec());
        self.linear(x, head.hidden, &head.cond, false)
    }

    /// `[steps, rows, outputs]`
    pub fn modulation(&mut self, time: Span, steps: usize, cond: Span, rows: usize) -> Span {
        let head = self.head;
        let (w, bias) = self.pair("modulation", &head.modulation);
        let outputs = head.modulation.1.len();
        let modulation = self.rig.output("modulation", self.dtype, steps * rows * outputs).unwrap();
        let args = flow_modulation::Args {
            time,
            cond,
            w,
            bias,
            modulation,
            steps,
            rows,
            width: head.width,
            outputs,
        };
        let launch = Launch {
            selection: &self.selection,
            dtype: self.dtype,
            sm_count: self.sm_count,
            dependent: false,
        };
        launch_node(&mut self.rig, &flow_modulation::node(&launch, "modulation", &args).unwrap());
        modulation
    }

    pub fn run(&mut self, token: Token) -> Sampled {
        let head = self.head;
        let (steps, images, branches) = (token.steps.len(), token.images, token.branches);
        let (sequences, values) = (images * branches, images * TOKEN_DIM);
        let tokens_total = token.token as usize + 1;
        let (w_in, b_in) = self.pair("input", &head.input);
        let (ln_w, ln_b) = self.pair("norm", &head.norm);
        let (w0, b0) = self.pair("mlp0", &head.mlp0);
        let (w2, b2) = self.pair("mlp2", &head.mlp2);
        let (w_out, b_out) = self.pair("output", &head.output);
        let (w_next, b_next) = self.pair("next", &head.next);
        let draws_per_slot = token.draws.len() / values;
        let state = GenerationState { token: token.token, nonfinite: token.nonfinite, ..Default::default() };
        let exchange_bytes =
            flow_chain::exchange_bytes((head.width, head.mlp_width, TOKEN_DIM), images, branches);
        let exchange = vec![0; exchange_bytes];
        let draws = self.upload_f32("draws", token.draws);
        let forced_x = token.forced_x.map(|x| self.upload_f32("forced_x", x));
        let rig = &mut self.rig;
        let state = rig.bytes("state", bytemuck::bytes_of(&state)).unwrap();
        let mut output = |name: &str, len: usize| rig.output(name, DType::F32, len).unwrap();
        let [h, a, v_raw] =
            [head.width, head.mlp_width, TOKEN_DIM].map(|len| output("scratch", sequences * len));
        let trace_v_raw = output("trace_v_raw", steps * sequences * TOKEN_DIM);
        let [trace_v, trace_x] = ["trace_v", "trace_x"].map(|name| output(name, steps * values));
        let sampled = output("sampled", values);
        let x_next = output("x_next", sequences * head.hidden);
        let args = flow_chain::Args {
            modulation: token.modulation,
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
            steps_table: rig.bytes("steps", bytemuck::cast_slice(&token.steps)).unwrap(),
            guidance: rig
                .bytes("guidance", bytemuck::cast_slice(&vec![token.guidance; tokens_total]))
                .unwrap(),
            draws,
            forced_x,
            state,
            barrier: rig.bytes("barrier", bytemuck::bytes_of(&GridBarrier::default())).unwrap(),
            exchange: rig.bytes("exchange", &exchange).unwrap(),
            h,
            a,
            v_raw,
            trace_v_raw: Some(trace_v_raw),
            trace_v: Some(trace_v),
            trace_x: Some(trace_x),
            sampled: Some(sampled),
            tokens: rig.output("tokens", self.dtype, tokens_total * values).unwrap(),
            w_next,
            b_next,
            x_next,
            steps,
            images,
            branches,
            width: head.width,
            mlp_width: head.mlp_width,
            blocks: head.blocks,
            token_dim: TOKEN_DIM,
            hidden: head.hidden,
            tokens_total,
            draws_per_slot,
            draw_slots: 1,
            use_norm: token.use_norm,
            rescale: token.rescale,
        };
        let launch = Launch {
            selection: &self.selection,
            dtype: self.dtype,
            sm_count: self.sm_count,
            dependent: false,
        };
        launch_node(rig, &flow_chain::node(&launch, "chain", &args).unwrap());
        let mut read = |span| rig.read(span, DType::F32).unwrap();
        Sampled {
            v_raw: read(trace_v_raw),
            v: read(trace_v),
            x: read(trace_x),
            sampled: read(sampled),
            x_next: read(x_next),
            h: read(h),
            nonfinite: u32::from_le_bytes(rig.read_bytes(state).unwrap()[4..8].try_into().unwrap()),
        }
    }
}

/// The draws of one token, `[draws, images, token_dim]`.
pub fn randn(
    seed: u64,
    base_offset: u64,
    token: u32,
    draws_per_token: usize,
    (first_image, images): (u32, usize),
    token_dim: usize,
    round_bf16: bool,
) -> Vec<f32> {
    use warpstep::ops::randn;
    let mut rig = rig(4);
    let state = GenerationState { token, ..Default::default() };
    let state = rig.bytes("state", bytemuck::bytes_of(&state)).unwrap();
    let draws = rig.output("draws", DType::F32, draws_per_token * images * token_dim).unwrap();
    let args = randn::Args {
        state,
        draws,
        seed,
        base_offset,
        draws_per_token,
        images,
        first_image,
        token_dim,
        round_bf16,
    };
    let selection = Selection::default();
    let launch = Launch { selection: &selection, dtype: DType::F32, sm_count: 4, dependent: false };
    launch_node(&mut rig, &randn::node(&launch, "randn", &args).unwrap());
    rig.read(draws, DType::F32).unwrap()
}
