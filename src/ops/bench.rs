//! The kernels that measure and are measured on: copy, read-only sum, random values. Not in the registry, because no
//! model uses them; `bench` times the first two as ceilings, and synthetic weights come from the third.

use super::DType;
use super::params::BenchParams;
use crate::device::{Geometry, KernelId, Node, ParamBytes, Span};
use crate::error::{Error, Result};

const THREADS: u32 = 256;

/// Bytes that a block of `bench_copy` or `bench_sum` moves at a time: 256 threads, four loads of 16 bytes.
const CHUNK_BYTES: usize = 4 * 16 * THREADS as usize;

const COPY: KernelId = KernelId { module: "bench", symbol: "bench_copy" };
const SUM: KernelId = KernelId { module: "bench", symbol: "bench_sum" };

/// Blocks that fill the machine and stride over the rest.
fn geometry(sm_count: u32, chunks: usize) -> Geometry {
    let most = sm_count.max(1).saturating_mul(8);
    Geometry::linear(u32::try_from(chunks).unwrap_or(u32::MAX).clamp(1, most), THREADS)
}

fn vectors(what: &str, span: Span) -> Result<u64> {
    match span.bytes > 0 && span.bytes.is_multiple_of(16) && span.ptr.0.is_multiple_of(16) {
        true => Ok(span.bytes as u64 / 16),
        false => Err(Error::Internal(format!(
            "bench: {what} of {} bytes at {:#x}; 16-byte pieces are needed",
            span.bytes, span.ptr.0
        ))),
    }
}

fn node(label: &str, kernel: KernelId, geometry: Geometry, params: &BenchParams) -> Node {
    Node {
        label: label.into(),
        kernel,
        geometry,
        params: ParamBytes::of(params),
        reads: Vec::new(),
        writes: Vec::new(),
    }
}

/// Copies `src` to `dst`, of the same size.
pub fn copy(sm_count: u32, src: Span, dst: Span) -> Result<Node> {
    let elements = vectors("copy", src)?;
    if vectors("copy", dst)? != elements || src.overlaps(&dst) {
        return Err(Error::Internal(format!("bench: copy of {} bytes onto {}", src.bytes, dst.bytes)));
    }
    let params = BenchParams { src: src.ptr.0, dst: dst.ptr.0, elements, ..BenchParams::default() };
    let made = node("bench.copy", COPY, geometry(sm_count, src.bytes.div_ceil(CHUNK_BYTES)), &params);
    Ok(Node { reads: vec![src], writes: vec![dst], ..made })
}

/// Adds the sum of the 32-bit words of `src`, modulo 2^32, to the word `sum`.
pub fn sum(sm_count: u32, src: Span, sum: Span) -> Result<Node> {
    let elements = vectors("sum", src)?;
    if sum.bytes < 4 || !sum.ptr.0.is_multiple_of(4) || src.overlaps(&sum) {
        return Err(Error::Internal(format!("bench: sum into {} bytes", sum.bytes)));
    }
    let word = sum.slice(0, 4);
    let params = BenchParams { src: src.ptr.0, dst: sum.ptr.0, elements, ..BenchParams::default() };
    let made = node("bench.sum", SUM, geometry(sm_count, src.bytes.div_ceil(CHUNK_BYTES)), &params);
    Ok(Node { reads: vec![src, word], writes: vec![word], ..made })
}

/// What random values look like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Random {
    /// Of the values; the same seed gives the same values.
    pub seed: u64,
    /// Their mean.
    pub mean: f32,
    /// Their standard deviation; none is further from the mean than 3.5 of it.
    pub deviation: f32,
}

