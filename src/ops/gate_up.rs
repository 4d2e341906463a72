//! `gate_up`: RMSNorm, gate and up projections, SiLU and product, in one launch.

use super::harness::{Case, Check, Rig, Scale, compare};
use super::params::GateUpParams;
use super::shared::{self, Checks};
use super::{DType, Launch, Op, Variant};
use crate::device::{Node, ParamBytes, Span};
use crate::error::Result;
use crate::kernels;
use crate::reference::gate_up::{GateUp, gate_up};
use crate::reference::{Exact, PlainBf16, PlainF32};

/// The registry row.
pub static OP: Op = Op {
    name: "gate_up",
    summary: "act = silu(w_gate rms(x)) * (w_up rms(x))",
    bound: "few rows: bytes of both weights (283.1 MB per layer at 14B in bf16); many rows: FP32 FMA",
    variants: &[
        Variant {
            name: "plain",
            kernels: kernels!("gate_up", f32: "gate_up_plain_f32", bf16: "gate_up_plain_bf16"),
            summary: "warp per gate and up row, weights read once per 8 rows; any shape",
        },
        Variant {
            name: "tile",
            kernels: kernels!("gate_up", f32: "gate_up_tile_f32", bf16: "gate_up_tile_bf16"),
            summary: "64 x 64 tiles in shared memory, for prompts; any shape",
        },
    ],
    cases,
};

/// Tensors and dimensions; shapes in `kernels/params.h` (`GateUpParams`).
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// Residual stream, `[rows, hidden_size]` f32.
    pub x: Span,
    /// `[hidden_size]`
    pub norm_w: Span,
    /// `[intermediate_size, hidden_size]`
    pub w_gate: Span,
    /// `[intermediate_size, hidden_size]`
    pub w_up: Span,
    /// `[intermediate_size]`
    pub gate_bias: Option<Span>,
    /// `[intermediate_size]`
    pub up_bias: Option<Span>,
    /// `[rows, intermediate_size]`, written.
    pub act: Span,
    /// Rows.
    pub rows: usize,
    /// `hidden_size`.
    pub hidden: usize,
    /// `intermediate_size`.
    pub intermediate: usize,
    /// `rms_norm_eps`.
    pub eps: f32,
}

/// The node that computes `args`.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let a = args;
    let variant = launch.selection.variant(&OP, shared::product_variant(a.rows))?;
    let checks = Checks::new(OP.name, variant.name);
    let e = launch.dtype.bytes();
    let x = checks.span("x", a.x, 4, &[a.rows, a.hidden])?;
    let norm_w = checks.span("norm_w", a.norm_w, e, &[a.hidden])?;
    let w_gate = checks.span("w_gate", a.w_gate, e, &[a.intermediate, a.hidden])?;
    let w_up = checks.span("w_up", a.w_up, e, &[a.intermediate, a.hidden])?;
    let gate_bias = checks.optional("gate_bias", a.gate_bias, e, &[a.intermediate])?;
    let up_bias = checks.optional("up_bias", a.up_bias, e, &[a.intermediate])?;
    let act = checks.span("act", a.act, e, &[a.rows, a.intermediate])?;
    let params = GateUpParams {
        x: x.ptr.0,
        norm_w: norm_w.ptr.0,
        w_gate: w_gate.ptr.0,
        w_up: w_up.ptr.0,
        gate_bias: shared::address(gate_bias),
        up_bias: shared::address(up_bias),
        act: act.ptr.0,
        rows: checks.dim("rows", a.rows)?,
        hidden: checks.dim("hidden", a.hidden)?,
        intermediate: checks.dim("intermediate", a.intermediate)?,
        eps: a.eps,
    };
    let mut reads = vec![x, norm_w, w_gate, w_up];
    reads.extend(gate_bias);
    reads.extend(up_bias);
    Ok(Node {
        label: label.into(),
        kernel: variant.kernel(OP.name, launch.dtype)?,
        geometry: shared::product_geometry(launch, variant.name, a.rows, a.hidden, a.intermediate),
        params: ParamBytes::of(&params),
        reads,
        writes: vec![act],
    })
}

