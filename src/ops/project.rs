//! What `o_proj` and `down` share: a product added into the residual stream in place.

use super::harness::{Case, Check, Rig, Scale, compare};
use super::params::ProjectParams;
use super::shared::{self, Checks};
use super::{DType, Launch, Op};
use crate::device::{Node, ParamBytes, Span};
use crate::error::Result;
use crate::reference::project::{Project, project};
use crate::reference::{Exact, PlainBf16, PlainF32};

/// Tensors and dimensions; shapes in `kernels/params.h` (`ProjectParams`).
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// `[rows, inner]`
    pub input: Span,
    /// `[hidden_size, inner]`
    pub w: Span,
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
}

/// The node that computes `args` as `op`.
pub(super) fn node(op: &'static Op, launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let a = args;
    let variant = launch.selection.variant(op, shared::product_variant(a.rows))?;
    let checks = Checks::new(op.name, variant.name);
    let e = launch.dtype.bytes();
    let input = checks.span("in", a.input, e, &[a.rows, a.inner])?;
    let w = checks.span("w", a.w, e, &[a.hidden, a.inner])?;
    let bias = checks.optional("bias", a.bias, e, &[a.hidden])?;
    let x = checks.span("x", a.x, 4, &[a.rows, a.hidden])?;
    let params = ProjectParams {
        in_: input.ptr.0,
        w: w.ptr.0,
        bias: shared::address(bias),
        x: x.ptr.0,
        rows: checks.dim("rows", a.rows)?,
        hidden: checks.dim("hidden", a.hidden)?,
        inner: checks.dim("inner", a.inner)?,
        pad: 0,
    };
    let mut reads = vec![input, w, x];
    reads.extend(bias);
    Ok(Node {
        label: label.into(),
        kernel: variant.kernel(op.name, launch.dtype)?,
        geometry: shared::product_geometry(launch, variant.name, a.rows, a.inner, a.hidden.div_ceil(2)),
        params: ParamBytes::of(&params),
        reads,
        writes: vec![x],
    })
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
    let mut cases = Vec::new();
    for &dtype in DType::ALL {
        for &shape in shapes {
            for variant in ["plain", "tile"] {
                cases.push(make_case(op, shape, variant, dtype, None));
            }
        }
        for &shape in real {
            let variant = shared::product_variant(shape.rows);
            cases.push(make_case(op, shape, variant, dtype, Some(Scale::Real)));
        }
    }
    cases
}

fn make_case(op: &'static Op, s: Shape, variant: &'static str, dtype: DType, scale: Option<Scale>) -> Case {
    let flops = (2 * s.rows * s.hidden * s.inner) as u64;
    let bytes = (s.hidden * s.inner * dtype.bytes()) as u64;
    let label = format!("rows={},hidden={},inner={},bias={}", s.rows, s.hidden, s.inner, u8::from(s.bias));
    let scale = scale.unwrap_or(shared::scale_for(flops));
    shared::case(op, variant, dtype, scale, (bytes, flops), label, move |rig, launch| run(op, rig, launch, s))
}

fn run(op: &'static Op, rig: &mut Rig, launch: &Launch, s: Shape) -> Result<Vec<Check>> {
    let dtype = launch.dtype;
    let input = rig.random("in", dtype, s.rows * s.inner, 1.0)?;
    let w = rig.random("w", dtype, s.hidden * s.inner, 1.0 / (s.inner as f32).sqrt())?;
    let bias = s.bias.then(|| rig.random("bias", dtype, s.hidden, 0.5)).transpose()?;
    let x = rig.random("x", DType::F32, s.rows * s.hidden, 1.0)?;
    let args = Args {
        input: input.span,
        w: w.span,
        bias: bias.as_ref().map(|b| b.span),
        x: x.span,
        rows: s.rows,
        hidden: s.hidden,
        inner: s.inner,
    };
    rig.run(&node(op, launch, "test.project", &args)?)?;
    let got = rig.read(x.span, DType::F32)?;
    let inputs = Project {
        input: &input.values,
        weight: &w.values,
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
