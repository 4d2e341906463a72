//! `qkv`: RMSNorm, q/k/v projection, bias, rotary embedding and the write into the KV cache, in one launch.
//!
//! Owns the op's shapes and what it reads and writes. `row_pos` lives on the device, so the whole cache of the
//! layer is declared as written.

use super::harness::{Case, Check, Rig, Scale, compare};
use super::params::QkvParams;
use super::product::{self, Product, ProductScratch, Weight};
use super::shared::{self, Checks};
use super::{DType, Launch, Op, Variant};
use crate::device::{Node, Span};
use crate::error::Result;
use crate::kernels;
use crate::reference::qkv::{Projected, Qkv, qkv};
use crate::reference::{Exact, PlainBf16, PlainF32};
use crate::weights::pack::Pairing;

/// The registry row.
pub static OP: Op = Op {
    name: "qkv",
    summary: "q, k, v = w rms(x) + bias; q, k rotated; k, v into the cache",
    bound: "few rows: bytes of w (73.4 MB per layer at 14B in bf16); many rows: FP32 FMA",
    variants: &[
        Variant {
            name: "plain",
            kernels: kernels!("qkv", f32: "qkv_plain_f32", bf16: "qkv_plain_bf16"),
            summary: "warp per rotary pair, weights read once per 8 rows; any shape",
        },
        Variant {
            name: "tile",
            kernels: kernels!("qkv", f32: "qkv_tile_f32", bf16: "qkv_tile_bf16"),
            summary: "64 x 64 tiles in shared memory, for prompts; any shape",
        },
        product::stream(kernels!("qkv", bf16: "qkv_stream_bf16")),
        product::ring(kernels!("qkv", bf16: "qkv_ring_bf16")),
        product::mma(kernels!("qkv", bf16: "qkv_mma_bf16")),
    ],
    cases,
};

/// Tensors and dimensions; shapes in `kernels/params.h` (`QkvParams`).
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// Residual stream, `[rows, hidden_size]` f32.
    pub x: Span,
    /// `[hidden_size]`
    pub norm_w: Span,
    /// `[rows, hidden_size]`: the rows normed by [`norm_rows`](super::norm_rows), for `mma` alone, which reads neither
    /// `x` nor `norm_w`.
    pub normed: Option<Span>,
    /// `[(heads_q + 2 heads_kv) * head_dim, hidden_size]`
    pub w: Weight,
    /// `[(heads_q + 2 heads_kv) * head_dim]`
    pub bias: Option<Span>,
    /// `[positions, head_dim]` f32: cosines, then sines.
    pub rope: Span,
    /// `[rows]` u32.
    pub row_seq: Span,
    /// `[rows]` u32.
    pub row_pos: Span,
    /// `[sequences]` u32.
    pub rope_offset: Span,
    /// `[rows, heads_q, head_dim]`, written.
    pub q: Span,
    /// `[sequences, heads_kv, capacity, head_dim]`, slots of the rows written.
    pub k_cache: Span,
    /// As `k_cache`.
    pub v_cache: Span,
    /// Rows: prompt tokens, or one per sequence while decoding.
    pub rows: usize,
    /// Sequences in the cache.
    pub sequences: usize,
    /// `hidden_size`.
    pub hidden: usize,
    /// `num_attention_heads`.
    pub heads_q: usize,
    /// `num_key_value_heads`.
    pub heads_kv: usize,
    /// `head_dim`, even.
    pub head_dim: usize,
    /// Slots per sequence.
    pub capacity: usize,
    /// Rows of `rope`.
    pub positions: usize,
    /// `rms_norm_eps`.
    pub eps: f32,
    /// Scratch of the variants that share tiles between blocks.
    pub scratch: Option<ProductScratch>,
}

