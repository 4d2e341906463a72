//! `out_proj`: final RMSNorm and `image_out_projector`, from the last row of every sequence to its condition.

use super::harness::{Case, Check, Rig, Scale, compare};
use super::params::{GenerationState, OutProjParams};
use super::product::{self, Product, ProductScratch, Weight};
use super::shared;
use super::{DType, Launch, Op, Variant};
use crate::device::{Node, Span};
use crate::error::Result;
use crate::kernels;
use crate::reference::out_proj::{OutProj, out_proj};
use crate::reference::{Exact, PlainBf16, PlainF32};
use crate::weights::pack::Pairing;

/// The registry row.
pub static OP: Op = Op {
    name: "out_proj",
    summary: "c = w (rms(x) + pos_embed[token]) + bias; rms(x) kept if asked for",
    bound: "bytes of w (52.4 MB per token at 14B in bf16)",
    variants: &[
        Variant {
            name: "plain",
            kernels: kernels!("out_proj", f32: "out_proj_plain_f32", bf16: "out_proj_plain_bf16"),
            summary: "warp per two outputs, weights read once per 8 rows; any shape",
        },
        product::stream(kernels!("out_proj", bf16: "out_proj_stream_bf16")),
        product::ring(kernels!("out_proj", bf16: "out_proj_ring_bf16")),
    ],
    cases,
};

/// The table of position rows and the counter that picks one.
#[derive(Clone, Copy, Debug)]
pub struct PosEmbed {
    /// `[rows, hidden_size]`
    pub table: Span,
    /// Rows of the table; a token beyond them gets none.
    pub rows: usize,
    /// [`GenerationState`]: row `token` is added.
    pub state: Span,
}

/// Tensors and dimensions; shapes in `kernels/params.h` (`OutProjParams`).
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// `[rows, hidden_size]` f32.
    pub x: Span,
    /// `[hidden_size]`
    pub norm_w: Span,
    /// `gen_pos_embed`, if the model has one.
    pub pos_embed: Option<PosEmbed>,
    /// `[hidden_size, hidden_size]`
    pub w: Weight,
    /// `[hidden_size]`
    pub bias: Span,
    /// `[rows, hidden_size]`, written: the normalised rows.
    pub norm_out: Option<Span>,
    /// `[rows, hidden_size]`, written.
    pub c: Span,
    /// Rows: one per sequence.
    pub rows: usize,
    /// `hidden_size`.
    pub hidden: usize,
    /// `rms_norm_eps`.
    pub eps: f32,
    /// Scratch of the variants that share tiles between blocks.
    pub scratch: Option<ProductScratch>,
}

/// The node that computes `args`.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let a = args;
    let shape = product::Shape { rows: a.rows, inner: a.hidden, units: a.hidden.div_ceil(2) };
    let product = Product::new(&OP, launch, a.w.layout, shape, a.scratch)?;
    let checks = product.checks;
    let e = launch.dtype.bytes();
    checks.product("rows * hidden", &[a.rows, a.hidden])?;
    let x = checks.span("x", a.x, 4, &[a.rows, a.hidden])?;
    let norm_w = checks.span("norm_w", a.norm_w, e, &[a.hidden])?;
    let w = product.weight("w", a.w.span, launch.dtype, a.hidden, shape)?;
    let bias = checks.span("bias", a.bias, e, &[a.hidden])?;
    let norm_out = checks.optional("norm_out", a.norm_out, e, &[a.rows, a.hidden])?;
    let c = checks.span("c", a.c, e, &[a.rows, a.hidden])?;
    let mut reads = vec![x, norm_w, w, bias];
    let (mut pos_embed, mut state, mut pos_rows) = (0, 0, 0);
    if let Some(p) = a.pos_embed {
        let table = checks.span("pos_embed", p.table, e, &[p.rows, a.hidden])?;
        let counter = checks.span("state", p.state, 4, &[size_of::<GenerationState>() / 4])?;
        product.aligned(&[("pos_embed", table)])?;
        reads.extend([table, counter]);
        (pos_embed, state, pos_rows) = (table.ptr.0, counter.ptr.0, checks.dim("pos_rows", p.rows)?);
    }
    product.aligned(&[("x", x), ("norm_w", norm_w)])?;
    let [partial, arrivals] = product.scratch();
    let params = OutProjParams {
        x: x.ptr.0,
        norm_w: norm_w.ptr.0,
        pos_embed,
        state,
        w: w.ptr.0,
        bias: bias.ptr.0,
        norm_out: shared::address(norm_out),
        c: c.ptr.0,
        partial,
        arrivals,
        next: product.next(),
        rows: checks.dim("rows", a.rows)?,
        hidden: checks.dim("hidden", a.hidden)?,
        pos_rows,
        eps: a.eps,
    };
    Ok(product.node(label, &params, reads, [c].into_iter().chain(norm_out)))
}

