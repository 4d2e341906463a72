//! `o_proj`: the output projection of attention, added into the residual stream.

use super::harness::Case;
use super::product;
use super::project::{self, Shape};
use super::{Launch, Op, Variant};
use crate::device::Node;
use crate::error::Result;
use crate::kernels;

pub use super::project::Args;

/// The registry row.
pub static OP: Op = Op {
    name: "o_proj",
    summary: "x += w in + bias, after attention",
    bound: "few rows: bytes of w (52.4 MB per layer at 14B in bf16); many rows: FP32 FMA",
    variants: &[
        Variant {
            name: "plain",
            kernels: kernels!("o_proj", f32: "o_proj_plain_f32", bf16: "o_proj_plain_bf16"),
            summary: "warp per two outputs, weights read once per 8 rows; any shape",
        },
        Variant {
            name: "tile",
            kernels: kernels!("o_proj", f32: "o_proj_tile_f32", bf16: "o_proj_tile_bf16"),
            summary: "64 x 64 tiles in shared memory, for prompts; any shape",
        },
        product::stream(kernels!("o_proj", bf16: "o_proj_stream_bf16")),
        product::ring(kernels!("o_proj", bf16: "o_proj_ring_bf16")),
        product::mma(kernels!("o_proj", bf16: "o_proj_mma_bf16")),
    ],
    cases,
};

/// The node that computes `args`.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    project::node(&OP, launch, label, args)
}

fn cases() -> Vec<Case> {
    let shape = |rows, hidden, inner, bias| Shape { rows, hidden, inner, bias };
    let shapes = [
        shape(1, 96, 48, false),
        shape(2, 192, 320, true),
        shape(3, 80, 112, false),
        shape(5, 96, 96, false),
        shape(8, 192, 128, true),
        shape(9, 99, 54, true),
        shape(37, 96, 48, false),
        shape(130, 70, 33, false),
        // Packed weights: rows of one step, odd outputs, one tile for all SMs, long rows, several groups of rows.
        shape(4, 50, 32, true),
        shape(6, 33, 96, true),
        shape(7, 16, 992, false),
        shape(19, 100, 288, true),
        shape(140, 75, 64, true),
        shape(523, 37, 96, false),
    ];
    let real = |rows| shape(rows, 5120, 5120, false);
    project::cases(&OP, &shapes, &[real(1), real(2), real(3), real(8), real(37), real(130)])
}