/// The node that computes `args`.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let a = args;
    let checks = Checks::new(OP.name, "any");
    let e = launch.dtype.bytes();
    if a.head_dim == 0 || !a.head_dim.is_multiple_of(2) {
        return Err(
            checks.refuse(format!("head_dim is {}, must be even: it is rotated in halves", a.head_dim))
        );
    }
    let heads = a.heads_kv.saturating_mul(2).saturating_add(a.heads_q);
    let outputs = checks.product("(heads_q + 2 heads_kv) * head_dim", &[heads, a.head_dim])?;
    let shape = product::Shape { rows: a.rows, inner: a.hidden, units: outputs / 2 };
    let product = Product::new(&OP, launch, a.w.layout, shape, a.scratch)?;
    let checks = product.checks;
    let cache = [a.sequences, a.heads_kv, a.capacity, a.head_dim];
    let (rows, [x, norm_w]) = product.normed_rows((a.x, a.norm_w), a.normed, launch.dtype, shape)?;
    let w = product.weight("w", a.w.span, launch.dtype, outputs, shape)?;
    let bias = checks.optional("bias", a.bias, e, &[outputs])?;
    let rope = checks.span("rope", a.rope, 4, &[a.positions, a.head_dim])?;
    let row_seq = checks.span("row_seq", a.row_seq, 4, &[a.rows])?;
    let row_pos = checks.span("row_pos", a.row_pos, 4, &[a.rows])?;
    let rope_offset = checks.span("rope_offset", a.rope_offset, 4, &[a.sequences])?;
    let q = checks.span("q", a.q, e, &[a.rows, a.heads_q, a.head_dim])?;
    let k_cache = checks.span("k_cache", a.k_cache, e, &cache)?;
    let v_cache = checks.span("v_cache", a.v_cache, e, &cache)?;
    let [partial, arrivals] = product.scratch();
    let params = QkvParams {
        x,
        norm_w,
        w: w.ptr.0,
        bias: shared::address(bias),
        rope: rope.ptr.0,
        row_seq: row_seq.ptr.0,
        row_pos: row_pos.ptr.0,
        rope_offset: rope_offset.ptr.0,
        q: q.ptr.0,
        k_cache: k_cache.ptr.0,
        v_cache: v_cache.ptr.0,
        partial,
        arrivals,
        next: product.next(),
        rows: checks.dim("rows", a.rows)?,
        hidden: checks.dim("hidden", a.hidden)?,
        heads_q: checks.dim("heads_q", a.heads_q)?,
        heads_kv: checks.dim("heads_kv", a.heads_kv)?,
        head_dim: checks.dim("head_dim", a.head_dim)?,
        capacity: checks.dim("capacity", a.capacity)?,
        positions: checks.dim("positions", a.positions)?,
        eps: a.eps,
    };
    let reads = rows.into_iter().chain([w, rope, row_seq, row_pos, rope_offset]).chain(bias);
    Ok(product.node(label, &params, reads, [q, k_cache, v_cache]))
}

/// One test shape. Row m belongs to sequence `row_seq[m]`; unused slots of the cache hold NaN.
#[derive(Clone, Debug)]
struct Shape {
    hidden: usize,
    heads_q: usize,
    heads_kv: usize,
    head_dim: usize,
    capacity: usize,
    bias: bool,
    row_seq: Vec<u32>,
    row_pos: Vec<u32>,
    rope_offset: Vec<u32>,
}

impl Shape {
    /// Prompts of these lengths, one row per token, with `gap` slots of each sequence already filled.
    fn prompts(lengths: &[u32], gap: u32, dims: (usize, usize, usize, usize), bias: bool) -> Shape {
        let (hidden, heads_q, heads_kv, head_dim) = dims;
        let rows = || lengths.iter().enumerate().flat_map(|(s, &n)| (0..n).map(move |t| (s as u32, t)));
        let longest = lengths.iter().copied().max().unwrap_or(1) + gap * lengths.len() as u32;
        Shape {
            hidden,
            heads_q,
            heads_kv,
            head_dim,
            capacity: longest as usize + 3,
            bias,
            row_seq: rows().map(|(s, _)| s).collect(),
            row_pos: rows().map(|(s, t)| t + gap * s).collect(),
            rope_offset: (0..lengths.len() as u32).map(|s| s * 2).collect(),
        }
    }
}

