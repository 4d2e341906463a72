//! `flow_chain`: the whole sampler of one image token in one persistent launch: N evaluations of the flow head,
//! guidance, solver steps, the token and its projection back into the transformer.
//!
//! The variant follows from the element type and the head, never from the number of images: each sums in its own order.
//!
//! Owns the op's shapes, its cooperative geometry and its shared memory. Time grids, coefficients and guidance scales
//! are tables that `crate::sampler` computes. `state.token` lives on the device, so all tokens are declared as written.

mod cases;
mod ring;

pub use ring::exchange_bytes;

use super::params::{FlowChainParams, GenerationState, GridBarrier, SolverStep};
use super::shared::{self, Checks};
use super::{DType, Launch, Op, Variant, div_ceil};
use crate::device::{Geometry, KernelId, Node, ParamBytes, Span};
use crate::error::Result;
use crate::kernels;

/// The registry row.
pub static OP: Op = Op {
    name: "flow_chain",
    summary: "all evaluations, guidance and solver steps of one image token, and its projection",
    bound: "bytes: 113.6 MB per evaluation at width 1536, 12 blocks, bf16; plus 26 grid barriers",
    variants: &[
        Variant {
            name: "plain",
            kernels: kernels!("flow_chain", f32: "flow_chain_plain_f32", bf16: "flow_chain_plain_bf16"),
            summary: "persistent grid, warp per two outputs, weights once per evaluation and 8 sequences; any shape",
        },
        Variant {
            name: "ring",
            kernels: RING_KERNELS,
            summary: "tensor cores, weights by bulk copies through a ring, values by epoch words; widths of whole 32",
        },
        Variant {
            name: "resident",
            kernels: RING_KERNELS,
            summary: "ring, with as many weights as fit kept in shared memory and 30 MB more asked to stay in L2",
        },
    ],
    cases: cases::cases,
};

const RING_KERNELS: &[(DType, KernelId)] =
    &[(DType::Bf16, KernelId { module: "flow_ring", symbol: "flow_ring_bf16" })];

const THREADS: u32 = 256;
/// Sequences that share one pass over the weights (`kRowGroup`).
const ROW_GROUP: usize = 8;
/// Most shared memory for the staged rows (`kStageBytes`).
const STAGE_BYTES: usize = 128 * 1024;
/// Shared memory of a block on Hopper, less the kernel's static arrays.
const SHARED_BYTES: usize = 226 * 1024;