/// Fills `dst` with random values of `dtype`.
pub fn fill(sm_count: u32, dtype: DType, dst: Span, random: Random) -> Result<Node> {
    let symbol = match dtype {
        DType::F32 => "bench_fill_f32",
        DType::Bf16 => "bench_fill_bf16",
    };
    if dst.bytes == 0
        || !dst.bytes.is_multiple_of(dtype.bytes())
        || !dst.ptr.0.is_multiple_of(dtype.bytes() as u64)
    {
        return Err(Error::Internal(format!("bench: fill of {} bytes at {:#x}", dst.bytes, dst.ptr.0)));
    }
    let elements = dst.bytes / dtype.bytes();
    let Random { seed, mean, deviation } = random;
    let params = BenchParams { dst: dst.ptr.0, elements: elements as u64, seed, mean, deviation, src: 0 };
    let geometry = geometry(sm_count, elements.div_ceil(THREADS as usize));
    let made = node("bench.fill", KernelId { module: "bench", symbol }, geometry, &params);
    Ok(Node { writes: vec![dst], ..made })
}

#[cfg(test)]
mod tests {
    use super::super::harness::Rig;
    use super::*;
    use crate::device::emulated::{EmulatedDevice, EmulatedOptions};
    use std::sync::Arc;

    fn rig() -> Rig {
        Rig::new(Arc::new(EmulatedDevice::new(EmulatedOptions::default()).unwrap()), 1).unwrap()
    }

    #[test]
    fn copies_and_sums_are_exact_at_any_length() {
        // Less than a chunk, and more than all blocks take at a time with a ragged end.
        for bytes in [16, 4096 + 48, 4 * 8 * CHUNK_BYTES + 5 * 16] {
            let mut rig = rig();
            let words: Vec<u32> = (0..bytes as u32 / 4).map(|i| i.wrapping_mul(0x9e37_79b9) ^ 7).collect();
            let src = rig.indices("src", &words).unwrap();
            let dst = rig.bytes("dst", &vec![0; bytes]).unwrap();
            let total = rig.indices("total", &[5]).unwrap();
            rig.run(&copy(4, src, dst).unwrap()).unwrap();
            rig.run(&sum(4, src, total).unwrap()).unwrap();
            rig.check_guards().unwrap();
            assert!(rig.read_bytes(dst).unwrap() == bytemuck::cast_slice::<u32, u8>(&words), "{bytes}");
            let expected = words.iter().fold(5u32, |sum, &word| sum.wrapping_add(word));
            assert_eq!(rig.read_bytes(total).unwrap(), expected.to_le_bytes(), "{bytes}");
        }
    }

    #[test]
    fn random_values_have_the_asked_moments_and_do_not_depend_on_the_grid() {
        let random = Random { seed: 3, mean: 1.0, deviation: 0.5 };
        for &dtype in DType::ALL {
            let mut rig = rig();
            let len = 100_003;
            let spans = [1, 4].map(|sms| {
                let span = rig.output("values", dtype, len).unwrap();
                rig.run(&fill(sms, dtype, span, random).unwrap()).unwrap();
                span
            });
            rig.check_guards().unwrap();
            let values = rig.read(spans[0], dtype).unwrap();
            assert_eq!(values, rig.read(spans[1], dtype).unwrap());
            let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / len as f64;
            let variance = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / len as f64;
            // Five standard errors: 0.5 / sqrt(n), and 0.25 sqrt(2 / n) at most.
            assert!((mean - 1.0).abs() < 0.008 && (variance - 0.25).abs() < 0.006, "{mean} {variance}");
            assert!(values.iter().all(|v| (v - 1.0).abs() <= 1.75));
            let other = rig.output("other", dtype, len).unwrap();
            rig.run(&fill(4, dtype, other, Random { seed: 4, ..random }).unwrap()).unwrap();
            assert_ne!(values, rig.read(other, dtype).unwrap());
        }
    }

    #[test]
    fn odd_sizes_and_overlaps_are_refused() {
        let span = |at: u64, bytes| Span { ptr: crate::device::DevicePtr(at), bytes };
        assert!(copy(4, span(256, 24), span(512, 24)).is_err());
        assert!(copy(4, span(256, 32), span(264, 32)).is_err());
        assert!(copy(4, span(256, 32), span(272, 32)).is_err());
        assert!(sum(4, span(256, 32), span(260, 4)).is_err());
        assert!(fill(4, DType::Bf16, span(256, 3), Random { seed: 0, mean: 0.0, deviation: 1.0 }).is_err());
    }
}
