//! `flow_modulation`: the modulations of the flow head for all evaluations and sequences of one image token in one
//! product, because they do not depend on the state that is sampled.
//!
//! Owns the op's shapes and how many outputs a block keeps in shared memory.

use super::harness::{Case, Check, Rig, Scale, compare};
use super::params::FlowModulationParams;
use super::shared::{self, Checks};
use super::{DType, Launch, Op, Variant, div_ceil};
use crate::device::{Geometry, KernelId, Node, ParamBytes, Span};
use crate::error::Result;
use crate::kernels;
use crate::reference::flow_modulation::modulation;
use crate::reference::{Exact, PlainBf16, PlainF32, Precision};

/// The registry row.
pub static OP: Op = Op {
    name: "flow_modulation",
    summary: "mod[n, s] = w silu(time[n] + cond[s]) + bias, all evaluations and sequences at once",
    bound: "bytes of w (179 MB at width 1536, 12 blocks, bf16) up to 260 rows on tensor cores; plain: FP32 FMA",
    variants: &[
        Variant {
            name: "plain",
            kernels: kernels!("flow_modulation", f32: "flow_modulation_plain_f32", bf16: "flow_modulation_plain_bf16"),
            summary: "up to 32 weight rows stay in shared memory while all rows pass; weights read once; any shape",
        },
        Variant {
            name: "mma",
            kernels: &[(
                DType::Bf16,
                KernelId { module: "flow_modulation", symbol: "flow_modulation_mma_bf16" },
            )],
            summary: "tensor cores, weights straight from memory into operands, once per 160 rows; widths of whole 32",
        },
    ],
    cases,
};

const THREADS: u32 = 256;
/// Most outputs of a block (`kColumns`).
const MAX_COLUMNS: usize = 32;
/// Most shared memory for weights (`kWeightBytes`).
const WEIGHT_BYTES: usize = 208 * 1024;

/// Tensors and dimensions; shapes in `kernels/params.h` (`FlowModulationParams`).
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// `[steps, width]`
    pub time: Span,
    /// `[rows, width]`
    pub cond: Span,
    /// `[outputs, width]`
    pub w: Span,
    /// `[outputs]`
    pub bias: Span,
    /// `[steps, rows, outputs]`, written.
    pub modulation: Span,
    /// Network evaluations N.
    pub steps: usize,
    /// Sequences S.
    pub rows: usize,
    /// Width F of the head.
    pub width: usize,
    /// `(3 blocks + 2) * width`
    pub outputs: usize,
}

/// Bytes of a weight row in shared memory (`weight_stride`), and how many of them a block keeps (`block_columns`).
fn columns(width: usize, dtype: DType) -> (usize, usize) {
    let vector = 16 / dtype.bytes();
    let row = (width.div_ceil(vector) + 1) * 16;
    (row, (WEIGHT_BYTES / row).min(MAX_COLUMNS))
}

/// Outputs of a warp's tile in `mma` (`kTile`).
const MMA_TILE: usize = 16;
/// Most warps of an `mma` block (`kMmaThreads`).
const MMA_WARPS: u32 = 8;
/// Rows of one pass of `mma` (`kMmaRows`).
const MMA_ROWS: usize = 160;
/// Shared memory for its activations (`kActBytes`).
const MMA_ACT_BYTES: usize = 200 * 1024;
/// What `mma` asks of the width (`kStep`).
const MMA_STEP: usize = 32;

/// Elements of a row that `mma` stages at once, and from one staged row to the next (`act_chunk`, `act_stride`).
fn mma_chunk(rows: usize, width: usize) -> (usize, usize) {
    let stride = |chunk: usize| chunk + if chunk.is_multiple_of(64) { 32 } else { 0 };
    let padded = rows.min(MMA_ROWS).next_multiple_of(8);
    let unit = 4 * MMA_STEP;
    let fits = stride(width).checked_mul(padded * 2).is_some_and(|bytes| bytes <= MMA_ACT_BYTES);
    let chunk = if fits { width } else { (MMA_ACT_BYTES / (padded * 2) - 32) / unit * unit };
    (chunk, padded * stride(chunk) * 2)
}

/// At most one block per SM, and as many warps as make the rounds over its tiles full ones.
fn mma_geometry(launch: &Launch, a: &Args, rows: usize) -> Geometry {
    let tiles = a.outputs.div_ceil(MMA_TILE);
    let blocks = div_ceil(tiles, 1).min(launch.sm_count.max(1));
    let per_block = div_ceil(tiles, blocks as usize);
    let warps = per_block.div_ceil(per_block.div_ceil(MMA_WARPS));
    let (_, shared_bytes) = mma_chunk(rows, a.width);
    Geometry::linear(blocks, 32 * warps).with_shared(shared_bytes as u32)
}

/// Tensor cores where they can: rows of whole steps, 16-byte aligned.
fn default_variant(launch: &Launch, a: &Args) -> &'static str {
    let aligned = [a.time, a.cond, a.w].iter().all(|s| s.ptr.0.is_multiple_of(16));
    if launch.dtype == DType::Bf16 && a.width.is_multiple_of(MMA_STEP) && aligned { "mma" } else { "plain" }
}

