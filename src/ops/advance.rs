//! `advance`: the end of a token. The token index and every sequence's slot move on by one, on the device.

use super::harness::{Case, Check, Rig, Scale, within};
use super::params::{AdvanceParams, GenerationState};
use super::shared::{self, Checks};
use super::{DType, Launch, Op, Variant};
use crate::device::{Geometry, Node, ParamBytes, Span};
use crate::error::Result;
use crate::kernels;

/// The registry row.
pub static OP: Op = Op {
    name: "advance",
    summary: "state.token += 1; row_pos += 1",
    bound: "latency",
    variants: &[Variant {
        name: "plain",
        kernels: kernels!("advance", f32: "advance_plain", bf16: "advance_plain"),
        summary: "one block",
    }],
    cases,
};

/// Tensors and dimensions; shapes in `kernels/params.h` (`AdvanceParams`).
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// [`GenerationState`], `token` read and written.
    pub state: Span,
    /// `[rows]` u32, read and written.
    pub row_pos: Span,
    /// Rows: one per sequence.
    pub rows: usize,
}

/// The node that computes `args`.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let variant = launch.selection.variant(&OP, "plain")?;
    let checks = Checks::new(OP.name, variant.name);
    let state = checks.span("state", args.state, 4, &[size_of::<GenerationState>() / 4])?;
    let row_pos = checks.span("row_pos", args.row_pos, 4, &[args.rows])?;
    let params = AdvanceParams {
        state: state.ptr.0,
        row_pos: row_pos.ptr.0,
        rows: checks.dim("rows", args.rows)?,
        pad: 0,
    };
    let mut geometry = Geometry::linear(1, 256);
    geometry.dependent = launch.dependent;
    Ok(Node {
        label: label.into(),
        kernel: variant.kernel(OP.name, launch.dtype)?,
        geometry,
        params: ParamBytes::of(&params),
        reads: vec![state, row_pos],
        writes: vec![state, row_pos],
    })
}

fn cases() -> Vec<Case> {
    [1, 3, 300]
        .into_iter()
        .map(|rows| {
            let label = format!("rows={rows}");
            let run = move |rig: &mut Rig, launch: &Launch| run(rig, launch, rows);
            shared::case(&OP, "plain", DType::F32, Scale::Small, (8 * rows as u64, 0), label, run)
        })
        .collect()
}

fn run(rig: &mut Rig, launch: &Launch, rows: u32) -> Result<Vec<Check>> {
    let before = GenerationState { token: 41, nonfinite: 7, ..Default::default() };
    let state = rig.bytes("state", bytemuck::bytes_of(&before))?;
    let row_pos = rig.indices("row_pos", &(0..rows).map(|s| 5 * s).collect::<Vec<_>>())?;
    rig.run(&node(launch, "test.advance", &Args { state, row_pos, rows: rows as usize })?)?;
    let numbers = |bytes: Vec<u8>| -> Vec<f32> {
        bytes.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]]) as f32).collect()
    };
    let mut expected_state = vec![42.0, 7.0];
    expected_state.resize(size_of::<GenerationState>() / 4, 0.0);
    let expected_pos: Vec<f64> = (0..rows).map(|s| f64::from(5 * s + 1)).collect();
    Ok(vec![
        within("state", &numbers(rig.read_bytes(state)?), &expected_state, 0.0),
        within("row_pos", &numbers(rig.read_bytes(row_pos)?), &expected_pos, 0.0),
    ])
}
