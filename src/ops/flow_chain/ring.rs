//! Geometry of the variants `ring` and `resident`: shares of the rows, images of a pass, shared memory.
//!
//! Mirrors `kernels/flow_ring.cu`. What a shape is refused for does not depend on the number of images, and neither does
//! an image's result: images that do not fit one pass make another.

use super::Args;
use crate::device::Geometry;
use crate::ops::params::FlowExchange;
use crate::ops::{DType, Launch};

/// Sequences of a pass (`kColumns`).
const COLUMNS: usize = 8;
/// Rows of a tile (`kTile`) and elements of a segment's rows (`kSegment`).
const TILE: usize = 16;
const SEGMENT: usize = 512;
/// What the widths must be multiples of (`kStep`).
const STEP: usize = 32;
/// Rows of a word between the blocks (`kTriple`).
const TRIPLE: usize = 3;
/// Stages of the ring: four segments of 13 KB cover the latency of memory; more make up for longer exchanges.
const MIN_STAGES: usize = 4;
const MAX_STAGES: usize = 16;
/// Segments that may stay.
const MAX_RESIDENT: usize = 32;
/// Weights that are asked to stay in L2: more of 50 MB would be lost to what else passes through.
const PINNED_BYTES: usize = 30 * 1000 * 1000;
/// Warps that compute (`kWarps`), beside one that copies and one that sends.
const WARPS: usize = 8;
const THREADS: u32 = 32 * (WARPS as u32 + 2);
/// Shared memory of a block on Hopper.
const SHARED_BYTES: usize = 227 * 1024;
/// Looks at a word until it counts as lost: seconds, at the latency of L2.
pub(super) const SPIN_LIMIT: u32 = 1 << 22;

/// What a launch is made of; fields as in `FlowChainParams`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ring {
    pub blocks: u32,
    pub rows_width: u32,
    pub rows_mlp: u32,
    pub rows_token: u32,
    pub rows_hidden: u32,
    pub images_at_once: u32,
    pub exchange_words: u32,
    pub stages: u32,
    pub stage_bytes: u32,
    pub resident: u32,
    pub pinned: u32,
    pub shared_bytes: u32,
}

impl Ring {
    /// Cooperative: the blocks wait for each other.
    pub fn geometry(&self) -> Geometry {
        let mut geometry = Geometry::linear(self.blocks, THREADS).with_shared(self.shared_bytes);
        geometry.cooperative = true;
        geometry
    }
}

/// Images of a pass if memory does not matter.
fn most_images(images: usize, branches: usize) -> usize {
    images.min(COLUMNS / branches.clamp(1, COLUMNS)).max(1)
}

/// Words of an exchange for `rows` rows of which a block has `per_block` (`Words.of_all`).
fn words_of(rows: usize, per_block: usize) -> usize {
    let of_block = |rows: usize| rows / TILE * TILE.div_ceil(TRIPLE) + (rows % TILE).div_ceil(TRIPLE);
    rows / per_block * of_block(per_block) + of_block(rows % per_block)
}

/// 128-bit words of one exchange buffer for `sequences` sequences of a pass, however many blocks share the rows: floats
/// of the residual, or pairs of the rest, three rows to a word, at least one.
fn exchange_words((width, mlp_width, token_dim): (usize, usize, usize), sequences: usize) -> usize {
    let pairs = sequences.div_ceil(2).saturating_mul(mlp_width.max(token_dim));
    sequences.saturating_mul(width).max(pairs)
}

/// Bytes of the memory through which the blocks exchange values, for a head of (width, mlp_width, token_dim).
pub fn exchange_bytes(head: (usize, usize, usize), images: usize, branches: usize) -> usize {
    let words = exchange_words(head, most_images(images, branches) * branches);
    size_of::<FlowExchange>().saturating_add(words.saturating_mul(3 * 16))
}

/// Bytes from one row of `n` elements to the next (`row_bytes`).
fn row_bytes(n: usize) -> usize {
    2 * n + if n.is_multiple_of(64) { 64 } else { 0 }
}

/// A block's share of the rows of each product.
#[derive(Clone, Copy)]
struct Rows {
    width: usize,
    mlp: usize,
    token: usize,
}