/// The node that computes `args`.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let a = args;
    let variant = launch.selection.variant(&OP, default_variant(launch, a))?;
    let checks = Checks::new(OP.name, variant.name);
    let e = launch.dtype.bytes();
    let time = checks.span("time", a.time, e, &[a.steps, a.width])?;
    let cond = checks.span("cond", a.cond, e, &[a.rows, a.width])?;
    let w = checks.span("w", a.w, e, &[a.outputs, a.width])?;
    let bias = checks.span("bias", a.bias, e, &[a.outputs])?;
    let modulation = checks.span("modulation", a.modulation, e, &[a.steps, a.rows, a.outputs])?;
    let rows = checks.product("steps x rows", &[a.steps, a.rows])?;
    let params = FlowModulationParams {
        time: time.ptr.0,
        cond: cond.ptr.0,
        w: w.ptr.0,
        bias: bias.ptr.0,
        mod_: modulation.ptr.0,
        steps: checks.dim("steps", a.steps)?,
        rows: checks.dim("rows", a.rows)?,
        width: checks.dim("width", a.width)?,
        outputs: checks.dim("outputs", a.outputs)?,
    };
    let mut geometry = if variant.name == "mma" {
        if !a.width.is_multiple_of(MMA_STEP) {
            return Err(checks.refuse(format!("width {}, must be a multiple of {MMA_STEP}", a.width)));
        }
        for (name, span) in [("time", time), ("cond", cond), ("w", w)] {
            if !span.ptr.0.is_multiple_of(16) {
                return Err(checks.refuse(format!("{name} at {:#x}, must be 16-byte aligned", span.ptr.0)));
            }
        }
        mma_geometry(launch, a, rows)
    } else {
        let (row_bytes, columns) = columns(a.width, launch.dtype);
        if columns == 0 {
            return Err(checks.refuse(format!(
                "width {}: a row of weights takes {row_bytes} bytes of shared memory, {WEIGHT_BYTES} are there",
                a.width
            )));
        }
        Geometry::linear(div_ceil(a.outputs, columns), THREADS)
            .with_shared(u32::try_from(columns * row_bytes).unwrap_or(u32::MAX))
    };
    geometry.dependent = launch.dependent;
    Ok(Node {
        label: label.into(),
        kernel: variant.kernel(OP.name, launch.dtype)?,
        geometry,
        params: ParamBytes::of(&params),
        reads: vec![time, cond, w, bias],
        writes: vec![modulation],
    })
}

/// One test shape.
#[derive(Clone, Copy, Debug)]
struct Shape {
    steps: usize,
    rows: usize,
    width: usize,
    outputs: usize,
}

fn cases() -> Vec<Case> {
    let shape = |steps, rows, width, outputs| Shape { steps, rows, width, outputs };
    let shapes = [
        // Outputs are (3 L + 2) F of small heads; beyond one tile of 64 rows; tails of rows, columns and k.
        shape(1, 1, 96, 480),
        shape(6, 2, 80, 400),
        shape(5, 3, 72, 360),
        shape(3, 1, 75, 375),
        shape(23, 3, 96, 70),
        shape(13, 10, 128, 37),
        shape(2, 4, 17, 33),
    ];
    // A slice of the outputs is enough: the shipped head has 1824 such blocks.
    let medium = [shape(28, 2, 1536, 96), shape(2, 3, 2048, 70), shape(3, 3, 6001, 40)];
    let real = [shape(2, 2, 1536, 38 * 1536), shape(2, 2, 1024, 20 * 1024), shape(2, 3, 2048, 5 * 2048)];
    // Every number of row tiles that mma is built for, two passes of rows, activations in chunks, tails of outputs.
    let mma_small = [
        shape(1, 1, 96, 480),
        shape(6, 2, 32, 400),
        shape(5, 5, 64, 37),
        shape(17, 3, 96, 70),
        shape(27, 3, 32, 33),
        shape(45, 2, 160, 17),
        shape(55, 3, 32, 20),
        // A last pass of 64 rows, which fit whole where those of the first do not.
        shape(28, 8, 1536, 20),
    ];
    let mma_medium = [
        shape(28, 2, 1536, 96),
        shape(28, 3, 1536, 80),
        shape(50, 3, 1536, 50),
        shape(2, 3, 2048, 70),
        shape(90, 2, 800, 90),
    ];
    let mut cases = Vec::new();
    for &dtype in DType::ALL {
        cases.extend(shapes.map(|s| make_case(s, "plain", dtype, Scale::Small)));
        cases.extend(medium.map(|s| make_case(s, "plain", dtype, Scale::Medium)));
    }
    cases.extend(mma_small.map(|s| make_case(s, "mma", DType::Bf16, Scale::Small)));
    cases.extend(mma_medium.map(|s| make_case(s, "mma", DType::Bf16, Scale::Medium)));
    for variant in ["plain", "mma"] {
        cases.extend(real.map(|s| make_case(s, variant, DType::Bf16, Scale::Real)));
    }
    cases
}