/// Tensors and dimensions; shapes in `kernels/params.h` (`FlowChainParams`).
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// `[steps, S, (3 blocks + 2) * width]`, S = images * branches.
    pub modulation: Span,
    /// `input_proj`: `[width, token_dim]`
    pub w_in: Span,
    /// `[width]`
    pub b_in: Span,
    /// `in_ln` of all blocks: `[blocks, width]`
    pub ln_w: Span,
    /// `[blocks, width]`
    pub ln_b: Span,
    /// `mlp.0` of all blocks: `[blocks, mlp_width, width]`
    pub w0: Span,
    /// `[blocks, mlp_width]`
    pub b0: Span,
    /// `mlp.2` of all blocks: `[blocks, width, mlp_width]`
    pub w2: Span,
    /// `[blocks, width]`
    pub b2: Span,
    /// `final_layer.linear`: `[token_dim, width]`
    pub w_out: Span,
    /// `[token_dim]`
    pub b_out: Span,
    /// `[steps]` [`SolverStep`]
    pub steps_table: Span,
    /// `[tokens_total, 2]` f32: cfg, cfg_img.
    pub guidance: Span,
    /// `[draw_slots, draws_per_slot, images, token_dim]` f32.
    pub draws: Span,
    /// `[steps, images, token_dim]` f32: replaces the state before each evaluation.
    pub forced_x: Option<Span>,
    /// [`GenerationState`], `token` read, `nonfinite` written.
    pub state: Span,
    /// [`GridBarrier`], zeroed once.
    pub barrier: Span,
    /// [`exchange_bytes`] of memory, zeroed once.
    pub exchange: Span,
    /// `[S, width]` f32, scratch; at the end the residual of the last evaluation.
    pub h: Span,
    /// `[S, mlp_width]` f32, scratch.
    pub a: Span,
    /// `[S, token_dim]` f32, scratch.
    pub v_raw: Span,
    /// `[steps, S, token_dim]` f32, written.
    pub trace_v_raw: Option<Span>,
    /// `[steps, images, token_dim]` f32, written: after guidance.
    pub trace_v: Option<Span>,
    /// `[steps, images, token_dim]` f32, written: the state after each step.
    pub trace_x: Option<Span>,
    /// `[images, token_dim]` f32, written: the token before `use_norm`.
    pub sampled: Option<Span>,
    /// `[images, tokens_total, token_dim]`, the token's row written.
    pub tokens: Span,
    /// `image_in_projector`: `[hidden, token_dim]`
    pub w_next: Span,
    /// `[hidden]`
    pub b_next: Span,
    /// `[S, hidden]` f32, written.
    pub x_next: Span,
    /// Network evaluations N.
    pub steps: usize,
    /// Images B.
    pub images: usize,
    /// Guidance branches R: 1, 2 or 3.
    pub branches: usize,
    /// Width F of the head.
    pub width: usize,
    /// MLP width H.
    pub mlp_width: usize,
    /// Residual blocks L.
    pub blocks: usize,
    /// Values per token K.
    pub token_dim: usize,
    /// `hidden_size` D of the transformer.
    pub hidden: usize,
    /// Image tokens T.
    pub tokens_total: usize,
    /// Draws stored per token: the initial one and one for every step whose noise factor is not zero. A step that
    /// needs a draw beyond them makes the token NaN.
    pub draws_per_slot: usize,
    /// `tokens_total` when all draws are there, 1 when `randn` refills one slot.
    pub draw_slots: usize,
    /// LayerNorm over the token.
    pub use_norm: bool,
    /// Norm rescale after guidance.
    pub rescale: bool,
}

/// The node that computes `args`. It is never a dependent launch: all its blocks must be resident together.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    node_with(launch, label, args, ring::SPIN_LIMIT)
}

