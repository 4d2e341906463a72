//! Host weights to device memory: converted on the fly, stacked where one kernel reads several tensors, packed where
//! one reads tiles. Threads write the device's form straight into the stream's staging memory, piece by piece; that the
//! pieces before are copied to the device meanwhile is the stream's affair.

use super::workers::Workers;
use crate::device::{Buffer, Copies, Device, STAGING_BYTES, Span, Stream};
use crate::error::{Error, Result};
use crate::event::{Control, LoadProgress, ask};
use crate::ops::bench::{self, Random};
use crate::ops::product::{Layout, Weight};
use crate::ops::{DType, Op, Selection};
use crate::weights::pack::{Pairing, STEP_BYTES, Tiles};
use crate::weights::{Dtype, TensorView, convert};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

/// Uploads tensors and keeps their buffers.
pub struct Uploader<'a> {
    device: Arc<dyn Device>,
    stream: Box<dyn Stream>,
    dtype: DType,
    kernels: &'a Selection,
    workers: Workers,
    progress: Option<Progress<'a>>,
    buffers: Vec<Buffer>,
    /// Bytes of the buffers.
    bytes: usize,
    /// Bytes of the tensors that were read for them.
    stored_bytes: u64,
    /// Values are made on the device, from this seed, and not read.
    random: Option<u64>,
}

/// Whom to tell how far it is.
struct Progress<'a> {
    callback: &'a mut dyn FnMut(&LoadProgress<'_>) -> Control,
    done_bytes: u64,
    of_bytes: u64,
}

/// Writes the part of a buffer from some byte on.
type Fill<'a> = &'a (dyn Fn(usize, &mut [u8]) -> Result<()> + Sync);

impl<'a> Uploader<'a> {
    /// Weights become `dtype` on the device, in the layouts that the variants in `kernels` read. Other streams use them
    /// after [`wait`](Self::wait).
    pub fn new(device: Arc<dyn Device>, dtype: DType, kernels: &'a Selection) -> Result<Uploader<'a>> {
        Ok(Uploader {
            stream: device.stream()?,
            device,
            dtype,
            kernels,
            workers: Workers::none(),
            progress: None,
            buffers: Vec::new(),
            bytes: 0,
            stored_bytes: 0,
            random: None,
        })
    }

    /// The same with threads that convert and pack, as many as given or as the machine has use for, in place of the
    /// calling one. They live as long as the uploader; what arrives on the device does not depend on their number.
    pub fn with_threads(self, threads: Option<NonZeroUsize>) -> Result<Uploader<'a>> {
        Ok(Uploader { workers: Workers::new(threads)?, ..self })
    }

