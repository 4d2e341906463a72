//! torch's random numbers, reproduced on the host.
//!
//! Three layers, each usable alone: [`philox`] is the counter-based generator and the Box-Muller transform exactly as
//! cuRAND orders them; [`CudaRandn`] is one `torch.randn` call on a CUDA device (which element comes from which
//! counter and lane, and how far the generator moves on); [`DrawPlan`] is the sequence of calls that one request of the
//! official NextStep-1 code makes. [`torch_cpu`] is the other stream, `torch.randn` on the CPU.
//!
//! The device has its own kernel for the same numbers and is fed from a [`DrawPlan`]; this module is its reference and
//! knows nothing of devices. The stream matched is that of eager torch: `torch.compile` replaces `randn` by another generator.

mod cuda_randn;
mod draws;
pub mod philox;
pub mod torch_cpu;

pub use cuda_randn::{BLOCK_THREADS, CudaRandn, H100_MAX_THREADS};
pub use draws::{DrawPlan, MAX_IMAGES_PER_BATCH, PosteriorDraw, RecordedDraws};

use std::hash::{BuildHasher, Hasher};

/// A seed for a request that names none: 32 bits from the operating system, so that it is short enough to read out
/// and survives JSON readers that hold numbers in doubles.
pub fn random_seed() -> u64 {
    std::hash::RandomState::new().build_hasher().finish() >> 32
}
