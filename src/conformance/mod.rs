//! Whether a device does what `kernels/dev.cuh` says: every primitive on inputs that tell all lanes, slots and
//! elements apart, compared with values computed here from the PTX manual, and with the outputs kept from real GPUs.
//!
//! The kernels and the emulated device come from one reading of that manual, so a wrong one would agree with itself.
//! A primitive counts as verified once outputs of a GPU are kept in `tests/golden/conformance/` (see
//! [`VERIFIED_ON`]), and no earlier.

mod units;

pub use units::UNITS;

use crate::device::{Buffer, Copies, Device, Geometry, KernelId, Node, NodeList, ParamBytes, Stream};
use crate::error::{Error, Result};
use crate::files::write_atomically;
use crate::ops::params::ConformanceParams;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

/// GPUs whose outputs are kept with the tests, by the names of their files. Empty: nothing is verified on silicon yet.
pub const VERIFIED_ON: &[&str] = &[];

const SCRATCH_WORDS: usize = 256;
const FORMAT: &str = "warpstep conformance 1";

/// What a unit must leave.
#[derive(Clone, Debug)]
pub(crate) enum Expected {
    /// These words, but for what is the hardware's own affair.
    Bits {
        /// Words.
        words: Vec<u32>,
        /// Whether two words that differ are the same all the same.
        alike: fn(u32, u32) -> bool,
    },
    /// Floats, each with the largest error that the CUDA programming guide documents.
    Near(Vec<(f64, f64)>),
}

/// One launch of a unit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Step {
    /// Kernel in `conformance.cu`.
    pub symbol: &'static str,
    /// How it is launched.
    pub geometry: fn() -> Geometry,
}

/// A family of primitives with its inputs and expectations.
#[derive(Clone, Copy, Debug)]
pub struct Unit {
    /// Name, as in reports and files.
    pub name: &'static str,
    /// Primitives of `dev.cuh` that it shows.
    pub primitives: &'static [&'static str],
    /// Launches, each after the one before.
    pub(crate) steps: &'static [Step],
    /// Input words.
    pub(crate) input: fn() -> Vec<u32>,
    /// What the output must be, for that input.
    pub(crate) expected: fn(&[u32]) -> Expected,
}

/// The first word that is not as it should be.
#[derive(Clone, Debug, PartialEq)]
pub struct Mismatch {
    /// Index of the word.
    pub at: usize,
    /// Words that are wrong.
    pub count: usize,
    /// Both values there, in words.
    pub detail: String,
}

/// The unit of that name.
pub fn find(name: &str) -> Result<&'static Unit> {
    UNITS.iter().find(|unit| unit.name == name).ok_or_else(|| {
        let known: Vec<&str> = UNITS.iter().map(|unit| unit.name).collect();
        Error::request("unit", format!("no conformance unit {name:?}; there are {}", known.join(", ")))
    })
}

fn upload(device: &dyn Device, stream: &mut dyn Stream, label: &str, words: &[u32]) -> Result<Buffer> {
    let buffer = device.alloc(size_of_val(words), label)?;
    stream.put(buffer.span(), bytemuck::cast_slice(words))?;
    Ok(buffer)
}

