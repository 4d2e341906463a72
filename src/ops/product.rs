//! What the transformer's products share: how their weights lie in memory, which variant reads that, its geometry
//! and scratch, and the test weights of either layout.
//!
//! `plain` and `tile` read weights as they are stored; `stream`, `ring` and `mma` read one packed copy
//! ([`weights::pack`](crate::weights::pack)), bf16 only, which serves decoding and prompts alike.

use super::harness::{Case, Check, Rig, Scale, encode};
use super::params::NextWeights;
use super::shared::{self, Checks};
use super::{DType, Form, Launch, Op, Variant, div_ceil};
use crate::device::{Geometry, KernelId, Node, ParamBytes, Span};
use crate::error::{Error, Result};
use crate::weights::pack::{Pairing, STEP, TILE_UNITS, Tiles};

/// Threads of a block in every product but `mma`.
const THREADS: u32 = 256;
/// Shared memory that a block of `stream.cuh` may take (`kSharedBytes`), and what lets two share an SM.
const SHARED_BYTES: usize = 225 * 1024;
const HALF_SHARED_BYTES: usize = 110 * 1024;
/// The ring of `stream.cuh`: bytes of a stage, and stages at least and at most.
const RING_STAGE_BYTES: usize = 16 * 1024;
/// Bytes of a step of packed weights (`kStepBytes`).
const STEP_BYTES: usize = 2 * TILE_UNITS * STEP * 2;
const RING_STAGES: (usize, usize) = (3, 8);
/// Sums of cut tiles in shared memory (`kCutBytes`).
const CUT_BYTES: usize = 8 * 1024;
/// Floats that a block leaves of the tiles it shares with others.
const PARTIAL_FLOATS: usize = 2 * 128;
/// Block of `mma.cuh`: threads, tiles, rows, and bytes of shared memory.
const MMA_THREADS: u32 = 384;
const MMA_TILES: usize = 8;
const MMA_ROWS: usize = 256;
const MMA_SHARED_BYTES: u32 = 192 * 1024;
/// Blocks that may share the K of one group of tiles.
const MMA_PARTS: usize = 4;
/// K of a part at least.
const MMA_PART: usize = 512;
/// What it costs a block of `mma` to add up parts, in elements of K that it could multiply meanwhile: some 3.4 us for
/// 85 KB from other SMs, of 800 cycles per step.
const MMA_PARTS_COST: usize = 256;
/// SMs of the smallest processing clusters of an H100, in which all blocks of a cluster are.
const GPC_SMS: usize = 16;

/// How a weight matrix lies in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Row by row, as stored.
    Rows,
    /// Packed by [`Tiles`].
    Tiles,
}

impl Layout {
    /// What the product variant called `name` reads.
    pub fn of_variant(name: &str) -> Layout {
        match name {
            "stream" | "ring" | "mma" => Layout::Tiles,
            _ => Layout::Rows,
        }
    }

    /// How a weight of `op` with rows of `inner` elements is to be loaded: packed where that can be and no variant
    /// is chosen that reads it unpacked.
    pub fn to_load(op: &'static Op, selection: &super::Selection, dtype: DType, inner: usize) -> Layout {
        let packs = dtype == DType::Bf16 && inner > 0 && inner.is_multiple_of(STEP);
        match selection.chosen(op) {
            _ if !packs => Layout::Rows,
            Some(variant) => Layout::of_variant(variant),
            None => Layout::Tiles,
        }
    }
}

/// A weight matrix on the device.
#[derive(Clone, Copy, Debug)]
pub struct Weight {
    /// Where it is.
    pub span: Span,
    /// How it lies there.
    pub layout: Layout,
}

impl From<Span> for Weight {
    /// A matrix as stored.
    fn from(span: Span) -> Weight {
        Weight { span, layout: Layout::Rows }
    }
}

/// What `stream` and `ring` take beside their operands: where blocks leave their sums of tiles that they share, one per
/// stream of launches, and what they ask for ahead.
#[derive(Clone, Copy, Debug)]
pub struct ProductScratch {
    /// Float sums, see [`ProductScratch::sizes`].
    pub partial: Span,
    /// u32 counters, zero before and after every launch.
    pub arrivals: Span,
    /// What a later launch reads.
    pub next: Option<Next>,
}

