//! `attention`: grouped-query attention of single rows over the KV cache.
//!
//! `plain` gives every (row, kv head) one block: prompts have enough of them. `splitkv` cuts the slots of a row
//! into ranges, for decoding, where rows are few and caches long.

use super::harness::{Case, Check, Rig, Scale, compare, within};
use super::params::AttentionParams;
use super::shared::{self, Checks};
use super::{DType, Launch, Op, Variant, div_ceil};
use crate::device::{Geometry, Node, ParamBytes, Span};
use crate::error::{Error, Result};
use crate::kernels;
use crate::reference::attention::{Attention, attention};
use crate::reference::{Exact, PlainBf16, PlainF32};

/// The registry row.
pub static OP: Op = Op {
    name: "attention",
    summary: "out = softmax(scale q k^T) v over slots 0..=row_pos, grouped query heads",
    bound: "decoding: latency (4 KB of cache per slot, layer and branch at 14B in bf16)",
    variants: &[
        Variant {
            name: "plain",
            kernels: kernels!("attention", f32: "attention_plain_f32", bf16: "attention_plain_bf16"),
            summary: "one block per row and kv head; head_dim a multiple of 16 up to 256",
        },
        Variant {
            name: "splitkv",
            kernels: kernels!("attention", f32: "attention_splitkv_f32", bf16: "attention_splitkv_bf16"),
            summary: "slots split over blocks, combined by the last to arrive; head_dim as plain",
        },
    ],
    cases,
};

/// Threads of a block (`kThreads`).
const THREADS: u32 = 256;
/// Largest head that fits the kernel's shared memory (`kMaxHeadDim`).
const MAX_HEAD_DIM: usize = 256;
/// A split of fewer slots than this costs more to combine than it saves.
const MIN_SLOTS_PER_SPLIT: usize = 32;

/// Scratch of `splitkv`, shared by all layers.
#[derive(Clone, Copy, Debug)]
pub struct SplitScratch {
    /// `[rows, heads_q, splits, head_dim + 2]` f32.
    pub partial: Span,
    /// `[rows, heads_kv]` u32, zero before the first launch.
    pub arrivals: Span,
    /// Ranges that the slots of a row are cut into.
    pub splits: usize,
}

/// Tensors and dimensions; shapes in `kernels/params.h` (`AttentionParams`).
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// `[rows, heads_q, head_dim]`
    pub q: Span,
    /// `[sequences, heads_kv, capacity, head_dim]`
    pub k_cache: Span,
    /// As `k_cache`.
    pub v_cache: Span,
    /// `[rows]` u32.
    pub row_seq: Span,
    /// `[rows]` u32: last slot that the row sees.
    pub row_pos: Span,
    /// `[rows, heads_q, head_dim]`, written.
    pub out: Span,
    /// Given while decoding: `splitkv` is then the default.
    pub split: Option<SplitScratch>,
    /// Rows.
    pub rows: usize,
    /// Sequences in the cache.
    pub sequences: usize,
    /// `num_attention_heads`, a multiple of `heads_kv`.
    pub heads_q: usize,
    /// `num_key_value_heads`.
    pub heads_kv: usize,
    /// `head_dim`, a multiple of 16, at most 256.
    pub head_dim: usize,
    /// Slots per sequence.
    pub capacity: usize,
    /// Factor on the scores, `1 / sqrt(head_dim)`.
    pub scale: f32,
}

/// Splits for decoding: enough blocks for every SM, but no range shorter than is worth combining. It follows
/// from the capacity, not from the length, so that a recorded node serves every token.
pub fn splits(sm_count: u32, rows: usize, heads_kv: usize, capacity: usize) -> usize {
    let blocks = rows.saturating_mul(heads_kv).max(1);
    (2 * sm_count as usize).div_ceil(blocks).min(capacity / MIN_SLOTS_PER_SPLIT).max(1)
}

/// Bytes of [`SplitScratch::partial`] and [`SplitScratch::arrivals`].
pub fn scratch_bytes(
    rows: usize,
    heads_q: usize,
    heads_kv: usize,
    head_dim: usize,
    splits: usize,
) -> (usize, usize) {
    (rows * heads_q * splits * (head_dim + 2) * 4, rows * heads_kv * 4)
}