/// The same with a limit to the looks at a word that does not come, for tests that have one not come.
fn node_with(launch: &Launch, label: &str, args: &Args, spin_limit: u32) -> Result<Node> {
    let a = args;
    let variant = launch.selection.variant(&OP, ring::default_variant(launch, a))?;
    let checks = Checks::new(OP.name, variant.name);
    if !(1..=3).contains(&a.branches) {
        return Err(checks.refuse(format!("{} guidance branches, must be 1 to 3", a.branches)));
    }
    if a.draw_slots != 1 && a.draw_slots != a.tokens_total {
        let reason =
            format!("{} draw slots for {} tokens, must be 1 or as many", a.draw_slots, a.tokens_total);
        return Err(checks.refuse(reason));
    }
    let sequences = checks.product("images x branches", &[a.images, a.branches])?;
    let outputs =
        checks.product("(3 blocks + 2) x width", &[a.blocks.saturating_mul(3).saturating_add(2), a.width])?;
    let e = launch.dtype.bytes();
    let (f, h, k) = (a.width, a.mlp_width, a.token_dim);
    let per_step = [a.steps, a.images, k];

    let modulation = checks.span("modulation", a.modulation, e, &[a.steps, sequences, outputs])?;
    let w_in = checks.span("w_in", a.w_in, e, &[f, k])?;
    let b_in = checks.span("b_in", a.b_in, e, &[f])?;
    let ln_w = checks.span("ln_w", a.ln_w, e, &[a.blocks, f])?;
    let ln_b = checks.span("ln_b", a.ln_b, e, &[a.blocks, f])?;
    let w0 = checks.span("w0", a.w0, e, &[a.blocks, h, f])?;
    let b0 = checks.span("b0", a.b0, e, &[a.blocks, h])?;
    let w2 = checks.span("w2", a.w2, e, &[a.blocks, f, h])?;
    let b2 = checks.span("b2", a.b2, e, &[a.blocks, f])?;
    let w_out = checks.span("w_out", a.w_out, e, &[k, f])?;
    let b_out = checks.span("b_out", a.b_out, e, &[k])?;
    let steps_table =
        checks.span("steps_table", a.steps_table, 4, &[a.steps, size_of::<SolverStep>() / 4])?;
    let guidance = checks.span("guidance", a.guidance, 4, &[a.tokens_total, 2])?;
    let draws = checks.span("draws", a.draws, 4, &[a.draw_slots, a.draws_per_slot, a.images, k])?;
    let forced_x = checks.optional("forced_x", a.forced_x, 4, &per_step)?;
    let state = checks.span("state", a.state, 4, &[size_of::<GenerationState>() / 4])?;
    let barrier = checks.span("barrier", a.barrier, 4, &[size_of::<GridBarrier>() / 4])?;
    let exchange =
        checks.span("exchange", a.exchange, 8, &[exchange_bytes((f, h, k), a.images, a.branches) / 8])?;
    let h_rows = checks.span("h", a.h, 4, &[sequences, f])?;
    let a_rows = checks.span("a", a.a, 4, &[sequences, h])?;
    let v_raw = checks.span("v_raw", a.v_raw, 4, &[sequences, k])?;
    let trace_v_raw = checks.optional("trace_v_raw", a.trace_v_raw, 4, &[a.steps, sequences, k])?;
    let trace_v = checks.optional("trace_v", a.trace_v, 4, &per_step)?;
    let trace_x = checks.optional("trace_x", a.trace_x, 4, &per_step)?;
    let sampled = checks.optional("sampled", a.sampled, 4, &[a.images, k])?;
    let tokens = checks.span("tokens", a.tokens, e, &[a.images, a.tokens_total, k])?;
    let w_next = checks.span("w_next", a.w_next, e, &[a.hidden, k])?;
    let b_next = checks.span("b_next", a.b_next, e, &[a.hidden])?;
    let x_next = checks.span("x_next", a.x_next, 4, &[sequences, a.hidden])?;

    let ring = match variant.name {
        "plain" => None,
        name => {
            let plan = ring::plan(launch, a, name == "resident").map_err(|reason| checks.refuse(reason))?;
            Some(plan)
        }
    };
    let of_ring = |value: fn(&ring::Ring) -> u32| ring.as_ref().map_or(0, value);
    let params = FlowChainParams {
        mod_: modulation.ptr.0,
        w_in: w_in.ptr.0,
        b_in: b_in.ptr.0,
        ln_w: ln_w.ptr.0,
        ln_b: ln_b.ptr.0,
        w0: w0.ptr.0,
        b0: b0.ptr.0,
        w2: w2.ptr.0,
        b2: b2.ptr.0,
        w_out: w_out.ptr.0,
        b_out: b_out.ptr.0,
        steps_table: steps_table.ptr.0,
        guidance: guidance.ptr.0,
        draws: draws.ptr.0,
        forced_x: shared::address(forced_x),
        state: state.ptr.0,
        barrier: barrier.ptr.0,
        h: h_rows.ptr.0,
        a: a_rows.ptr.0,
        v_raw: v_raw.ptr.0,
        trace_v_raw: shared::address(trace_v_raw),
        trace_v: shared::address(trace_v),
        trace_x: shared::address(trace_x),
        sampled: shared::address(sampled),
        tokens: tokens.ptr.0,
        w_next: w_next.ptr.0,
        b_next: b_next.ptr.0,
        x_next: x_next.ptr.0,
        exchange: exchange.ptr.0,
        steps: checks.dim("steps", a.steps)?,
        images: checks.dim("images", a.images)?,
        branches: checks.dim("branches", a.branches)?,
        width: checks.dim("width", f)?,
        mlp_width: checks.dim("mlp_width", h)?,
        blocks: checks.dim("blocks", a.blocks)?,
        token_dim: checks.dim("token_dim", k)?,
        hidden: checks.dim("hidden", a.hidden)?,
        tokens_total: checks.dim("tokens_total", a.tokens_total)?,
        draws_per_slot: checks.dim("draws_per_slot", a.draws_per_slot)?,
        draw_slots: checks.dim("draw_slots", a.draw_slots)?,
        use_norm: a.use_norm.into(),
        rescale: a.rescale.into(),
        rows_width: of_ring(|r| r.rows_width),
        rows_mlp: of_ring(|r| r.rows_mlp),
        rows_token: of_ring(|r| r.rows_token),
        rows_hidden: of_ring(|r| r.rows_hidden),
        images_at_once: of_ring(|r| r.images_at_once),
        exchange_words: of_ring(|r| r.exchange_words),
        stages: of_ring(|r| r.stages),
        stage_bytes: of_ring(|r| r.stage_bytes),
        resident: of_ring(|r| r.resident),
        pinned: of_ring(|r| r.pinned),
        spin_limit,
    };
    // The scratch rows carry values between blocks: they are read as well as written.
    let mut reads = vec![
        modulation,
        w_in,
        b_in,
        ln_w,
        ln_b,
        w0,
        b0,
        w2,
        b2,
        w_out,
        b_out,
        steps_table,
        guidance,
        draws,
        state,
        barrier,
        w_next,
        b_next,
        h_rows,
        a_rows,
        v_raw,
        exchange,
    ];
    reads.extend(forced_x);
    let mut writes = vec![state, barrier, exchange, h_rows, a_rows, v_raw, tokens, x_next];
    writes.extend([trace_v_raw, trace_v, trace_x, sampled].into_iter().flatten());
    Ok(Node {
        label: label.into(),
        kernel: variant.kernel(OP.name, launch.dtype)?,
        geometry: match &ring {
            Some(ring) => ring.geometry(),
            None => geometry(launch, &checks, a, sequences)?,
        },
        params: ParamBytes::of(&params),
        reads,
        writes,
    })
}

