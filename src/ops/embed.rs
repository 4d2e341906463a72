//! `embed`: token ids to rows of the residual stream.

use super::harness::{Case, Check, Rig, Scale, within};
use super::params::EmbedParams;
use super::shared::{self, Checks};
use super::{DType, Launch, Op, Variant};
use crate::device::{Geometry, Node, ParamBytes, Span};
use crate::error::Result;
use crate::kernels;
use crate::reference::gather_rows::gather_rows;

/// The registry row.
pub static OP: Op = Op {
    name: "embed",
    summary: "x = table[ids], widened to f32",
    bound: "latency: one row of 10 KB per prompt token at 14B",
    variants: &[Variant {
        name: "plain",
        kernels: kernels!("embed", f32: "embed_plain_f32", bf16: "embed_plain_bf16"),
        summary: "one block per row; an id outside the table gives NaN",
    }],
    cases,
};

/// Tensors and dimensions; shapes in `kernels/params.h` (`EmbedParams`).
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// `[rows]` u32.
    pub ids: Span,
    /// `[vocab_size, hidden_size]`
    pub table: Span,
    /// Residual stream, `[rows, hidden_size]` f32, written.
    pub x: Span,
    /// Rows.
    pub rows: usize,
    /// `hidden_size`.
    pub hidden: usize,
    /// `vocab_size`.
    pub vocab: usize,
}

/// The node that computes `args`.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let a = args;
    let variant = launch.selection.variant(&OP, "plain")?;
    let checks = Checks::new(OP.name, variant.name);
    let ids = checks.span("ids", a.ids, 4, &[a.rows])?;
    let table = checks.span("table", a.table, launch.dtype.bytes(), &[a.vocab, a.hidden])?;
    let x = checks.span("x", a.x, 4, &[a.rows, a.hidden])?;
    let params = EmbedParams {
        ids: ids.ptr.0,
        table: table.ptr.0,
        x: x.ptr.0,
        rows: checks.dim("rows", a.rows)?,
        hidden: checks.dim("hidden", a.hidden)?,
        vocab: checks.dim("vocab", a.vocab)?,
        pad: 0,
    };
    let mut geometry = Geometry::linear(params.rows, 256);
    geometry.dependent = launch.dependent;
    Ok(Node {
        label: label.into(),
        kernel: variant.kernel(OP.name, launch.dtype)?,
        geometry,
        params: ParamBytes::of(&params),
        reads: vec![ids, table],
        writes: vec![x],
    })
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for &dtype in DType::ALL {
        // The last id of each list but the first lies outside the table.
        let shapes: [(&'static [u32], usize, usize, Scale); 3] = [
            (&[10, 0, 7, 7], 96, 11, Scale::Small),
            (&[1, 2, 3], 75, 3, Scale::Small),
            (&[0, 1000, 63, 5, u32::MAX], 5120, 1001, Scale::Medium),
        ];
        for (ids, hidden, vocab, scale) in shapes {
            let label = format!("rows={},hidden={hidden},vocab={vocab}", ids.len());
            let bytes = (ids.len() * hidden * dtype.bytes()) as u64;
            cases.push(shared::case(&OP, "plain", dtype, scale, (bytes, 0), label, move |rig, launch| {
                run(rig, launch, ids, hidden, vocab)
            }));
        }
    }
    cases
}

fn run(rig: &mut Rig, launch: &Launch, ids: &[u32], hidden: usize, vocab: usize) -> Result<Vec<Check>> {
    let table = rig.random("table", launch.dtype, vocab * hidden, 1.0)?;
    let ids_span = rig.indices("ids", ids)?;
    let x = rig.output("x", DType::F32, ids.len() * hidden)?;
    let args = Args { ids: ids_span, table: table.span, x, rows: ids.len(), hidden, vocab };
    rig.run(&node(launch, "test.embed", &args)?)?;
    let got = rig.read(x, DType::F32)?;
    // A copy is exact.
    Ok(vec![within("x", &got, &gather_rows(&table.values, hidden, ids), 0.0)])
}
