//! `down`: the MLP's down projection, added into the residual stream.

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
    name: "down",
    summary: "x += w act + bias, the end of a layer",
    bound: "few rows: bytes of w (141.6 MB per layer at 14B in bf16); many rows: FP32 FMA",
    variants: &[
        Variant {
            name: "plain",
            kernels: kernels!("down", f32: "down_plain_f32", bf16: "down_plain_bf16"),
            summary: "warp per two outputs, weights read once per 8 rows; any shape",
        },
        Variant {
            name: "tile",
            kernels: kernels!("down", f32: "down_tile_f32", bf16: "down_tile_bf16"),
            summary: "64 x 64 tiles in shared memory, for prompts; any shape",
        },
        product::stream(kernels!("down", bf16: "down_stream_bf16")),
        product::ring(kernels!("down", bf16: "down_ring_bf16")),
        product::mma(kernels!("down", bf16: "down_mma_bf16")),
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
        shape(1, 96, 256, false),
        shape(3, 80, 250, false),
        // Staged in several chunks of K, over several passes: 8 rows of 4 bytes hold 3072 columns, of 2 bytes 6144.
        shape(8, 20, 3304, false),
        shape(8, 20, 6200, false),
        shape(8, 200, 3304, false),
        shape(8, 150, 6200, true),
        shape(7, 34, 6171, false),
        shape(37, 96, 520, false),
        shape(65, 192, 77, true),
        // Packed weights: odd outputs, few tiles and long rows, several groups of rows.
        shape(2, 51, 2080, true),
        shape(5, 20, 6208, false),
        shape(21, 30, 1056, true),
        shape(131, 66, 96, false),
        // In parts of K for mma, a last one of odd steps; several groups of its rows.
        shape(12, 20, 1568, false),
        shape(300, 40, 1120, true),
    ];
    let real = |rows| shape(rows, 5120, 13824, false);
    project::cases(&OP, &shapes, &[real(1), real(2), real(3), real(8), real(37)])
}
