//! What `kernels test` and the op tests share: poisoned buffers, random data, the derived tolerance.
//!
//! Tolerance (FlashAttention-3's rule): a kernel may err against the f64 reference at most twice as much as
//! the plain low-precision evaluation of the same reference, plus one unit in the last place of the largest
//! value. Nothing is chosen by hand and nothing is widened to pass.

use super::DType;
use crate::device::{Buffer, Copies, Device, DevicePtr, Node, Span, Stream};
use crate::error::{Error, Result};
use crate::parallel::split_rows;
use half::bf16;
use std::sync::Arc;

/// Bytes of NaN around every test buffer, so that a read past its end is seen in the result.
const GUARD_BYTES: usize = 256;

/// How large a case is, and so when it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scale {
    /// Milliseconds, also under `asan` and `race`.
    Small,
    /// Up to a second on the emulated device.
    Medium,
    /// The shipped 14B shapes on 132 SMs; only when asked for.
    Real,
}

/// Builds inputs, launches, compares with the reference.
pub type RunCase = Box<dyn Fn(&mut Rig) -> Result<Vec<Check>> + Send + Sync>;

/// One shape of one variant in one element type, ready to run.
pub struct Case {
    /// The shape, e.g. `rows=3,hidden=96`; label and filter at once.
    pub label: String,
    /// Name of the variant.
    pub variant: &'static str,
    /// Element type.
    pub dtype: DType,
    /// When it runs.
    pub scale: Scale,
    /// Bytes the op must move at least, for the bench.
    pub bytes: u64,
    /// Floating-point operations, for the bench.
    pub flops: u64,
    /// Builds inputs, launches, compares with the reference.
    pub run: RunCase,
}

/// One output compared.
#[derive(Clone, Debug)]
pub struct Check {
    /// Which output.
    pub output: String,
    /// Largest absolute error against the f64 reference.
    pub max_error: f64,
    /// Mean absolute error.
    pub mean_error: f64,
    /// Largest error allowed.
    pub allowed: f64,
    /// Index of the worst element, what was computed and what was expected there.
    pub worst: (usize, f64, f64),
    /// Within tolerance, with NaN exactly where the reference has it.
    pub ok: bool,
}

/// A device array in a test, with the values that the kernel sees (already rounded to its element type).
#[derive(Clone)]
pub struct Tensor {
    /// Where it is.
    pub span: Span,
    /// What it holds, widened.
    pub values: Vec<f32>,
}

impl Tensor {
    /// Device address.
    pub fn ptr(&self) -> DevicePtr {
        self.span.ptr
    }
}

/// A device, a stream, and the guarded buffers of one case.
pub struct Rig {
    device: Arc<dyn Device>,
    stream: Box<dyn Stream>,
    buffers: Vec<(String, Buffer)>,
    random: u64,
    /// Of a rig that only prepares: the first node that it was to run.
    kept: Option<Kept>,
}

/// See [`prepare`].
enum Kept {
    /// Nothing yet.
    Waiting,
    /// The node.
    Node(Box<Node>),
}

/// A case with its inputs on the device, ready to be launched again and again.
pub struct Prepared {
    /// What the case launches.
    pub node: Node,
    /// The owner of its buffers and of the stream to launch it on.
    pub rig: Rig,
}

/// Brings a case to the point where it would launch, and no further: no reference is computed, which at real shapes
/// takes minutes.
pub fn prepare(case: &Case, device: Arc<dyn Device>, seed: u64) -> Result<Prepared> {
    let mut rig = Rig::new(device, seed)?;
    rig.kept = Some(Kept::Waiting);
    let outcome = (case.run)(&mut rig);
    match (rig.kept.take(), outcome) {
        (Some(Kept::Node(node)), _) => Ok(Prepared { node: *node, rig }),
        (_, Err(error)) => Err(error),
        (_, Ok(_)) => Err(Error::Internal(format!("case {} launches nothing", case.label))),
    }
}

/// What SplitMix64 adds from one number to the next, so that any of them can be had at once.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
/// Values that a thread takes at a time.
const SHARE: usize = 1 << 16;