/// The node that computes `args`.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let a = args;
    let variant = launch.selection.variant(&OP, if a.split.is_some() { "splitkv" } else { "plain" })?;
    let checks = Checks::new(OP.name, variant.name);
    let e = launch.dtype.bytes();
    if a.head_dim == 0 || !a.head_dim.is_multiple_of(16) || a.head_dim > MAX_HEAD_DIM {
        let reason = format!("head_dim is {}, must be a multiple of 16 up to {MAX_HEAD_DIM}", a.head_dim);
        return Err(checks.refuse(reason));
    }
    if a.heads_kv == 0 || !a.heads_q.is_multiple_of(a.heads_kv) {
        let reason = format!("{} query heads do not divide into {} kv heads", a.heads_q, a.heads_kv);
        return Err(checks.refuse(reason));
    }
    checks.product("rows * heads_q", &[a.rows, a.heads_q])?;
    let cache = [a.sequences, a.heads_kv, a.capacity, a.head_dim];
    let q = checks.span("q", a.q, e, &[a.rows, a.heads_q, a.head_dim])?;
    let k_cache = checks.span("k_cache", a.k_cache, e, &cache)?;
    let v_cache = checks.span("v_cache", a.v_cache, e, &cache)?;
    let row_seq = checks.span("row_seq", a.row_seq, 4, &[a.rows])?;
    let row_pos = checks.span("row_pos", a.row_pos, 4, &[a.rows])?;
    let out = checks.span("out", a.out, e, &[a.rows, a.heads_q, a.head_dim])?;
    for (name, span) in [("k_cache", k_cache), ("v_cache", v_cache)] {
        if !span.ptr.0.is_multiple_of(16) {
            return Err(Error::Internal(format!(
                "op attention: {name} at {:#x} is not 16-byte aligned",
                span.ptr.0
            )));
        }
    }

    let mut geometry = Geometry::linear(div_ceil(a.rows * a.heads_kv, 1), THREADS);
    geometry.dependent = launch.dependent;
    let reads = vec![q, k_cache, v_cache, row_seq, row_pos];
    let mut writes = vec![out];
    let mut scratch = (0, 0);
    let mut splits = 1;
    if variant.name == "splitkv" {
        let s = a.split.ok_or_else(|| checks.refuse("needs split scratch, none is planned for this node"))?;
        splits = checks.dim("splits", s.splits)?;
        if splits > 0xffff {
            return Err(checks.refuse(format!("{splits} splits, a grid has at most 65535")));
        }
        if splits > 1 {
            let partial =
                checks.span("partial", s.partial, 4, &[a.rows, a.heads_q, s.splits, a.head_dim + 2])?;
            let arrivals = checks.span("arrivals", s.arrivals, 4, &[a.rows, a.heads_kv])?;
            writes.extend([partial, arrivals]);
            scratch = (partial.ptr.0, arrivals.ptr.0);
        }
        geometry.grid[1] = splits;
    }
    let params = AttentionParams {
        q: q.ptr.0,
        k_cache: k_cache.ptr.0,
        v_cache: v_cache.ptr.0,
        row_seq: row_seq.ptr.0,
        row_pos: row_pos.ptr.0,
        out: out.ptr.0,
        partial: scratch.0,
        arrivals: scratch.1,
        rows: checks.dim("rows", a.rows)?,
        heads_q: checks.dim("heads_q", a.heads_q)?,
        heads_kv: checks.dim("heads_kv", a.heads_kv)?,
        head_dim: checks.dim("head_dim", a.head_dim)?,
        capacity: checks.dim("capacity", a.capacity)?,
        splits,
        scale: a.scale,
        pad: 0,
    };
    // The last block reads back what all wrote, so the scratch is read as well as written.
    let reads = reads.into_iter().chain(writes[1..].iter().copied()).collect();
    Ok(Node {
        label: label.into(),
        kernel: variant.kernel(OP.name, launch.dtype)?,
        geometry,
        params: ParamBytes::of(&params),
        reads,
        writes,
    })
}

/// One test shape: row m sees `lengths[m]` slots of sequence `m % sequences`.
#[derive(Clone, Copy, Debug)]
struct Shape {
    heads_q: usize,
    heads_kv: usize,
    head_dim: usize,
    sequences: usize,
    lengths: &'static [usize],
    splits: usize,
}

fn cases() -> Vec<Case> {
    let shape = |heads_q, heads_kv, head_dim, sequences, lengths, splits| Shape {
        heads_q,
        heads_kv,
        head_dim,
        sequences,
        lengths,
        splits,
    };
    // Lengths cross the tile of 256 slots; some splits get no slot at all; eleven heads of a group are two passes.
    let shapes = [
        shape(3, 1, 16, 1, &[1], 1),
        shape(3, 1, 48, 2, &[5, 37], 3),
        shape(5, 1, 64, 2, &[33, 1], 4),
        shape(4, 2, 16, 3, &[9, 257, 64], 2),
        shape(7, 1, 128, 1, &[70], 5),
        shape(2, 2, 256, 2, &[40, 3], 7),
        shape(11, 1, 16, 1, &[20], 2),
        shape(11, 1, 32, 1, &[300, 17], 2),
        shape(5, 1, 64, 2, &[300, 530], 1),
        shape(40, 8, 16, 2, &[18, 700], 3),
        shape(3, 1, 16, 1, &[1, 2, 3, 4, 5, 6, 7, 8, 9], 2),
    ];
    const DECODE: [&[usize]; 3] = [&[600], &[1120, 1025], &[2300, 1240, 1030]];
    let mut cases = Vec::new();
    for &dtype in DType::ALL {
        for s in shapes {
            cases.push(make_case(s, "plain", dtype, None));
            cases.push(make_case(s, "splitkv", dtype, None));
        }
        for lengths in DECODE {
            let rows = lengths.len();
            let s = shape(40, 8, 128, rows, lengths, splits(132, rows, 8, 2304));
            cases.push(make_case(s, "splitkv", dtype, Some(Scale::Real)));
        }
        const PROMPT: [usize; 37] = {
            let mut lengths = [0; 37];
            let mut i = 0;
            while i < 37 {
                lengths[i] = i + 1;
                i += 1;
            }
            lengths
        };
        cases.push(make_case(shape(40, 8, 128, 1, &PROMPT, 1), "plain", dtype, Some(Scale::Real)));
    }
    cases
}

