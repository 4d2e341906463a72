//! Host weights to device memory: converted on the fly, stacked where one kernel reads several tensors.

use crate::device::{Buffer, Device, Span, Stream};
use crate::error::{Error, Result};
use crate::ops::DType;
use crate::weights::{Dtype, TensorView, convert};
use std::sync::Arc;

/// Bytes converted and copied at a time; bounds the host memory that loading needs.
const CHUNK_BYTES: usize = 8 << 20;

/// Uploads tensors and keeps their buffers.
pub struct Uploader<'a> {
    device: Arc<dyn Device>,
    stream: &'a mut dyn Stream,
    dtype: DType,
    buffers: Vec<Buffer>,
    bytes: usize,
}

impl<'a> Uploader<'a> {
    /// Weights become `dtype` on the device.
    pub fn new(device: Arc<dyn Device>, stream: &'a mut dyn Stream, dtype: DType) -> Uploader<'a> {
        Uploader { device, stream, dtype, buffers: Vec::new(), bytes: 0 }
    }

    /// Uploads `tensors` one after another into one buffer called `label`.
    pub fn stack(&mut self, label: &str, tensors: &[TensorView<'_>]) -> Result<Span> {
        let elements = tensors.iter().try_fold(0usize, |sum, t| sum.checked_add(t.elements()));
        let bytes = elements
            .and_then(|n| n.checked_mul(self.dtype.bytes()))
            .ok_or_else(|| Error::Internal(format!("size of {label} overflows")))?;
        let buffer = self.device.alloc(bytes, label)?;
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
        self.bytes += bytes;
        let span = buffer.span();
        self.buffers.push(buffer);
        Ok(span)
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
        self.bytes += bytes;
        let span = buffer.span();
        self.buffers.push(buffer);
        Ok(span)
    }

    /// The buffers, to be kept as long as their spans are used, and their size.
    pub fn finish(self) -> (Vec<Buffer>, usize) {
        (self.buffers, self.bytes)
    }
}
