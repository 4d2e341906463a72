//! `unpatchify`: image tokens to the latent that the VAE decodes.

use super::harness::{self, Case, Check, Rig};
use super::params::UnpatchifyParams;
use super::shared::{Checks, case, scale_for};
use super::{DType, Launch, Op, Variant};
use crate::device::{Geometry, Node, ParamBytes, Span};
use crate::error::Result;
use crate::reference::unpatchify::{Shape, unpatchify as reference};
use crate::reference::{Exact, PlainBf16, PlainF32};

/// The row of the registry.
pub static OP: Op = Op {
    name: "unpatchify",
    summary: "tokens / scale + shift, folded back into a channels-last latent",
    bound: "latency: 65,536 values for a 512x512 picture",
    variants: &[Variant {
        name: "plain",
        kernels: crate::kernels!("unpatchify", f32: "unpatchify_plain_f32", bf16: "unpatchify_plain_bf16"),
        summary: "one latent value per thread",
    }],
    cases,
};

const THREADS: usize = 256;

/// One rearrangement.
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// `[images, (height / patch) * (width / patch), channels * patch^2]` E.
    pub tokens: Span,
    /// `[images, height, width, channels]` E, written.
    pub latent: Span,
    /// Sizes.
    pub shape: Shape,
    /// The VAE's `scaling_factor`: tokens are divided by it.
    pub scale: f32,
    /// The VAE's `shift_factor`: added afterwards.
    pub shift: f32,
}

/// Checks and records one launch.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let variant = launch.selection.variant(&OP, "plain")?;
    let checks = Checks::new(OP.name, variant.name);
    let Shape { images, height, width, channels, patch } = args.shape;
    if patch == 0 || height % patch != 0 || width % patch != 0 {
        return Err(
            checks.refuse(format!("a {height}x{width} latent is not made of {patch}x{patch} patches"))
        );
    }
    let values = checks.product("latent", &[images, height, width, channels])?;
    let dims = [images, height, width, channels];
    let tokens = checks.span("tokens", args.tokens, launch.dtype.bytes(), &dims)?;
    let latent = checks.span("latent", args.latent, launch.dtype.bytes(), &dims)?;
    let params = UnpatchifyParams {
        tokens: tokens.ptr.0,
        latent: latent.ptr.0,
        images: checks.dim("images", images)?,
        height: checks.dim("height", height)?,
        width: checks.dim("width", width)?,
        channels: checks.dim("channels", channels)?,
        patch: checks.dim("patch", patch)?,
        scale: args.scale,
        shift: args.shift,
        pad: 0,
    };
    let mut geometry = Geometry::linear(checks.dim("blocks", values.div_ceil(THREADS))?, THREADS as u32);
    geometry.dependent = launch.dependent;
    Ok(Node {
        label: label.into(),
        kernel: variant.kernel(OP.name, launch.dtype)?,
        geometry,
        params: ParamBytes::of(&params),
        reads: vec![tokens],
        writes: vec![latent],
    })
}

fn cases() -> Vec<Case> {
    let shape = |images, height, width, channels, patch| Shape { images, height, width, channels, patch };
    let shapes = [
        (shape(1, 2, 2, 16, 2), 1.0, 0.0),
        (shape(3, 4, 6, 16, 2), 0.3611, 0.1159),
        (shape(1, 18, 14, 5, 2), 2.0, -0.5),
        (shape(2, 5, 3, 7, 1), 0.3611, 0.1159),
        (shape(1, 9, 6, 3, 3), 1.0, 0.0),
        (shape(1, 64, 64, 16, 2), 0.3611, 0.1159),
    ];
    let mut cases = Vec::new();
    for (shape, scale, shift) in shapes {
        let Shape { images, height, width, channels, patch } = shape;
        for &dtype in DType::ALL {
            let values = (images * height * width * channels) as u64;
            let label =
                format!("images={images},height={height},width={width},channels={channels},patch={patch}");
            let cost = (2 * values * dtype.bytes() as u64, 2 * values);
            cases.push(case(&OP, "plain", dtype, scale_for(values), cost, label, move |rig, launch| {
                run(rig, launch, &shape, scale, shift)
            }));
        }
    }
    cases
}

fn run(rig: &mut Rig, launch: &Launch, shape: &Shape, scale: f32, shift: f32) -> Result<Vec<Check>> {
    let dtype = launch.dtype;
    let len = shape.images * shape.height * shape.width * shape.channels;
    let tokens = rig.random("tokens", dtype, len, 1.0)?;
    let latent = rig.output("latent", dtype, len)?;
    let args = Args { tokens: tokens.span, latent, shape: *shape, scale, shift };
    rig.run(&node(launch, "unpatchify", &args)?)?;
    let got = rig.read(latent, dtype)?;
    let wide: Vec<f64> = tokens.values.iter().map(|&v| f64::from(v)).collect();
    let exact = reference::<Exact>(shape, &wide, scale, shift);
    let plain = match dtype {
        DType::F32 => reference::<PlainF32>(shape, &tokens.values, scale, shift),
        DType::Bf16 => reference::<PlainBf16>(shape, &tokens.values, scale, shift),
    };
    let plain: Vec<f64> = plain.into_iter().map(f64::from).collect();
    Ok(vec![harness::compare("latent", dtype, &got, &exact, &plain)])
}