    /// The same with a callback that is told how much of `of_bytes` is done, and may stop it.
    pub fn with_progress(
        self,
        of_bytes: u64,
        callback: &'a mut dyn FnMut(&LoadProgress<'_>) -> Control,
    ) -> Uploader<'a> {
        Uploader { progress: Some(Progress { callback, done_bytes: 0, of_bytes }), ..self }
    }

    /// The same with random values in place of the tensors' own: only their names and shapes are looked at.
    pub(super) fn random(
        device: Arc<dyn Device>,
        dtype: DType,
        kernels: &'a Selection,
        seed: u64,
    ) -> Result<Uploader<'a>> {
        Ok(Uploader { random: Some(seed), ..Uploader::new(device, dtype, kernels)? })
    }

    /// The device that they are uploaded to.
    pub(super) fn device(&self) -> Arc<dyn Device> {
        self.device.clone()
    }

    /// Whether tensors have names and shapes only.
    pub fn is_random(&self) -> bool {
        self.random.is_some()
    }

    /// Element type of the weights on the device.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Variants whose layouts the weights take.
    pub fn kernels(&self) -> &'a Selection {
        self.kernels
    }

    /// Threads that convert and pack.
    pub fn threads(&self) -> usize {
        self.workers.count()
    }

    /// Uploads `tensors` one after another into one buffer called `label`.
    pub fn stack(&mut self, label: &str, tensors: &[TensorView<'_>]) -> Result<Span> {
        // The elements of each tensor, counted through all of them.
        let parts = ranges(label, tensors, TensorView::elements)?;
        let elements = parts.last().map_or(0, |(range, _)| range.end);
        let bytes = elements
            .checked_mul(self.dtype.bytes())
            .ok_or_else(|| Error::Internal(format!("size of {label} overflows")))?;
        let buffer = self.device.alloc(bytes, label)?;
        if let Some(seed) = self.random {
            self.fill_random(seed, buffer.span(), tensors)?;
            return Ok(self.keep(buffer));
        }
        let (stored, size) = (self.stored(), self.dtype.bytes());
        self.send(label, &buffer, size, &|first, mut out| {
            let mut element = first / size;
            while !out.is_empty() {
                let (range, tensor) = part_of(&parts, element, label)?;
                let end = range.end.min(element + out.len() / size);
                let (part, rest) = out.split_at_mut((end - element) * size);
                convert::write_range_as(tensor, element - range.start..end - range.start, stored, part)?;
                (element, out) = (end, rest);
            }
            Ok(())
        })?;
        self.count_read(tensors);
        Ok(self.keep(buffer))
    }

    /// How the device's element type is called in files.
    fn stored(&self) -> Dtype {
        match self.dtype {
            DType::F32 => Dtype::F32,
            DType::Bf16 => Dtype::Bf16,
        }
    }

    fn count_read(&mut self, tensors: &[TensorView<'_>]) {
        if self.device.holds_data() {
            self.stored_bytes += tensors.iter().map(|tensor| tensor.byte_len() as u64).sum::<u64>();
        }
    }

    /// Uploads all of `buffer`, `fill`ed by the threads in parts of whole `unit`s of bytes.
    fn send(&mut self, label: &str, buffer: &Buffer, unit: usize, fill: Fill<'_>) -> Result<()> {
        if !self.device.holds_data() || buffer.bytes() == 0 {
            return Ok(());
        }
        let step = STAGING_BYTES / unit.max(1) * unit;
        if step == 0 {
            // A config has no rows of that size.
            return Err(Error::Internal(format!("{label} is filled in units of {unit} bytes")));
        }
        for first in (0..buffer.bytes()).step_by(step) {
            self.tell(label)?;
            let bytes = step.min(buffer.bytes() - first);
            let workers = &self.workers;
            self.stream.put_with(buffer.span().slice(first, bytes), &mut |out| {
                workers.fill(out, unit, &|at, part| fill(first + at, part))
            })?;
            self.count_sent(bytes);
        }
        Ok(())
    }

    fn count_sent(&mut self, bytes: usize) {
        if let Some(progress) = &mut self.progress {
            progress.done_bytes += bytes as u64;
        }
    }

    /// Tells the caller how far it is, and what comes next.
    fn tell(&mut self, what: &str) -> Result<()> {
        let Some(Progress { callback, done_bytes, of_bytes }) = &mut self.progress else { return Ok(()) };
        let (done_bytes, of_bytes) = (*done_bytes, *of_bytes);
        match ask(|| callback(&LoadProgress { what, done_bytes, of_bytes }))? {
            Control::Continue => Ok(()),
            Control::Stop => Err(Error::LoadCancelled { done_bytes, of_bytes }),
        }
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
        let node = bench::fill(self.device.info().sm_count, self.dtype, span, random)?;
        // SAFETY: `span` lies in a buffer that the caller just allocated, and no device frees memory before what was
        // enqueued over it is done; the kernel reads no tables.
        unsafe { self.stream.launch(&node) }
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

    /// Uploads the matrix of `tensors`, one over another, packed.
    pub fn packed(
        &mut self,
        label: &str,
        tensors: &[TensorView<'_>],
        inner: usize,
        pairing: Pairing,
    ) -> Result<Span> {
        // The rows of each tensor, counted through all of them.
        let parts = ranges(label, tensors, |tensor| tensor.elements() / inner.max(1))?;
        let rows = parts.last().map_or(0, |(range, _)| range.end);
        let tiles = Tiles::new(rows, inner, pairing)?;
        let buffer = self.device.alloc(tiles.bytes(), label)?;
        if let (Some(seed), Some(tensor)) = (self.random, tensors.first()) {
            // As many values in whichever order.
            self.fill_like(seed, buffer.span(), tensor)?;
            return Ok(self.keep(buffer));
        }
        let read = |row: usize, columns: Range<usize>, out: &mut [u8]| {
            let (range, tensor) = part_of(&parts, row, label)?;
            let from = (row - range.start) * inner;
            convert::write_range_as(tensor, from + columns.start..from + columns.end, Dtype::Bf16, out)
        };
        self.send(label, &buffer, STEP_BYTES, &|first, out| {
            tiles.write_steps(first / STEP_BYTES, read, out)
        })?;
        self.count_read(tensors);
        Ok(self.keep(buffer))
    }

    /// Uploads one tensor.
    pub fn one(&mut self, label: &str, tensor: &TensorView<'_>) -> Result<Span> {
        self.stack(label, std::slice::from_ref(tensor))
    }

    /// Uploads a convolution of shape `[O, I, kh, kw]` as `[O, kh, kw, I]`.
    pub fn convolution(&mut self, label: &str, tensor: &TensorView<'_>, shape: [usize; 4]) -> Result<Span> {
        let [filters, inputs, height, width] = shape;
        let per_filter = [inputs, height, width].iter().try_fold(1usize, |count, &n| count.checked_mul(n));
        let per_filter = per_filter
            .filter(|count| count.checked_mul(filters) == Some(tensor.elements()))
            .ok_or_else(|| Error::Internal(format!("{tensor:?} as a convolution of shape {shape:?}")))?;
        let span = self.rows(label, (filters, per_filter), |filter, out| {
            let mut values = vec![0f32; per_filter];
            let range = filter * per_filter..(filter + 1) * per_filter;
            convert::write_range_as(tensor, range, Dtype::F32, bytemuck::cast_slice_mut(&mut values))?;
            *out = convert::conv_to_ohwi(&values, [1, inputs, height, width])?;
            Ok(())
        })?;
        self.count_read(std::slice::from_ref(tensor));
        Ok(span)
    }

    /// Uploads `rows` rows of `width` values that `row` makes on the host, on any thread and in any order, each rounded
    /// to the device's element type. It is given an empty vector to fill.
    pub fn rows(
        &mut self,
        label: &str,
        (rows, width): (usize, usize),
        row: impl Fn(usize, &mut Vec<f32>) -> Result<()> + Sync,
    ) -> Result<Span> {
        let too_large = || Error::Internal(format!("size of {label} overflows"));
        let row_bytes = width.checked_mul(self.dtype.bytes()).ok_or_else(too_large)?;
        let bytes = row_bytes.checked_mul(rows).ok_or_else(too_large)?;
        // Before anything is computed: what the device has no room for, the host may not have either.
        let buffer = self.device.alloc(bytes, label)?;
        let stored = self.stored();
        self.send(label, &buffer, row_bytes, &|first, out| {
            let mut values = Vec::with_capacity(width);
            for (index, out) in out.chunks_mut(row_bytes).enumerate() {
                values.clear();
                row(first / row_bytes + index, &mut values)?;
                convert::write_values_as(&values, stored, out)?;
            }
            Ok(())
        })?;
        Ok(self.keep(buffer))
    }

    /// Waits until everything is on the device, and tells the caller so.
    pub fn wait(&mut self) -> Result<()> {
        self.stream.synchronize()?;
        match self.device.holds_data() {
            true => self.tell(""),
            false => Ok(()),
        }
    }

    /// Bytes of the tensors that were read.
    pub fn stored_bytes(&self) -> u64 {
        self.stored_bytes
    }

    /// The buffers, to be kept as long as their spans are used, and their size.
    pub fn finish(self) -> (Vec<Buffer>, usize) {
        (self.buffers, self.bytes)
    }
}

/// Tensors, each with its range in all of them one after another.
type Parts<'t, 'v> = Vec<(Range<usize>, &'t TensorView<'v>)>;

/// The ranges of `tensors`, which have `count` each.
fn ranges<'t, 'v>(
    label: &str,
    tensors: &'t [TensorView<'v>],
    count: impl Fn(&TensorView<'v>) -> usize,
) -> Result<Parts<'t, 'v>> {
    let mut first = 0usize;
    let range = |tensor: &'t TensorView<'v>| {
        let end = first.checked_add(count(tensor));
        let end = end.ok_or_else(|| Error::Internal(format!("size of {label} overflows")))?;
        Ok((std::mem::replace(&mut first, end)..end, tensor))
    };
    tensors.iter().map(range).collect()
}

/// The one of `parts` that `index` falls into.
fn part_of<'p, 't, 'v>(
    parts: &'p Parts<'t, 'v>,
    index: usize,
    label: &str,
) -> Result<&'p (Range<usize>, &'t TensorView<'v>)> {
    let found = parts.iter().find(|(range, _)| range.contains(&index));
    found.ok_or_else(|| Error::Internal(format!("{label} has no part {index}")))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::emulated::{EmulatedDevice, EmulatedOptions};
    use crate::ops::qkv;
    use crate::weights::{Checkpoint, Part, TensorSpec};
    use std::fmt::Debug;

    /// Tensors of every dtype that files have, of these shapes, with values of many magnitudes.
    fn checkpoint(shapes: &[(&str, &str, &[usize])]) -> Checkpoint {
        let (mut header, mut data) = (String::new(), Vec::new());
        let mut state = 1u32;
        for (name, dtype, shape) in shapes {
            let start = data.len();
            for _ in 0..shape.iter().product() {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // Exponents around those of weights; every bit of the mantissa in use.
                let value = f32::from_bits(state & 0x87ff_ffff | 0x3800_0000);
                match *dtype {
                    "F32" => data.extend(value.to_le_bytes()),
                    "F16" => data.extend(half::f16::from_f32(value).to_le_bytes()),
                    _ => data.extend(half::bf16::from_f32(value).to_le_bytes()),
                }
            }
            let comma = if header.is_empty() { "" } else { "," };
            header += &format!(
                r#"{comma}"{name}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{}]}}"#,
                data.len()
            );
        }
        let header = format!("{{{header}}}");
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
        Checkpoint::from_bytes("weights", bytes).unwrap()
    }

    /// What is in device memory after `upload` by 1, 2 and 7 threads, which is the same.
    fn uploaded<T: PartialEq + Debug>(
        dtype: DType,
        upload: impl Fn(&mut Uploader<'_>) -> Result<(Span, T)>,
    ) -> (Vec<u8>, T) {
        let device = EmulatedDevice::new(EmulatedOptions::default()).unwrap();
        let mut found = Vec::new();
        for threads in [1, 2, 7] {
            let mut stream = device.stream().unwrap();
            let selection = Selection::default();
            let mut up = Uploader::new(Arc::new(device.clone()), dtype, &selection)
                .unwrap()
                .with_threads(NonZeroUsize::new(threads))
                .unwrap();
            assert_eq!(up.threads(), threads);
            let (span, other) = upload(&mut up).unwrap();
            up.wait().unwrap();
            let _buffers = up.finish();
            let mut bytes = vec![0; span.bytes];
            stream.get(span, &mut bytes).unwrap();
            found.push((bytes, other));
        }
        assert_eq!(device.live_bytes(), 0);
        assert!(found[0] == found[1] && found[0] == found[2], "the number of threads shows");
        found.swap_remove(0)
    }

    fn converted(tensor: &TensorView<'_>, dtype: Dtype) -> Vec<u8> {
        let mut out = vec![0; tensor.elements() * dtype.size()];
        convert::write_as(tensor, dtype, &mut out).unwrap();
        out
    }

    #[test]
    fn stacked_tensors_of_every_type_arrive_whatever_the_number_of_threads() {
        let checkpoint = checkpoint(&[
            ("a", "F32", &[1_500_003]),
            ("b", "BF16", &[7]),
            ("c", "F16", &[1_000, 1_001]),
            ("d", "BF16", &[2_100_001]),
        ]);
        let views: Vec<_> = checkpoint.tensors().collect();
        for (dtype, stored) in [(DType::F32, Dtype::F32), (DType::Bf16, Dtype::Bf16)] {
            let (bytes, read) = uploaded(dtype, |up| Ok((up.stack("x", &views)?, up.stored_bytes())));
            // More than one piece of staging memory, and no whole number of anything.
            assert!(bytes.len() > STAGING_BYTES);
            let expected: Vec<u8> = views.iter().flat_map(|view| converted(view, stored)).collect();
            assert!(bytes == expected, "{dtype:?}");
            assert_eq!(read, 1_500_003 * 4 + 7 * 2 + 1_001_000 * 2 + 2_100_001 * 2);
        }
        let (bytes, _) = uploaded(DType::Bf16, |up| Ok((up.stack("x", &[])?, ())));
        assert!(bytes.is_empty());
    }

    #[test]
    fn packed_matrices_arrive_whatever_the_number_of_threads() {
        const INNER: usize = 4128;
        let checkpoint = checkpoint(&[
            ("a", "F32", &[640, INNER]),
            ("b", "BF16", &[320, INNER]),
            ("c", "F16", &[320, INNER]),
            // Its last tile has three rows.
            ("odd", "F32", &[1027, INNER]),
        ]);
        let views: Vec<_> = checkpoint.tensors().collect();
        for (views, pairing) in [
            (&views[..3], Pairing::Rotary { head_dim: 64 }),
            (&views[..3], Pairing::Stacked),
            (&views[3..], Pairing::Neighbours),
        ] {
            let rows = views.iter().map(|view| view.elements() / INNER).sum();
            let values: Vec<u8> = views.iter().flat_map(|view| converted(view, Dtype::Bf16)).collect();
            let expected = Tiles::new(rows, INNER, pairing).unwrap().pack(&values).unwrap();
            let (bytes, layout) = uploaded(DType::Bf16, |up| {
                let weight = up.product(&qkv::OP, "x", views, INNER, pairing)?;
                Ok((weight.span, weight.layout))
            });
            assert!(bytes.len() > STAGING_BYTES && bytes == expected, "{pairing:?}");
            assert_eq!(layout, Layout::Tiles);
        }
    }

    #[test]
    fn rows_and_convolutions_arrive_whatever_the_number_of_threads() {
        let (rows, width) = (2_500, 1_001);
        let value = |row: usize, column: usize| (row * width + column) as f32 * 0.37 - 5e5;
        let checkpoint = checkpoint(&[("conv", "F32", &[70, 65, 3, 2])]);
        let conv = checkpoint.get("conv").unwrap();
        let ohwi = convert::conv_to_ohwi(&convert::to_f32(&conv).unwrap(), [70, 65, 3, 2]).unwrap();
        for dtype in [DType::F32, DType::Bf16] {
            let (bytes, ()) = uploaded(dtype, |up| {
                let row = |row: usize, out: &mut Vec<f32>| {
                    out.extend((0..width).map(|column| value(row, column)));
                    Ok(())
                };
                Ok((up.rows("table", (rows, width), row)?, ()))
            });
            let values = (0..rows * width).map(|i| value(i / width, i % width)).collect();
            assert!(bytes == crate::ops::harness::encode(dtype, values).0, "{dtype:?}");
            let (bytes, read) =
                uploaded(dtype, |up| Ok((up.convolution("conv", &conv, [70, 65, 3, 2])?, up.stored_bytes())));
            assert!(bytes == crate::ops::harness::encode(dtype, ohwi.clone()).0, "{dtype:?}");
            assert_eq!(read, 70 * 65 * 6 * 4);
        }
    }

    #[test]
    fn what_goes_wrong_in_a_thread_is_an_error_and_nothing_stays_on_the_device() {
        let spec = TensorSpec { name: "t".into(), shape: vec![3_000, 1_000], part: Part::Backbone };
        // Names and shapes; to read one is an error.
        let empty = Checkpoint::of_shapes(&[spec]).unwrap();
        let tensor = empty.get("t").unwrap();
        let device = EmulatedDevice::new(EmulatedOptions::default()).unwrap();
        let selection = Selection::default();
        for threads in [1, 2, 7] {
            let mut up = Uploader::new(Arc::new(device.clone()), DType::F32, &selection)
                .unwrap()
                .with_threads(NonZeroUsize::new(threads))
                .unwrap();
            let error = up.one("t", &tensor).unwrap_err().to_string();
            // Of the first part, whichever thread failed first.
            assert!(
                error.contains("32768 bytes at offset 0 reach past the end"),
                "{threads} threads: {error}"
            );
            let short = |_: usize, out: &mut Vec<f32>| {
                out.push(1.0);
                Ok(())
            };
            let error = up.rows("rows", (9, 2), short).unwrap_err().to_string();
            assert!(error.contains("1 values as f32 into 8 bytes"), "{error}");
            let panics = |row: usize, _: &mut Vec<f32>| -> Result<()> { panic!("row {row}") };
            let error = up.rows("rows", (1, 9), panics).unwrap_err();
            assert!(
                matches!(&error, Error::Internal(reason) if reason.ends_with("panicked: row 0")),
                "{error}"
            );
            let error = up.convolution("conv", &tensor, [3, 1_000, 1_000, 2]).unwrap_err().to_string();
            assert!(error.contains("as a convolution of shape [3, 1000, 1000, 2]"), "{error}");
            assert_eq!(device.live_bytes(), 0);
        }
    }

    #[test]
    fn callers_are_told_before_every_piece_and_at_the_end() {
        let checkpoint = checkpoint(&[("a", "F32", &[5_000_000]), ("b", "F32", &[3])]);
        let (a, b) = (checkpoint.get("a").unwrap(), checkpoint.get("b").unwrap());
        let device = EmulatedDevice::new(EmulatedOptions::default()).unwrap();
        let selection = Selection::default();
        let mut told = Vec::new();
        let mut callback = |progress: &LoadProgress<'_>| {
            assert_eq!(progress.of_bytes, 20_000_012);
            told.push((progress.what.to_owned(), progress.done_bytes));
            Control::Continue
        };
        let mut up = Uploader::new(Arc::new(device), DType::F32, &selection)
            .unwrap()
            .with_progress(20_000_012, &mut callback);
        up.one("a", &a).unwrap();
        up.one("b", &b).unwrap();
        up.wait().unwrap();
        drop(up);
        let step = STAGING_BYTES as u64;
        let expected = [("a", 0), ("a", step), ("a", 2 * step), ("b", 20_000_000), ("", 20_000_012)];
        assert_eq!(told, expected.map(|(what, done)| (what.to_owned(), done)));
    }
}
