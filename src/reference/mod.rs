//! The slow obvious version of every op: plain loops, written to be read, independent of the kernels.
//!
//! Each is generic over a [`Precision`]: in [`Exact`] it is the answer that a kernel is judged by, in
//! [`PlainF32`] or [`PlainBf16`] it is the plain low-precision evaluation whose own error sets the tolerance
//! (at most twice that error, see [`crate::ops::harness`]).

pub mod attention;
pub mod conv2d;
pub mod encode_latent;
pub mod flow_chain;
pub mod flow_head;
pub mod flow_modulation;
pub mod gate_up;
pub mod gather_rows;
pub mod group_stats;
pub mod linear;
pub mod lm_head;
pub mod merge_stats;
pub mod norm;
pub mod out_proj;
pub mod project;
pub mod qkv;
pub mod randn;
pub mod repeat_prompts;
pub mod samplers;
pub mod to_rgb8;
pub mod unpatchify;
pub mod vae;
pub mod vae_attention;

use num_traits::Float;

/// How a reference computes and where it rounds.
pub trait Precision: Copy + Send + Sync + 'static {
    /// Arithmetic type.
    type T: Float + std::iter::Sum + std::ops::AddAssign + Send + Sync + std::fmt::Debug;

    /// Takes an input value.
    fn load(value: f32) -> Self::T;

    /// Rounds to the storage type, at the places where `model.md` says that the official code stores.
    fn store(value: Self::T) -> Self::T;

    /// Takes a constant.
    fn constant(value: f64) -> Self::T;

    /// Widens a result for comparison.
    fn widen(value: Self::T) -> f64;

    /// Takes a slice of inputs.
    fn load_all(values: &[f32]) -> Vec<Self::T> {
        values.iter().map(|&v| Self::load(v)).collect()
    }

    /// Widens results for comparison.
    fn widen_all(values: &[Self::T]) -> Vec<f64> {
        values.iter().map(|&v| Self::widen(v)).collect()
    }
}

/// Double precision, nothing rounded.
#[derive(Clone, Copy, Debug)]
pub struct Exact;

/// Single precision throughout.
#[derive(Clone, Copy, Debug)]
pub struct PlainF32;

/// Single-precision arithmetic, bf16 wherever something is stored.
#[derive(Clone, Copy, Debug)]
pub struct PlainBf16;

impl Precision for Exact {
    type T = f64;
    fn load(value: f32) -> f64 {
        f64::from(value)
    }
    fn store(value: f64) -> f64 {
        value
    }
    fn constant(value: f64) -> f64 {
        value
    }
    fn widen(value: f64) -> f64 {
        value
    }
}

impl Precision for PlainF32 {
    type T = f32;
    fn load(value: f32) -> f32 {
        value
    }
    fn store(value: f32) -> f32 {
        value
    }
    fn constant(value: f64) -> f32 {
        value as f32
    }
    fn widen(value: f32) -> f64 {
        f64::from(value)
    }
}

impl Precision for PlainBf16 {
    type T = f32;
    fn load(value: f32) -> f32 {
        value
    }
    fn store(value: f32) -> f32 {
        half::bf16::from_f32(value).to_f32()
    }
    fn constant(value: f64) -> f32 {
        value as f32
    }
    fn widen(value: f32) -> f64 {
        f64::from(value)
    }
}
