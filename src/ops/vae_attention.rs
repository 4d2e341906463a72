//! `vae_attention`: the VAE's single-head attention over all pixels of the latent.

use super::harness::{self, Case, Check, Rig, Scale};
use super::params::VaeAttentionParams;
use super::shared::{Checks, case, scale_for};
use super::{DType, Launch, Op, Variant, div_ceil};
use crate::device::{Geometry, Node, ParamBytes, Span};
use crate::error::{Error, Result};
use crate::reference::vae_attention::vae_attention as reference;
use crate::reference::{Exact, PlainBf16, PlainF32, Precision};

/// The row of the registry.
pub static OP: Op = Op {
    name: "vae_attention",
    summary: "softmax(scale q k^T) v, one head over all pixels of a latent",
    bound: "FLOPs: 34 GFLOP for a 512x512 picture, 1.4 % of the decoder",
    variants: &[
        Variant {
            name: "plain",
            kernels: crate::kernels!("vae_attention", f32: "vae_attention_plain_f32", bf16: "vae_attention_plain_bf16"),
            summary: "tiles of 32 queries and 32 keys with an online softmax, up to 512 channels",
        },
        Variant {
            name: "mma",
            kernels: crate::kernels!("vae_attention_mma", bf16: "vae_attention_mma_bf16"),
            summary: "tensor cores, tiles of 32 queries and 64 keys; a multiple of 64 channels up to 512",
        },
    ],
    cases,
};

/// Queries of a block of either variant (`kBlockQ`, `kQueries`).
const BLOCK_Q: usize = 32;
/// Output channels that a block's registers hold (`kMaxChannels`).
const MAX_CHANNELS: usize = 512;
const THREADS: u32 = 256;
/// Channels of a warp of `mma`.
const WARP_CHANNELS: usize = 64;
/// Keys of a tile of `mma` (`kKeys`).
const MMA_KEYS: usize = 64;

fn fits_mma(dtype: DType, channels: usize) -> bool {
    dtype == DType::Bf16 && channels.is_multiple_of(WARP_CHANNELS)
}

/// One attention.
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// `[images, pixels, channels]` E.
    pub q: Span,
    /// The same shape.
    pub k: Span,
    /// The same shape.
    pub v: Span,
    /// The same shape, written.
    pub out: Span,
    /// Pictures.
    pub images: usize,
    /// Pixels of a picture, each a query and a key.
    pub pixels: usize,
    /// Channels.
    pub channels: usize,
}

/// Checks and records one launch; scores are scaled by `1 / sqrt(channels)`.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let Args { images, pixels, channels, .. } = *args;
    let default = if fits_mma(launch.dtype, channels) { "mma" } else { "plain" };
    let variant = launch.selection.variant(&OP, default)?;
    let mma = variant.name == "mma";
    let checks = Checks::new(OP.name, variant.name);
    if mma && channels % WARP_CHANNELS != 0 {
        return Err(checks.refuse(format!("channels is {channels}, must be a multiple of {WARP_CHANNELS}")));
    }
    if channels > MAX_CHANNELS {
        return Err(checks.refuse(format!("channels is {channels}, must be at most {MAX_CHANNELS}")));
    }
    if images > 65_535 {
        return Err(checks.refuse(format!("images: {images}, must be at most 65535")));
    }
    let tensor = |name, span| checks.span(name, span, launch.dtype.bytes(), &[images, pixels, channels]);
    let (q, k, v) = (tensor("q", args.q)?, tensor("k", args.k)?, tensor("v", args.v)?);
    let out = tensor("out", args.out)?;
    if let Some(span) = [q, k, v, out].iter().find(|s| mma && !s.ptr.0.is_multiple_of(16)) {
        return Err(Error::Internal(format!(
            "op vae_attention {label}: {:#x} is not 16-byte aligned",
            span.ptr.0
        )));
    }
    let params = VaeAttentionParams {
        q: q.ptr.0,
        k: k.ptr.0,
        v: v.ptr.0,
        out: out.ptr.0,
        images: checks.dim("images", images)?,
        pixels: checks.dim("pixels", pixels)?,
        channels: checks.dim("channels", channels)?,
        scale: scale(channels),
    };
    let mut geometry = Geometry::linear(div_ceil(pixels, BLOCK_Q), THREADS);
    geometry.grid[1] = params.images;
    if mma {
        // Queries, keys and values, rows of which lie 16 bytes off a multiple of 128.
        geometry = geometry.with_shared(((BLOCK_Q + 2 * MMA_KEYS) * (channels + 8) * 2) as u32);
    }
    geometry.dependent = launch.dependent;
    Ok(Node {
        label: label.into(),
        kernel: variant.kernel(OP.name, launch.dtype)?,
        geometry,
        params: ParamBytes::of(&params),
        reads: vec![q, k, v],
        writes: vec![out],
    })
}