/// Packed weights that a later launch reads, which are asked into L2 while a launch ends and asks for nothing else.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Next {
    /// All of them.
    pub weights: Span,
    /// Steps of a warp's share that are not asked for: the later launch does that itself before it waits.
    pub first: usize,
}

impl Next {
    /// Steps that a warp of `stream` asks for before it waits (`Direct<8>`).
    pub const OWN_STEPS: usize = 8;

    /// Of `weight`, if it is packed.
    pub fn of(weight: impl Into<Weight>, first: usize) -> Option<Next> {
        let Weight { span, layout } = weight.into();
        (layout == Layout::Tiles).then_some(Next { weights: span, first })
    }
}

impl ProductScratch {
    /// The same for a launch that asks for `next`.
    pub fn ahead(self, next: Option<Next>) -> ProductScratch {
        ProductScratch { next, ..self }
    }

    /// Floats of `partial` and counters of `arrivals` for products of up to `rows` rows.
    pub fn sizes(sm_count: u32, rows: usize) -> (usize, usize) {
        let blocks = rows.div_ceil(shared::ROW_GROUP).saturating_mul(sm_count.max(1) as usize);
        (blocks.saturating_mul(PARTIAL_FLOATS), blocks)
    }
}

/// Rows, K and units (pairs of weight rows) of a product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub rows: usize,
    pub inner: usize,
    pub units: usize,
}

