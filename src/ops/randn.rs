//! `randn`: the draws of one image token, the numbers that eager `torch.randn` gives on a CUDA device.
//!
//! Owns the bound under which they depend on the seed alone. What a request draws, and in which order, is
//! `crate::rng`'s business.

use super::harness::{Case, Check, Rig, Scale, compare, within};
use super::params::{GenerationState, RandnParams};
use super::shared::{self, Checks};
use super::{DType, Launch, Op, Variant, div_ceil};
use crate::device::{Geometry, Node, ParamBytes, Span};
use crate::error::Result;
use crate::kernels;
use crate::reference::randn::normal;

/// The registry row.
pub static OP: Op = Op {
    name: "randn",
    summary: "draws of one token: Philox4x32-10 and Box-Muller in torch's CUDA order",
    bound: "latency: 13 KB written for 50 draws of one image",
    variants: &[Variant {
        name: "plain",
        kernels: kernels!("randn", f32: "randn_plain", bf16: "randn_plain"),
        summary: "thread per number; any shape that one grid of torch covers",
    }],
    cases,
};

/// Threads that torch starts at most for one call on an H100 SXM or H200 (132 SMs of 2048 threads). A call for more
/// numbers gives each thread several, and which is whose then depends on the card.
pub const MAX_ELEMENTS: usize = 132 * 2048;
const BLOCK_THREADS: u32 = 256;

/// Tensors and dimensions; shapes in `kernels/params.h` (`RandnParams`).
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// [`GenerationState`], `token` read.
    pub state: Span,
    /// `[draws_per_token, images, token_dim]` f32, written.
    pub draws: Span,
    /// Seed of the request.
    pub seed: u64,
    /// Generator offset before token 0, in 32-bit outputs; a multiple of 4.
    pub base_offset: u64,
    /// `torch.randn` calls per image token.
    pub draws_per_token: usize,
    /// Images of this run.
    pub images: usize,
    /// Index of the first of them in the batch whose noise is made.
    pub first_image: u32,
    /// Numbers per image token.
    pub token_dim: usize,
    /// Whether draws are rounded to bf16, as torch makes them in a bf16 model.
    pub round_bf16: bool,
}

/// The node that computes `args`.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let a = args;
    let variant = launch.selection.variant(&OP, "plain")?;
    let checks = Checks::new(OP.name, variant.name);
    let dims = [a.draws_per_token, a.images, a.token_dim];
    let state = checks.span("state", a.state, 4, &[size_of::<GenerationState>() / 4])?;
    let draws = checks.span("draws", a.draws, 4, &dims)?;
    let numbers = checks.product("draws", &dims)?;
    let elements = (a.first_image as usize).checked_add(a.images).and_then(|n| n.checked_mul(a.token_dim));
    if elements.is_none_or(|n| n > MAX_ELEMENTS) {
        return Err(checks.refuse(format!(
            "images {}..{} of {} values: torch draws at most {MAX_ELEMENTS} numbers per call independently of the \
             card; make fewer images at once or start at a lower first image",
            a.first_image,
            a.first_image as usize + a.images,
            a.token_dim
        )));
    }
    if !a.base_offset.is_multiple_of(4) {
        return Err(checks.refuse(format!("base_offset is {}, must be a multiple of 4", a.base_offset)));
    }
    let params = RandnParams {
        state: state.ptr.0,
        draws: draws.ptr.0,
        seed: a.seed,
        base_offset: a.base_offset,
        draws_per_token: checks.dim("draws_per_token", a.draws_per_token)?,
        images: checks.dim("images", a.images)?,
        first_image: a.first_image,
        token_dim: checks.dim("token_dim", a.token_dim)?,
        round_bf16: a.round_bf16.into(),
        pad: 0,
    };
    let mut geometry = Geometry::linear(div_ceil(numbers, BLOCK_THREADS as usize), BLOCK_THREADS);
    geometry.dependent = launch.dependent;
    Ok(Node {
        label: label.into(),
        kernel: variant.kernel(OP.name, launch.dtype)?,
        geometry,
        params: ParamBytes::of(&params),
        reads: vec![state],
        writes: vec![draws],
    })
}

/// One test shape.
#[derive(Clone, Copy, Debug)]
struct Shape {
    seed: u64,
    base_offset: u64,
    token: u32,
    draws: usize,
    images: usize,
    first_image: u32,
    token_dim: usize,
    round_bf16: bool,
}

