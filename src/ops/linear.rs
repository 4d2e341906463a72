//! `linear`: one Linear layer with optional bias and SiLU; projectors, condition embedding, LM head.

use super::harness::{Case, Check, Rig, Scale, compare};
use super::params::LinearParams;
use super::product::{self, Product, ProductScratch, Weight};
use super::shared;
use super::{DType, Launch, Op, Variant};
use crate::device::{Node, Span};
use crate::error::Result;
use crate::kernels;
use crate::reference::linear::{Linear, linear};
use crate::reference::{Exact, PlainBf16, PlainF32};
use crate::weights::pack::Pairing;

/// The registry row.
pub static OP: Op = Op {
    name: "linear",
    summary: "y = act(w x + bias)",
    bound: "few rows: bytes of w; many rows: FP32 FMA",
    variants: &[
        Variant {
            name: "plain",
            kernels: kernels!("linear", f32: "linear_plain_f32", bf16: "linear_plain_bf16"),
            summary: "warp per two outputs, weights read once per 8 rows; any shape",
        },
        Variant {
            name: "tile",
            kernels: kernels!("linear", f32: "linear_tile_f32", bf16: "linear_tile_bf16"),
            summary: "64 x 64 tiles in shared memory, for many rows; any shape",
        },
        product::stream(kernels!("linear", bf16: "linear_stream_bf16")),
        product::ring(kernels!("linear", bf16: "linear_ring_bf16")),
        product::mma(kernels!("linear", bf16: "linear_mma_bf16")),
    ],
    cases,
};

/// Tensors and dimensions; shapes in `kernels/params.h` (`LinearParams`).
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// `[rows, inner]`
    pub x: Span,
    /// `[outputs, inner]`
    pub w: Weight,
    /// `[outputs]`
    pub bias: Option<Span>,
    /// `[rows, outputs]`, written; f32 with `out_f32`.
    pub y: Span,
    /// Rows.
    pub rows: usize,
    /// Columns of `y`.
    pub outputs: usize,
    /// Columns of `x`.
    pub inner: usize,
    /// Whether SiLU follows.
    pub silu: bool,
    /// Whether `y` is f32: the same values as in the element type, widened.
    pub out_f32: bool,
    /// Scratch of the variants that share tiles between blocks.
    pub scratch: Option<ProductScratch>,
}

/// The node that computes `args`.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let a = args;
    let shape = product::Shape { rows: a.rows, inner: a.inner, units: a.outputs.div_ceil(2) };
    let product = Product::new(&OP, launch, a.w.layout, shape, a.scratch)?;
    let checks = product.checks;
    let e = launch.dtype.bytes();
    let x = checks.span("x", a.x, e, &[a.rows, a.inner])?;
    let w = product.weight("w", a.w.span, launch.dtype, a.outputs, shape)?;
    let bias = checks.optional("bias", a.bias, e, &[a.outputs])?;
    let y = checks.span("y", a.y, if a.out_f32 { 4 } else { e }, &[a.rows, a.outputs])?;
    product.aligned(&[("x", x)])?;
    let [partial, arrivals] = product.scratch();
    let params = LinearParams {
        x: x.ptr.0,
        w: w.ptr.0,
        bias: shared::address(bias),
        y: y.ptr.0,
        partial,
        arrivals,
        rows: checks.dim("rows", a.rows)?,
        outputs: checks.dim("outputs", a.outputs)?,
        inner: checks.dim("inner", a.inner)?,
        silu: a.silu.into(),
        out_f32: a.out_f32.into(),
        pad: 0,
    };
    Ok(product.node(label, &params, [x, w].into_iter().chain(bias), [y]))
}

/// One test shape.
#[derive(Clone, Copy, Debug)]
struct Shape {
    rows: usize,
    outputs: usize,
    inner: usize,
    bias: bool,
    silu: bool,
    out_f32: bool,
}

fn cases() -> Vec<Case> {
    let shape =
        |rows, outputs, inner, bias, silu, out_f32| Shape { rows, outputs, inner, bias, silu, out_f32 };
    let shapes = [
        shape(1, 300, 96, false, false, true),
        shape(2, 64, 192, true, true, false),
        shape(3, 33, 80, true, false, false),
        shape(4, 96, 16, true, false, true),
        shape(5, 65, 75, false, true, true),
        // Several chunks of K over several passes, in both element types.
        shape(8, 140, 6152, true, false, false),
        shape(13, 71, 64, true, false, false),
        shape(37, 96, 64, true, false, true),
        shape(129, 67, 36, true, true, false),
        // Packed weights: tiles with a tail, one tile for all SMs, rows of one step, several groups of rows.
        shape(1, 70, 32, true, false, false),
        shape(6, 7, 608, true, true, false),
        shape(7, 130, 256, false, false, true),
        shape(17, 50, 288, true, false, false),
        shape(150, 300, 96, true, true, true),
    ];
    let real = [
        // image_in_projector, cond_embed, and a slice of lm_head.
        shape(2, 5120, 64, true, false, true),
        shape(2, 1536, 5120, true, false, false),
        shape(1, 19008, 5120, false, false, true),
        shape(37, 5120, 64, true, false, true),
        shape(28, 1536, 1536, true, false, false),
    ];
    let size = |s: &Shape| (s.rows, s.inner);
    product::cases(&OP, (&shapes, &real), size, make_case)
}

fn make_case(s: Shape, variant: &'static str, dtype: DType, scale: Option<Scale>) -> Case {
    let flops = (2 * s.rows * s.outputs * s.inner) as u64;
    let bytes = (s.outputs * s.inner * dtype.bytes()) as u64;
    let label = format!(
        "rows={},outputs={},inner={},bias={},silu={},out_f32={}",
        s.rows,
        s.outputs,
        s.inner,
        u8::from(s.bias),
        u8::from(s.silu),
        u8::from(s.out_f32)
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
    let x = rig.random("x", dtype, s.rows * s.inner, 1.0)?;
    let deviation = 1.0 / (s.inner as f32).sqrt();
    let size = (s.outputs, s.inner);
    let (weights, w) =
        product::random_weight(rig, variant, ("w", dtype, deviation), size, Pairing::Neighbours)?;
    let bias = s.bias.then(|| rig.random("bias", dtype, s.outputs, 0.5)).transpose()?;
    let out = if s.out_f32 { DType::F32 } else { dtype };
    let y = rig.output("y", out, s.rows * s.outputs)?;
    let args = Args {
        x: x.span,
        w,
        bias: bias.as_ref().map(|b| b.span),
        y,
        rows: s.rows,
        outputs: s.outputs,
        inner: s.inner,
        silu: s.silu,
        out_f32: s.out_f32,
        scratch,
    };
    rig.run(&node(launch, "test.linear", &args)?)?;
    let got = rig.read(y, out)?;
    let inputs = Linear {
        x: &x.values,
        weight: &weights,
        bias: bias.as_ref().map(|b| b.values.as_slice()),
        inner: s.inner,
        silu: s.silu,
    };
    let exact = linear::<Exact>(&inputs);
    let plain = match dtype {
        DType::F32 => linear::<PlainF32>(&inputs),
        DType::Bf16 => linear::<PlainBf16>(&inputs),
    };
    Ok(vec![compare("y", dtype, &got, &exact, &plain)])
}
