//! `lm_head`: final RMSNorm and the vocabulary's logits, for the last row of every sequence.

use super::harness::{Case, Check, Rig, Scale, compare, encode};
use super::params::LmHeadParams;
use super::product::{self, Layout, Product, ProductScratch, Weight};
use super::shared;
use super::{DType, Launch, Op, Variant};
use crate::device::{Copies, Node, Span};
use crate::error::Result;
use crate::kernels;
use crate::reference::lm_head::{LmHead, lm_head};
use crate::reference::{Exact, PlainBf16, PlainF32};
use crate::weights::pack::{Pairing, STEP_BYTES, Tiles};
use std::ops::Range;

/// The registry row.
pub static OP: Op = Op {
    name: "lm_head",
    summary: "logits = w rms(x), in f32; rms(x) kept if asked for",
    bound: "bytes of w (1.56 GB per text token at 14B in bf16)",
    variants: &[
        Variant {
            name: "plain",
            kernels: kernels!("lm_head", f32: "lm_head_plain_f32", bf16: "lm_head_plain_bf16"),
            summary: "warp per two logits, weights read once per 8 rows; any shape, and tied embeddings",
        },
        product::stream(kernels!("lm_head", bf16: "lm_head_stream_bf16")),
        product::ring(kernels!("lm_head", bf16: "lm_head_ring_bf16")),
    ],
    cases,
};

/// Tensors and dimensions; shapes in `kernels/params.h` (`LmHeadParams`).
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// `[rows, hidden_size]` f32.
    pub x: Span,
    /// `[hidden_size]`
    pub norm_w: Span,
    /// `[vocab_size, hidden_size]`
    pub w: Weight,
    /// `[rows, hidden_size]`, written: the normalised rows.
    pub norm_out: Option<Span>,
    /// `[rows, vocab_size]` f32, written.
    pub logits: Span,
    /// Rows: one per sequence.
    pub rows: usize,
    /// `hidden_size`.
    pub hidden: usize,
    /// `vocab_size`.
    pub vocab: usize,
    /// `rms_norm_eps`.
    pub eps: f32,
    /// Scratch of the variants that share tiles between blocks.
    pub scratch: Option<ProductScratch>,
}

/// The node that computes `args`.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let a = args;
    let shape = product::Shape { rows: a.rows, inner: a.hidden, units: a.vocab.div_ceil(2) };
    let product = Product::new(&OP, launch, a.w.layout, shape, a.scratch)?;
    let checks = product.checks;
    let e = launch.dtype.bytes();
    checks.product("rows * hidden", &[a.rows, a.hidden])?;
    let x = checks.span("x", a.x, 4, &[a.rows, a.hidden])?;
    let norm_w = checks.span("norm_w", a.norm_w, e, &[a.hidden])?;
    let w = product.weight("w", a.w.span, launch.dtype, a.vocab, shape)?;
    let norm_out = checks.optional("norm_out", a.norm_out, e, &[a.rows, a.hidden])?;
    let logits = checks.span("logits", a.logits, 4, &[a.rows, a.vocab])?;
    product.aligned(&[("x", x), ("norm_w", norm_w)])?;
    let [partial, arrivals] = product.scratch();
    let params = LmHeadParams {
        x: x.ptr.0,
        norm_w: norm_w.ptr.0,
        w: w.ptr.0,
        norm_out: shared::address(norm_out),
        logits: logits.ptr.0,
        partial,
        arrivals,
        rows: checks.dim("rows", a.rows)?,
        hidden: checks.dim("hidden", a.hidden)?,
        vocab: checks.dim("vocab", a.vocab)?,
        eps: a.eps,
    };
    Ok(product.node(label, &params, [x, norm_w, w], [logits].into_iter().chain(norm_out)))
}

/// One test shape. Row v of the weights is row `v % period` of a random table: at the shipped size the whole of it
/// would not fit beside its reference. A prime period moves the repeats against every block's share.
#[derive(Clone, Copy, Debug)]
struct Shape {
    rows: usize,
    hidden: usize,
    vocab: usize,
    period: usize,
    norm_out: bool,
}