/// One test shape; `pos_embed` is the number of position rows and the token.
#[derive(Clone, Copy, Debug)]
struct Shape {
    rows: usize,
    hidden: usize,
    pos_embed: Option<(usize, u32)>,
    norm_out: bool,
}

fn cases() -> Vec<Case> {
    let shape = |rows, hidden, pos_embed, norm_out| Shape { rows, hidden, pos_embed, norm_out };
    let shapes = [
        shape(1, 96, None, true),
        shape(2, 192, Some((16, 5)), false),
        shape(3, 80, Some((4, 3)), true),
        // A token beyond the table has no position row.
        shape(3, 80, Some((4, 4)), true),
        shape(5, 75, Some((9, 0)), true),
        shape(9, 96, None, false),
        shape(18, 66, Some((3, 1)), true),
        shape(4, 32, Some((3, 1)), false),
        shape(7, 288, None, true),
    ];
    let real = [1, 2, 3, 8].map(|rows| shape(rows, 5120, None, true));
    let size = |s: &Shape| (s.rows, s.hidden);
    product::cases(&OP, (&shapes, &real), size, make_case)
}

fn make_case(s: Shape, variant: &'static str, dtype: DType, scale: Option<Scale>) -> Case {
    let flops = (2 * s.rows * s.hidden * s.hidden) as u64;
    let bytes = (s.hidden * s.hidden * dtype.bytes()) as u64;
    let pos = s.pos_embed.map_or("none".into(), |(rows, token)| format!("{token}of{rows}"));
    let label =
        format!("rows={},hidden={},pos_embed={pos},norm_out={}", s.rows, s.hidden, u8::from(s.norm_out));
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
    let x = rig.random("x", DType::F32, s.rows * s.hidden, 2.0)?;
    let norm_w = rig.random("norm_w", dtype, s.hidden, 1.0)?;
    let deviation = 1.0 / (s.hidden as f32).sqrt();
    let size = (s.hidden, s.hidden);
    let (weights, w) =
        product::random_weight(rig, variant, ("w", dtype, deviation), size, Pairing::Neighbours)?;
    let bias = rig.random("bias", dtype, s.hidden, 0.5)?;
    let c = rig.output("c", dtype, s.rows * s.hidden)?;
    let norm_out = s.norm_out.then(|| rig.output("norm_out", dtype, s.rows * s.hidden)).transpose()?;
    let mut added = None;
    let mut pos_embed = None;
    if let Some((rows, token)) = s.pos_embed {
        let table = rig.random("pos_embed", dtype, rows * s.hidden, 0.7)?;
        let state = GenerationState { token, ..Default::default() };
        let state = rig.bytes("state", bytemuck::bytes_of(&state))?;
        pos_embed = Some(PosEmbed { table: table.span, rows, state });
        added = table.values.chunks_exact(s.hidden).nth(token as usize).map(<[f32]>::to_vec);
    }
    let args = Args {
        x: x.span,
        norm_w: norm_w.span,
        pos_embed,
        w,
        bias: bias.span,
        norm_out,
        c,
        rows: s.rows,
        hidden: s.hidden,
        eps: 1e-6,
        scratch,
    };
    rig.run(&node(launch, "test.out_proj", &args)?)?;
    let inputs = OutProj {
        x: &x.values,
        norm_weight: &norm_w.values,
        pos_embed: added.as_deref(),
        weight: &weights,
        bias: &bias.values,
        hidden_size: s.hidden,
        eps: 1e-6,
    };
    let exact = out_proj::<Exact>(&inputs);
    let plain = match dtype {
        DType::F32 => out_proj::<PlainF32>(&inputs),
        DType::Bf16 => out_proj::<PlainBf16>(&inputs),
    };
    let mut checks = vec![compare("c", dtype, &rig.read(c, dtype)?, &exact.1, &plain.1)];
    if let Some(span) = norm_out {
        checks.push(compare("norm_out", dtype, &rig.read(span, dtype)?, &exact.0, &plain.0));
    }
    Ok(checks)
}
