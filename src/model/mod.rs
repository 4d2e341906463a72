//! What the model is: its configuration, and from there its parts.

pub mod arena;
pub mod backbone;
pub mod config;
pub mod flow_head;
pub mod lm_head;
pub mod nextstep;
pub mod plan;
pub(crate) mod run;
pub mod sources;
pub(crate) mod text;
pub mod upload;
pub mod vae;
pub(crate) mod workers;
