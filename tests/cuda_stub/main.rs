//! The CUDA device without a GPU: driven against a recording stub of the driver's library (`driver.cpp`), which
//! runs no kernels. What the stub receives is compared with what the emulated device receives, and every call of the
//! driver is made to fail in turn.

mod cli;
mod failures;
mod machines;
mod picture;
mod recorder;
mod stub;
mod work;