/// Shared memory beside the segments, for a pass of `images` images.
fn fixed_bytes(a: &Args, images: usize, rows: Rows) -> usize {
    let sequences = images * a.branches;
    let token = a.token_dim.next_multiple_of(STEP);
    let listed =
        words_of(a.width, rows.width) + words_of(a.mlp_width, rows.mlp) + words_of(a.token_dim, rows.token);
    let arrays = [
        (MAX_RESIDENT + 2 * MAX_STAGES + 2 + 4) * 8,
        2 * WARPS * TILE * COLUMNS * 4,
        COLUMNS * WARPS * 2 * 4,
        rows.width.saturating_mul(COLUMNS * 4),
        images.saturating_mul(a.token_dim * 4),
        images.saturating_mul(a.token_dim * 4),
        sequences.saturating_mul(a.token_dim * 4),
        sequences.saturating_mul(a.width * 4),
        (sequences + 1).saturating_mul(a.width * 4),
        sequences.saturating_mul(row_bytes(a.width.max(a.mlp_width).max(token))),
        rows.width.saturating_mul(row_bytes(token)),
        listed * 4,
    ];
    arrays.iter().fold(0, |sum, bytes| sum.saturating_add(bytes.saturating_add(15) / 16 * 16))
}

/// The launch for `a`, or why there is none.
pub(super) fn plan(launch: &Launch, a: &Args, keep: bool) -> Result<Ring, String> {
    let (f, h, k) = (a.width, a.mlp_width, a.token_dim);
    for (name, width) in [("width", f), ("mlp_width", h)] {
        if !width.is_multiple_of(STEP) || width == 0 || width > 1 << 24 {
            return Err(format!("{name} {width}, must be a multiple of {STEP}"));
        }
    }
    if k == 0 || k > 1 << 16 || a.hidden == 0 || !(1..=3).contains(&a.branches) {
        return Err(format!("{} branches of tokens of {k} values for {} hidden", a.branches, a.hidden));
    }
    let copied = [
        ("modulation", a.modulation),
        ("ln_w", a.ln_w),
        ("ln_b", a.ln_b),
        ("w0", a.w0),
        ("w2", a.w2),
        ("w_out", a.w_out),
        ("exchange", a.exchange),
    ];
    for (name, span) in copied {
        if !span.ptr.0.is_multiple_of(16) {
            return Err(format!("{name} at {:#x}, must be 16-byte aligned", span.ptr.0));
        }
    }
    // As many rows as an even share of all SMs takes, and no more blocks than that needs.
    let rows_width = f.div_ceil(launch.sm_count.max(1) as usize);
    let blocks = f.div_ceil(rows_width);
    let [rows_mlp, rows_token, rows_hidden] = [h, k, a.hidden].map(|rows| rows.div_ceil(blocks));
    let rows = Rows { width: rows_width, mlp: rows_mlp, token: rows_token };
    let tile = rows_width.max(rows_mlp).max(rows_token).min(TILE);
    let stage_bytes = tile * row_bytes(SEGMENT);
    let room = |images| SHARED_BYTES.saturating_sub(fixed_bytes(a, images, rows)) / stage_bytes;
    let images = (1..=most_images(a.images, a.branches)).rev().find(|&images| room(images) >= MIN_STAGES);
    let Some(images) = images else {
        return Err(format!(
            "one image of {} branches, width {f}, mlp_width {h} takes {} bytes of shared memory beside {MIN_STAGES} \
             stages of {stage_bytes}, {SHARED_BYTES} are there",
            a.branches,
            fixed_bytes(a, 1, rows)
        ));
    };
    let slots = room(images);
    let (stages, resident) = match keep {
        true => (MIN_STAGES, (slots - MIN_STAGES).min(MAX_RESIDENT)),
        false => (slots.min(MAX_STAGES), 0),
    };
    let pinned = if keep { PINNED_BYTES / (blocks * tile * f.min(SEGMENT) * 2) } else { 0 };
    let shared = (stages + resident) * stage_bytes + fixed_bytes(a, images, rows);
    let sequences = images * a.branches;
    let number = |value: usize| u32::try_from(value).map_err(|_| format!("{value} does not fit 32 bits"));
    Ok(Ring {
        blocks: number(blocks)?,
        rows_width: number(rows_width)?,
        rows_mlp: number(rows_mlp)?,
        rows_token: number(rows_token)?,
        rows_hidden: number(rows_hidden)?,
        images_at_once: number(images)?,
        exchange_words: number(exchange_words((f, h, k), sequences))?,
        stages: number(stages)?,
        stage_bytes: number(stage_bytes)?,
        resident: number(resident)?,
        pinned: number(pinned)?,
        shared_bytes: number(shared)?,
    })
}

/// The variant where none is chosen.
pub(super) fn default_variant(launch: &Launch, a: &Args) -> &'static str {
    // One image decides for all.
    let one = Args { images: 1, ..*a };
    if launch.dtype == DType::Bf16 && plan(launch, &one, true).is_ok() { "resident" } else { "plain" }
}

