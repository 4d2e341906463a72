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
