//! What the ops share: shape checks with numbers in their messages, the launch geometry of the two product
//! loops (`kernels/gemv.cuh`, `kernels/gemm_tile.cuh`), and the set-up of a test case.

use super::harness::{Case, Check, Rig, Scale};
use super::{DType, Launch, Op, Selection, div_ceil};
use crate::device::{Geometry, Span};
use crate::error::{Error, Result};

/// Rows that share one pass over the weights in `gemv.cuh` (`kRowGroup`).
pub const ROW_GROUP: usize = 8;
/// Shared memory for staged activations in `gemv.cuh` (`kStageBytes`).
const STAGE_BYTES: usize = 96 * 1024;
/// Warps, and so units at a time, of a block in `gemv.cuh`.
const WARPS: usize = 8;
/// Rows of a tile in `gemm_tile.cuh`.
pub const TILE_ROWS: usize = 64;
/// Units (pairs of weight rows) of a tile in `gemm_tile.cuh`.
const TILE_UNITS: usize = 32;

/// Checks the arguments of one op and names it in every error.
#[derive(Clone, Copy, Debug)]
pub struct Checks {
    op: &'static str,
    variant: &'static str,
}

impl Checks {
    /// For `variant` of `op`.
    pub fn new(op: &'static str, variant: &'static str) -> Checks {
        Checks { op, variant }
    }

    /// The error of a shape that this variant does not do.
    pub fn refuse(&self, reason: impl Into<String>) -> Error {
        Error::Unsupported { op: self.op, variant: self.variant.into(), reason: reason.into() }
    }

    /// A dimension as the kernels take it: at least 1, and far enough below 2^32 that a kernel's index may
    /// pass the end by one block's worth.
    pub fn dim(&self, name: &str, value: usize) -> Result<u32> {
        match u32::try_from(value) {
            Ok(v @ 1..=0x7fff_ffff) => Ok(v),
            _ => Err(self.refuse(format!("{name} is {value}, must be 1 to 2147483647"))),
        }
    }

    /// The product of dimensions, refused where it leaves the kernels' 32-bit indices.
    pub fn product(&self, name: &str, dims: &[usize]) -> Result<usize> {
        let product = dims.iter().try_fold(1usize, |p, &d| p.checked_mul(d));
        match product {
            Some(p) => {
                self.dim(name, p)?;
                Ok(p)
            }
            None => Err(self.refuse(format!("{name} of shape {dims:?} overflows"))),
        }
    }

    /// The part of `span` that a tensor of shape `dims` takes.
    pub fn span(&self, name: &str, span: Span, element_bytes: usize, dims: &[usize]) -> Result<Span> {
        let bytes = dims
            .iter()
            .try_fold(element_bytes, |p, &d| p.checked_mul(d))
            .ok_or_else(|| self.refuse(format!("{name} of shape {dims:?} overflows")))?;
        if span.ptr.0 == 0 || span.bytes < bytes {
            return Err(Error::Internal(format!(
                "op {}: {name} of shape {dims:?} takes {bytes} bytes, the buffer at {:#x} has {}",
                self.op, span.ptr.0, span.bytes
            )));
        }
        if !span.ptr.0.is_multiple_of(element_bytes as u64) {
            return Err(Error::Internal(format!(
                "op {}: {name} at {:#x} is not aligned to its elements of {element_bytes} bytes",
                self.op, span.ptr.0
            )));
        }
        Ok(Span { ptr: span.ptr, bytes })
    }

    /// The same for a tensor that may be absent.
    pub fn optional(
        &self,
        name: &str,
        span: Option<Span>,
        element_bytes: usize,
        dims: &[usize],
    ) -> Result<Option<Span>> {
        span.map(|s| self.span(name, s, element_bytes, dims)).transpose()
    }
}

/// The address that a kernel takes for an optional tensor.
pub fn address(span: Option<Span>) -> u64 {
    span.map_or(0, |s| s.ptr.0)
}

