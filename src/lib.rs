//! NextStep-1 on one Hopper GPU: hand-written CUDA kernels and a thin executor.
//!
//! One image, from prompt to pixels:
//!
//! ```text
//! request ─ prompt ─► token ids per guidance branch (ragged, no padding)
//!         ─ VAE encoder → encode_latent → image_in_projector                            input pictures, editing
//!         ─ prefill: embed → layers × {qkv → attention → o_proj → gate_up → down}      rows = prompt tokens,
//!                                                          normed by norm_rows before qkv and gate_up in bf16
//!           → repeat_prompts: from one image of a batch to the others, which have the same prompts
//!    ┌──► token loop, one node list, replayed unchanged:
//!    │      out_proj (final norm, projector) → cond_embed → flow_modulation (all evaluations at once)
//!    │      randn → flow_chain (N evaluations, guidance, solver, image_in_projector) → token
//!    │      layers × {qkv → attention → o_proj → gate_up → down} → advance             rows = sequences
//!    └───── position, token index and lengths live in device memory
//!         ─ unpatchify → VAE decoder → to_rgb8 ─► PNG
//! ```
//!
//! # Layers
//!
//! `bin → engine, session → model → ops → device → kernels`. A lower layer never names an upper one.
//! [`sampler`], [`prompt`], [`rng`], [`image`], [`metrics`] and [`weights`] are leaves: no device code in them.
//! [`mod@reference`] is the slow obvious version of every op, [`verify`] compares whole stages with tensors recorded
//! from the official code.
//!
//! | module | owns |
//! |---|---|
//! | [`engine`] | a loaded model on a device, validation, the plan of a request |
//! | [`session`] | the token loop: events, cancel, checks; memory, lists and prompts kept for the next request |
//! | [`text`] | text from the LM head: the same loop with the host choosing each token |
//! | [`mod@reconstruct`] | pictures through the VAE and back |
//! | [`files`] | files that are either whole or not there: pictures, tokens, reports |
//! | [`tokens`] | image tokens in files, to be decoded again |
//! | [`model`] | configs, weights on the device, the order of ops, the memory plan |
//! | [`ops`] | one op per file: shapes, geometry, declared reads and writes; the registry and the test harness |
//! | [`device`] | memory, node lists, replay; the emulated device, the CUDA device (never run on a GPU yet), and one that only plans |
//! | [`mod@bench`] | timing of kernels, models and loading, the ceilings, bytes counted from node lists |
//! | [`conformance`] | whether a device's primitives do what the PTX manual says |
//!
//! # Threads
//!
//! Load one [`engine::Engine`] and share it; make a [`session::Session`] for each thread that generates. A load takes
//! threads of its own, which end before it returns.
//!
//! # Promises to a host process
//!
//! Errors are values ([`Error`]). The library never prints, installs no handlers, opens no sockets, executes nothing
//! from checkpoints, and allocates no more device memory than [`engine::Engine::plan`] says: a session keeps that of its
//! last request, overwritten but for the prompts' keys and values, until a request of another shape or
//! [`session::Session::forget`]. A text takes what [`engine::Engine::plan_text`] says beside it while it is completed.
//! Drawing, editing and writing need no unsafe code: only launches and copies of one's own do ([`device`]).
#![warn(missing_docs)]
#![warn(clippy::undocumented_unsafe_blocks)]

pub mod bench;
pub mod conformance;
pub mod demo;
pub mod device;
pub mod engine;
pub mod error;
pub mod event;
pub mod files;
pub mod image;
pub mod metrics;
pub mod model;
pub mod ops;
mod parallel;
pub mod prompt;
pub mod reconstruct;
pub mod reference;
pub mod request;
pub mod rng;
pub mod sampler;
pub mod session;
pub mod text;
pub mod tokenizer;
pub mod tokens;
pub mod verify;
pub mod weights;

pub use error::{Error, Result};