/// The variant of `op` chosen by name, else the default for the layout and the rows.
fn chosen_variant(op: &'static Op, launch: &Launch, layout: Layout, rows: usize) -> Result<&'static Variant> {
    let many = match launch.selection.form() {
        Some(form) => form == Form::Many,
        None => rows > shared::ROW_GROUP,
    };
    let default = match (layout, many) {
        (Layout::Tiles, true) if op.variant("mma").is_ok() => "mma",
        (Layout::Tiles, _) => "stream",
        (Layout::Rows, true) if op.variant("tile").is_ok() => "tile",
        (Layout::Rows, _) => "plain",
    };
    launch.selection.variant(op, default)
}

/// Whether `op`, which has a norm fused, gives each of `rows` rows the bits that it gives it in any other number of
/// rows. In `plain` and `tile` fewer than eight rows in a block share its warps (`prepare` in `gemv.cuh`), which sum
/// the squares of a row in another order then.
pub fn rows_alike(op: &'static Op, launch: &Launch, layout: Layout, rows: usize) -> Result<bool> {
    let block_rows = match chosen_variant(op, launch, layout, rows)?.name {
        "plain" => shared::ROW_GROUP,
        "tile" => shared::TILE_ROWS,
        _ => return Ok(true),
    };
    let last = rows % block_rows;
    Ok(last == 0 || last >= shared::ROW_GROUP)
}

/// Whether `op` takes `rows` rows that [`norm_rows`](super::norm_rows) has normed before, and does not norm them
/// itself.
pub fn takes_normed(op: &'static Op, launch: &Launch, layout: Layout, rows: usize) -> Result<bool> {
    Ok(chosen_variant(op, launch, layout, rows)?.name == "mma")
}

/// A product about to be launched: its variant, checked against shape and layout.
pub(super) struct Product {
    pub checks: Checks,
    variant: &'static Variant,
    kernel: KernelId,
    geometry: Geometry,
    layout: Layout,
    /// Partial sums and counters, where the variant takes them.
    scratch: Option<[Span; 2]>,
    next: NextWeights,
}

impl Product {
    /// The variant of `op` chosen by name, else the default for the layout and the rows.
    pub fn new(
        op: &'static Op,
        launch: &Launch,
        layout: Layout,
        shape: Shape,
        scratch: Option<ProductScratch>,
    ) -> Result<Product> {
        let variant = chosen_variant(op, launch, layout, shape.rows)?;
        let checks = Checks::new(op.name, variant.name);
        if Layout::of_variant(variant.name) != layout {
            let [wanted, given] = [Layout::of_variant(variant.name), layout].map(|l| match l {
                Layout::Rows => "as stored",
                Layout::Tiles => "packed in tiles",
            });
            return Err(checks.refuse(format!(
                "reads weights {wanted}, these are {given}: a weight is packed at load, in bf16 and where its rows \
                 divide by {STEP}, unless a variant that cannot read it is chosen for the op then"
            )));
        }
        let packs = launch.dtype == DType::Bf16 && shape.inner.is_multiple_of(STEP);
        if layout == Layout::Tiles && !packs {
            let (inner, dtype) = (shape.inner, launch.dtype.name());
            return Err(checks.refuse(format!("K is {inner} in {dtype}, must divide by {STEP} in bf16")));
        }
        let kernel = variant.kernel(op.name, launch.dtype)?;
        let geometry = Geometry::linear(1, THREADS);
        let mut product = Product {
            checks,
            variant,
            kernel,
            geometry,
            layout,
            scratch: None,
            next: NextWeights::default(),
        };
        match layout {
            Layout::Rows => {
                let Shape { rows, inner, units } = shape;
                product.geometry = shared::product_geometry(launch, variant.name, rows, inner, units);
            }
            Layout::Tiles => product.packed(launch, shape, scratch)?,
        }
        product.geometry.dependent = launch.dependent;
        Ok(product)
    }

    fn packed(&mut self, launch: &Launch, shape: Shape, scratch: Option<ProductScratch>) -> Result<()> {
        let Shape { rows, inner, units } = shape;
        let tiles = units.div_ceil(TILE_UNITS);
        let steps = self.checks.product("steps of the packed weights", &[tiles, inner / STEP])?;
        if self.variant.name == "mma" {
            let groups = tiles.div_ceil(MMA_TILES);
            if groups > 65_535 {
                return Err(self.checks.refuse(format!(
                    "{units} units are {groups} groups of {MMA_TILES} tiles, a grid has at most 65535"
                )));
            }
            let parts = mma_parts(groups, inner, launch.sm_count as usize) as u32;
            self.geometry =
                Geometry::linear(div_ceil(rows, MMA_ROWS), MMA_THREADS).with_shared(MMA_SHARED_BYTES);
            self.geometry.grid[1..].copy_from_slice(&[groups as u32, parts]);
            self.geometry.cluster[2] = parts;
            return Ok(());
        }
        let staged = (rows.clamp(1, shared::ROW_GROUP) * (inner | 32) * 2).max(CUT_BYTES);
        if staged > SHARED_BYTES {
            return Err(self.checks.refuse(format!(
                "{} rows of {inner} take {staged} bytes of shared memory, {SHARED_BYTES} at most",
                rows.min(shared::ROW_GROUP)
            )));
        }
        let mut bytes = staged;
        if self.variant.name == "ring" {
            let stages = ring_stages(staged);
            if stages < RING_STAGES.0 || inner < 2 * STEP {
                return Err(self.checks.refuse(format!(
                    "{} rows of {inner} take {staged} of {SHARED_BYTES} bytes of shared memory and leave {stages} \
                     stages of {RING_STAGE_BYTES} for the ring, which needs {} and rows of {} or more",
                    rows.min(shared::ROW_GROUP),
                    RING_STAGES.0,
                    2 * STEP
                )));
            }
            bytes += stages * RING_STAGE_BYTES;
        }
        let blocks = (launch.sm_count.max(1) as usize).min(steps);
        // The kernels divide the stream into shares in 32 bits.
        self.checks.product("steps times blocks", &[steps, blocks + 1])?;
        let groups = rows.div_ceil(shared::ROW_GROUP);
        self.geometry = Geometry::linear(blocks as u32, THREADS).with_shared(bytes as u32);
        self.geometry.grid[1] = div_ceil(rows, shared::ROW_GROUP);
        let given =
            scratch.ok_or_else(|| self.checks.refuse("needs scratch for the sums of shared tiles"))?;
        let (floats, counters) = (blocks.saturating_mul(PARTIAL_FLOATS), blocks);
        self.scratch = Some([
            self.checks.span("partial", given.partial, 4, &[groups, floats])?,
            self.checks.span("arrivals", given.arrivals, 4, &[groups, counters])?,
        ]);
        if let Some(Next { weights, first }) = given.next {
            let steps = weights.bytes / STEP_BYTES;
            // Shares of them are cut as of the launch's own.
            self.checks.product("steps of the next weights times blocks", &[steps, blocks + 1])?;
            let [steps, first] = [steps, first].map(|n| u32::try_from(n).unwrap_or(u32::MAX));
            self.next = NextWeights { w: weights.ptr.0, steps, first };
        }
        Ok(())
    }

    /// The part of `weight` that the matrix takes: `[rows, inner]`, or its units packed.
    pub fn weight(&self, name: &str, weight: Span, dtype: DType, rows: usize, shape: Shape) -> Result<Span> {
        match self.layout {
            Layout::Rows => self.checks.span(name, weight, dtype.bytes(), &[rows, shape.inner]),
            Layout::Tiles => {
                let tiles = shape.units.div_ceil(TILE_UNITS);
                let span =
                    self.checks.span(name, weight, dtype.bytes(), &[tiles, shape.inner, 2 * TILE_UNITS])?;
                self.aligned(&[(name, span)])?;
                Ok(span)
            }
        }
    }

    /// Refuses operands of the packed variants that 16-byte loads cannot read.
    pub fn aligned(&self, operands: &[(&str, Span)]) -> Result<()> {
        match operands.iter().find(|(_, s)| self.layout == Layout::Tiles && !s.ptr.0.is_multiple_of(16)) {
            Some((name, s)) => {
                Err(self.checks.refuse(format!("{name} at {:#x} is not 16-byte aligned", s.ptr.0)))
            }
            None => Ok(()),
        }
    }

    /// The rows of a product with a norm fused: what it reads, the address of the norm's weights (0 for none) behind
    /// that of the rows.
    pub fn normed_rows(
        &self,
        (x, norm_w): (Span, Span),
        normed: Option<Span>,
        dtype: DType,
        shape: Shape,
    ) -> Result<(Vec<Span>, [u64; 2])> {
        let [rows, hidden] = [shape.rows, shape.inner];
        let Some(h) = normed else {
            if self.variant.name == "mma" {
                return Err(self.checks.refuse("takes rows that norm_rows has normed, none are given"));
            }
            let x = self.checks.span("x", x, 4, &[rows, hidden])?;
            let norm_w = self.checks.span("norm_w", norm_w, dtype.bytes(), &[hidden])?;
            self.aligned(&[("x", x), ("norm_w", norm_w)])?;
            return Ok((vec![x, norm_w], [x.ptr.0, norm_w.ptr.0]));
        };
        if self.variant.name != "mma" {
            return Err(self.checks.refuse("norms its rows itself, only mma takes normed ones"));
        }
        let h = self.checks.span("normed", h, dtype.bytes(), &[rows, hidden])?;
        self.aligned(&[("normed", h)])?;
        Ok((vec![h], [h.ptr.0, 0]))
    }

    /// Addresses of the partial sums and the counters, 0 where the variant takes none.
    pub fn scratch(&self) -> [u64; 2] {
        self.scratch.map_or([0; 2], |spans| spans.map(|s| s.ptr.0))
    }

    /// What the launch asks for ahead; nothing where the variant does not.
    pub fn next(&self) -> NextWeights {
        self.next
    }

    /// The node of this launch; what it reads and writes does not name the scratch, which is added.
    pub fn node<P: bytemuck::Pod>(
        self,
        label: &str,
        params: &P,
        reads: impl IntoIterator<Item = Span>,
        writes: impl IntoIterator<Item = Span>,
    ) -> Node {
        let scratch = self.scratch.into_iter().flatten();
        Node {
            label: label.into(),
            kernel: self.kernel,
            geometry: self.geometry,
            params: ParamBytes::of(params),
            reads: reads.into_iter().chain(scratch.clone()).collect(),
            writes: writes.into_iter().chain(scratch).collect(),
        }
    }
}

/// A case's rows, normed beforehand if `variant` takes them so: from `x` and `norm_w` of (rows, hidden).
pub(super) fn norm_rows(
    rig: &mut Rig,
    launch: &Launch,
    (x, norm_w): (Span, Span),
    (rows, hidden): (usize, usize),
    variant: &str,
) -> Result<Option<Span>> {
    if variant != "mma" {
        return Ok(None);
    }
    let h = rig.output("normed", launch.dtype, rows * hidden)?;
    let args = super::norm_rows::Args { x, norm_w, h, rows, hidden, eps: 1e-6 };
    rig.run(&super::norm_rows::node(launch, "test.norm_rows", &args)?)?;
    Ok(Some(h))
}

/// In how many parts `mma` sums up `inner` elements for `groups` groups of tiles: those that keep the SMs busy longest for
/// one group of rows. Never by the number of rows, because a row's bits follow from the order of its sum.
fn mma_parts(groups: usize, inner: usize, sm_count: usize) -> usize {
    let cost = |parts: usize| {
        let usable = sm_count - sm_count / GPC_SMS * (GPC_SMS % parts);
        let waves = (groups * parts).div_ceil(usable.max(1));
        waves * (inner.div_ceil(parts) + if parts > 1 { MMA_PARTS_COST } else { 0 })
    };
    let most = (inner / MMA_PART).clamp(1, MMA_PARTS);
    (1..=most).min_by_key(|&parts| cost(parts)).unwrap_or(1)
}

/// Stages of the ring beside `staged` bytes: half an SM's worth if that is deep enough, else all there is.
fn ring_stages(staged: usize) -> usize {
    let mut stages = HALF_SHARED_BYTES.saturating_sub(staged) / RING_STAGE_BYTES;
    if stages < 4 {
        stages = SHARED_BYTES.saturating_sub(staged) / RING_STAGE_BYTES;
    }
    stages.min(RING_STAGES.1)
}

/// The registry's row of `stream`, whose kernels are these.
pub(super) const fn stream(kernels: &'static [(DType, KernelId)]) -> Variant {
    let summary = "equal shares of packed weights per SM, loads to registers; K % 32 = 0";
    Variant { name: "stream", kernels, summary }
}

/// The registry's row of `ring`.
pub(super) const fn ring(kernels: &'static [(DType, KernelId)]) -> Variant {
    let summary = "the same by bulk copies into a ring in shared memory; K % 32 = 0, K >= 64";
    Variant { name: "ring", kernels, summary }
}

/// The registry's row of `mma`.
pub(super) const fn mma(kernels: &'static [(DType, KernelId)]) -> Variant {
    let summary = "128 x 256 tiles on tensor cores from packed weights, for many rows; K % 32 = 0";
    Variant { name: "mma", kernels, summary }
}

/// Variants of a product that its cases run for `rows` rows of `inner` at `scale`: every one at test shapes, at real
/// ones those that ship for so many rows.
fn case_variants(
    op: &'static Op,
    dtype: DType,
    (rows, inner): (usize, usize),
    real: bool,
) -> impl Iterator<Item = &'static str> {
    op.variants.iter().map(|v| v.name).filter(move |&name| {
        let few = rows <= shared::ROW_GROUP;
        let ships = match name {
            "plain" => few || op.variant("tile").is_err(),
            "tile" | "mma" => !few,
            _ => few,
        };
        let packs = dtype == DType::Bf16 && inner.is_multiple_of(STEP);
        // Wide rows leave the ring no room; that it says so is tested by itself.
        let staged = (rows.clamp(1, shared::ROW_GROUP) * (inner | 32) * 2).max(CUT_BYTES);
        let fits = name != "ring" || (inner >= 2 * STEP && ring_stages(staged) >= RING_STAGES.0);
        (!real || ships) && (Layout::of_variant(name) == Layout::Rows || (packs && fits))
    })
}

