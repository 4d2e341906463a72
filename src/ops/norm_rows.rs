//! `norm_rows`: RMSNorm of rows of the residual stream, once for all blocks of a product of many rows.
//!
//! `qkv` and `gate_up` norm their rows themselves, which costs few rows nothing. With a prompt's rows every block would
//! do it again for all of its 128: from [`Args::h`] they read half the bytes, once instead of twice.

use super::harness::{Case, Check, Rig, Scale, compare};
use super::params::NormRowsParams;
use super::shared::{self, Checks};
use super::{DType, Launch, Op, Variant, div_ceil};
use crate::device::{Geometry, Node, ParamBytes, Span};
use crate::error::Result;
use crate::kernels;
use crate::reference::norm::rms_norm;
use crate::reference::{Exact, PlainBf16, PlainF32, Precision};

/// The registry row.
pub static OP: Op = Op {
    name: "norm_rows",
    summary: "h = rms(x) * norm_w, for the products of prompts",
    bound: "latency: 30 KB per row at 14B",
    variants: &[Variant {
        name: "plain",
        kernels: kernels!("norm_rows", f32: "norm_rows_plain_f32", bf16: "norm_rows_plain_bf16"),
        summary: "a warp per row; any shape",
    }],
    cases,
};

/// Warps, and so rows, of a block (`kBlockWarps`).
const BLOCK_ROWS: usize = 2;

/// Tensors and dimensions; shapes in `kernels/params.h` (`NormRowsParams`).
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// Residual stream, `[rows, hidden_size]` f32.
    pub x: Span,
    /// `[hidden_size]`
    pub norm_w: Span,
    /// `[rows, hidden_size]`, written.
    pub h: Span,
    /// Rows.
    pub rows: usize,
    /// `hidden_size`.
    pub hidden: usize,
    /// `rms_norm_eps`.
    pub eps: f32,
}

/// The node that computes `args`.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let a = args;
    let variant = launch.selection.variant(&OP, "plain")?;
    let checks = Checks::new(OP.name, variant.name);
    let e = launch.dtype.bytes();
    let x = checks.span("x", a.x, 4, &[a.rows, a.hidden])?;
    let norm_w = checks.span("norm_w", a.norm_w, e, &[a.hidden])?;
    let h = checks.span("h", a.h, e, &[a.rows, a.hidden])?;
    let params = NormRowsParams {
        x: x.ptr.0,
        norm_w: norm_w.ptr.0,
        h: h.ptr.0,
        rows: checks.dim("rows", a.rows)?,
        hidden: checks.dim("hidden", a.hidden)?,
        eps: a.eps,
        pad: 0,
    };
    let mut geometry = Geometry::linear(div_ceil(a.rows, BLOCK_ROWS), 32 * BLOCK_ROWS as u32);
    geometry.dependent = launch.dependent;
    Ok(Node {
        label: label.into(),
        kernel: variant.kernel(OP.name, launch.dtype)?,
        geometry,
        params: ParamBytes::of(&params),
        reads: vec![x, norm_w],
        writes: vec![h],
    })
}

fn cases() -> Vec<Case> {
    // Rows of one go and of several, with tails, such as no vector load reads, and wider than the weights held ahead.
    let small = [(1, 96), (3, 75), (5, 264), (9, 2576), (2, 5200)];
    let mut cases = Vec::new();
    for &dtype in DType::ALL {
        for (rows, hidden) in small {
            cases.push(case(rows, hidden, dtype, Scale::Small));
        }
    }
    cases.push(case(256, 5120, DType::Bf16, Scale::Real));
    cases
}

fn case(rows: usize, hidden: usize, dtype: DType, scale: Scale) -> Case {
    let bytes = (rows * hidden * (4 + dtype.bytes())) as u64;
    let label = format!("rows={rows},hidden={hidden}");
    let run = move |rig: &mut Rig, launch: &Launch| run(rig, launch, rows, hidden);
    shared::case(&OP, "plain", dtype, scale, (bytes, 0), label, run)
}

fn run(rig: &mut Rig, launch: &Launch, rows: usize, hidden: usize) -> Result<Vec<Check>> {
    let dtype = launch.dtype;
    let x = rig.random("x", DType::F32, rows * hidden, 2.0)?;
    let norm_w = rig.random("norm_w", dtype, hidden, 1.0)?;
    let h = rig.output("h", dtype, rows * hidden)?;
    let args = Args { x: x.span, norm_w: norm_w.span, h, rows, hidden, eps: 1e-6 };
    rig.run(&node(launch, "test.norm_rows", &args)?)?;
    let got = rig.read(h, dtype)?;
    let expected = |of: fn(&[f32], &[f32]) -> Vec<f64>| -> Vec<f64> {
        x.values.chunks_exact(hidden).flat_map(|row| of(row, &norm_w.values)).collect()
    };
    let plain = match dtype {
        DType::F32 => expected(normed::<PlainF32>),
        DType::Bf16 => expected(normed::<PlainBf16>),
    };
    Ok(vec![compare("h", dtype, &got, &expected(normed::<Exact>), &plain)])
}

fn normed<P: Precision>(x: &[f32], weight: &[f32]) -> Vec<f64> {
    rms_norm::<P>(x, weight, 1e-6).into_iter().map(P::widen).collect()
}