/// SplitMix64's number for a state.
fn split_mix(state: u64) -> u64 {
    let mut z = state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Rig {
    /// A rig with its own stream; `seed` decides the random data.
    pub fn new(device: Arc<dyn Device>, seed: u64) -> Result<Rig> {
        let stream = device.stream()?;
        Ok(Rig { device, stream, buffers: Vec::new(), random: seed.wrapping_mul(GOLDEN) | 1, kept: None })
    }

    /// SMs of the device, for geometry.
    pub fn sm_count(&self) -> u32 {
        self.device.info().sm_count
    }

    /// Whether the number of SMs is a GPU's own.
    pub fn is_gpu(&self) -> bool {
        self.device.info().kind == "cuda"
    }

    fn next(&mut self) -> u64 {
        self.random = self.random.wrapping_add(GOLDEN);
        split_mix(self.random)
    }

    /// `len` roughly normal values of standard deviation `scale` (a sum of four uniforms: cheap, and large
    /// tensors need many).
    pub fn normal(&mut self, len: usize, scale: f32) -> Vec<f32> {
        let mut values = vec![0.0; len];
        let before = self.random;
        split_rows(&mut values, SHARE, |share, values| {
            let mut state = before.wrapping_add(GOLDEN.wrapping_mul((share * SHARE) as u64));
            for value in values {
                state = state.wrapping_add(GOLDEN);
                let bits = split_mix(state);
                let sum: u64 = (0..4).map(|i| (bits >> (16 * i)) & 0xffff).sum();
                // Four uniforms on [0, 65535]: mean 131070, variance 4 * 65536^2 / 12.
                *value = (sum as f32 - 131_070.0) / 37_837.0 * scale;
            }
        });
        self.random = before.wrapping_add(GOLDEN.wrapping_mul(len as u64));
        values
    }

    /// A uniform integer below `bound`.
    pub fn below(&mut self, bound: u32) -> u32 {
        (self.next() >> 32) as u32 % bound.max(1)
    }

    fn guarded(&mut self, name: &str, bytes: usize) -> Result<Span> {
        let padded = bytes.div_ceil(GUARD_BYTES) * GUARD_BYTES;
        let buffer = self.device.alloc(padded + 2 * GUARD_BYTES, name)?;
        self.stream.set(buffer.span(), 0xff)?;
        let span = Span { ptr: buffer.ptr().offset(GUARD_BYTES), bytes };
        self.device.name_span(span, name);
        self.buffers.push((name.to_string(), buffer));
        Ok(span)
    }

    /// Uploads `values` rounded to `dtype`, with NaN around them.
    pub fn input(&mut self, name: &str, dtype: DType, values: Vec<f32>) -> Result<Tensor> {
        let span = self.guarded(name, values.len() * dtype.bytes())?;
        let (bytes, values) = encode(dtype, values);
        self.stream.put(span, &bytes)?;
        Ok(Tensor { span, values })
    }

    /// Random input: [`Rig::normal`] then [`Rig::input`].
    pub fn random(&mut self, name: &str, dtype: DType, len: usize, scale: f32) -> Result<Tensor> {
        let values = self.normal(len, scale);
        self.input(name, dtype, values)
    }

    /// Uploads raw bytes (indices, tables, states), with NaN around them.
    pub fn bytes(&mut self, name: &str, bytes: &[u8]) -> Result<Span> {
        let span = self.guarded(name, bytes.len())?;
        self.stream.put(span, bytes)?;
        Ok(span)
    }

    /// Uploads `u32` indices.
    pub fn indices(&mut self, name: &str, values: &[u32]) -> Result<Span> {
        self.bytes(name, bytemuck::cast_slice(values))
    }

    /// An output filled with NaN.
    pub fn output(&mut self, name: &str, dtype: DType, len: usize) -> Result<Span> {
        self.guarded(name, len * dtype.bytes())
    }

    /// Device memory that the case takes.
    pub fn held_bytes(&self) -> usize {
        self.buffers.iter().map(|(_, buffer)| buffer.bytes()).sum()
    }

    /// The stream that everything runs on.
    pub fn stream(&mut self) -> &mut dyn Stream {
        self.stream.as_mut()
    }

    /// Launches a node that a case of this crate made, and waits.
    pub(crate) fn run(&mut self, node: &Node) -> Result<()> {
        // SAFETY: cases make their nodes by their ops, of buffers that they got from this rig, which keeps them, and of
        // tables that they wrote with what the op takes.
        unsafe { self.launch(node) }
    }

    /// Launches and waits. Of a rig that only prepares, this is where the case ends, with an error.
    ///
    /// # Safety
    /// As for [`Stream::launch`], and not once but as long as the rig lives: what is prepared is launched often.
    pub unsafe fn launch(&mut self, node: &Node) -> Result<()> {
        if let Some(kept) = &mut self.kept {
            *kept = Kept::Node(Box::new(node.clone()));
            return Err(Error::Internal("the case is prepared and goes no further".into()));
        }
        // SAFETY: promised by the caller.
        unsafe { self.stream.launch(node) }?;
        self.stream.synchronize()
    }

    /// Reads `span`, part of a buffer of this rig, back as `dtype`, widened.
    pub fn read(&mut self, span: Span, dtype: DType) -> Result<Vec<f32>> {
        Ok(decode(dtype, &self.read_bytes(span)?))
    }

    /// Reads raw bytes back.
    pub fn read_bytes(&mut self, span: Span) -> Result<Vec<u8>> {
        if !self.buffers.iter().any(|(_, buffer)| buffer.span().contains(&span)) {
            return Err(Error::Internal(format!("{span:?} is in no buffer of the rig")));
        }
        let mut bytes = vec![0; span.bytes];
        self.stream.get(span, &mut bytes)?;
        Ok(bytes)
    }

    /// Fails if any guard before or after a buffer was overwritten.
    pub fn check_guards(&mut self) -> Result<()> {
        let buffers = self.buffers.clone();
        for (name, buffer) in &buffers {
            let mut guard = [0u8; GUARD_BYTES];
            for offset in [0, buffer.bytes() - GUARD_BYTES] {
                self.stream.get(buffer.span().slice(offset, GUARD_BYTES), &mut guard)?;
                if let Some(at) = guard.iter().position(|&b| b != 0xff) {
                    return Err(Error::Internal(format!(
                        "the {} guard of buffer {name} was overwritten at byte {at}",
                        if offset == 0 { "leading" } else { "trailing" }
                    )));
                }
            }
        }
        Ok(())
    }
}

/// Rounds to `dtype`: the bytes to upload and the values that they hold.
pub fn encode(dtype: DType, values: Vec<f32>) -> (Vec<u8>, Vec<f32>) {
    match dtype {
        DType::F32 => (bytemuck::cast_slice(&values).to_vec(), values),
        DType::Bf16 => {
            let mut values = values;
            split_rows(&mut values, SHARE, |_, values| {
                values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
            });
            let mut bytes = vec![0; values.len() * 2];
            split_rows(&mut bytes, SHARE * 2, |share, bytes| {
                for (to, v) in bytes.as_chunks_mut().0.iter_mut().zip(&values[share * SHARE..]) {
                    *to = bf16::from_f32(*v).to_le_bytes();
                }
            });
            (bytes, values)
        }
    }
}

/// Widens device bytes of `dtype`; a trailing partial element is dropped.
pub fn decode(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        DType::F32 => bytes.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect(),
        DType::Bf16 => bytes.chunks_exact(2).map(|c| bf16::from_le_bytes([c[0], c[1]]).to_f32()).collect(),
    }
}