fn cases() -> Vec<Case> {
    let shape = |seed, base_offset, token, draws, (first_image, images), token_dim, round_bf16| Shape {
        seed,
        base_offset,
        token,
        draws,
        images,
        first_image,
        token_dim,
        round_bf16,
    };
    let shapes = [
        shape(0, 0, 0, 1, (0, 1), 12, false),
        shape(42, 4, 7, 3, (0, 2), 64, false),
        // The last image that one call covers, and a counter beyond 32 bits.
        shape(u64::MAX, (1 << 36) - 8, 5, 2, (4223, 1), 64, false),
        shape(1 << 40, 8, 1023, 5, (3, 3), 16, true),
        shape(9, 0, 1, 29, (0, 5), 75, false),
    ];
    shapes
        .into_iter()
        .map(|s| {
            let numbers = (s.draws * s.images * s.token_dim) as u64;
            let label = format!(
                "token={},draws={},images={}..{},token_dim={},round_bf16={}",
                s.token,
                s.draws,
                s.first_image,
                s.first_image as usize + s.images,
                s.token_dim,
                u8::from(s.round_bf16)
            );
            let run = move |rig: &mut Rig, launch: &Launch| run(rig, launch, s);
            shared::case(&OP, "plain", DType::F32, Scale::Small, (4 * numbers, 100 * numbers), label, run)
        })
        .collect()
}

fn args(s: Shape, state: Span, draws: Span) -> Args {
    Args {
        state,
        draws,
        seed: s.seed,
        base_offset: s.base_offset,
        draws_per_token: s.draws,
        images: s.images,
        first_image: s.first_image,
        token_dim: s.token_dim,
        round_bf16: s.round_bf16,
    }
}

fn run(rig: &mut Rig, launch: &Launch, s: Shape) -> Result<Vec<Check>> {
    let state = GenerationState { token: s.token, ..Default::default() };
    let state = rig.bytes("state", bytemuck::bytes_of(&state))?;
    let draws = rig.output("draws", DType::F32, s.draws * s.images * s.token_dim)?;
    rig.run(&node(launch, "test.randn", &args(s, state, draws))?)?;
    let got = rig.read(draws, DType::F32)?;
    let mut exact = Vec::new();
    for draw in 0..s.draws {
        let offset = s.base_offset + 4 * (u64::from(s.token) * s.draws as u64 + draw as u64);
        for image in 0..s.images {
            for k in 0..s.token_dim {
                let element = (s.first_image as usize + image) * s.token_dim + k;
                exact.push(normal(s.seed, offset, element as u32));
            }
        }
    }
    // sin.approx errs by 2^-20.5 absolutely and its factor stays below 6.8; the rest is a few roundings.
    let absolute = 6.8 * 2f64.powf(-20.5) + 1e-5;
    if s.round_bf16 {
        let rounded: Vec<f64> = exact.iter().map(|&v| half::bf16::from_f64(v).to_f64()).collect();
        return Ok(vec![compare("draws", DType::Bf16, &got, &exact, &rounded)]);
    }
    Ok(vec![within("draws", &got, &exact, absolute)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DevicePtr;
    use crate::error::Error;
    use crate::ops::Selection;

    fn built(s: Shape) -> Result<Node> {
        let selection = Selection::default();
        let launch = Launch { selection: &selection, dtype: DType::Bf16, sm_count: 4, dependent: false };
        let span = |at| Span { ptr: DevicePtr(at), bytes: 1 << 30 };
        node(&launch, "randn", &args(s, span(1 << 32), span(1 << 33)))
    }

    const SHAPE: Shape = Shape {
        seed: 1,
        base_offset: 4,
        token: 0,
        draws: 2,
        images: 4224,
        first_image: 0,
        token_dim: 64,
        round_bf16: false,
    };

    #[test]
    fn refuses_noise_that_would_depend_on_the_card() {
        assert!(built(SHAPE).is_ok());
        for bad in [
            Shape { images: 4225, ..SHAPE },
            Shape { first_image: 1, ..SHAPE },
            Shape { first_image: u32::MAX, ..SHAPE },
            Shape { base_offset: 6, ..SHAPE },
            Shape { draws: 0, ..SHAPE },
        ] {
            assert!(matches!(built(bad), Err(Error::Unsupported { op: "randn", .. })), "{bad:?}");
        }
    }
}
