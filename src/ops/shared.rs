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
const TILE_ROWS: usize = 64;
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

/// The product loop for `rows` rows: one pass over the weights where that suffices, else tiles.
pub fn product_variant(rows: usize) -> &'static str {
    if rows <= ROW_GROUP { "plain" } else { "tile" }
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
        // Real shapes use the geometry that ships.
        let sm_count = if scale == Scale::Real { 132 } else { rig.sm_count() };
        run(rig, &Launch { selection: &selection, dtype, sm_count, dependent: true })
    };
    Case { label, variant, dtype, scale, bytes, flops, run: Box::new(run) }
}

/// When a case of so many operations runs: the instrumented builds do 10 to 100 MFLOP/s.
pub fn scale_for(flops: u64) -> Scale {
    if flops <= 2_000_000 { Scale::Small } else { Scale::Medium }
}