/// Compares an output with the f64 reference; `plain` is the low-precision evaluation that sets the tolerance
/// and `dtype` the type in which the output is stored.
pub fn compare(output: &str, dtype: DType, got: &[f32], exact: &[f64], plain: &[f64]) -> Check {
    let unit = match dtype {
        DType::F32 => f64::from(f32::EPSILON),
        DType::Bf16 => f64::from(bf16::EPSILON.to_f32()),
    };
    let largest = exact.iter().filter(|v| v.is_finite()).fold(0.0f64, |m, v| m.max(v.abs()));
    let plain_error =
        exact.iter().zip(plain).map(|(e, p)| (e - p).abs()).filter(|e| e.is_finite()).fold(0.0, f64::max);
    let allowed = 2.0 * plain_error + unit * largest;
    within(output, got, exact, allowed)
}

/// Compares an output with a reference under a given bound, for goldens whose tolerance is recorded with them.
pub fn within(output: &str, got: &[f32], expected: &[f64], allowed: f64) -> Check {
    let mut check = Check {
        output: output.into(),
        max_error: 0.0,
        mean_error: 0.0,
        allowed,
        worst: (0, f64::NAN, f64::NAN),
        ok: got.len() == expected.len(),
    };
    let mut sum = 0.0;
    for (i, (&g, &e)) in got.iter().zip(expected).enumerate() {
        let g = f64::from(g);
        if g.is_nan() != e.is_nan() || g.is_infinite() != e.is_infinite() || (g.is_infinite() && g != e) {
            check.ok = false;
            check.max_error = f64::INFINITY;
            check.worst = (i, g, e);
            break;
        }
        if !e.is_finite() {
            continue;
        }
        let error = (g - e).abs();
        sum += error;
        if error > check.max_error || check.worst.1.is_nan() {
            check.max_error = error;
            check.worst = (i, g, e);
        }
    }
    check.mean_error = sum / got.len().max(1) as f64;
    check.ok &= check.max_error <= allowed;
    check
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_of_more_than_the_bound_fails() {
        let exact = [1.0, -2.0, 3.0];
        let plain = [1.0, -2.001, 3.0];
        assert!(compare("y", DType::F32, &[1.0, -2.001, 3.001], &exact, &plain).ok);
        let bad = compare("y", DType::F32, &[1.0, -2.0, 3.003], &exact, &plain);
        assert!(!bad.ok);
        assert_eq!(bad.worst.0, 2);
    }

    #[test]
    fn nan_must_stand_where_the_reference_has_it() {
        assert!(!compare("y", DType::F32, &[f32::NAN], &[1.0], &[1.0]).ok);
        assert!(!compare("y", DType::F32, &[1.0], &[f64::NAN], &[1.0]).ok);
        assert!(compare("y", DType::F32, &[f32::NAN], &[f64::NAN], &[f64::NAN]).ok);
        assert!(!compare("y", DType::F32, &[1.0, 2.0], &[1.0], &[1.0]).ok);
    }
}
