//! warpstep: NextStep-1 on one Hopper GPU.
pub mod device;
pub mod error;
pub mod image;
pub mod model;
pub mod ops;
pub mod prompt;
pub mod reference;
pub mod request;
pub mod rng;
pub mod sampler;
pub mod tokenizer;
pub mod weights;
pub use error::{Error, Result};
