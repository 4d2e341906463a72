//! `gate_up`: RMSNorm, gate and up projections, SiLU and product, in one launch.

use super::harness::{Case, Check, Rig, Scale, compare, encode};
use super::params::GateUpParams;
use super::product::{self, Layout, Product, ProductScratch};
use super::shared;
use super::{DType, Launch, Op, Variant};
use crate::device::{Node, Span};
use crate::error::Result;
use crate::kernels;
use crate::reference::gate_up::{GateUp, gate_up};
use crate::reference::{Exact, PlainBf16, PlainF32};
use crate::weights::pack::{Pairing, Tiles};

/// The registry row.
pub static OP: Op = Op {
    name: "gate_up",
    summary: "act = silu(w_gate rms(x)) * (w_up rms(x))",
    bound: "few rows: bytes of both weights (283.1 MB per layer at 14B in bf16); many rows: FP32 FMA",
    variants: &[
        Variant {
            name: "plain",
            kernels: kernels!("gate_up", f32: "gate_up_plain_f32", bf16: "gate_up_plain_bf16"),
            summary: "warp per gate and up row, weights read once per 8 rows; any shape",
        },
        Variant {
            name: "tile",
            kernels: kernels!("gate_up", f32: "gate_up_tile_f32", bf16: "gate_up_tile_bf16"),
            summary: "64 x 64 tiles in shared memory, for prompts; any shape",
        },
        product::stream(kernels!("gate_up", bf16: "gate_up_stream_bf16")),
        product::ring(kernels!("gate_up", bf16: "gate_up_ring_bf16")),
        product::mma(kernels!("gate_up", bf16: "gate_up_mma_bf16")),
    ],
    cases,
};

/// Both weights.
#[derive(Clone, Copy, Debug)]
pub enum Weights {
    /// As stored, `[intermediate_size, hidden_size]` each.
    Rows {
        /// `gate_proj`
        gate: Span,
        /// `up_proj`
        up: Span,
    },
    /// One matrix `[2 intermediate_size, hidden_size]`, gate over up, packed with `Pairing::Stacked`.
    Tiles(Span),
}

/// Tensors and dimensions; shapes in `kernels/params.h` (`GateUpParams`).
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// Residual stream, `[rows, hidden_size]` f32.
    pub x: Span,
    /// `[hidden_size]`
    pub norm_w: Span,
    /// `[rows, hidden_size]`: the rows normed by [`norm_rows`](super::norm_rows), for `mma` alone, which reads neither
    /// `x` nor `norm_w`.
    pub normed: Option<Span>,
    /// Gate and up.
    pub w: Weights,
    /// `[intermediate_size]`
    pub gate_bias: Option<Span>,
    /// `[intermediate_size]`
    pub up_bias: Option<Span>,
    /// `[rows, intermediate_size]`, written.
    pub act: Span,
    /// Rows.
    pub rows: usize,
    /// `hidden_size`.
    pub hidden: usize,
    /// `intermediate_size`.
    pub intermediate: usize,
    /// `rms_norm_eps`.
    pub eps: f32,
    /// Scratch of the variants that share tiles between blocks.
    pub scratch: Option<ProductScratch>,
}

/// The node that computes `args`.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let a = args;
    let layout = match a.w {
        Weights::Rows { .. } => Layout::Rows,
        Weights::Tiles(_) => Layout::Tiles,
    };
    let shape = product::Shape { rows: a.rows, inner: a.hidden, units: a.intermediate };
    let product = Product::new(&OP, launch, layout, shape, a.scratch)?;
    let checks = product.checks;
    let e = launch.dtype.bytes();
    let (rows, [x, norm_w]) = product.normed_rows((a.x, a.norm_w), a.normed, launch.dtype, shape)?;
    let weight = |name, span| product.weight(name, span, launch.dtype, a.intermediate, shape);
    let (w_gate, w_up) = match a.w {
        Weights::Rows { gate, up } => (weight("w_gate", gate)?, Some(weight("w_up", up)?)),
        Weights::Tiles(both) => (weight("w", both)?, None),
    };
    let gate_bias = checks.optional("gate_bias", a.gate_bias, e, &[a.intermediate])?;
    let up_bias = checks.optional("up_bias", a.up_bias, e, &[a.intermediate])?;
    let act = checks.span("act", a.act, e, &[a.rows, a.intermediate])?;
    let [partial, arrivals] = product.scratch();
    let params = GateUpParams {
        x,
        norm_w,
        w_gate: w_gate.ptr.0,
        w_up: shared::address(w_up),
        gate_bias: shared::address(gate_bias),
        up_bias: shared::address(up_bias),
        act: act.ptr.0,
        partial,
        arrivals,
        next: product.next(),
        rows: checks.dim("rows", a.rows)?,
        hidden: checks.dim("hidden", a.hidden)?,
        intermediate: checks.dim("intermediate", a.intermediate)?,
        eps: a.eps,
    };
    let optional = [w_up, gate_bias, up_bias].into_iter().flatten();
    Ok(product.node(label, &params, rows.into_iter().chain([w_gate]).chain(optional), [act]))
}

/// One test shape.
#[derive(Clone, Copy, Debug)]
struct Shape {
    rows: usize,
    hidden: usize,
    intermediate: usize,
    bias: bool,
}

