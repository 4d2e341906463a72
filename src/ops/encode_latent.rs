//! `encode_latent`: the VAE encoder's moments to image tokens: norm of the mean, posterior, scale and shift, patches.

use super::harness::{self, Case, Check, Rig};
use super::params::EncodeLatentParams;
use super::shared::{Checks, address, case, scale_for};
use super::{DType, Launch, Op, Variant, div_ceil};
use crate::device::{Geometry, Node, ParamBytes, Span};
use crate::error::Result;
use crate::reference::encode_latent::{Latent, Shape, encode_latent as reference};
use crate::reference::{Exact, PlainBf16, PlainF32, Precision};

/// The row of the registry.
pub static OP: Op = Op {
    name: "encode_latent",
    summary: "moments to tokens: norm of the mean, mean + std * draw, (sample - shift) * scale, patches",
    bound: "latency: 131,072 moments for a 512x512 picture",
    variants: &[Variant {
        name: "plain",
        kernels: crate::kernels!("encode_latent", f32: "encode_latent_plain_f32", bf16: "encode_latent_plain_bf16"),
        summary: "one warp per normalised patch, any shape",
    }],
    cases,
};

/// Normalised patches of a block (`kWarps`).
const WARPS: usize = 4;

/// One picture.
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// `[height, width, 2 * channels]` E.
    pub moments: Span,
    /// `[height, width, channels]` float; absent: the sample is the mean.
    pub draw: Option<Span>,
    /// `[(height / patch) * (width / patch), channels * patch^2]` E, written.
    pub tokens: Span,
    /// What verification looks at.
    pub taps: Taps,
    /// Sizes.
    pub shape: Shape,
    /// The VAE's `scaling_factor`: multiplied last.
    pub scale: f32,
    /// The VAE's `shift_factor`: subtracted before it.
    pub shift: f32,
}

/// Optional outputs, `[height, width, channels]` E.
#[derive(Clone, Copy, Debug, Default)]
pub struct Taps {
    /// The posterior's mean, normalised.
    pub mean: Option<Span>,
    /// Its standard deviation; 0 without a draw.
    pub std: Option<Span>,
    /// `mean + std * draw`.
    pub sample: Option<Span>,
}

/// Checks and records one launch.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let variant = launch.selection.variant(&OP, "plain")?;
    let checks = Checks::new(OP.name, variant.name);
    let Shape { height, width, channels, patch, psz } = args.shape;
    for (what, side) in [("tokens", patch), ("normalised patches", psz.unwrap_or(1))] {
        if side == 0 || height % side != 0 || width % side != 0 {
            return Err(checks.refuse(format!(
                "a {height}x{width} latent does not divide into {what} of {side}x{side} pixels"
            )));
        }
    }
    checks.product("moments", &[height, width, channels, 2])?;
    let element = launch.dtype.bytes();
    let dims = [height, width, channels];
    let moments = checks.span("moments", args.moments, element, &[height, width, channels, 2])?;
    let draw = checks.optional("draw", args.draw, 4, &dims)?;
    let tokens = checks.span("tokens", args.tokens, element, &dims)?;
    let mean = checks.optional("mean", args.taps.mean, element, &dims)?;
    let std = checks.optional("std", args.taps.std, element, &dims)?;
    let sample = checks.optional("sample", args.taps.sample, element, &dims)?;
    let params = EncodeLatentParams {
        moments: moments.ptr.0,
        draw: address(draw),
        tokens: tokens.ptr.0,
        mean: address(mean),
        deviation: address(std),
        sample: address(sample),
        height: checks.dim("height", height)?,
        width: checks.dim("width", width)?,
        channels: checks.dim("channels", channels)?,
        patch: checks.dim("patch", patch)?,
        psz: psz.map_or(Ok(0), |psz| checks.dim("psz", psz))?,
        scale: args.scale,
        shift: args.shift,
        pad: 0,
    };
    let patches = height * width / psz.unwrap_or(1).pow(2);
    let mut geometry = Geometry::linear(div_ceil(patches, WARPS), 32 * WARPS as u32);
    geometry.dependent = launch.dependent;
    let mut reads = vec![moments];
    reads.extend(draw);
    let mut writes = vec![tokens];
    writes.extend([mean, std, sample].into_iter().flatten());
    Ok(Node {
        label: label.into(),
        kernel: variant.kernel(OP.name, launch.dtype)?,
        geometry,
        params: ParamBytes::of(&params),
        reads,
        writes,
    })
}