/// `1 / sqrt(channels)`.
fn scale(channels: usize) -> f32 {
    1.0 / (channels as f32).sqrt()
}

fn cases() -> Vec<Case> {
    // images, pixels, channels, size of q and k: large scores move the maximum from tile to tile
    let shapes = [
        (1, 1, 32, 1.0),
        (3, 5, 32, 1.0),
        (1, 33, 3, 3.0),
        (1, 64, 64, 2.0),
        (2, 130, 70, 3.0),
        (1, 130, 512, 1.5),
        (1, 97, 301, 4.0),
        (1, 256, 128, 1.0),
        (2, 129, 192, 3.0),
        (1, 33, 64, 4.0),
    ];
    let real = [(1, 64, 512, 1.0), (1, 1024, 512, 1.0)];
    let mut cases = Vec::new();
    for (i, &shape) in shapes.iter().chain(&real).enumerate() {
        let (images, pixels, channels, _) = shape;
        for &dtype in DType::ALL {
            let bytes = (4 * images * pixels * channels * dtype.bytes()) as u64;
            let flops = (4 * images * pixels * pixels * channels) as u64;
            let scale = if i < shapes.len() { scale_for(flops) } else { Scale::Real };
            let label = format!("images={images},pixels={pixels},channels={channels}");
            for variant in ["plain", "mma"] {
                if variant == "plain" || fits_mma(dtype, channels) {
                    let run = move |rig: &mut Rig, launch: &Launch| run(rig, launch, shape);
                    cases.push(case(&OP, variant, dtype, scale, (bytes, flops), label.clone(), run));
                }
            }
        }
    }
    cases
}

fn run(
    rig: &mut Rig,
    launch: &Launch,
    (images, pixels, channels, size): (usize, usize, usize, f32),
) -> Result<Vec<Check>> {
    let dtype = launch.dtype;
    let len = images * pixels * channels;
    let (q, k) = (rig.random("q", dtype, len, size)?, rig.random("k", dtype, len, size)?);
    let v = rig.random("v", dtype, len, 1.0)?;
    let out = rig.output("out", dtype, len)?;
    let args = Args { q: q.span, k: k.span, v: v.span, out, images, pixels, channels };
    rig.run(&node(launch, "vae_attention", &args)?)?;
    let got = rig.read(out, dtype)?;

    fn reference_at<P: Precision>(qkv: [&[f32]; 3], pixels: usize, channels: usize) -> Vec<f64> {
        let [q, k, v] = qkv.map(P::load_all);
        P::widen_all(&reference::<P>(&q, &k, &v, pixels, channels, scale(channels)))
    }
    let qkv = [q.values.as_slice(), k.values.as_slice(), v.values.as_slice()];
    let exact = reference_at::<Exact>(qkv, pixels, channels);
    let plain = match dtype {
        DType::F32 => reference_at::<PlainF32>(qkv, pixels, channels),
        DType::Bf16 => reference_at::<PlainBf16>(qkv, pixels, channels),
    };
    Ok(vec![harness::compare("out", dtype, &got, &exact, &plain)])
}