/// Geometry of a product of `rows` rows with `units` pairs of weight rows of length `inner`.
pub fn product_geometry(launch: &Launch, variant: &str, rows: usize, inner: usize, units: usize) -> Geometry {
    let mut geometry = if variant == "tile" {
        let mut tiles = Geometry::linear(div_ceil(units, TILE_UNITS), 32 * WARPS as u32);
        tiles.grid[1] = div_ceil(rows, TILE_ROWS);
        tiles
    } else {
        // Two blocks fit an SM; a small product takes as many blocks as it has groups of eight units.
        let blocks = div_ceil(units, WARPS).min(launch.sm_count.max(1).saturating_mul(2));
        let group = rows.clamp(1, ROW_GROUP);
        let fits = STAGE_BYTES / (group * launch.dtype.bytes()) / 256 * 256;
        let staged = group * inner.min(fits) * launch.dtype.bytes();
        Geometry::linear(blocks, 32 * WARPS as u32).with_shared(staged as u32)
    };
    geometry.dependent = launch.dependent;
    geometry
}

/// A case of `variant` of `op`; `run` gets the launch that the case is about.
pub fn case(
    op: &'static Op,
    variant: &'static str,
    dtype: DType,
    scale: Scale,
    (bytes, flops): (u64, u64),
    label: String,
    run: impl Fn(&mut Rig, &Launch) -> Result<Vec<Check>> + Send + Sync + 'static,
) -> Case {
    let run = move |rig: &mut Rig| {
        let selection = Selection::one(op, variant)?;
        let sm_count = sm_count(scale, rig.is_gpu(), rig.sm_count());
        run(rig, &Launch { selection: &selection, dtype, sm_count, dependent: true })
    };
    Case { label, variant, dtype, scale, bytes, flops, run: Box::new(run) }
}

/// SMs that a case of `scale` is laid out for: real shapes take the geometry that ships, but a GPU (an H100 PCIe has 114
/// SMs) has those that it has, and more blocks that wait for each other would be refused.
fn sm_count(scale: Scale, gpu: bool, device: u32) -> u32 {
    if scale == Scale::Real && !gpu { 132 } else { device }
}

/// When a case of so many operations runs: the instrumented builds do 10 to 100 MFLOP/s.
pub fn scale_for(flops: u64) -> Scale {
    if flops <= 2_000_000 { Scale::Small } else { Scale::Medium }
}

#[cfg(test)]
mod tests {
    use super::super::{attention, linear, o_proj, out_proj, qkv};
    use super::*;
    use crate::device::DevicePtr;

    #[test]
    fn real_cases_are_laid_out_for_132_sms_or_for_those_of_the_gpu() {
        assert_eq!([sm_count(Scale::Real, false, 4), sm_count(Scale::Real, true, 114)], [132, 114]);
        assert_eq!([sm_count(Scale::Medium, false, 4), sm_count(Scale::Small, true, 114)], [4, 114]);
    }

    /// Disjoint fake buffers of 1 MiB.
    fn span(index: u64) -> Span {
        Span { ptr: DevicePtr((index + 1) << 20), bytes: 1 << 20 }
    }

    fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
        result.unwrap_err().to_string()
    }

    fn with_launch<T>(dtype: DType, f: impl FnOnce(&Launch) -> T) -> T {
        let selection = Selection::default();
        f(&Launch { selection: &selection, dtype, sm_count: 132, dependent: true })
    }

    fn qkv_args() -> qkv::Args {
        qkv::Args {
            x: span(0),
            norm_w: span(1),
            normed: None,
            w: span(2).into(),
            bias: Some(span(3)),
            rope: span(4),
            row_seq: span(5),
            row_pos: span(6),
            rope_offset: span(7),
            q: span(8),
            k_cache: span(9),
            v_cache: span(10),
            rows: 2,
            sequences: 2,
            hidden: 96,
            heads_q: 3,
            heads_kv: 1,
            head_dim: 16,
            capacity: 20,
            positions: 40,
            eps: 1e-6,
            scratch: None,
        }
    }

    fn attention_args() -> attention::Args {
        attention::Args {
            q: span(0),
            k_cache: span(1),
            v_cache: span(2),
            row_seq: span(3),
            row_pos: span(4),
            out: span(5),
            split: None,
            prefetch: None,
            rows: 2,
            sequences: 2,
            heads_q: 5,
            heads_kv: 1,
            head_dim: 64,
            capacity: 20,
            scale: 0.125,
        }
    }

    #[test]
    fn the_whole_cache_of_the_layer_is_declared_and_nothing_more() {
        let node = with_launch(DType::Bf16, |l| qkv::node(l, "t", &qkv_args())).unwrap();
        let cache = 2 * 20 * 16 * 2;
        let bytes = |spans: &[Span]| spans.iter().map(|s| (s.ptr.0 >> 20, s.bytes)).collect::<Vec<_>>();
        assert_eq!(bytes(&node.writes), [(9, 2 * 3 * 16 * 2), (10, cache), (11, cache)]);
        assert_eq!(
            bytes(&node.reads),
            [
                (1, 2 * 96 * 4),
                (2, 96 * 2),
                (3, 5 * 16 * 96 * 2),
                (5, 40 * 16 * 4),
                (6, 8),
                (7, 8),
                (8, 8),
                (4, 5 * 16 * 2)
            ]
        );
        assert!(node.geometry.dependent);
    }

    #[test]
    fn variants_follow_the_rows_unless_chosen() {
        let symbol = |rows| {
            with_launch(DType::F32, |l| qkv::node(l, "t", &qkv::Args { rows, ..qkv_args() }))
                .unwrap()
                .kernel
                .symbol
        };
        assert_eq!(symbol(8), "qkv_plain_f32");
        assert_eq!(symbol(9), "qkv_tile_f32");
        let selection = Selection::parse(&["qkv=tile"]).unwrap();
        let launch = Launch { selection: &selection, dtype: DType::F32, sm_count: 4, dependent: false };
        let node = qkv::node(&launch, "t", &qkv_args()).unwrap();
        assert_eq!((node.kernel.symbol, node.geometry.dependent), ("qkv_tile_f32", false));
    }

    #[test]
    fn splits_need_scratch_and_are_read_back() {
        let split = attention::SplitScratch { partial: span(6), arrivals: span(7), splits: 3 };
        let args = attention::Args { split: Some(split), ..attention_args() };
        let node = with_launch(DType::Bf16, |l| attention::node(l, "t", &args)).unwrap();
        assert_eq!((node.kernel.symbol, node.geometry.grid), ("attention_mma_splitkv_bf16", [2, 3, 1]));
        let partial = Span { ptr: span(6).ptr, bytes: 2 * 5 * 3 * 66 * 4 };
        assert!(node.reads.contains(&partial) && node.writes.contains(&partial));

        let selection = Selection::parse(&["attention=splitkv"]).unwrap();
        let launch = Launch { selection: &selection, dtype: DType::Bf16, sm_count: 4, dependent: true };
        assert!(message(attention::node(&launch, "t", &attention_args())).contains("needs split scratch"));
    }

    #[test]
    fn splits_fill_the_machine_without_shredding_short_caches() {
        // 256 blocks on 132 SMs that hold two each; 17 splits would be eight too many.
        assert_eq!(attention::splits(132, 2, 8, 1120), 16);
        assert_eq!(attention::splits(132, 1, 8, 70), 2);
        assert_eq!(attention::splits(4, 3, 8, 4096), 1);
        assert_eq!(attention::splits(132, 1, 8, 5), 1);
    }

    #[test]
    fn shapes_that_a_kernel_does_not_do_are_refused_with_their_numbers() {
        let attend = |args| message(with_launch(DType::F32, |l| attention::node(l, "t", &args)));
        assert!(attend(attention::Args { head_dim: 24, ..attention_args() }).contains("head_dim is 24"));
        assert!(attend(attention::Args { head_dim: 272, ..attention_args() }).contains("head_dim is 272"));
        assert!(attend(attention::Args { heads_kv: 2, ..attention_args() }).contains("5 query heads"));
        assert!(attend(attention::Args { heads_kv: 0, ..attention_args() }).contains("0 kv heads"));
        assert!(attend(attention::Args { rows: 0, ..attention_args() }).contains("rows"));
        let unaligned = Span { ptr: span(1).ptr.offset(8), bytes: 1 << 19 };
        assert!(
            attend(attention::Args { k_cache: unaligned, ..attention_args() }).contains("16-byte aligned")
        );

        let project = |args| message(with_launch(DType::F32, |l| qkv::node(l, "t", &args)));
        assert!(project(qkv::Args { head_dim: 15, ..qkv_args() }).contains("head_dim is 15"));
        assert!(project(qkv::Args { hidden: usize::MAX, ..qkv_args() }).contains("overflows"));
        assert!(project(qkv::Args { heads_kv: usize::MAX, ..qkv_args() }).contains("overflows"));
    }

    #[test]
    fn short_absent_and_misaligned_buffers_are_named() {
        let args = o_proj::Args {
            input: span(0),
            w: span(1).into(),
            bias: None,
            x: span(2),
            rows: 3,
            hidden: 512,
            inner: 512,
            scratch: None,
        };
        let o_proj = |args| message(with_launch(DType::F32, |l| o_proj::node(l, "t", &args)));
        let short = o_proj(o_proj::Args { rows: 513, ..args });
        assert!(
            short.contains("[513, 512]") && short.contains("1050624 bytes") && short.contains("1048576"),
            "{short}"
        );
        let absent = Span { ptr: DevicePtr::NULL, bytes: 1 << 20 };
        assert!(o_proj(o_proj::Args { w: absent.into(), ..args }).contains("w of shape [512, 512]"));
        let odd = Span { ptr: span(0).ptr.offset(2), bytes: 1 << 19 };
        assert!(o_proj(o_proj::Args { input: odd, ..args }).contains("not aligned"));
        assert!(with_launch(DType::F32, |l| o_proj::node(l, "t", &args)).is_ok());
    }

    #[test]
    fn large_products_stay_within_shared_memory() {
        for dtype in DType::ALL {
            for (rows, inner) in [(1, 16384), (3, 13824), (5, 16384), (8, 5120), (8, 1), (13, 9000)] {
                let geometry = with_launch(*dtype, |l| product_geometry(l, "plain", rows, inner, 1000));
                assert!(geometry.shared_bytes as usize <= STAGE_BYTES, "{rows} x {inner}: {geometry:?}");
                assert!(geometry.shared_bytes as usize >= rows.min(8) * inner.min(256) * dtype.bytes());
                assert_eq!(geometry.grid[0], 125);
            }
        }
        let launched =
            |units| with_launch(DType::F32, |l| product_geometry(l, "plain", 1, 64, units).grid[0]);
        assert_eq!((launched(3), launched(100_000)), (1, 264));
    }

    #[test]
    fn optional_tensors_are_declared_when_given() {
        let args = out_proj::Args {
            x: span(0),
            norm_w: span(1),
            pos_embed: None,
            w: span(2).into(),
            bias: span(3),
            norm_out: None,
            c: span(4),
            rows: 2,
            hidden: 64,
            eps: 1e-6,
            scratch: None,
        };
        let plain = with_launch(DType::F32, |l| out_proj::node(l, "t", &args)).unwrap();
        assert_eq!((plain.reads.len(), plain.writes.len()), (4, 1));
        let pos_embed = Some(out_proj::PosEmbed { table: span(5), rows: 7, state: span(6) });
        let full = out_proj::Args { pos_embed, norm_out: Some(span(7)), ..args };
        let full = with_launch(DType::F32, |l| out_proj::node(l, "t", &full)).unwrap();
        assert_eq!((full.reads.len(), full.writes.len()), (6, 2));

        let linear_args = linear::Args {
            x: span(0),
            w: span(1).into(),
            bias: None,
            y: span(2),
            rows: 2,
            outputs: 10,
            inner: 8,
            silu: false,
            out_f32: true,
            scratch: None,
        };
        let y = |out_f32| {
            let args = linear::Args { out_f32, ..linear_args };
            with_launch(DType::Bf16, |l| linear::node(l, "t", &args)).unwrap().writes[0].bytes
        };
        assert_eq!((y(true), y(false)), (80, 40));
    }
}