fn cases() -> Vec<Case> {
    let shape = |height, width, channels, patch, psz| Shape { height, width, channels, patch, psz };
    // shape, whether there is a draw, whether there are taps
    let shapes = [
        (shape(1, 1, 16, 1, Some(1)), false, true),
        (shape(2, 4, 16, 2, Some(1)), true, true),
        (shape(6, 10, 16, 2, Some(2)), true, false),
        (shape(6, 12, 5, 2, Some(3)), true, true),
        (shape(5, 3, 7, 1, None), true, true),
        (shape(8, 16, 3, 4, Some(8)), false, false),
        (shape(64, 64, 16, 2, Some(1)), true, false),
    ];
    let mut cases = Vec::new();
    for (shape, draw, taps) in shapes {
        let Shape { height, width, channels, patch, psz } = shape;
        for &dtype in DType::ALL {
            let values = (height * width * channels) as u64;
            let psz = psz.map_or("none".into(), |psz| psz.to_string());
            let label = format!(
                "height={height},width={width},channels={channels},patch={patch},psz={psz},draw={}",
                u8::from(draw)
            );
            let floats = if draw { 4 * values } else { 0 };
            let cost = (3 * values * dtype.bytes() as u64 + floats, 10 * values);
            let scale = scale_for(values * 16);
            cases.push(case(&OP, "plain", dtype, scale, cost, label, move |rig, launch| {
                run(rig, launch, &shape, draw, taps)
            }));
        }
    }
    cases
}

fn run(rig: &mut Rig, launch: &Launch, shape: &Shape, draw: bool, taps: bool) -> Result<Vec<Check>> {
    let dtype = launch.dtype;
    let (scale, shift) = (0.3611, 0.1159);
    let len = shape.height * shape.width * shape.channels;
    // Log variances of the released VAE are far below zero; some here reach the clamp.
    let values = rig.normal(2 * len, 1.0);
    let wide = |i: usize| i / shape.channels % 2 == 1;
    let values = values.iter().enumerate().map(|(i, v)| if wide(i) { 6.0 * v - 2.0 } else { v + 0.5 });
    let moments = rig.input("moments", dtype, values.collect())?;
    let draw = if draw { Some(rig.random("draw", DType::F32, len, 1.0)?) } else { None };
    let tokens = rig.output("tokens", dtype, len)?;
    let mut outputs = vec![("tokens", tokens)];
    if taps {
        for name in ["mean", "std", "sample"] {
            outputs.push((name, rig.output(name, dtype, len)?));
        }
    }
    let find = |name: &str| outputs.iter().find(|(n, _)| *n == name).map(|(_, span)| *span);
    let args = Args {
        moments: moments.span,
        draw: draw.as_ref().map(|d| d.span),
        tokens,
        taps: Taps { mean: find("mean"), std: find("std"), sample: find("sample") },
        shape: *shape,
        scale,
        shift,
    };
    rig.run(&node(launch, "encode_latent", &args)?)?;

    fn evaluate<P: Precision>(
        shape: &Shape,
        moments: &[f32],
        draw: Option<&[f32]>,
        constants: (f32, f32),
    ) -> [(&'static str, Vec<f64>); 4] {
        let draw = draw.map(P::load_all);
        let Latent { mean, std, sample, tokens } =
            reference::<P>(shape, &P::load_all(moments), draw.as_deref(), constants);
        [("tokens", tokens), ("mean", mean), ("std", std), ("sample", sample)]
            .map(|(name, values)| (name, P::widen_all(&values)))
    }
    let draw = draw.as_ref().map(|d| d.values.as_slice());
    let exact = evaluate::<Exact>(shape, &moments.values, draw, (scale, shift));
    let plain = match dtype {
        DType::F32 => evaluate::<PlainF32>(shape, &moments.values, draw, (scale, shift)),
        DType::Bf16 => evaluate::<PlainBf16>(shape, &moments.values, draw, (scale, shift)),
    };
    let mut checks = Vec::new();
    for ((name, exact), (_, plain)) in exact.iter().zip(&plain) {
        if let Some(span) = find(name) {
            checks.push(harness::compare(name, dtype, &rig.read(span, dtype)?, exact, plain));
        }
    }
    Ok(checks)
}
