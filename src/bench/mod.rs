//! Measuring: kernels one by one, whole models in the form of the paper's Table 9, and the ceilings of the same run
//! that both are ratios of; and, where there is no GPU, counting: the bytes that a token must move, from its nodes.
//!
//! The protocol: ceilings first, warm-up, at least 100 timed repeats with the device's own clock, medians with p10 and
//! p90, random data and never zeros, caches cold or said to be hot. On the emulated device everything runs too, and
//! says that its times mean nothing.

pub mod bytes;
pub mod ceilings;
pub mod derive;
pub mod kernels;
pub mod loading;
pub mod model;
pub mod report;
pub mod samples;
pub mod synthetic;

use crate::device::{Executable, Node, NodeList, Stream};
use crate::error::Result;
use std::sync::Arc;

/// Enqueues a node of a benchmark.
fn launch(stream: &mut dyn Stream, node: &Node) -> Result<()> {
    // SAFETY: benchmarks make nodes by ops and cases, of buffers that they allocated on the stream's device in the
    // sizes that those ask for; they free them after the stream was waited for, which on errors the device does in
    // freeing. Tables are those of the cases, in range however often they are launched.
    unsafe { stream.launch(node) }
}

/// Prepares a list of such nodes, to be dropped before their buffers.
fn instantiate(stream: &mut dyn Stream, list: NodeList) -> Result<Box<dyn Executable>> {
    // SAFETY: as in `launch`; the executables stay in the functions that hold the buffers.
    unsafe { stream.instantiate(Arc::new(list)) }
}
