//! What `o_proj` and `down` share: a product added into the residual stream in place.

use super::harness::{Case, Check, Rig, Scale, compare};
use super::params::ProjectParams;
use super::product::{self, Product, ProductScratch, Weight};
use super::shared;
use super::{DType, Launch, Op};
use crate::device::{Node, Span};
use crate::error::Result;
use crate::reference::project::{Project, project};
use crate::reference::{Exact, PlainBf16, PlainF32};
use crate::weights::pack::Pairing;

/// Tensors and dimensions; shapes in `kernels/params.h` (`ProjectParams`).
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// `[rows, inner]`
    pub input: Span,
    /// `[hidden_size, inner]`
    pub w: Weight,
    /// `[hidden_size]`
    pub bias: Option<Span>,
    /// Residual stream, `[rows, hidden_size]` f32, read and written.
    pub x: Span,
    /// Rows.
    pub rows: usize,
    /// `hidden_size`.
    pub hidden: usize,
    /// Columns of `input`.
    pub inner: usize,
    /// Scratch of the variants that share tiles between blocks.
    pub scratch: Option<ProductScratch>,
}

/// The node that computes `args` as `op`.
pub(super) fn node(op: &'static Op, launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let a = args;
    let shape = product::Shape { rows: a.rows, inner: a.inner, units: a.hidden.div_ceil(2) };
    let product = Product::new(op, launch, a.w.layout, shape, a.scratch)?;
    let checks = product.checks;
    let e = launch.dtype.bytes();
    let input = checks.span("in", a.input, e, &[a.rows, a.inner])?;
    let w = product.weight("w", a.w.span, launch.dtype, a.hidden, shape)?;
    let bias = checks.optional("bias", a.bias, e, &[a.hidden])?;
    let x = checks.span("x", a.x, 4, &[a.rows, a.hidden])?;
    product.aligned(&[("in", input)])?;
    let [partial, arrivals] = product.scratch();
    let params = ProjectParams {
        in_: input.ptr.0,
        w: w.ptr.0,
        bias: shared::address(bias),
        x: x.ptr.0,
        partial,
        arrivals,
        next: product.next(),
        rows: checks.dim("rows", a.rows)?,
        hidden: checks.dim("hidden", a.hidden)?,
        inner: checks.dim("inner", a.inner)?,
        pad: 0,
    };
    Ok(product.node(label, &params, [input, w, x].into_iter().chain(bias), [x]))
}

/// One test shape.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub rows: usize,
    pub hidden: usize,
    pub inner: usize,
    pub bias: bool,
}

/// Cases of `op`: every shape in every variant and element type, and `real` ones in the variant that ships.
pub(super) fn cases(op: &'static Op, shapes: &[Shape], real: &[Shape]) -> Vec<Case> {
    let size = |s: &Shape| (s.rows, s.inner);
    product::cases(op, (shapes, real), size, |s, variant, dtype, scale| {
        make_case(op, s, variant, dtype, scale)
    })
}

fn make_case(op: &'static Op, s: Shape, variant: &'static str, dtype: DType, scale: Option<Scale>) -> Case {
    let flops = (2 * s.rows * s.hidden * s.inner) as u64;
    let bytes = (s.hidden * s.inner * dtype.bytes()) as u64;
    let label = format!("rows={},hidden={},inner={},bias={}", s.rows, s.hidden, s.inner, u8::from(s.bias));
    let scale = scale.unwrap_or(shared::scale_for(flops));
    product::case(op, variant, dtype, scale, (s.rows, bytes, flops), label, move |rig, launch, scratch| {
        run((op, variant), rig, launch, s, scratch)
    })
}

fn run(
    (op, variant): (&'static Op, &str),
    rig: &mut Rig,
    launch: &Launch,
    s: Shape,
    scratch: Option<ProductScratch>,
) -> Result<Vec<Check>> {
    let dtype = launch.dtype;
    let input = rig.random("in", dtype, s.rows * s.inner, 1.0)?;
    let deviation = 1.0 / (s.inner as f32).sqrt();
    let size = (s.hidden, s.inner);
    let (weights, w) =
        product::random_weight(rig, variant, ("w", dtype, deviation), size, Pairing::Neighbours)?;
    let bias = s.bias.then(|| rig.random("bias", dtype, s.hidden, 0.5)).transpose()?;
    let x = rig.random("x", DType::F32, s.rows * s.hidden, 1.0)?;
    let args = Args {
        input: input.span,
        w,
        bias: bias.as_ref().map(|b| b.span),
        x: x.span,
        rows: s.rows,
        hidden: s.hidden,
        inner: s.inner,
        scratch,
    };
    rig.run(&node(op, launch, "test.project", &args)?)?;
    let got = rig.read(x.span, DType::F32)?;
    let inputs = Project {
        input: &input.values,
        weight: &weights,
        bias: bias.as_ref().map(|b| b.values.as_slice()),
        x: &x.values,
        inner: s.inner,
        hidden_size: s.hidden,
    };
    let exact = project::<Exact>(&inputs);
    let plain = match dtype {
        DType::F32 => project::<PlainF32>(&inputs),
        DType::Bf16 => project::<PlainBf16>(&inputs),
    };
    // The product is rounded to the element type before it is added, so that type sets the unit.
    Ok(vec![compare("x", dtype, &got, &exact, &plain)])
}
