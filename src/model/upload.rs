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
        for tensor in tensors {
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

    /// Uploads values computed on the host, rounded to the device's element type.
    pub fn values(&mut self, label: &str, values: Vec<f32>) -> Result<Span> {
        let (bytes, _) = crate::ops::harness::encode(self.dtype, values);
        let buffer = self.device.alloc(bytes.len(), label)?;
        self.stream.upload(buffer.ptr(), &bytes)?;
        self.bytes += bytes.len();
        let span = buffer.span();
        self.buffers.push(buffer);
        Ok(span)
    }

    /// The buffers, to be kept as long as their spans are used, and their size.
    pub fn finish(self) -> (Vec<Buffer>, usize) {
        (self.buffers, self.bytes)
    }
}
