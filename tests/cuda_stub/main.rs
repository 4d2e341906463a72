//! The CUDA device without a GPU: driven against a stub of the driver's library (`driver.cpp`) that records, and where a
//! test asks for it runs every launch on the emulated device's kernels. What the stub receives is compared with what the
//! emulated device receives, the results of whole requests too, and every call of the driver is made to fail in turn.

mod cli;
mod executed;
mod failures;
mod machines;
mod picture;
mod recorder;
#[path = "../support/streams.rs"]
mod streams;
mod stub;
mod turns;
mod work;
