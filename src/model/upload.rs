//! Host weights to device memory: converted on the fly, stacked where one kernel reads several tensors.

use crate::device::{Buffer, Device, Span, Stream};
use crate::error::{Error, Result};
use crate::ops::bench::{self, Random};
use crate::ops::product::{Layout, Weight};
use crate::ops::{DType, Op, Selection};
use crate::weights::pack::{Pairing, Tiles};
use crate::weights::{Dtype, TensorView, convert};
use std::sync::Arc;

/// Bytes converted and copied at a time; bounds the host memory that loading needs.
const CHUNK_BYTES: usize = 8 << 20;

/// Uploads tensors and keeps their buffers.
pub struct Uploader<'a> {
    device: Arc<dyn Device>,
    stream: &'a mut dyn Stream,
    dtype: DType,
    kernels: &'a Selection,
    buffers: Vec<Buffer>,
    bytes: usize,
    /// Values are made on the device, from this seed, and not read.
    random: Option<u64>,
}

impl<'a> Uploader<'a> {
    /// Weights become `dtype` on the device, in the layouts that the variants in `kernels` read.
    pub fn new(
        device: Arc<dyn Device>,
        stream: &'a mut dyn Stream,
        dtype: DType,
        kernels: &'a Selection,
    ) -> Uploader<'a> {
        Uploader { device, stream, dtype, kernels, buffers: Vec::new(), bytes: 0, random: None }
    }

    /// The same with random values in place of the tensors' own: only their names and shapes are looked at.
    pub fn random(
        device: Arc<dyn Device>,
        stream: &'a mut dyn Stream,
        dtype: DType,
        kernels: &'a Selection,
        seed: u64,
    ) -> Uploader<'a> {
        Uploader { random: Some(seed), ..Uploader::new(device, stream, dtype, kernels) }
    }

    /// Whether tensors have names and shapes only.
    pub fn is_random(&self) -> bool {
        self.random.is_some()
    }

    /// Uploads `tensors` one after another into one buffer called `label`.
    pub fn stack(&mut self, label: &str, tensors: &[TensorView<'_>]) -> Result<Span> {
        let elements = tensors.iter().try_fold(0usize, |sum, t| sum.checked_add(t.elements()));
        let bytes = elements
            .and_then(|n| n.checked_mul(self.dtype.bytes()))
            .ok_or_else(|| Error::Internal(format!("size of {label} overflows")))?;
        let buffer = self.device.alloc(bytes, label)?;
        if let Some(seed) = self.random {
            self.fill_random(seed, buffer.span(), tensors)?;
            return Ok(self.keep(buffer));
        }
        let mut at = buffer.ptr();
        let mut staging = Vec::new();
        let stored = match self.dtype {
            DType::F32 => Dtype::F32,
            DType::Bf16 => Dtype::Bf16,
        };
        let counted: &[TensorView<'_>] = if self.device.holds_data() { tensors } else { &[] };
        for tensor in counted {
            let step = CHUNK_BYTES / self.dtype.bytes();
            let mut first = 0;
            while first < tensor.elements() {
                let count = step.min(tensor.elements() - first);
                staging.resize(count * self.dtype.bytes(), 0);
                convert::write_range_as(tensor, first..first + count, stored, &mut staging)?;
                self.stream.upload(at, &staging)?;
                at = at.offset(staging.len());
                first += count;
            }
        }
        Ok(self.keep(buffer))
    }

    fn keep(&mut self, buffer: Buffer) -> Span {
        self.bytes += buffer.bytes();
        let span = buffer.span();
        self.buffers.push(buffer);
        span
    }

    /// Random values for `tensors`, one after another in `span`.
    fn fill_random(&mut self, seed: u64, span: Span, tensors: &[TensorView<'_>]) -> Result<()> {
        let mut first = 0;
        for tensor in tensors {
            let part = span.slice(first, tensor.elements() * self.dtype.bytes());
            self.fill_like(seed.wrapping_add(first as u64), part, tensor)?;
            first += part.bytes;
        }
        Ok(())
    }

    /// Random values in all of `span`, as large as those of `tensor`.
    fn fill_like(&mut self, seed: u64, span: Span, tensor: &TensorView<'_>) -> Result<()> {
        let (mean, deviation) = distribution(tensor.name(), tensor.shape());
        // Another stream of values for every tensor.
        let seed = seed.wrapping_add((self.bytes as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let random = Random { seed, mean, deviation };
        self.stream.launch(&bench::fill(self.device.info().sm_count, self.dtype, span, random)?)
    }

    /// Whether weights of `op` with rows of `inner` elements are packed.
    pub fn packs(&self, op: &'static Op, inner: usize) -> bool {
        Layout::to_load(op, self.kernels, self.dtype, inner) == Layout::Tiles
    }

    /// Uploads the matrix of `tensors`, one over another, for products of `op`: packed if that op's variants read it so.
    pub fn product(
        &mut self,
        op: &'static Op,
        label: &str,
        tensors: &[TensorView<'_>],
        inner: usize,
        pairing: Pairing,
    ) -> Result<Weight> {
        if !self.packs(op, inner) {
            return Ok(self.stack(label, tensors)?.into());
        }
        Ok(Weight { span: self.packed(label, tensors, inner, pairing)?, layout: Layout::Tiles })
    }

    /// Uploads the matrix of `tensors`, one over another, packed: tile by tile, in pieces of about 8 MB.
    pub fn packed(
        &mut self,
        label: &str,
        tensors: &[TensorView<'_>],
        inner: usize,
        pairing: Pairing,
    ) -> Result<Span> {
        let rows = tensors.iter().map(|t| t.elements() / inner.max(1)).sum();
        let tiles = Tiles::new(rows, inner, pairing)?;
        // The rows of each tensor, counted through all of them.
        let mut first = 0;
        let parts: Vec<_> = tensors
            .iter()
            .map(|t| {
                let range = first..first + t.elements() / inner.max(1);
                first = range.end;
                (range, t)
            })
            .collect();
        let read = |row: usize, out: &mut [u8]| {
            let (range, tensor) = parts
                .iter()
                .find(|(range, _)| range.contains(&row))
                .ok_or_else(|| Error::Internal(format!("{label} has no row {row}")))?;
            let from = (row - range.start) * inner;
            convert::write_range_as(tensor, from..from + inner, Dtype::Bf16, out)
        };
        let buffer = self.device.alloc(tiles.bytes(), label)?;
        if let (Some(seed), Some(tensor)) = (self.random, tensors.first()) {
            // As many values in whichever order.
            self.fill_like(seed, buffer.span(), tensor)?;
            return Ok(self.keep(buffer));
        }
        let at_once = (CHUNK_BYTES / tiles.tile_bytes()).max(1);
        let mut staging = Vec::new();
        let mut at = buffer.ptr();
        let packed = if self.device.holds_data() { tiles.tiles() } else { 0 };
        for start in (0..packed).step_by(at_once) {
            let count = at_once.min(tiles.tiles() - start);
            staging.resize(count * tiles.tile_bytes(), 0);
            for (i, out) in staging.chunks_exact_mut(tiles.tile_bytes()).enumerate() {
                tiles.write_tile(start + i, read, out)?;
            }
            self.stream.upload(at, &staging)?;
            at = at.offset(staging.len());
        }
        Ok(self.keep(buffer))
    }

    /// Uploads one tensor.
    pub fn one(&mut self, label: &str, tensor: &TensorView<'_>) -> Result<Span> {
        self.stack(label, std::slice::from_ref(tensor))
    }

    /// Uploads `count` values that `compute` makes on the host, rounded to the device's element type.
    pub fn values(
        &mut self,
        label: &str,
        count: usize,
        compute: impl FnOnce() -> Result<Vec<f32>>,
    ) -> Result<Span> {
        let mut compute = Some(compute);
        self.rows(label, (1, count), |_, row| {
            if let Some(compute) = compute.take() {
                *row = compute()?;
            }
            Ok(())
        })
    }

    /// The same for `rows` rows of `width` values, which `row` appends one at a time, so that no more than a few are
    /// held.
    pub fn rows(
        &mut self,
        label: &str,
        (rows, width): (usize, usize),
        mut row: impl FnMut(usize, &mut Vec<f32>) -> Result<()>,
    ) -> Result<Span> {
        let too_large = || Error::Internal(format!("size of {label} overflows"));
        let row_bytes = width.checked_mul(self.dtype.bytes()).ok_or_else(too_large)?;
        let bytes = row_bytes.checked_mul(rows).ok_or_else(too_large)?;
        // Before anything is computed: what the device has no room for, the host may not have either.
        let buffer = self.device.alloc(bytes, label)?;
        let step = (CHUNK_BYTES / row_bytes.max(1)).max(1);
        let computed = if self.device.holds_data() { rows } else { 0 };
        let mut at = buffer.ptr();
        for first in (0..computed).step_by(step) {
            let mut values = Vec::new();
            let end = rows.min(first + step);
            for index in first..end {
                row(index, &mut values)?;
            }
            let (chunk, _) = crate::ops::harness::encode(self.dtype, values);
            if chunk.len() != (end - first) * row_bytes {
                return Err(Error::Internal(format!(
                    "{} bytes of rows {first}..{end} of {label}",
                    chunk.len()
                )));
            }
            self.stream.upload(at, &chunk)?;
            at = at.offset(chunk.len());
        }
        Ok(self.keep(buffer))
    }

    /// The buffers, to be kept as long as their spans are used, and their size.
    pub fn finish(self) -> (Vec<Buffer>, usize) {
        (self.buffers, self.bytes)
    }
}

/// Mean and standard deviation of random weights: outputs about as large as inputs, norms about 1, and what is added
/// to a residual stream small, as in a trained model, so that nothing runs away over many layers.
fn distribution(name: &str, shape: &[usize]) -> (f32, f32) {
    let &[_, ref inputs @ ..] = shape else { return (0.0, 1.0) };
    if inputs.is_empty() {
        return if name.ends_with(".weight") { (1.0, 0.1) } else { (0.0, 0.02) };
    }
    let added = ["o_proj", "down_proj", "mlp.2", "conv2", "proj_out"];
    let gain = if added.iter().any(|part| name.contains(part)) { 0.25 } else { 1.0 };
    (0.0, gain / (inputs.iter().product::<usize>() as f32).sqrt())
}
