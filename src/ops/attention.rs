//! `attention`: grouped-query attention of single rows over the KV cache.
//!
//! `plain` gives every (row, kv head) one block: prompts have enough of them. `splitkv` cuts the slots of a row
//! into ranges, for decoding, where rows are few and caches long. `flash` and `splitkv_mma` do the same two jobs on
//! tensor cores.

use super::harness::{Case, Check, Rig, Scale, compare, within};
use super::params::AttentionParams;
use super::shared::{self, Checks, address};
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
        Variant {
            name: "flash",
            kernels: kernels!("attention_mma", bf16: "attention_mma_flash_bf16"),
            summary: "prompts on tensor cores, 64 rows x 64 keys; head_dim 64 or 128",
        },
        Variant {
            name: "splitkv_mma",
            kernels: kernels!("attention_mma", bf16: "attention_mma_splitkv_bf16"),
            summary: "as splitkv on tensor cores; head_dim 64 or 128, at most 8 query heads per kv head",
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

/// Threads of a block of the variants on tensor cores (`kThreads` of `attention_mma.cu`).
const MMA_THREADS: u32 = 128;
/// Query rows of a block of `flash` (`kRows`), and keys of each of its two stages (`kKeys`).
const FLASH_ROWS: usize = 64;
/// Query heads of a kv head that `splitkv_mma` takes (`kHeads`).
const MAX_GROUP: usize = 8;
/// Splits that `splitkv_mma` combines (`kMaxSplits`).
const MAX_SPLITS: usize = 64;
/// More weights than this are not asked for ahead: L2 holds other things too.
const MAX_PREFETCH: usize = 16 << 20;

/// The variant for a prompt's rows, or for `decode`, chosen by what does not change from row to row.
pub fn default_variant(
    dtype: DType,
    (heads_q, heads_kv): (usize, usize),
    head_dim: usize,
    decode: bool,
) -> &'static str {
    let mma = dtype == DType::Bf16 && matches!(head_dim, 64 | 128);
    match decode {
        false if mma => "flash",
        false => "plain",
        true if mma && heads_q <= MAX_GROUP * heads_kv => "splitkv_mma",
        true => "splitkv",
    }
}