/// One block per SM at most, and no more than the widest product has pairs of outputs.
fn geometry(launch: &Launch, checks: &Checks, a: &Args, sequences: usize) -> Result<Geometry> {
    let state_bytes = checks.product("images x token_dim", &[a.images, a.token_dim])?.next_multiple_of(8) * 4;
    let widest = a.width.max(a.mlp_width).max(a.token_dim);
    let rows = sequences.min(ROW_GROUP);
    let stage_bytes = widest.next_multiple_of(8).saturating_mul(rows * 4).min(STAGE_BYTES);
    let shared_bytes = state_bytes.saturating_add(stage_bytes);
    if shared_bytes > SHARED_BYTES {
        return Err(checks.refuse(format!(
            "{} images of {} values take {shared_bytes} bytes of shared memory, {SHARED_BYTES} are there; make fewer \
             images at once",
            a.images, a.token_dim
        )));
    }
    let pairs = a.width.max(a.mlp_width).max(a.hidden).div_ceil(2);
    let blocks = div_ceil(pairs, 1).min(launch.sm_count.max(1));
    let mut geometry =
        Geometry::linear(blocks, THREADS).with_shared(u32::try_from(shared_bytes).unwrap_or(u32::MAX));
    geometry.cooperative = true;
    Ok(geometry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DevicePtr;
    use crate::error::Error;
    use crate::ops::{DType, Selection};

    /// The base head; every buffer is large and has its own address.
    fn args(bytes: usize) -> Args {
        let mut next = 0;
        let mut span = || {
            next += 1;
            Span { ptr: DevicePtr(next << 40), bytes }
        };
        Args {
            modulation: span(),
            w_in: span(),
            b_in: span(),
            ln_w: span(),
            ln_b: span(),
            w0: span(),
            b0: span(),
            w2: span(),
            b2: span(),
            w_out: span(),
            b_out: span(),
            steps_table: span(),
            guidance: span(),
            draws: span(),
            forced_x: Some(span()),
            state: span(),
            barrier: span(),
            exchange: span(),
            h: span(),
            a: span(),
            v_raw: span(),
            trace_v_raw: Some(span()),
            trace_v: Some(span()),
            trace_x: Some(span()),
            sampled: Some(span()),
            tokens: span(),
            w_next: span(),
            b_next: span(),
            x_next: span(),
            steps: 28,
            images: 1,
            branches: 2,
            width: 1536,
            mlp_width: 1536,
            blocks: 12,
            token_dim: 64,
            hidden: 5120,
            tokens_total: 1024,
            draws_per_slot: 28,
            draw_slots: 1,
            use_norm: true,
            rescale: false,
        }
    }

    fn built(args: &Args, dtype: DType) -> Result<Node> {
        let selection = Selection::one(&OP, "plain").unwrap();
        let launch = Launch { selection: &selection, dtype, sm_count: 132, dependent: true };
        node(&launch, "flow.chain", args)
    }

    #[test]
    fn shipped_heads_fit_an_sm_and_every_span_is_declared() {
        for (width, blocks) in [(1024, 6), (1536, 12), (2048, 24)] {
            for images in [1, 16, 128] {
                for branches in [1, 2, 3] {
                    let args = Args { width, mlp_width: width, blocks, images, branches, ..args(1 << 39) };
                    for dtype in [DType::F32, DType::Bf16] {
                        let node = built(&args, dtype).unwrap();
                        assert!(node.geometry.cooperative && node.geometry.grid == [132, 1, 1]);
                        assert!(
                            !node.geometry.dependent,
                            "blocks of a dependent launch may not all be resident"
                        );
                        assert!(node.geometry.shared_bytes as usize <= SHARED_BYTES);
                    }
                }
            }
        }
        let node = built(&args(1 << 39), DType::Bf16).unwrap();
        let bytes = |number: u64| {
            let spans = node.reads.iter().chain(&node.writes);
            spans.filter(|s| s.ptr.0 == number << 40).map(|s| s.bytes).max()
        };
        // All 29 buffers, each with the bytes that its shape takes.
        assert!((1..=29).all(|number| bytes(number).is_some()));
        assert_eq!(bytes(1), Some(28 * 2 * 38 * 1536 * 2));
        assert_eq!(bytes(6), Some(12 * 1536 * 1536 * 2));
        assert_eq!(bytes(14), Some(28 * 64 * 4));
        assert_eq!(bytes(26), Some(1024 * 64 * 2));
    }

    #[test]
    fn refuses_what_it_cannot_do() {
        let good = args(1 << 39);
        for (what, bad) in [
            ("branches", Args { branches: 4, ..good }),
            ("branches", Args { branches: 0, ..good }),
            ("slots", Args { draw_slots: 7, ..good }),
            ("steps", Args { steps: 0, ..good }),
            ("images", Args { images: 0, ..good }),
            ("shared memory", Args { images: 900, ..good }),
            ("overflows", Args { blocks: usize::MAX / 2, ..good }),
        ] {
            let error = built(&bad, DType::Bf16).unwrap_err();
            assert!(matches!(error, Error::Unsupported { op: "flow_chain", .. }), "{what}: {error}");
            assert!(error.to_string().contains(what), "{what}: {error}");
        }
        assert!(matches!(built(&args(1 << 20), DType::Bf16), Err(Error::Internal(_))), "short buffers");
    }
}