#[cfg(test)]
mod tests {
    use super::super::cases::{BASE, RandomHead, Shape};
    use super::super::{OP, node_with};
    use super::*;
    use crate::device::emulated::{EmulatedDevice, EmulatedOptions};
    use crate::ops::Selection;
    use crate::ops::harness::Rig;
    use std::sync::Arc;

    const SMALL: Shape = Shape { steps: 3, blocks: 1, width: 64, mlp_width: 96, token_dim: 16, ..BASE };

    fn rig() -> Rig {
        Rig::new(Arc::new(EmulatedDevice::new(EmulatedOptions::default()).unwrap()), 3).unwrap()
    }

    fn with_launch<T>(variant: &str, run: impl FnOnce(&Launch) -> T) -> T {
        let selection = Selection::one(&OP, variant).unwrap();
        run(&Launch { selection: &selection, dtype: DType::Bf16, sm_count: 4, dependent: true })
    }

    #[test]
    fn a_word_that_never_comes_ends_in_a_report_and_not_in_a_hang() {
        let (mut rig, mut stalled) = (rig(), Vec::new());
        for lost in [false, true] {
            with_launch("resident", |launch| {
                let head = RandomHead::new(&mut rig, DType::Bf16, SMALL).unwrap();
                let (args, written) = head.args(&mut rig, 0).unwrap();
                let mut node = node_with(launch, "test.flow_chain", &args, 50).unwrap();
                // The last block's rows then have no words.
                node.geometry.grid[0] -= u32::from(lost);
                rig.run(&node).unwrap();
                let state = rig.read_bytes(written.state).unwrap();
                stalled.push(u32::from_le_bytes(state[8..12].try_into().unwrap()));
            });
        }
        assert_eq!(stalled, [0, 2], "1 + the token that was made");
    }

    #[test]
    fn epochs_go_on_from_launch_to_launch_and_past_their_end() {
        let mut rig = rig();
        with_launch("ring", |launch| {
            let head = RandomHead::new(&mut rig, DType::Bf16, SMALL).unwrap();
            let mut tokens = |made: u64, launches: usize| {
                let (args, written) = head.args(&mut rig, made).unwrap();
                let node = node_with(launch, "test.flow_chain", &args, SPIN_LIMIT).unwrap();
                let mut all = Vec::new();
                for _ in 0..launches {
                    rig.run(&node).unwrap();
                    all.push(rig.read_bytes(written.x_next).unwrap());
                }
                let end = rig.read_bytes(args.exchange).unwrap()[..8].try_into().unwrap();
                (all, u64::from_le_bytes(end))
            };
            // Three evaluations of four exchanges each.
            let (expected, end) = tokens(0, 1);
            assert_eq!(end, 12);
            for made in [u64::from(u32::MAX) - 1, u64::from(u32::MAX) - 14, u64::from(u32::MAX) - 24] {
                let (found, end) = tokens(made, 3);
                assert!(found.iter().all(|x| *x == expected[0]), "from {made}");
                assert_eq!(end, (made + 36) % u64::from(u32::MAX));
            }
        });
    }

    #[test]
    fn shipped_heads_fit_an_sm() {
        let mut rig = rig();
        let shape = Shape { steps: 1, ..BASE };
        let head = RandomHead::new(&mut rig, DType::Bf16, shape).unwrap();
        let (args, _) = head.args(&mut rig, 0).unwrap();
        let selection = Selection::default();
        let launch = Launch { selection: &selection, dtype: DType::Bf16, sm_count: 132, dependent: true };
        for (width, mlp_width) in [(1024, 1024), (1536, 1536), (2048, 2048), (2048, 8192)] {
            for (branches, images) in [(1, 1), (1, 8), (2, 1), (2, 4), (3, 2)] {
                let args = Args { width, mlp_width, hidden: 5120, images, branches, ..args };
                for keep in [false, true] {
                    let ring = plan(&launch, &args, keep).unwrap();
                    assert!(ring.blocks <= 132 && ring.shared_bytes as usize <= SHARED_BYTES, "{ring:?}");
                    assert!(ring.images_at_once as usize * branches <= COLUMNS);
                    println!("{width} x {mlp_width}, {images} x {branches}: {ring:?}");
                }
            }
        }
        let base = Args { width: 1536, mlp_width: 1536, hidden: 5120, ..args };
        let ring = plan(&launch, &base, true).unwrap();
        assert_eq!((ring.blocks, ring.rows_width, ring.stage_bytes), (128, 12, 12 * 1088));
        assert!(ring.resident >= 8, "{ring:?}");
        for bad in
            [Args { width: 1528, ..base }, Args { mlp_width: 100, ..base }, Args { width: 1 << 15, ..base }]
        {
            assert!(plan(&launch, &bad, true).is_err());
        }
    }
}