fn cases() -> Vec<Case> {
    let shape = |rows, hidden, vocab, norm_out| Shape { rows, hidden, vocab, period: vocab, norm_out };
    let shapes = [
        shape(1, 96, 130, true),
        shape(2, 64, 528, false),
        // Odd in every dimension: the last unit has one logit, no row is aligned.
        shape(3, 75, 101, true),
        shape(1, 80, 1, false),
        shape(5, 66, 37, false),
        shape(9, 96, 61, true),
        shape(68, 64, 131, true),
        // Packed weights: rows of one step, one tile for all SMs, a tail of a tile, several groups of rows.
        shape(4, 32, 21, true),
        shape(6, 608, 7, false),
        shape(7, 288, 45, true),
        shape(133, 64, 75, true),
    ];
    let real = [Shape { rows: 2, hidden: 5120, vocab: 152_064, period: 1009, norm_out: true }];
    let size = |s: &Shape| (s.rows, s.hidden);
    let mut cases = product::cases(&OP, (&shapes, &real), size, make_case);
    // In f32, which does not ship, the real one would take three gigabytes.
    cases.retain(|case| case.dtype == DType::Bf16 || case.scale != Scale::Real);
    cases
}

fn make_case(s: Shape, variant: &'static str, dtype: DType, scale: Option<Scale>) -> Case {
    let flops = (2 * s.rows * s.hidden * s.vocab) as u64;
    let bytes = (s.hidden * s.vocab * dtype.bytes()) as u64;
    let label =
        format!("rows={},hidden={},vocab={},norm_out={}", s.rows, s.hidden, s.vocab, u8::from(s.norm_out));
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
    let (table, w) = upload_weights(rig, variant, dtype, s)?;
    let logits = rig.output("logits", DType::F32, s.rows * s.vocab)?;
    let norm_out = s.norm_out.then(|| rig.output("norm_out", dtype, s.rows * s.hidden)).transpose()?;
    let args = Args {
        x: x.span,
        norm_w: norm_w.span,
        w,
        norm_out,
        logits,
        rows: s.rows,
        hidden: s.hidden,
        vocab: s.vocab,
        eps: 1e-6,
        scratch,
    };
    rig.run(&node(launch, "test.lm_head", &args)?)?;
    let inputs = LmHead {
        x: &x.values,
        norm_weight: &norm_w.values,
        weight: &table,
        hidden_size: s.hidden,
        eps: 1e-6,
    };
    let exact = lm_head::<Exact>(&inputs);
    let plain = match dtype {
        DType::F32 => lm_head::<PlainF32>(&inputs),
        DType::Bf16 => lm_head::<PlainBf16>(&inputs),
    };
    let whole = |of_table: &[f64]| -> Vec<f64> {
        let rows = of_table.chunks_exact(s.period);
        rows.flat_map(|row| row.iter().copied().cycle().take(s.vocab)).collect()
    };
    let got = rig.read(logits, DType::F32)?;
    let mut checks = vec![compare("logits", dtype, &got, &whole(&exact.1), &whole(&plain.1))];
    if let Some(span) = norm_out {
        checks.push(compare("norm_out", dtype, &rig.read(span, dtype)?, &exact.0, &plain.0));
    }
    Ok(checks)
}

/// The weights on the device, as `variant` reads them, and the table that they repeat. The host never holds all.
fn upload_weights(rig: &mut Rig, variant: &str, dtype: DType, s: Shape) -> Result<(Vec<f32>, Weight)> {
    let (bytes, table) = encode(dtype, rig.normal(s.period * s.hidden, 1.0 / (s.hidden as f32).sqrt()));
    let layout = Layout::of_variant(variant);
    let span = match layout {
        Layout::Rows => {
            let span = rig.output("w", dtype, s.vocab * s.hidden)?;
            for at in (0..span.bytes).step_by(bytes.len()) {
                let part = &bytes[..bytes.len().min(span.bytes - at)];
                rig.stream().put(span.slice(at, part.len()), part)?;
            }
            span
        }
        Layout::Tiles => {
            let tiles = Tiles::new(s.vocab, s.hidden, Pairing::Neighbours)?;
            let span = rig.output("w", dtype, tiles.bytes() / dtype.bytes())?;
            let row_bytes = s.hidden * dtype.bytes();
            let mut packed = vec![0; tiles.tile_bytes()];
            let steps = packed.len() / STEP_BYTES;
            for tile in 0..tiles.tiles() {
                let read = |row: usize, columns: Range<usize>, to: &mut [u8]| {
                    let first = row % s.period * row_bytes + columns.start * dtype.bytes();
                    to.copy_from_slice(&bytes[first..][..to.len()]);
                    Ok(())
                };
                tiles.write_steps(tile * steps, read, &mut packed)?;
                rig.stream().put(span.slice(tile * packed.len(), packed.len()), &packed)?;
            }
            span
        }
    };
    Ok((table, Weight { span, layout }))
}