fn cases() -> Vec<Case> {
    let shape = |rows, hidden, intermediate, bias| Shape { rows, hidden, intermediate, bias };
    let shapes = [
        shape(1, 96, 256, false),
        shape(2, 192, 100, false),
        shape(3, 80, 75, true),
        shape(5, 96, 40, false),
        shape(8, 192, 77, false),
        shape(9, 75, 64, true),
        shape(37, 96, 130, false),
        shape(67, 80, 35, false),
        // Packed weights: rows of one step, a tail of a tile, long rows, several groups of rows.
        shape(4, 32, 21, true),
        shape(7, 288, 44, true),
        shape(6, 544, 3, false),
        shape(133, 64, 75, true),
        // In parts of K for mma; several groups of its rows.
        shape(10, 1056, 40, true),
        shape(261, 1088, 24, false),
    ];
    let real = |rows| shape(rows, 5120, 13824, false);
    let real_shapes = [real(1), real(2), real(3), real(8), real(37)];
    let size = |s: &Shape| (s.rows, s.hidden);
    product::cases(&OP, (&shapes, &real_shapes), size, make_case)
}

fn make_case(s: Shape, variant: &'static str, dtype: DType, scale: Option<Scale>) -> Case {
    let flops = (4 * s.rows * s.hidden * s.intermediate) as u64;
    let bytes = (2 * s.hidden * s.intermediate * dtype.bytes()) as u64;
    let label = format!(
        "rows={},hidden={},intermediate={},bias={}",
        s.rows,
        s.hidden,
        s.intermediate,
        u8::from(s.bias)
    );
    let scale = scale.unwrap_or(shared::scale_for(flops));
    product::case(&OP, variant, dtype, scale, (s.rows, bytes, flops), label, move |rig, launch, scratch| {
        run(variant, rig, launch, s, scratch)
    })
}

fn run(
    variant: &str,
    rig: &mut Rig,
    launch: &Launch,
    s: Shape,
    scratch: Option<ProductScratch>,
) -> Result<Vec<Check>> {
    let dtype = launch.dtype;
    let deviation = 1.0 / (s.hidden as f32).sqrt();
    let x = rig.random("x", DType::F32, s.rows * s.hidden, 2.0)?;
    let norm_w = rig.random("norm_w", dtype, s.hidden, 1.0)?;
    // Gates reach far enough to both sides for SiLU to bend.
    let gate = rig.normal(s.intermediate * s.hidden, 2.0 * deviation);
    let up = rig.normal(s.intermediate * s.hidden, deviation);
    let (gate, up, w) = upload_weights(rig, variant, dtype, (gate, up), s)?;
    let mut bias = |name| s.bias.then(|| rig.random(name, dtype, s.intermediate, 0.5)).transpose();
    let gate_bias = bias("gate_bias")?;
    let up_bias = bias("up_bias")?;
    let act = rig.output("act", dtype, s.rows * s.intermediate)?;
    let normed = product::norm_rows(rig, launch, (x.span, norm_w.span), (s.rows, s.hidden), variant)?;
    let args = Args {
        x: x.span,
        norm_w: norm_w.span,
        normed,
        w,
        gate_bias: gate_bias.as_ref().map(|b| b.span),
        up_bias: up_bias.as_ref().map(|b| b.span),
        act,
        rows: s.rows,
        hidden: s.hidden,
        intermediate: s.intermediate,
        eps: 1e-6,
        scratch,
    };
    rig.run(&node(launch, "test.gate_up", &args)?)?;
    let got = rig.read(act, dtype)?;
    let inputs = GateUp {
        x: &x.values,
        norm_weight: &norm_w.values,
        gate: &gate,
        up: &up,
        gate_bias: gate_bias.as_ref().map(|b| b.values.as_slice()),
        up_bias: up_bias.as_ref().map(|b| b.values.as_slice()),
        hidden_size: s.hidden,
        eps: 1e-6,
    };
    let exact = gate_up::<Exact>(&inputs);
    let plain = match dtype {
        DType::F32 => gate_up::<PlainF32>(&inputs),
        DType::Bf16 => gate_up::<PlainBf16>(&inputs),
    };
    Ok(vec![compare("act", dtype, &got, &exact, &plain)])
}

/// Both weights on the device, as `variant` reads them, and their values.
fn upload_weights(
    rig: &mut Rig,
    variant: &str,
    dtype: DType,
    (gate, up): (Vec<f32>, Vec<f32>),
    s: Shape,
) -> Result<(Vec<f32>, Vec<f32>, Weights)> {
    match Layout::of_variant(variant) {
        Layout::Rows => {
            let (gate, up) = (rig.input("w_gate", dtype, gate)?, rig.input("w_up", dtype, up)?);
            let w = Weights::Rows { gate: gate.span, up: up.span };
            Ok((gate.values, up.values, w))
        }
        Layout::Tiles => {
            let ((gate_bytes, gate), (up_bytes, up)) = (encode(dtype, gate), encode(dtype, up));
            let tiles = Tiles::new(2 * s.intermediate, s.hidden, Pairing::Stacked)?;
            let both = rig.bytes("w", &tiles.pack(&[gate_bytes, up_bytes].concat())?)?;
            Ok((gate, up, Weights::Tiles(both)))
        }
    }
}
