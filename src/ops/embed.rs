//! `embed`: token ids, and image tokens between them, to rows of the residual stream.

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
    summary: "x = table[ids], widened to f32; projected image tokens at their rows",
    bound: "latency: one row of 10 KB per prompt token at 14B",
    variants: &[Variant {
        name: "plain",
        kernels: kernels!("embed", f32: "embed_plain_f32", bf16: "embed_plain_bf16"),
        summary: "one block per row; an index outside its table gives NaN",
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
    /// Image tokens among the rows.
    pub source: Option<Source>,
    /// Residual stream, `[rows, hidden_size]` f32, written.
    pub x: Span,
    /// Rows.
    pub rows: usize,
    /// `hidden_size`.
    pub hidden: usize,
    /// `vocab_size`.
    pub vocab: usize,
}

/// Image tokens of a prompt, projected.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// `[count, hidden_size]` f32.
    pub x: Span,
    /// `[rows]` u32: which of them a row takes, or [`TEXT`].
    pub rows: Span,
    /// Number of image tokens.
    pub count: usize,
}

/// Marks a row that is taken from the table.
pub const TEXT: u32 = u32::MAX;

/// The node that computes `args`.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let a = args;
    let variant = launch.selection.variant(&OP, "plain")?;
    let checks = Checks::new(OP.name, variant.name);
    let ids = checks.span("ids", a.ids, 4, &[a.rows])?;
    let table = checks.span("table", a.table, launch.dtype.bytes(), &[a.vocab, a.hidden])?;
    let x = checks.span("x", a.x, 4, &[a.rows, a.hidden])?;
    let mut reads = vec![ids, table];
    let mut source = (0, 0, 0);
    if let Some(s) = &a.source {
        let values = checks.span("source", s.x, 4, &[s.count, a.hidden])?;
        let rows = checks.span("source_row", s.rows, 4, &[a.rows])?;
        reads.extend([values, rows]);
        source = (values.ptr.0, rows.ptr.0, checks.dim("source_rows", s.count)?);
    }
    let params = EmbedParams {
        ids: ids.ptr.0,
        table: table.ptr.0,
        source: source.0,
        source_row: source.1,
        x: x.ptr.0,
        rows: checks.dim("rows", a.rows)?,
        hidden: checks.dim("hidden", a.hidden)?,
        vocab: checks.dim("vocab", a.vocab)?,
        source_rows: source.2,
    };
    let mut geometry = Geometry::linear(params.rows, 256);
    geometry.dependent = launch.dependent;
    Ok(Node {
        label: label.into(),
        kernel: variant.kernel(OP.name, launch.dtype)?,
        geometry,
        params: ParamBytes::of(&params),
        reads,
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
                run(rig, launch, ids, &[], hidden, vocab)
            }));
        }
        // Text, two image tokens, text, and one that is not there.
        const SOURCES: [u32; 5] = [TEXT, 1, 0, TEXT, 2];
        for hidden in [75, 300] {
            let label = format!("rows=5,hidden={hidden},vocab=9,source_rows=2");
            let cost = (5 * hidden as u64 * 4, 0);
            cases.push(shared::case(&OP, "plain", dtype, Scale::Small, cost, label, move |rig, launch| {
                run(rig, launch, &[3, 8, 8, 0, 1], &SOURCES, hidden, 9)
            }));
        }
    }
    cases
}

fn run(
    rig: &mut Rig,
    launch: &Launch,
    ids: &[u32],
    sources: &[u32],
    hidden: usize,
    vocab: usize,
) -> Result<Vec<Check>> {
    const COUNT: usize = 2;
    let table = rig.random("table", launch.dtype, vocab * hidden, 1.0)?;
    let ids_span = rig.indices("ids", ids)?;
    let x = rig.output("x", DType::F32, ids.len() * hidden)?;
    let projected = rig.random("source", DType::F32, COUNT * hidden, 1.0)?;
    let source = match sources {
        [] => None,
        rows => Some(Source { x: projected.span, rows: rig.indices("source_row", rows)?, count: COUNT }),
    };
    let args = Args { ids: ids_span, table: table.span, source, x, rows: ids.len(), hidden, vocab };
    rig.run(&node(launch, "test.embed", &args)?)?;
    let got = rig.read(x, DType::F32)?;
    let mut expected = gather_rows(&table.values, hidden, ids);
    let shown = gather_rows(&projected.values, hidden, sources);
    for (row, _) in sources.iter().enumerate().filter(|(_, s)| **s != TEXT) {
        expected[row * hidden..][..hidden].copy_from_slice(&shown[row * hidden..][..hidden]);
    }
    // A copy is exact.
    Ok(vec![within("x", &got, &expected, 0.0)])
}
