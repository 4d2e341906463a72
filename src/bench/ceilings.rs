//! What the card can do at best, measured in the same run as everything that is compared with it: a copy, a
//! read-only stream and a large bf16 product, each by kernels of our own.

use super::launch;
use super::samples::{Effort, Row, time};
use crate::device::{Buffer, Copies, Device, Node, Stream};
use crate::error::{Error, Result};
use crate::ops::bench::{self, Random};
use crate::ops::product::{Layout, ProductScratch, Weight};
use crate::ops::{self, DType, Launch, Selection};
use serde::Serialize;
use std::sync::Arc;

/// How large the ceilings' own work is.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Bytes of each of the two buffers of the copy.
    pub stream_bytes: usize,
    /// Side of the square matrices of the product.
    pub gemm_side: usize,
}

impl Sizes {
    /// 4 GB and 8192 on a GPU (less where its memory is taken), little on the emulated device.
    pub fn for_device(device: &dyn Device) -> Sizes {
        let info = device.info();
        if info.kind != "cuda" {
            return Sizes { stream_bytes: 4 << 20, gemm_side: 96 };
        }
        let free = info.memory_bytes.map_or(u64::MAX, |(_, free)| free);
        let stream_bytes = (free / 4).min(4 << 30) as usize / 256 * 256;
        // Three matrices of bf16, in a quarter of it as well.
        let gemm_side = (free / 24).isqrt().min(8192) as usize / 256 * 256;
        Sizes { stream_bytes: stream_bytes.max(256), gemm_side: gemm_side.max(256) }
    }
}

/// The three ceilings of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Ceilings {
    /// Device copy: bytes are those read plus those written.
    pub copy: Row,
    /// Read-only sum.
    pub read: Row,
    /// bf16 product by the fastest `linear` variant; a library may be faster (`tools/peers.py` measures one).
    pub gemm: Row,
}

impl Ceilings {
    /// Measures all three.
    pub fn measure(device: &Arc<dyn Device>, effort: &Effort, sizes: Sizes) -> Result<Ceilings> {
        let (copy, read) = streams(device, effort, sizes.stream_bytes)?;
        Ok(Ceilings { copy, read, gemm: gemm(device, effort, sizes.gemm_side)? })
    }

    /// Milliseconds that `bytes` take at the copy's bandwidth.
    pub fn floor_ms(&self, bytes: u64) -> f64 {
        bytes as f64 / self.copy.gb_per_s() / 1e6
    }

    /// The rows, in the order of measuring.
    pub fn rows(&self) -> [&Row; 3] {
        [&self.copy, &self.read, &self.gemm]
    }
}

/// A buffer of random values.
pub(super) fn random_buffer(
    device: &Arc<dyn Device>,
    stream: &mut dyn Stream,
    label: &str,
    dtype: DType,
    bytes: usize,
    random: Random,
) -> Result<Buffer> {
    let buffer = device.alloc(bytes, label)?;
    launch(stream, &bench::fill(device.info().sm_count, dtype, buffer.span(), random)?)?;
    Ok(buffer)
}

fn launches(stream: &mut dyn Stream, effort: &Effort, node: &Node) -> Result<Vec<f64>> {
    time(stream, effort, &mut |_| Ok(()), &mut |stream| launch(stream, node))
}

fn streams(device: &Arc<dyn Device>, effort: &Effort, bytes: usize) -> Result<(Row, Row)> {
    let sms = device.info().sm_count;
    let mut stream = device.stream()?;
    let random = Random { seed: 1, mean: 0.0, deviation: 1.0 };
    let src = random_buffer(device, stream.as_mut(), "bench.src", DType::Bf16, bytes, random)?;
    let dst = device.alloc(bytes, "bench.dst")?;
    let total = device.alloc(16, "bench.total")?;
    stream.set(total.span(), 0)?;
    let row = |test: &str, moved: usize, samples_ms| Row {
        test: test.into(),
        shape: format!("{bytes} bytes"),
        bytes: moved as u64,
        samples_ms,
        ..Row::default()
    };
    let copy = bench::copy(sms, src.span(), dst.span())?;
    let copy = row("ceiling: copy", 2 * bytes, launches(stream.as_mut(), effort, &copy)?);
    let read = bench::sum(sms, src.span(), total.span())?;
    let read = row("ceiling: read", bytes, launches(stream.as_mut(), effort, &read)?);
    Ok((copy, read))
}

/// The fastest `linear` kernel on `side`-sized square matrices.
fn gemm(device: &Arc<dyn Device>, effort: &Effort, side: usize) -> Result<Row> {
    let sm_count = device.info().sm_count;
    let mut stream = device.stream()?;
    let bytes = side * side * DType::Bf16.bytes();
    let mut operand = |label, seed| {
        let random = Random { seed, mean: 0.0, deviation: 1.0 / (side as f32).sqrt() };
        random_buffer(device, stream.as_mut(), label, DType::Bf16, bytes, random)
    };
    // Random values are the same weights whether packed or not; with a multiple of 32 both take as many bytes.
    let (x, w) = (operand("bench.x", 2)?, operand("bench.w", 3)?);
    let y = device.alloc(bytes, "bench.y")?;
    let (floats, counters) = ProductScratch::sizes(sm_count, side);
    let partial = device.alloc(floats * 4, "bench.partial")?;
    let arrivals = device.alloc(counters * 4, "bench.arrivals")?;
    stream.set(arrivals.span(), 0)?;
    let args = |variant: &str| ops::linear::Args {
        x: x.span(),
        w: Weight { span: w.span(), layout: Layout::of_variant(variant) },
        bias: None,
        y: y.span(),
        rows: side,
        outputs: side,
        inner: side,
        silu: false,
        out_f32: false,
        scratch: Some(ProductScratch { partial: partial.span(), arrivals: arrivals.span(), next: None }),
    };
    let mut best: Option<(f64, &'static str, Node)> = None;
    for variant in ops::linear::OP.variants {
        let selection = Selection::one(&ops::linear::OP, variant.name)?;
        let launch = Launch { selection: &selection, dtype: DType::Bf16, sm_count, dependent: false };
        let node = match ops::linear::node(&launch, "bench.gemm", &args(variant.name)) {
            Ok(node) => node,
            // A variant for other shapes.
            Err(Error::Unsupported { .. }) => continue,
            Err(error) => return Err(error),
        };
        let trial = Effort { warm_up: 1, repeats: 3, in_flight: 1, ..*effort };
        let row = Row { samples_ms: launches(stream.as_mut(), &trial, &node)?, ..Row::default() };
        if best.as_ref().is_none_or(|(ms, ..)| row.median() < *ms) {
            best = Some((row.median(), variant.name, node));
        }
    }
    let Some((_, name, node)) = best else {
        return Err(Error::Internal(format!("no variant of linear multiplies {side} x {side} matrices")));
    };
    Ok(Row {
        test: "ceiling: bf16 product".into(),
        variant: format!("linear={name}"),
        dtype: "bf16".into(),
        shape: format!("{side} x {side} x {side}"),
        bytes: 3 * bytes as u64,
        flops: 2 * (side as u64).pow(3),
        samples_ms: launches(stream.as_mut(), effort, &node)?,
        note: "fastest of our own kernels".into(),
        ..Row::default()
    })
}
