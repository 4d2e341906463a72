//! `gather_rows`: picks rows of the residual stream, such as the last prompt row of every sequence.

use super::harness::{Case, Check, Rig, Scale, within};
use super::params::GatherRowsParams;
use super::shared::{self, Checks};
use super::{DType, Launch, Op, Variant};
use crate::device::{Geometry, Node, ParamBytes, Span};
use crate::error::Result;
use crate::kernels;
use crate::reference::gather_rows::gather_rows;

/// The registry row.
pub static OP: Op = Op {
    name: "gather_rows",
    summary: "y = x[index]",
    bound: "latency: one row of 20 KB per sequence at 14B, once per prompt",
    variants: &[Variant {
        name: "plain",
        // The residual stream is f32 in both.
        kernels: kernels!("gather_rows", f32: "gather_rows_plain", bf16: "gather_rows_plain"),
        summary: "one block per row",
    }],
    cases,
};

/// Tensors and dimensions; shapes in `kernels/params.h` (`GatherRowsParams`).
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// `[source_rows, hidden_size]` f32.
    pub x: Span,
    /// `[rows]` u32, each below `source_rows`.
    pub index: Span,
    /// `[rows, hidden_size]` f32, written.
    pub y: Span,
    /// Rows of `x`.
    pub source_rows: usize,
    /// Rows of `y`.
    pub rows: usize,
    /// `hidden_size`.
    pub hidden: usize,
}

/// The node that computes `args`.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let a = args;
    let variant = launch.selection.variant(&OP, "plain")?;
    let checks = Checks::new(OP.name, variant.name);
    let x = checks.span("x", a.x, 4, &[a.source_rows, a.hidden])?;
    let index = checks.span("index", a.index, 4, &[a.rows])?;
    let y = checks.span("y", a.y, 4, &[a.rows, a.hidden])?;
    let params = GatherRowsParams {
        x: x.ptr.0,
        index: index.ptr.0,
        y: y.ptr.0,
        rows: checks.dim("rows", a.rows)?,
        hidden: checks.dim("hidden", a.hidden)?,
    };
    let mut geometry = Geometry::linear(params.rows, 256);
    geometry.dependent = launch.dependent;
    Ok(Node {
        label: label.into(),
        kernel: variant.kernel(OP.name, launch.dtype)?,
        geometry,
        params: ParamBytes::of(&params),
        reads: vec![x, index],
        writes: vec![y],
    })
}

fn cases() -> Vec<Case> {
    let shapes: [(&'static [u32], usize, usize); 3] =
        [(&[3], 4, 96), (&[36, 0, 17], 37, 75), (&[1, 1, 0, 8, 5], 9, 300)];
    shapes
        .into_iter()
        .map(|(index, source_rows, hidden)| {
            let label = format!("rows={},source_rows={source_rows},hidden={hidden}", index.len());
            let bytes = (8 * index.len() * hidden) as u64;
            let run = move |rig: &mut Rig, launch: &Launch| run(rig, launch, index, source_rows, hidden);
            shared::case(&OP, "plain", DType::F32, Scale::Small, (bytes, 0), label, run)
        })
        .collect()
}

fn run(
    rig: &mut Rig,
    launch: &Launch,
    index: &[u32],
    source_rows: usize,
    hidden: usize,
) -> Result<Vec<Check>> {
    let x = rig.random("x", DType::F32, source_rows * hidden, 1.0)?;
    let index_span = rig.indices("index", index)?;
    let y = rig.output("y", DType::F32, index.len() * hidden)?;
    let args = Args { x: x.span, index: index_span, y, source_rows, rows: index.len(), hidden };
    rig.run(&node(launch, "test.gather_rows", &args)?)?;
    let got = rig.read(y, DType::F32)?;
    Ok(vec![within("y", &got, &gather_rows(&x.values, hidden, index), 0.0)])
}