/// Scratch of `splitkv` and `splitkv_mma`, shared by all layers.
#[derive(Clone, Copy, Debug)]
pub struct SplitScratch {
    /// `[rows, heads_q, splits, head_dim + 2]` f32; aligned to 16 bytes for `splitkv_mma`.
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
    /// Given while decoding: `splitkv_mma` or `splitkv` is then the default.
    pub split: Option<SplitScratch>,
    /// Weights that the next node reads, and nobody writes: `splitkv_mma` asks for them while it waits for the cache.
    pub prefetch: Option<Span>,
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

/// Splits for decoding: two blocks for every SM where there is room, never a few more, which would run after all
/// others and hold up the next launch; but no range shorter than is worth combining. It follows from the capacity, not
/// from the length, so that a recorded node serves every token.
pub fn splits(sm_count: u32, rows: usize, heads_kv: usize, capacity: usize) -> usize {
    let blocks = rows.saturating_mul(heads_kv).max(1);
    (2 * sm_count as usize / blocks).min(capacity / MIN_SLOTS_PER_SPLIT).clamp(1, MAX_SPLITS)
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
    let default = default_variant(launch.dtype, (a.heads_q, a.heads_kv), a.head_dim, a.split.is_some());
    let variant = launch.selection.variant(&OP, default)?;
    let (flash, split_mma) = (variant.name == "flash", variant.name == "splitkv_mma");
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
    if (flash || split_mma) && !matches!(a.head_dim, 64 | 128) {
        return Err(checks.refuse(format!("head_dim is {}, must be 64 or 128", a.head_dim)));
    }
    if split_mma && a.heads_q > MAX_GROUP * a.heads_kv {
        let group = a.heads_q / a.heads_kv;
        return Err(checks.refuse(format!("{group} query heads per kv head, must be at most {MAX_GROUP}")));
    }
    if flash && a.heads_q > 0xffff {
        return Err(checks.refuse(format!("{} query heads, a grid has at most 65535", a.heads_q)));
    }
    checks.product("rows * heads_q", &[a.rows, a.heads_q])?;
    let cache = [a.sequences, a.heads_kv, a.capacity, a.head_dim];
    let q = checks.span("q", a.q, e, &[a.rows, a.heads_q, a.head_dim])?;
    let k_cache = checks.span("k_cache", a.k_cache, e, &cache)?;
    let v_cache = checks.span("v_cache", a.v_cache, e, &cache)?;
    let row_seq = checks.span("row_seq", a.row_seq, 4, &[a.rows])?;
    let row_pos = checks.span("row_pos", a.row_pos, 4, &[a.rows])?;
    let out = checks.span("out", a.out, e, &[a.rows, a.heads_q, a.head_dim])?;
    let vectors = [("k_cache", k_cache), ("v_cache", v_cache), ("q", q), ("out", out)];
    for &(name, span) in &vectors[..if flash || split_mma { 4 } else { 2 }] {
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
    let row_bytes = (a.head_dim + 8) * e;
    if flash {
        let shared = 5 * FLASH_ROWS * row_bytes;
        geometry = Geometry::linear(div_ceil(a.rows, FLASH_ROWS), MMA_THREADS).with_shared(shared as u32);
        geometry.grid[1] = a.heads_q as u32;
        geometry.dependent = launch.dependent;
    }
    if split_mma {
        // q, then k and v of four warps with 32 slots each; float sums of four warps fit into the same.
        let shared = (16 + 4 * 2 * 32) * row_bytes;
        geometry = Geometry::linear(geometry.grid[0], MMA_THREADS).with_shared(shared as u32);
        geometry.dependent = launch.dependent;
    }
    if variant.name == "splitkv" || split_mma {
        let s = a.split.ok_or_else(|| checks.refuse("needs split scratch, none is planned for this node"))?;
        splits = checks.dim("splits", s.splits)?;
        if split_mma && s.splits > MAX_SPLITS {
            return Err(checks.refuse(format!("{splits} splits, must be at most {MAX_SPLITS}")));
        }
        if splits > 0xffff {
            return Err(checks.refuse(format!("{splits} splits, a grid has at most 65535")));
        }
        if splits > 1 {
            let partial =
                checks.span("partial", s.partial, 4, &[a.rows, a.heads_q, s.splits, a.head_dim + 2])?;
            let arrivals = checks.span("arrivals", s.arrivals, 4, &[a.rows, a.heads_kv])?;
            if split_mma && !partial.ptr.0.is_multiple_of(16) {
                return Err(Error::Internal(format!(
                    "op attention: partial at {:#x} is not 16-byte aligned",
                    partial.ptr.0
                )));
            }
            writes.extend([partial, arrivals]);
            scratch = (partial.ptr.0, arrivals.ptr.0);
        }
        geometry.grid[1] = splits;
    }
    let prefetch = a.prefetch.filter(|_| flash || split_mma).map(|w| w.slice(0, w.bytes.min(MAX_PREFETCH)));
    let params = AttentionParams {
        q: q.ptr.0,
        k_cache: k_cache.ptr.0,
        v_cache: v_cache.ptr.0,
        row_seq: row_seq.ptr.0,
        row_pos: row_pos.ptr.0,
        out: out.ptr.0,
        partial: scratch.0,
        arrivals: scratch.1,
        prefetch: address(prefetch),
        rows: checks.dim("rows", a.rows)?,
        heads_q: checks.dim("heads_q", a.heads_q)?,
        heads_kv: checks.dim("heads_kv", a.heads_kv)?,
        head_dim: checks.dim("head_dim", a.head_dim)?,
        capacity: checks.dim("capacity", a.capacity)?,
        splits,
        scale: a.scale,
        prefetch_bytes: prefetch.map_or(0, |w| w.bytes as u32),
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

/// One test shape.
#[derive(Clone, Debug)]
struct Shape {
    heads_q: usize,
    heads_kv: usize,
    head_dim: usize,
    /// Sequence of every row, and how many slots it sees.
    rows: Vec<(usize, usize)>,
    splits: usize,
}

impl Shape {
    /// Row m sees `lengths[m]` slots of sequence `m % sequences`.
    fn decode(
        (heads_q, heads_kv, head_dim): (usize, usize, usize),
        sequences: usize,
        lengths: &[usize],
        splits: usize,
    ) -> Shape {
        let rows = lengths.iter().enumerate().map(|(m, &length)| (m % sequences, length)).collect();
        Shape { heads_q, heads_kv, head_dim, rows, splits }
    }

    /// Sequence after sequence: `rows` rows after `before` slots.
    fn prompts((heads_q, heads_kv, head_dim): (usize, usize, usize), prompts: &[(usize, usize)]) -> Shape {
        let rows = prompts.iter().enumerate();
        let rows = rows.flat_map(|(s, &(before, rows))| (1..=rows).map(move |row| (s, before + row)));
        Shape { heads_q, heads_kv, head_dim, rows: rows.collect(), splits: 1 }
    }

    fn sequences(&self) -> usize {
        self.rows.iter().map(|&(sequence, _)| sequence + 1).max().unwrap_or(1)
    }
}

fn cases() -> Vec<Case> {
    // Lengths cross the tile of 256 slots; some splits get no slot at all; eleven heads of a group are two passes.
    let shapes = [
        Shape::decode((3, 1, 16), 1, &[1], 1),
        Shape::decode((3, 1, 48), 2, &[5, 37], 3),
        Shape::decode((5, 1, 64), 2, &[33, 1], 4),
        Shape::decode((4, 2, 16), 3, &[9, 257, 64], 2),
        Shape::decode((7, 1, 128), 1, &[70], 5),
        Shape::decode((2, 2, 256), 2, &[40, 3], 7),
        Shape::decode((11, 1, 16), 1, &[20], 2),
        Shape::decode((11, 1, 32), 1, &[300, 17], 2),
        Shape::decode((5, 1, 64), 2, &[300, 530], 1),
        Shape::decode((40, 8, 16), 2, &[18, 700], 3),
        Shape::decode((3, 1, 16), 1, &[1, 2, 3, 4, 5, 6, 7, 8, 9], 2),
    ];
    // For the variants on tensor cores: every size of group, warps and splits without a slot, several rounds of a warp.
    let groups = [
        Shape::decode((1, 1, 64), 1, &[1], 1),
        Shape::decode((4, 2, 128), 3, &[31, 33, 65], 2),
        Shape::decode((3, 1, 64), 1, &[100], 64),
        Shape::decode((8, 2, 64), 2, &[290, 129], 1),
        Shape::decode((6, 1, 64), 1, &[47], 3),
        Shape::decode((8, 1, 128), 2, &[2, 140], 2),
    ];
    // Tiles of one sequence, of several, of one that goes on in the next tile; slots from an earlier prompt.
    let prompts = [
        Shape::prompts((5, 1, 64), &[(0, 70), (3, 5), (60, 10)]),
        Shape::prompts((2, 2, 128), &[(0, 65)]),
        Shape::prompts((2, 1, 64), &[(0, 1), (130, 2), (0, 140), (64, 1)]),
        Shape::prompts((1, 1, 128), &[(200, 9), (0, 3)]),
        // The second one is no affair of the first warp, and its rows see different numbers of key tiles.
        Shape::prompts((2, 1, 64), &[(0, 20), (50, 40)]),
    ];
    let sizes = (40, 8, 128);
    let mut cases = Vec::new();
    for &dtype in DType::ALL {
        for s in &shapes {
            cases.push(make_case(s, "plain", dtype, None));
            cases.push(make_case(s, "splitkv", dtype, None));
        }
        for lengths in [&[600][..], &[1120, 1025], &[2300, 1240, 1030]] {
            let rows = lengths.len();
            let s = Shape::decode(sizes, rows, lengths, splits(132, rows, 8, 2304));
            cases.push(make_case(&s, "splitkv", dtype, Some(Scale::Real)));
            if dtype == DType::Bf16 {
                cases.push(make_case(&s, "splitkv_mma", dtype, Some(Scale::Real)));
            }
        }
        let prompt = Shape::prompts(sizes, &[(0, 37)]);
        cases.push(make_case(&prompt, "plain", dtype, Some(Scale::Real)));
    }
    for s in shapes.iter().chain(&groups).chain(&prompts) {
        let heads = (s.heads_q, s.heads_kv);
        for (decode, name) in [(false, "flash"), (true, "splitkv_mma")] {
            if default_variant(DType::Bf16, heads, s.head_dim, decode) == name {
                cases.push(make_case(s, name, DType::Bf16, None));
            }
        }
    }
    let prompts = Shape::prompts(sizes, &[(0, 130), (0, 133)]);
    cases.push(make_case(&prompts, "flash", DType::Bf16, Some(Scale::Real)));
    cases
}

fn make_case(s: &Shape, variant: &'static str, dtype: DType, scale: Option<Scale>) -> Case {
    let slots: usize = s.rows.iter().map(|&(_, length)| length).sum();
    let flops = (4 * slots * s.heads_q * s.head_dim) as u64;
    let bytes = (2 * slots * s.heads_kv * s.head_dim * dtype.bytes()) as u64;
    let split = if variant.starts_with("splitkv") { format!(",splits={}", s.splits) } else { String::new() };
    let lengths: Vec<String> = s.rows.iter().take(4).map(|(_, length)| length.to_string()).collect();
    let label = format!(
        "rows={},heads={}/{},head_dim={},sequences={},slots={}{split}",
        s.rows.len(),
        s.heads_q,
        s.heads_kv,
        s.head_dim,
        s.sequences(),
        lengths.join("+"),
    );
    let scale = scale.unwrap_or(shared::scale_for(flops));
    let s = s.clone();
    shared::case(&OP, variant, dtype, scale, (bytes, flops), label, move |rig, launch| run(rig, launch, &s))
}

fn run(rig: &mut Rig, launch: &Launch, s: &Shape) -> Result<Vec<Check>> {
    let dtype = launch.dtype;
    let (rows, sequences) = (s.rows.len(), s.sequences());
    let capacity = s.rows.iter().map(|&(_, length)| length + 3).max().unwrap_or(1);
    let row_seq: Vec<u32> = s.rows.iter().map(|&(sequence, _)| sequence as u32).collect();
    let row_pos: Vec<u32> = s.rows.iter().map(|&(_, length)| length as u32 - 1).collect();
    // Slots that no row sees hold NaN: a kernel that touches one shows it.
    let cache = |rig: &mut Rig, name: &str| {
        let mut values = rig.normal(sequences * s.heads_kv * capacity * s.head_dim, 1.0);
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
            prefetch: Some(q.span),
            rows,
            sequences,
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