fn cases() -> Vec<Case> {
    // (hidden, heads_q, heads_kv, head_dim): the tiny models' and odd ones.
    let shapes = [
        Shape::prompts(&[1], 2, (96, 3, 1, 16), true),
        Shape::prompts(&[1, 1], 5, (80, 4, 2, 48), false),
        Shape::prompts(&[2, 1], 1, (192, 5, 1, 64), true),
        Shape::prompts(&[3, 2], 0, (192, 7, 1, 16), true),
        Shape::prompts(&[5, 3], 4, (96, 4, 2, 16), true),
        Shape::prompts(&[9], 0, (80, 3, 1, 16), false),
        Shape::prompts(&[20, 17], 3, (96, 3, 1, 48), true),
        Shape::prompts(&[2, 2], 3, (99, 2, 1, 6), true),
        Shape::prompts(&[70], 1, (70, 2, 1, 34), false),
        // Packed weights: rows of one step, a tail of a tile, long rows, several groups of rows.
        Shape::prompts(&[3, 1], 2, (32, 2, 1, 6), true),
        Shape::prompts(&[4, 3], 2, (288, 2, 1, 10), true),
        Shape::prompts(&[90, 43], 2, (64, 3, 1, 16), true),
        // In parts of K for mma; several groups of its rows.
        Shape::prompts(&[9], 2, (1056, 2, 1, 16), true),
        Shape::prompts(&[201, 90], 2, (1088, 1, 1, 16), true),
    ];
    let real = |lengths: &[u32]| Shape::prompts(lengths, 600, (5120, 40, 8, 128), true);
    let eight = [1; 8];
    let real_shapes = [real(&[1]), real(&[1, 1]), real(&[1, 1, 1]), real(&eight), real(&[37])];
    let size = |s: &Shape| (s.row_seq.len(), s.hidden);
    product::cases(&OP, (&shapes, &real_shapes), size, make_case)
}

fn make_case(s: Shape, variant: &'static str, dtype: DType, scale: Option<Scale>) -> Case {
    let outputs = (s.heads_q + 2 * s.heads_kv) * s.head_dim;
    let flops = (2 * s.row_seq.len() * outputs * s.hidden) as u64;
    let bytes = (outputs * s.hidden * dtype.bytes()) as u64;
    let label = format!(
        "rows={},hidden={},heads={}/{},head_dim={},bias={}",
        s.row_seq.len(),
        s.hidden,
        s.heads_q,
        s.heads_kv,
        s.head_dim,
        u8::from(s.bias)
    );
    let scale = scale.unwrap_or(shared::scale_for(flops));
    let rows = s.row_seq.len();
    product::case(&OP, variant, dtype, scale, (rows, bytes, flops), label, move |rig, launch, scratch| {
        run(variant, rig, launch, &s, scratch)
    })
}