/// Memory that a case lets its launch ask for, as if later weights lay there: asking must do no harm.
fn rehearsed(memory: Span) -> Option<Next> {
    let weights = memory.slice(0, memory.bytes / STEP_BYTES * STEP_BYTES);
    Some(Next { weights, first: 1 })
}

/// Cases of a product: `shapes` in every element type and variant that can do them, `real` ones at the real scale in
/// the variants that ship for them. `size` says the rows and K of a shape.
pub(super) fn cases<S: Clone>(
    op: &'static Op,
    (shapes, real): (&[S], &[S]),
    size: impl Fn(&S) -> (usize, usize),
    make: impl Fn(S, &'static str, DType, Option<Scale>) -> Case,
) -> Vec<Case> {
    let mut cases = Vec::new();
    for &dtype in DType::ALL {
        for (shapes, scale) in [(shapes, None), (real, Some(Scale::Real))] {
            for shape in shapes {
                for variant in case_variants(op, dtype, size(shape), scale.is_some()) {
                    cases.push(make(shape.clone(), variant, dtype, scale));
                }
            }
        }
    }
    cases
}

/// A case of a product: [`shared::case`] with scratch, whose counters must be zero again afterwards.
pub(super) fn case(
    op: &'static Op,
    variant: &'static str,
    dtype: DType,
    scale: Scale,
    (rows, bytes, flops): (usize, u64, u64),
    label: String,
    run: impl Fn(&mut Rig, &Launch, Option<ProductScratch>) -> Result<Vec<Check>> + Send + Sync + 'static,
) -> Case {
    shared::case(op, variant, dtype, scale, (bytes, flops), label, move |rig, launch| {
        if Layout::of_variant(variant) == Layout::Rows {
            return run(rig, launch, None);
        }
        let (floats, counters) = ProductScratch::sizes(launch.sm_count, rows);
        let partial = rig.output("partial", DType::F32, floats)?;
        let arrivals = rig.indices("arrivals", &vec![0; counters])?;
        let checks = run(rig, launch, Some(ProductScratch { partial, arrivals, next: rehearsed(partial) }))?;
        match rig.read_bytes(arrivals)?.iter().position(|&b| b != 0) {
            Some(at) => Err(Error::Internal(format!("counter {} was not left at zero", at / 4))),
            None => Ok(checks),
        }
    })
}

/// A random weight matrix `[rows, inner]` in the layout that `variant` reads, and its values row by row.
pub(super) fn random_weight(
    rig: &mut Rig,
    variant: &str,
    (name, dtype, scale): (&str, DType, f32),
    (rows, inner): (usize, usize),
    pairing: Pairing,
) -> Result<(Vec<f32>, Weight)> {
    let values = rig.normal(rows * inner, scale);
    let layout = Layout::of_variant(variant);
    match layout {
        Layout::Rows => {
            let tensor = rig.input(name, dtype, values)?;
            Ok((tensor.values, tensor.span.into()))
        }
        Layout::Tiles => {
            let (bytes, values) = encode(dtype, values);
            let span = rig.bytes(name, &Tiles::new(rows, inner, pairing)?.pack(&bytes)?)?;
            Ok((values, Weight { span, layout }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Selection, down, o_proj, project};
    use super::*;
    use crate::device::{DevicePtr, Node};

    /// Disjoint fake buffers of 1 GiB.
    fn span(index: u64) -> Span {
        Span { ptr: DevicePtr((index + 1) << 30), bytes: 1 << 30 }
    }

    fn args(rows: usize, inner: usize, layout: Layout) -> project::Args {
        project::Args {
            input: span(0),
            w: Weight { span: span(1), layout },
            bias: None,
            x: span(2),
            rows,
            hidden: 5120,
            inner,
            scratch: Some(ProductScratch { partial: span(3), arrivals: span(4), next: None }),
        }
    }

    fn node(chosen: Option<&str>, dtype: DType, args: &project::Args) -> Result<Node> {
        let selection = match chosen {
            Some(variant) => Selection::one(&down::OP, variant)?,
            None => Selection::default(),
        };
        let launch = Launch { selection: &selection, dtype, sm_count: 132, dependent: true };
        down::node(&launch, "t", args)
    }

    fn refusal(chosen: Option<&str>, dtype: DType, args: &project::Args) -> String {
        node(chosen, dtype, args).unwrap_err().to_string()
    }

    #[test]
    fn rows_are_alike_where_no_block_has_fewer_than_eight() {
        let alike = |chosen: Option<&str>, layout, form, rows| {
            let selection = match chosen {
                Some(variant) => Selection::one(&super::super::qkv::OP, variant).unwrap(),
                None => Selection::default(),
            };
            let selection = selection.for_products(form);
            let launch = Launch { selection: &selection, dtype: DType::F32, sm_count: 132, dependent: true };
            rows_alike(&super::super::qkv::OP, &launch, layout, rows).unwrap()
        };
        for rows in 0..200 {
            assert!(
                alike(None, Layout::Tiles, Form::Many, rows) && alike(None, Layout::Tiles, Form::Few, rows)
            );
            let tile = !(1..8).contains(&(rows % 64));
            assert_eq!(alike(None, Layout::Rows, Form::Many, rows), tile, "{rows}");
            assert_eq!(
                alike(Some("plain"), Layout::Rows, Form::Many, rows),
                rows.is_multiple_of(8),
                "{rows}"
            );
        }
    }

    #[test]
    fn the_default_follows_the_layout_and_the_rows_or_the_stage() {
        let symbol = |rows, layout| node(None, DType::Bf16, &args(rows, 512, layout)).unwrap().kernel.symbol;
        assert_eq!(symbol(8, Layout::Rows), "down_plain_bf16");
        assert_eq!(symbol(9, Layout::Rows), "down_tile_bf16");
        assert_eq!(symbol(8, Layout::Tiles), "down_stream_bf16");
        assert_eq!(symbol(9, Layout::Tiles), "down_mma_bf16");
        for (form, rows, expected) in
            [(Form::Few, 20, "o_proj_stream_bf16"), (Form::Many, 2, "o_proj_mma_bf16")]
        {
            let selection = Selection::default().for_products(form);
            let launch = Launch { selection: &selection, dtype: DType::Bf16, sm_count: 132, dependent: true };
            let node = o_proj::node(&launch, "t", &args(rows, 512, Layout::Tiles)).unwrap();
            assert_eq!(node.kernel.symbol, expected);
        }
    }

    #[test]
    fn products_of_a_14b_are_summed_up_in_parts_where_that_keeps_132_sms_busy() {
        // qkv, o_proj, gate_up, down: groups of 128 weight rows, K.
        let parts = [(56, 5120), (40, 5120), (216, 5120), (40, 13824)]
            .map(|(groups, inner)| mma_parts(groups, inner, 132));
        assert_eq!(parts, [2, 3, 1, 3]);
        // A part of 512 at least; whatever the device says of itself.
        assert_eq!([512, 1024, 2048].map(|inner| mma_parts(1, inner, 132)), [1, 2, 4]);
        assert!((0..40).all(|sm_count| (1..=MMA_PARTS).contains(&mma_parts(3, 4096, sm_count))));
        let node = node(None, DType::Bf16, &args(300, 13824, Layout::Tiles)).unwrap();
        assert_eq!((node.geometry.grid, node.geometry.cluster), ([2, 40, 3], [1, 1, 3]));
    }

    #[test]
    fn a_weight_is_packed_unless_its_variant_its_type_or_its_rows_forbid_it() {
        let none = Selection::default();
        let chosen = |variant| Selection::one(&down::OP, variant).unwrap();
        let layout =
            |selection: &Selection, dtype, inner| Layout::to_load(&down::OP, selection, dtype, inner);
        assert_eq!(layout(&none, DType::Bf16, 512), Layout::Tiles);
        assert_eq!(layout(&none, DType::Bf16, 500), Layout::Rows);
        assert_eq!(layout(&none, DType::F32, 512), Layout::Rows);
        for (variant, expected) in [
            ("plain", Layout::Rows),
            ("tile", Layout::Rows),
            ("stream", Layout::Tiles),
            ("ring", Layout::Tiles),
            ("mma", Layout::Tiles),
        ] {
            assert_eq!(layout(&chosen(variant), DType::Bf16, 512), expected, "{variant}");
        }
        // What is chosen for another op changes nothing.
        assert_eq!(layout(&Selection::one(&o_proj::OP, "plain").unwrap(), DType::Bf16, 512), Layout::Tiles);
    }

    #[test]
    fn a_variant_that_cannot_read_the_layout_says_so() {
        let packed = refusal(Some("plain"), DType::Bf16, &args(2, 512, Layout::Tiles));
        assert!(packed.contains("these are packed in tiles"), "{packed}");
        let stored = refusal(Some("stream"), DType::Bf16, &args(2, 512, Layout::Rows));
        assert!(stored.contains("these are as stored"), "{stored}");
    }

    #[test]
    fn shapes_that_packed_variants_do_not_do_are_refused_with_their_numbers() {
        let tiles = |rows, inner| args(rows, inner, Layout::Tiles);
        assert!(refusal(None, DType::F32, &tiles(2, 512)).contains("K is 512 in f32"));
        assert!(refusal(None, DType::Bf16, &tiles(2, 500)).contains("K is 500 in bf16"));
        let wide = refusal(None, DType::Bf16, &tiles(8, 16384));
        assert!(wide.contains("8 rows of 16384 take 262656 bytes") && wide.contains("230400"), "{wide}");
        // The MLP of the 14B at eight rows: 221,696 bytes of activations leave no room for a ring.
        let ring = refusal(Some("ring"), DType::Bf16, &tiles(8, 13824));
        assert!(ring.contains("221696 of 230400") && ring.contains("leave 0 stages"), "{ring}");
        assert!(refusal(Some("ring"), DType::Bf16, &tiles(2, 32)).contains("rows of 64 or more"));
        let bare = project::Args { scratch: None, ..tiles(2, 512) };
        assert!(refusal(None, DType::Bf16, &bare).contains("needs scratch"));
        assert!(node(Some("mma"), DType::Bf16, &bare).is_ok());
        let short = Span { bytes: 132 * 1024, ..span(3) };
        let scratch = ProductScratch { partial: short, arrivals: span(4), next: None };
        let few = project::Args { scratch: Some(scratch), ..tiles(8, 512) };
        assert!(node(None, DType::Bf16, &few).is_ok());
        let many = project::Args { rows: 17, ..few };
        assert!(refusal(Some("stream"), DType::Bf16, &many).contains("partial of shape [3, 33792]"));
        let odd =
            project::Args { input: Span { ptr: span(0).ptr.offset(8), bytes: 1 << 20 }, ..tiles(2, 512) };
        assert!(refusal(None, DType::Bf16, &odd).contains("not 16-byte aligned"));
    }

    #[test]
    fn geometry_fills_the_machine_within_shared_memory() {
        for (rows, inner) in [(1, 32), (1, 5120), (2, 5120), (3, 13824), (8, 13824), (8, 5120), (19, 5120)] {
            let geometry =
                node(Some("stream"), DType::Bf16, &args(rows, inner, Layout::Tiles)).unwrap().geometry;
            assert_eq!(geometry.grid, [132, rows.div_ceil(8) as u32, 1]);
            let staged = (rows.min(8) * (inner | 32) * 2).max(CUT_BYTES);
            assert_eq!(geometry.shared_bytes as usize, staged);
            let Ok(ring) = node(Some("ring"), DType::Bf16, &args(rows, inner, Layout::Tiles)) else {
                continue;
            };
            let ring_bytes = ring.geometry.shared_bytes as usize - staged;
            assert!(
                ring.geometry.shared_bytes as usize <= SHARED_BYTES
                    && ring_bytes.is_multiple_of(RING_STAGE_BYTES)
            );
            assert!(ring_bytes >= 64 * 1024, "{rows} x {inner}: a ring of {ring_bytes} bytes");
        }
        // Two rows of 5120 leave room for the next launch's block; two of 13824 take the SM for a deep ring.
        assert_eq!((ring_stages(20_608), ring_stages(55_424)), (5, 8));
        // The two blocks of 256 rows that read the same weights are neighbours.
        let prompt = node(None, DType::Bf16, &args(260, 5120, Layout::Tiles)).unwrap();
        assert_eq!((prompt.geometry.grid, prompt.writes.len()), ([2, 40, 3], 1));
        let tiny = project::Args { hidden: 16, ..args(2, 96, Layout::Tiles) };
        assert_eq!(node(None, DType::Bf16, &tiny).unwrap().geometry.grid, [3, 1, 1]);
    }
}