impl Unit {
    /// Kernels that it launches, in order.
    pub fn symbols(&self) -> impl Iterator<Item = &'static str> + use<> {
        self.steps.iter().map(|step| step.symbol)
    }

    /// Runs the unit and returns its output words.
    pub fn run(&self, device: &dyn Device) -> Result<Vec<u32>> {
        let input = (self.input)();
        let count = match (self.expected)(&input) {
            Expected::Bits { words, .. } => words.len(),
            Expected::Near(values) => values.len(),
        };
        let mut stream = device.stream()?;
        let source = upload(device, stream.as_mut(), "conformance.in", &input)?;
        let target = upload(device, stream.as_mut(), "conformance.out", &vec![0; count])?;
        let scratch = upload(device, stream.as_mut(), "conformance.scratch", &[0; SCRATCH_WORDS])?;
        let params = ConformanceParams {
            in_: source.ptr().0,
            out: target.ptr().0,
            scratch: scratch.ptr().0,
            count_in: input.len() as u32,
            count_out: count as u32,
        };
        let mut list = NodeList::new();
        for step in self.steps {
            list.push(Node {
                label: format!("conformance.{}", self.name),
                kernel: KernelId { module: "conformance", symbol: step.symbol },
                geometry: (step.geometry)(),
                params: ParamBytes::of(&params),
                reads: vec![source.span(), target.span(), scratch.span()],
                writes: vec![target.span(), scratch.span()],
            });
        }
        // SAFETY: the kernels take this struct, and touch as much of three buffers as it and the unit say, which only
        // this crate can make; buffers and executable are held until the output was read.
        let executable = unsafe { stream.instantiate(Arc::new(list)) }?;
        stream.replay(executable.as_ref())?;
        let mut words = vec![0u32; count];
        stream.get(target.span(), bytemuck::cast_slice_mut(&mut words))?;
        Ok(words)
    }

    /// Compares an output with what the manual says.
    pub fn check(&self, words: &[u32]) -> Option<Mismatch> {
        match (self.expected)(&(self.input)()) {
            Expected::Bits { words: expected, alike } => compare_bits(words, &expected, alike),
            Expected::Near(expected) => mismatch(words.len(), expected.len(), |i| {
                let (value, allowed) = expected[i];
                let got = f64::from(f32::from_bits(words[i]));
                // A NaN is within no bound.
                (got - value)
                    .abs()
                    .partial_cmp(&allowed)
                    .is_none_or(|order| order.is_gt())
                    .then(|| format!("{got:e}, should be {value:e} within {allowed:.1e}"))
            }),
        }
    }

    /// Compares the outputs of two devices: bit for bit, but for approximations, which may each err as documented.
    pub fn compare(&self, ours: &[u32], theirs: &[u32]) -> Option<Mismatch> {
        match (self.expected)(&(self.input)()) {
            Expected::Bits { alike, .. } => compare_bits(ours, theirs, alike),
            Expected::Near(_) => self.check(ours).or_else(|| self.check(theirs)),
        }
    }
}

fn compare_bits(got: &[u32], expected: &[u32], alike: fn(u32, u32) -> bool) -> Option<Mismatch> {
    mismatch(got.len(), expected.len(), |i| {
        let (g, e) = (got[i], expected[i]);
        (g != e && !alike(g, e)).then(|| format!("{g:#010x}, should be {e:#010x}"))
    })
}

fn mismatch(got: usize, expected: usize, wrong: impl Fn(usize) -> Option<String>) -> Option<Mismatch> {
    if got != expected {
        let detail = format!("{got} words, should be {expected}");
        return Some(Mismatch { at: 0, count: got.abs_diff(expected), detail });
    }
    let mut all = (0..got).filter_map(|i| wrong(i).map(|detail| (i, detail)));
    let (at, detail) = all.next()?;
    Some(Mismatch { at, count: 1 + all.count(), detail })
}

/// Outputs of a device, as kept in a file: safetensors with one `U32` tensor per unit and the device's name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outputs {
    /// Name of the device, e.g. `NVIDIA H100 80GB HBM3`.
    pub device: String,
    /// Words of every unit, by name, in the order of [`UNITS`].
    pub units: Vec<(String, Vec<u32>)>,
}

impl Outputs {
    /// Writes the file.
    pub fn save(&self, path: &Path) -> Result<()> {
        let views = self
            .units
            .iter()
            .map(|(name, words)| {
                let view = TensorView::new(Dtype::U32, vec![words.len()], bytemuck::cast_slice(words));
                view.map(|view| (name.as_str(), view)).map_err(|e| Error::Internal(e.to_string()))
            })
            .collect::<Result<Vec<_>>>()?;
        let metadata = HashMap::from([
            ("format".to_string(), FORMAT.to_string()),
            ("device".to_string(), self.device.clone()),
            ("warpstep".to_string(), env!("CARGO_PKG_VERSION").to_string()),
        ]);
        let bytes =
            safetensors::serialize(views, Some(metadata)).map_err(|e| Error::Internal(e.to_string()))?;
        write_atomically(path, |out| out.write_all(&bytes).map_err(Error::io(path)))
    }

    /// Reads a file that [`Outputs::save`] wrote.
    pub fn load(path: &Path) -> Result<Outputs> {
        let invalid = |reason: String| Error::InvalidCase { path: path.into(), reason };
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| invalid(e.to_string()))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        if metadata.get("format").map(String::as_str) != Some(FORMAT) {
            return Err(invalid(format!("metadata: format is not {FORMAT:?}")));
        }
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| invalid(e.to_string()))?;
        let mut units = Vec::new();
        for unit in UNITS {
            let view = tensors
                .tensor(unit.name)
                .map_err(|_| invalid(format!("no outputs of unit {}", unit.name)))?;
            if view.dtype() != Dtype::U32 {
                return Err(invalid(format!("unit {} has element type {:?}", unit.name, view.dtype())));
            }
            let words = view.data().chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]]));
            units.push((unit.name.to_string(), words.collect()));
        }
        Ok(Outputs { device: metadata.get("device").cloned().unwrap_or_default(), units })
    }
}