fn make_case(s: Shape, variant: &'static str, dtype: DType, scale: Scale) -> Case {
    let rows = s.steps * s.rows;
    let bytes = (s.outputs * s.width + s.outputs * rows) * dtype.bytes();
    let flops = 2 * rows * s.width * s.outputs;
    let label = format!("steps={},rows={},width={},outputs={}", s.steps, s.rows, s.width, s.outputs);
    let run = move |rig: &mut Rig, launch: &Launch| run(rig, launch, s);
    shared::case(&OP, variant, dtype, scale, (bytes as u64, flops as u64), label, run)
}

fn run(rig: &mut Rig, launch: &Launch, s: Shape) -> Result<Vec<Check>> {
    let dtype = launch.dtype;
    let time = rig.random("time", dtype, s.steps * s.width, 1.0)?;
    let cond = rig.random("cond", dtype, s.rows * s.width, 1.0)?;
    let w = rig.random("w", dtype, s.outputs * s.width, 1.0 / (s.width as f32).sqrt())?;
    let bias = rig.random("bias", dtype, s.outputs, 0.5)?;
    let out = rig.output("modulation", dtype, s.steps * s.rows * s.outputs)?;
    let args = Args {
        time: time.span,
        cond: cond.span,
        w: w.span,
        bias: bias.span,
        modulation: out,
        steps: s.steps,
        rows: s.rows,
        width: s.width,
        outputs: s.outputs,
    };
    rig.run(&node(launch, "test.flow_modulation", &args)?)?;
    let got = rig.read(out, dtype)?;
    type Evaluate = fn(&[f32], &[f32], &[f32], &[f32]) -> Vec<f64>;
    let reference = |evaluate: Evaluate| -> Vec<f64> {
        let times = time.values.chunks_exact(s.width);
        times
            .flat_map(|t| cond.values.chunks_exact(s.width).map(move |c| (t, c)))
            .flat_map(|(t, c)| evaluate(&w.values, &bias.values, t, c))
            .collect()
    };
    let plain = match dtype {
        DType::F32 => reference(widened::<PlainF32>),
        DType::Bf16 => reference(widened::<PlainBf16>),
    };
    Ok(vec![compare("modulation", dtype, &got, &reference(widened::<Exact>), &plain)])
}

fn widened<P: Precision>(weight: &[f32], bias: &[f32], time: &[f32], cond: &[f32]) -> Vec<f64> {
    P::widen_all(&modulation::<P>(weight, bias, &P::load_all(time), &P::load_all(cond)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DevicePtr;
    use crate::error::Error;
    use crate::ops::Selection;

    fn built(variant: &str, width: usize, outputs: usize, dtype: DType, bytes: usize) -> Result<Node> {
        let selection = Selection::one(&OP, variant).unwrap();
        let launch = Launch { selection: &selection, dtype, sm_count: 132, dependent: true };
        let span = |at: u64| Span { ptr: DevicePtr(at << 36), bytes };
        let args = Args {
            time: span(1),
            cond: span(2),
            w: span(3),
            bias: span(4),
            modulation: span(5),
            steps: 28,
            rows: 2,
            width,
            outputs,
        };
        node(&launch, "flow.modulation", &args)
    }

    #[test]
    fn shipped_widths_fit_an_sm() {
        // Small, base and large head; 227 KiB less the activations' 9 KiB.
        for (width, blocks) in [(1024, 6), (1536, 12), (2048, 24)] {
            for (variant, dtype) in [("plain", DType::Bf16), ("plain", DType::F32), ("mma", DType::Bf16)] {
                let node = built(variant, width, (3 * blocks + 2) * width, dtype, 1 << 34).unwrap();
                assert!(node.geometry.shared_bytes <= 227 * 1024 - 9216, "{node:?}");
                assert_eq!(node.writes[0].bytes, 56 * (3 * blocks + 2) * width * dtype.bytes());
            }
        }
        // Two blocks of the base head share an SM (228 KiB, of which each block costs one).
        let base = built("plain", 1536, 38 * 1536, DType::Bf16, 1 << 34).unwrap();
        assert!(2 * (base.geometry.shared_bytes + 9216 + 1024) <= 228 * 1024);
        // 27 or 28 tiles per block: four full rounds of seven warps.
        let base = built("mma", 1536, 38 * 1536, DType::Bf16, 1 << 34).unwrap();
        assert_eq!((base.geometry.grid[0], base.geometry.block[0]), (132, 7 * 32));
    }

    #[test]
    fn refuses_what_it_cannot_do() {
        let unsupported = |variant, width, dtype| {
            matches!(built(variant, width, 5, dtype, 1 << 34), Err(Error::Unsupported { .. }))
        };
        assert!(unsupported("plain", 120_000, DType::Bf16));
        assert!(unsupported("mma", 1528, DType::Bf16));
        assert!(unsupported("mma", 1536, DType::F32));
        assert!(built("plain", 0, 5, DType::Bf16, 1 << 34).is_err());
        assert!(built("mma", 0, 5, DType::Bf16, 1 << 34).is_err());
        assert!(matches!(built("plain", 96, 480, DType::Bf16, 1000), Err(Error::Internal(_))));
    }
}