fn make_case(s: Shape, variant: &'static str, dtype: DType, scale: Option<Scale>) -> Case {
    let slots: usize = s.lengths.iter().sum();
    let flops = (4 * slots * s.heads_q * s.head_dim) as u64;
    let bytes = (2 * slots * s.heads_kv * s.head_dim * dtype.bytes()) as u64;
    let split = if variant == "splitkv" { format!(",splits={}", s.splits) } else { String::new() };
    let lengths: Vec<String> = s.lengths.iter().take(4).map(usize::to_string).collect();
    let label = format!(
        "rows={},heads={}/{},head_dim={},slots={}{split}",
        s.lengths.len(),
        s.heads_q,
        s.heads_kv,
        s.head_dim,
        lengths.join("+"),
    );
    let scale = scale.unwrap_or(shared::scale_for(flops));
    shared::case(&OP, variant, dtype, scale, (bytes, flops), label, move |rig, launch| run(rig, launch, &s))
}

fn run(rig: &mut Rig, launch: &Launch, s: &Shape) -> Result<Vec<Check>> {
    let dtype = launch.dtype;
    let rows = s.lengths.len();
    let capacity = s.lengths.iter().max().map_or(1, |&l| l + 3);
    let row_seq: Vec<u32> = (0..rows).map(|m| (m % s.sequences) as u32).collect();
    let row_pos: Vec<u32> = s.lengths.iter().map(|&l| l as u32 - 1).collect();
    // Slots that no row sees hold NaN: a kernel that touches one shows it.
    let cache = |rig: &mut Rig, name: &str| {
        let mut values = rig.normal(s.sequences * s.heads_kv * capacity * s.head_dim, 1.0);
        for (i, slot) in values.chunks_exact_mut(s.head_dim).enumerate() {
            let (sequence, t) = (i / capacity / s.heads_kv, i % capacity);
            let used = row_seq.iter().zip(&row_pos).any(|(&q, &p)| q as usize == sequence && t <= p as usize);
            if !used {
                slot.fill(f32::NAN);
            }
        }
        rig.input(name, dtype, values)
    };
    let k_cache = cache(rig, "k_cache")?;
    let v_cache = cache(rig, "v_cache")?;
    let q = rig.random("q", dtype, rows * s.heads_q * s.head_dim, 1.5)?;
    let row_seq_span = rig.indices("row_seq", &row_seq)?;
    let row_pos_span = rig.indices("row_pos", &row_pos)?;
    let out = rig.output("out", dtype, rows * s.heads_q * s.head_dim)?;
    let scale = 1.0 / (s.head_dim as f32).sqrt();
    let arrivals = rig.indices("arrivals", &vec![0; rows * s.heads_kv])?;
    let (partial_bytes, _) = scratch_bytes(rows, s.heads_q, s.heads_kv, s.head_dim, s.splits);
    let partial = rig.output("partial", DType::F32, partial_bytes / 4)?;
    let scratch = SplitScratch { partial, arrivals, splits: s.splits };
    let launched = node(
        launch,
        "test.attention",
        &Args {
            q: q.span,
            k_cache: k_cache.span,
            v_cache: v_cache.span,
            row_seq: row_seq_span,
            row_pos: row_pos_span,
            out,
            split: Some(scratch),
            rows,
            sequences: s.sequences,
            heads_q: s.heads_q,
            heads_kv: s.heads_kv,
            head_dim: s.head_dim,
            capacity,
            scale,
        },
    )?;
    rig.run(&launched)?;
    let first = rig.read(out, dtype)?;
    // A second launch on the same scratch: the counters must have been left at zero, the bits must be the same.
    let counters: Vec<f32> = rig.read_bytes(arrivals)?.iter().map(|&b| b.into()).collect();
    rig.run(&launched)?;
    let second = rig.read(out, dtype)?;

    let inputs = Attention {
        q: &q.values,
        k_cache: &k_cache.values,
        v_cache: &v_cache.values,
        row_seq: &row_seq,
        row_pos: &row_pos,
        num_attention_heads: s.heads_q,
        num_key_value_heads: s.heads_kv,
        head_dim: s.head_dim,
        capacity,
        scale,
    };
    let exact = attention::<Exact>(&inputs);
    let plain = match dtype {
        DType::F32 => attention::<PlainF32>(&inputs),
        DType::Bf16 => attention::<PlainBf16>(&inputs),
    };
    let mut checks = vec![
        compare("out", dtype, &first, &exact, &plain),
        within("arrivals", &counters, &vec![0.0; counters.len()], 0.0),
    ];
    if first != second {
        checks.push(compare("out of a second launch", dtype, &second, &exact, &plain));
        if let Some(check) = checks.last_mut() {
            check.ok = false;
        }
    }
    Ok(checks)
}