/// One test shape.
#[derive(Clone, Copy, Debug)]
struct Shape {
    rows: usize,
    hidden: usize,
    intermediate: usize,
    bias: bool,
}

fn cases() -> Vec<Case> {
    let shape = |rows, hidden, intermediate, bias| Shape { rows, hidden, intermediate, bias };
    let shapes = [
        shape(1, 96, 256, false),
        shape(2, 192, 100, false),
        shape(3, 80, 75, true),
        shape(5, 96, 40, false),
        shape(8, 192, 77, false),
        shape(9, 75, 64, true),
        shape(37, 96, 130, false),
        shape(67, 80, 35, false),
    ];
    let real = |rows| shape(rows, 5120, 13824, false);
    let real_shapes = [real(1), real(2), real(3), real(37)];
    let mut cases = Vec::new();
    for &dtype in DType::ALL {
        for s in shapes {
            for variant in ["plain", "tile"] {
                cases.push(make_case(s, variant, dtype, None));
            }
        }
        for s in real_shapes {
            cases.push(make_case(s, shared::product_variant(s.rows), dtype, Some(Scale::Real)));
        }
    }
    cases
}

fn make_case(s: Shape, variant: &'static str, dtype: DType, scale: Option<Scale>) -> Case {
    let flops = (4 * s.rows * s.hidden * s.intermediate) as u64;
    let bytes = (2 * s.hidden * s.intermediate * dtype.bytes()) as u64;
    let label = format!(
        "rows={},hidden={},intermediate={},bias={}",
        s.rows,
        s.hidden,
        s.intermediate,
        u8::from(s.bias)
    );
    let scale = scale.unwrap_or(shared::scale_for(flops));
    shared::case(&OP, variant, dtype, scale, (bytes, flops), label, move |rig, launch| run(rig, launch, s))
}

fn run(rig: &mut Rig, launch: &Launch, s: Shape) -> Result<Vec<Check>> {
    let dtype = launch.dtype;
    let deviation = 1.0 / (s.hidden as f32).sqrt();
    let x = rig.random("x", DType::F32, s.rows * s.hidden, 2.0)?;
    let norm_w = rig.random("norm_w", dtype, s.hidden, 1.0)?;
    // Gates reach far enough to both sides for SiLU to bend.
    let w_gate = rig.random("w_gate", dtype, s.intermediate * s.hidden, 2.0 * deviation)?;
    let w_up = rig.random("w_up", dtype, s.intermediate * s.hidden, deviation)?;
    let mut bias = |name| s.bias.then(|| rig.random(name, dtype, s.intermediate, 0.5)).transpose();
    let gate_bias = bias("gate_bias")?;
    let up_bias = bias("up_bias")?;
    let act = rig.output("act", dtype, s.rows * s.intermediate)?;
    let args = Args {
        x: x.span,
        norm_w: norm_w.span,
        w_gate: w_gate.span,
        w_up: w_up.span,
        gate_bias: gate_bias.as_ref().map(|b| b.span),
        up_bias: up_bias.as_ref().map(|b| b.span),
        act,
        rows: s.rows,
        hidden: s.hidden,
        intermediate: s.intermediate,
        eps: 1e-6,
    };
    rig.run(&node(launch, "test.gate_up", &args)?)?;
    let got = rig.read(act, dtype)?;
    let inputs = GateUp {
        x: &x.values,
        norm_weight: &norm_w.values,
        gate: &w_gate.values,
        up: &w_up.values,
        gate_bias: gate_bias.as_ref().map(|b| b.values.as_slice()),
        up_bias: up_bias.as_ref().map(|b| b.values.as_slice()),
        hidden_size: s.hidden,
        eps: 1e-6,
    };
    let exact = gate_up::<Exact>(&inputs);
    let plain = match dtype {
        DType::F32 => gate_up::<PlainF32>(&inputs),
        DType::Bf16 => gate_up::<PlainBf16>(&inputs),
    };
    Ok(vec![compare("act", dtype, &got, &exact, &plain)])
}