fn run(
    variant: &str,
    rig: &mut Rig,
    launch: &Launch,
    s: &Shape,
    scratch: Option<ProductScratch>,
) -> Result<Vec<Check>> {
    let dtype = launch.dtype;
    let (rows, sequences) = (s.row_seq.len(), s.rope_offset.len());
    let outputs = (s.heads_q + 2 * s.heads_kv) * s.head_dim;
    let angles: Vec<u32> =
        s.row_seq.iter().zip(&s.row_pos).map(|(&q, &p)| p + s.rope_offset[q as usize]).collect();
    let positions = angles.iter().max().map_or(1, |&m| m as usize + 1);

    let x = rig.random("x", DType::F32, rows * s.hidden, 1.5)?;
    let norm_w = rig.random("norm_w", dtype, s.hidden, 1.0)?;
    let deviation = 0.5 / (s.hidden as f32).sqrt();
    let (size, pairing) = ((outputs, s.hidden), Pairing::Rotary { head_dim: s.head_dim });
    let (weights, w) = product::random_weight(rig, variant, ("w", dtype, deviation), size, pairing)?;
    let bias = s.bias.then(|| rig.random("bias", dtype, outputs, 0.5)).transpose()?;
    let half = s.head_dim / 2;
    let table = (0..positions * s.head_dim)
        .map(|i| {
            let (position, j) = (i / s.head_dim, i % s.head_dim);
            let angle = position as f64 * 1e4f64.powf(-((j % half) as f64) / half as f64);
            // Rounded to the element type, as the table is defined.
            let value = (if j < half { angle.cos() } else { angle.sin() }) as f32;
            if dtype == DType::Bf16 { half::bf16::from_f32(value).to_f32() } else { value }
        })
        .collect();
    let rope = rig.input("rope", DType::F32, table)?;
    let row_seq = rig.indices("row_seq", &s.row_seq)?;
    let row_pos = rig.indices("row_pos", &s.row_pos)?;
    let rope_offset = rig.indices("rope_offset", &s.rope_offset)?;
    let cache_len = sequences * s.heads_kv * s.capacity * s.head_dim;
    let q = rig.output("q", dtype, rows * s.heads_q * s.head_dim)?;
    let k_cache = rig.output("k_cache", dtype, cache_len)?;
    let v_cache = rig.output("v_cache", dtype, cache_len)?;
    let normed = product::norm_rows(rig, launch, (x.span, norm_w.span), (rows, s.hidden), variant)?;
    let args = Args {
        x: x.span,
        norm_w: norm_w.span,
        normed,
        w,
        bias: bias.as_ref().map(|b| b.span),
        rope: rope.span,
        row_seq,
        row_pos,
        rope_offset,
        q,
        k_cache,
        v_cache,
        rows,
        sequences,
        hidden: s.hidden,
        heads_q: s.heads_q,
        heads_kv: s.heads_kv,
        head_dim: s.head_dim,
        capacity: s.capacity,
        positions,
        eps: 1e-6,
        scratch,
    };
    rig.run(&node(launch, "test.qkv", &args)?)?;

    let inputs = Qkv {
        x: &x.values,
        norm_weight: &norm_w.values,
        weight: &weights,
        bias: bias.as_ref().map(|b| b.values.as_slice()),
        rope: &rope.values,
        positions: &angles,
        hidden_size: s.hidden,
        num_attention_heads: s.heads_q,
        num_key_value_heads: s.heads_kv,
        head_dim: s.head_dim,
        eps: 1e-6,
    };
    let exact = qkv::<Exact>(&inputs);
    let plain = match dtype {
        DType::F32 => qkv::<PlainF32>(&inputs),
        DType::Bf16 => qkv::<PlainBf16>(&inputs),
    };
    // The written rows in a cache that is NaN everywhere else.
    let cached = |rows: &[f64]| {
        let mut cache = vec![f64::NAN; cache_len];
        for (i, row) in rows.chunks_exact(s.head_dim).enumerate() {
            let (m, head) = (i / s.heads_kv, i % s.heads_kv);
            let slot = (s.row_seq[m] as usize * s.heads_kv + head) * s.capacity + s.row_pos[m] as usize;
            cache[slot * s.head_dim..][..s.head_dim].copy_from_slice(row);
        }
        cache
    };
    let mut check = |name: &str, span: Span, of: fn(&Projected) -> &[f64], in_cache: bool| -> Result<Check> {
        let place = |p| if in_cache { cached(of(p)) } else { of(p).to_vec() };
        Ok(compare(name, dtype, &rig.read(span, dtype)?, &place(&exact), &place(&plain)))
    };
    Ok(vec![
        check("q", q, |p| &p.q, false)?,
        check("k_cache", k_cache, |p| &p.k, true)?,
        check("v_cache", v_cache, |p| &p.v, true)?,
    ])
}
