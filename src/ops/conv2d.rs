//! `conv2d`: every convolution of the VAE, with normalisation and swish of its input, resampling and residual
//! folded in. Channels last; the kernel's file says how it tiles.

use super::harness::{self, Case, Check, Rig, Scale};
use super::params::Conv2dParams;
use super::shared::{Checks, address, case, scale_for};
use super::{DType, Launch, Op, Variant, div_ceil};
use crate::device::{Geometry, Node, ParamBytes, Span};
use crate::error::{Error, Result};
use crate::reference::conv2d::{self as reference, Resample, Shape};
use crate::reference::{Exact, PlainBf16, PlainF32, Precision};

/// The row of the registry.
pub static OP: Op = Op {
    name: "conv2d",
    summary: "3x3 or 1x1 convolution: GroupNorm, swish, nearest upsampling or stride 2 on load, bias, residual",
    bound: "FLOPs: 2.5 TFLOP for a 512x512 picture, 3.2 ms at 798 TFLOP/s",
    variants: &[
        Variant {
            name: "plain",
            kernels: crate::kernels!("conv2d", f32: "conv2d_plain_f32", bf16: "conv2d_plain_bf16"),
            summary: "implicit GEMM on CUDA cores, tiles of 8x8 pixels x 64 channels, any shape",
        },
        Variant {
            name: "mma",
            kernels: crate::kernels!("conv2d_mma", bf16: "conv2d_mma_bf16"),
            summary: "implicit GEMM on tensor cores, statistics of the result; c_in a multiple of 8",
        },
    ],
    cases,
};

/// Rows and columns of a block's tile: `plain` (`kTile`), `mma` (`kTileH`, `kTileW`).
const TILE_PLAIN: (usize, usize) = (8, 8);
const TILE_MMA: (usize, usize) = crate::reference::merge_stats::TILE;
/// Output channels of a block of `plain` (`kBlockN`), and the fewer that one of `mma` may have; else twice as many.
const BLOCK_N: usize = 64;
/// Threads of a block of `plain` and of `mma` (`kThreads`).
const THREADS: (u32, u32) = (64, 128);
/// Channels of a 16-byte access (`kChunk`).
const CHUNK: usize = 8;
/// Shared memory that a block may have.
const MAX_SHARED: usize = 227 * 1024;

/// GroupNorm of the input, applied while it is loaded.
#[derive(Clone, Copy, Debug)]
pub struct Norm {
    /// `[images, groups, 2]` float, from `group_stats`.
    pub stats: Span,
    /// `[c_in]` E.
    pub gamma: Span,
    /// `[c_in]` E.
    pub beta: Span,
    /// Groups; a divisor of `c_in`.
    pub groups: usize,
    /// Swish after it.
    pub silu: bool,
}

/// One convolution.
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// `[images, h_in, w_in, c_in]` E.
    pub x: Span,
    /// Absent: `x` is taken as it is.
    pub norm: Option<Norm>,
    /// `[c_out, ksize, ksize, c_in]` E.
    pub w: Span,
    /// `[c_out]` E.
    pub bias: Span,
    /// `[images, height, width, c_out]` E; may be `y`.
    pub residual: Option<Span>,
    /// `[images, height, width, c_out]` E, written.
    pub y: Span,
    /// `[images, partial_tiles(height, width), c_out, 2]` float, written: statistics of `y` for `merge_stats`, where
    /// [`makes_partial`].
    pub partial: Option<Span>,
    /// Sizes.
    pub shape: Shape,
}

/// Tiles whose statistics `mma` writes, for every channel of a picture.
pub fn partial_tiles(height: usize, width: usize) -> usize {
    height.div_ceil(TILE_MMA.0).saturating_mul(width.div_ceil(TILE_MMA.1))
}

/// Whether the variant that `launch` gives such a convolution can write statistics of its result.
pub fn makes_partial(launch: &Launch, shape: &Shape) -> Result<bool> {
    Ok(variant(launch, shape)?.name == "mma")
}

fn variant(launch: &Launch, shape: &Shape) -> Result<&'static Variant> {
    let fits = launch.dtype == DType::Bf16 && unfit(shape).is_none();
    launch.selection.variant(&OP, if fits { "mma" } else { "plain" })
}

/// Why `mma` does not do a shape.
fn unfit(shape: &Shape) -> Option<String> {
    if !shape.c_in.is_multiple_of(CHUNK) {
        return Some(format!("c_in is {}, must be a multiple of {CHUNK}", shape.c_in));
    }
    if shape.ksize == 1 && shape.resample != Resample::Same {
        return Some("1x1 is for a picture of the same size".into());
    }
    let shared = mma_shared(shape, 2 * BLOCK_N);
    (shared > MAX_SHARED).then(|| format!("takes {shared} bytes of shared memory, a block has {MAX_SHARED}"))
}

/// Shared memory of `mma`: two patches, two stages of weights (a column of taps each) and a norm's coefficients; or the
/// finished tile and its statistics, which lie in their place. Output channels as in `mma_block_n`.
fn mma_shared(shape: &Shape, block_n: usize) -> usize {
    /// Bytes of a slice of a pixel, and of a tap for an output channel.
    const SLICE: usize = 64;
    /// Rows of a tile whose statistics are found apart (`kPartRows`).
    const PART_ROWS: usize = 2;
    let patch = match (shape.ksize, shape.resample) {
        (1, _) => TILE_MMA.0 * TILE_MMA.1,
        (_, Resample::Same) => (TILE_MMA.0 + 2) * (TILE_MMA.1 + 2),
        (_, Resample::Up) => (TILE_MMA.0 / 2 + 2) * (TILE_MMA.1 / 2 + 2),
        (_, Resample::Down) => (TILE_MMA.0 * 2 + 1) * (TILE_MMA.1 * 2 + 1),
    };
    let operands = 2 * (patch + shape.ksize * block_n) * SLICE;
    let tile = TILE_MMA.0 * TILE_MMA.1 * (block_n + CHUNK) * 2;
    let statistics = TILE_MMA.0 / PART_ROWS * block_n * 2 * size_of::<f32>();
    operands.saturating_add(shape.c_in.saturating_mul(2 * size_of::<f32>())).max(tile + statistics)
}

/// Output channels of a block of `mma`: with 128, fewer bytes of shared memory per product. With 64 where there are no
/// more, where a halved picture's patch leaves no room, and where blocks of 128 would leave an SM with one or none: two
/// on an SM hide each other's waits.
fn mma_block_n(sm_count: u32, shape: &Shape) -> usize {
    let wide = 2 * BLOCK_N;
    let blocks = partial_tiles(shape.height, shape.width)
        .saturating_mul(shape.c_out.div_ceil(wide))
        .saturating_mul(shape.images);
    let narrow = shape.c_out <= BLOCK_N || shape.resample == Resample::Down || blocks <= sm_count as usize;
    if narrow { BLOCK_N } else { wide }
}

/// Checks and records one launch.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let variant = variant(launch, &args.shape)?;
    let mma = variant.name == "mma";
    let checks = Checks::new(OP.name, variant.name);
    let Shape { images, height, width, c_in, c_out, ksize, resample } = args.shape;
    if ksize != 1 && ksize != 3 {
        return Err(checks.refuse(format!("ksize is {ksize}, must be 1 or 3")));
    }
    if resample == Resample::Down && ksize != 3 {
        return Err(checks.refuse(format!("ksize is {ksize}, a halved picture takes 3")));
    }
    if resample == Resample::Up && (height % 2 != 0 || width % 2 != 0) {
        return Err(checks.refuse(format!("an enlarged picture has even sides, not {height}x{width}")));
    }
    if let Some(reason) = unfit(&args.shape).filter(|_| mma) {
        return Err(checks.refuse(reason));
    }
    let (tile, block_n, threads) = match mma {
        true => (TILE_MMA, mma_block_n(launch.sm_count, &args.shape), THREADS.1),
        false => (TILE_PLAIN, BLOCK_N, THREADS.0),
    };
    let tiles = checks.product("tiles", &[height.div_ceil(tile.0), width.div_ceil(tile.1)])?;
    // The kernel counts the input's pixels in 32 bits, and a halved picture's input is four times as large.
    checks.product("pixels", &[height, width, 4])?;
    for (axis, blocks) in [("images", images), ("blocks of output channels", c_out.div_ceil(block_n))] {
        if blocks > 65_535 {
            return Err(checks.refuse(format!("{axis}: {blocks}, must be at most 65535")));
        }
    }
    let (in_height, in_width) = args.shape.input_size();
    let element = launch.dtype.bytes();
    let x = checks.span("x", args.x, element, &[images, in_height, in_width, c_in])?;
    let w = checks.span("w", args.w, element, &[c_out, ksize, ksize, c_in])?;
    let bias = checks.span("bias", args.bias, element, &[c_out])?;
    let out_shape = [images, height, width, c_out];
    let residual = checks.optional("residual", args.residual, element, &out_shape)?;
    let y = checks.span("y", args.y, element, &out_shape)?;
    if x.overlaps(&y) {
        return Err(Error::Internal(format!(
            "op conv2d {label}: y overlaps x, whose neighbours are still needed"
        )));
    }
    if residual.is_some_and(|r| r.overlaps(&y) && r != y) {
        return Err(Error::Internal(format!(
            "op conv2d {label}: y and residual overlap without being the same"
        )));
    }

    let partial = checks.optional("partial", args.partial, 4, &[images, tiles, c_out, 2])?;
    if partial.is_some() && !mma {
        return Err(checks.refuse("writes no statistics of its result"));
    }
    let vectors = [Some(x), Some(w), residual, Some(y)];
    let vectors = if c_out % CHUNK == 0 { &vectors[..] } else { &vectors[..2] };
    if let Some(span) = vectors.iter().flatten().find(|s| mma && !s.ptr.0.is_multiple_of(16)) {
        return Err(Error::Internal(format!("op conv2d {label}: {:#x} is not 16-byte aligned", span.ptr.0)));
    }

    let mut reads = vec![x, w, bias];
    reads.extend(residual);
    let mut params = Conv2dParams {
        x: x.ptr.0,
        w: w.ptr.0,
        bias: bias.ptr.0,
        residual: address(residual),
        y: y.ptr.0,
        partial: address(partial),
        images: checks.dim("images", images)?,
        height: checks.dim("height", height)?,
        width: checks.dim("width", width)?,
        c_in: checks.dim("c_in", c_in)?,
        c_out: checks.dim("c_out", c_out)?,
        ksize: ksize as u32,
        upsample: u32::from(resample == Resample::Up),
        stride: if resample == Resample::Down { 2 } else { 1 },
        ..Default::default()
    };
    if let Some(norm) = &args.norm {
        if norm.groups == 0 || c_in % norm.groups != 0 {
            return Err(checks.refuse(format!("{c_in} channels do not divide into {} groups", norm.groups)));
        }
        let stats = checks.span("stats", norm.stats, 4, &[images, norm.groups, 2])?;
        let gamma = checks.span("gamma", norm.gamma, element, &[c_in])?;
        let beta = checks.span("beta", norm.beta, element, &[c_in])?;
        reads.extend([stats, gamma, beta]);
        params.stats = stats.ptr.0;
        params.gamma = gamma.ptr.0;
        params.beta = beta.ptr.0;
        params.groups = checks.dim("groups", norm.groups)?;
        params.silu = u32::from(norm.silu);
    }
    let mut geometry = Geometry::linear(tiles as u32, threads);
    geometry.grid = [tiles as u32, div_ceil(c_out, block_n), params.images];
    if mma {
        geometry = geometry.with_shared(mma_shared(&args.shape, block_n) as u32);
    }
    geometry.dependent = launch.dependent;
    Ok(Node {
        label: label.into(),
        kernel: variant.kernel(OP.name, launch.dtype)?,
        geometry,
        params: ParamBytes::of(&params),
        reads,
        writes: [y].into_iter().chain(partial).collect(),
    })
}

/// Floating-point operations of one convolution.
pub fn flops(shape: &Shape) -> u64 {
    let Shape { images, height, width, c_in, c_out, ksize, .. } = *shape;
    2 * (images * height * width * c_out * ksize * ksize * c_in) as u64
}

/// What a test case adds to its shape.
#[derive(Clone, Copy, Debug)]
struct Form {
    /// Groups and swish; no normalisation without.
    norm: Option<(usize, bool)>,
    residual: Residual,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Residual {
    None,
    Apart,
    /// The residual's buffer is the output's.
    InPlace,
}

fn cases() -> Vec<Case> {
    let shape = |images, height, width, c_in, c_out, ksize, resample| Shape {
        images,
        height,
        width,
        c_in,
        c_out,
        ksize,
        resample,
    };
    let bare = Form { norm: None, residual: Residual::None };
    let norm = |groups, silu, residual| Form { norm: Some((groups, silu)), residual };
    use Resample::{Down, Same, Up};
    use Residual::{Apart, InPlace, None as No};
    let small = [
        (shape(1, 1, 1, 3, 32, 3, Same), bare),
        (shape(3, 3, 5, 3, 32, 3, Same), bare),
        (shape(1, 7, 9, 16, 64, 3, Same), bare),
        (shape(1, 7, 9, 32, 3, 3, Same), norm(32, true, No)),
        (shape(3, 3, 5, 32, 32, 3, Same), norm(32, true, InPlace)),
        (shape(1, 7, 9, 33, 17, 3, Same), norm(11, true, Apart)),
        (shape(1, 7, 9, 33, 17, 1, Same), norm(3, false, No)),
        (shape(1, 3, 5, 33, 65, 1, Same), bare),
        (shape(1, 9, 17, 5, 7, 3, Same), norm(5, false, InPlace)),
        (shape(1, 2, 2, 32, 32, 3, Up), bare),
        (shape(3, 6, 10, 16, 24, 3, Up), bare),
        (shape(1, 14, 18, 8, 8, 3, Up), norm(4, true, No)),
        (shape(1, 6, 10, 20, 9, 1, Up), bare),
        (shape(1, 1, 1, 3, 5, 3, Down), bare),
        (shape(3, 3, 5, 16, 24, 3, Down), bare),
        (shape(1, 9, 17, 5, 7, 3, Down), norm(5, true, No)),
        (shape(1, 7, 9, 33, 65, 3, Down), norm(11, false, InPlace)),
        // For mma: tails of slices, channels and tiles; slices enough to use every stage twice.
        (shape(1, 9, 17, 8, 8, 3, Same), norm(4, true, Apart)),
        (shape(2, 1, 19, 40, 72, 1, Same), norm(5, true, InPlace)),
        (shape(1, 3, 2, 104, 20, 1, Same), norm(13, false, Apart)),
        (shape(1, 2, 18, 24, 16, 3, Up), norm(3, true, No)),
        (shape(1, 5, 3, 72, 13, 3, Down), norm(9, true, No)),
        // For its blocks of 128 output channels: more tiles than SMs.
        (shape(8, 1, 2, 40, 72, 3, Same), norm(5, true, InPlace)),
        (shape(8, 2, 2, 24, 72, 3, Up), norm(3, true, Apart)),
        (shape(8, 2, 3, 72, 72, 1, Same), norm(9, false, No)),
    ];
    let medium = [
        (shape(2, 16, 24, 64, 64, 3, Same), norm(32, true, InPlace)),
        (shape(1, 16, 16, 128, 256, 1, Same), norm(32, false, No)),
        (shape(1, 8, 8, 256, 130, 3, Same), norm(32, true, Apart)),
        (shape(1, 32, 32, 64, 96, 3, Up), bare),
        (shape(2, 16, 24, 64, 64, 3, Down), bare),
        (shape(1, 10, 20, 96, 136, 3, Same), norm(32, true, InPlace)),
        (shape(1, 20, 12, 48, 200, 3, Up), bare),
        (shape(2, 9, 17, 48, 130, 3, Down), norm(12, false, No)),
        (shape(1, 20, 24, 72, 200, 1, Same), norm(9, true, Apart)),
        (shape(1, 18, 34, 40, 136, 3, Up), norm(5, true, No)),
    ];
    let real = [
        (shape(1, 32, 32, 512, 512, 3, Same), norm(32, true, InPlace)),
        (shape(1, 8, 8, 512, 512, 3, Same), norm(32, true, InPlace)),
        (shape(1, 64, 64, 256, 256, 3, Up), bare),
        (shape(1, 32, 32, 256, 256, 3, Down), bare),
        (shape(1, 64, 64, 256, 128, 1, Same), bare),
        (shape(1, 64, 64, 128, 3, 3, Same), norm(32, true, No)),
    ];
    let mut cases = Vec::new();
    let all = small.iter().chain(&medium).map(|c| (c, false)).chain(real.iter().map(|c| (c, true)));
    for (&(shape, form), real) in all {
        for &dtype in DType::ALL {
            // The plain kernel needs a minute for the largest.
            if flops(&shape) < 4_000_000_000 {
                cases.push(build("plain", shape, form, dtype, real));
            }
        }
        if unfit(&shape).is_none() {
            cases.push(build("mma", shape, form, DType::Bf16, real));
        }
    }
    cases
}

fn build(variant: &'static str, shape: Shape, form: Form, dtype: DType, real: bool) -> Case {
    let Shape { images, height, width, c_in, c_out, ksize, resample } = shape;
    let label = format!(
        "images={images},height={height},width={width},c_in={c_in},c_out={c_out},ksize={ksize},resample={resample:?},norm={},\
         residual={:?}",
        match form.norm {
            None => "none".into(),
            Some((groups, silu)) => format!("{groups}{}", if silu { "+silu" } else { "" }),
        },
        form.residual
    );
    let (in_height, in_width) = shape.input_size();
    let pixels = images * height * width;
    let residual_values = if form.residual == Residual::None { 0 } else { pixels * c_out };
    let values = images * in_height * in_width * c_in
        + c_out * (ksize * ksize * c_in + 1)
        + pixels * c_out
        + residual_values;
    let bytes = (values * dtype.bytes()) as u64;
    let scale = if real { Scale::Real } else { scale_for(flops(&shape)) };
    case(&OP, variant, dtype, scale, (bytes, flops(&shape)), label, move |rig, launch| {
        run(rig, launch, &shape, &form)
    })
}

fn run(rig: &mut Rig, launch: &Launch, shape: &Shape, form: &Form) -> Result<Vec<Check>> {
    let dtype = launch.dtype;
    let Shape { images, height, width, c_in, c_out, ksize, .. } = *shape;
    let (in_height, in_width) = shape.input_size();
    let taps = ksize * ksize;
    let x = rig.random("x", dtype, images * in_height * in_width * c_in, 1.5)?;
    let w = rig.random("w", dtype, c_out * taps * c_in, 1.0 / ((taps * c_in) as f32).sqrt())?;
    let bias = rig.random("bias", dtype, c_out, 0.5)?;
    let y = rig.output("y", dtype, images * height * width * c_out)?;
    let residual = match form.residual {
        Residual::None => None,
        _ => Some(rig.random("residual", dtype, images * height * width * c_out, 1.0)?),
    };
    let y = match (&residual, form.residual) {
        (Some(residual), Residual::InPlace) => residual.span,
        _ => y,
    };
    let norm = match form.norm {
        None => None,
        Some((groups, silu)) => {
            // Any statistics will do: means around 0, deviations around 1.5.
            let stats = rig.normal(images * groups * 2, 0.3);
            let stats = stats.iter().enumerate().map(|(i, v)| if i % 2 == 0 { *v } else { 0.7 + v.abs() });
            let stats = rig.input("stats", DType::F32, stats.collect())?;
            let gamma = rig.random("gamma", dtype, c_in, 1.0)?;
            let beta = rig.random("beta", dtype, c_in, 0.5)?;
            Some((stats, gamma, beta, groups, silu))
        }
    };
    let partial = match makes_partial(launch, shape)? {
        false => None,
        true => Some(rig.output("partial", DType::F32, images * partial_tiles(height, width) * c_out * 2)?),
    };
    let args = Args {
        x: x.span,
        norm: norm.as_ref().map(|(stats, gamma, beta, groups, silu)| Norm {
            stats: stats.span,
            gamma: gamma.span,
            beta: beta.span,
            groups: *groups,
            silu: *silu,
        }),
        w: w.span,
        bias: bias.span,
        residual: residual.as_ref().map(|r| r.span),
        y,
        partial,
        shape: *shape,
    };
    rig.run(&node(launch, "conv2d", &args)?)?;
    let got = rig.read(y, dtype)?;
    let mut checks = Vec::new();
    if let Some(partial) = partial {
        let partial = rig.read(partial, DType::F32)?;
        checks.extend(check_partial(shape, &got, &partial));
    }

    /// Statistics, gamma, beta, groups, whether swish follows.
    type HostNorm<'a> = (&'a [f32], &'a [f32], &'a [f32], usize, bool);

    fn reference<P: Precision>(
        shape: &Shape,
        x: &[f32],
        norm: Option<HostNorm<'_>>,
        w: &[f32],
        bias: &[f32],
        residual: Option<&[f32]>,
    ) -> Vec<f64> {
        let loaded = norm.map(|(s, g, b, ..)| (P::load_all(s), P::load_all(g), P::load_all(b)));
        let norm = norm.zip(loaded.as_ref()).map(|((.., groups, silu), (stats, gamma, beta))| {
            reference::Norm { stats, gamma, beta, groups, silu }
        });
        let residual = residual.map(P::load_all);
        let (x, w, bias) = (P::load_all(x), P::load_all(w), P::load_all(bias));
        P::widen_all(&reference::conv2d::<P>(shape, &x, norm.as_ref(), &w, &bias, residual.as_deref()))
    }
    let norm = norm.as_ref().map(|(s, g, b, groups, silu)| {
        (s.values.as_slice(), g.values.as_slice(), b.values.as_slice(), *groups, *silu)
    });
    let residual = residual.as_ref().map(|r| r.values.as_slice());
    let inputs = (shape, x.values.as_slice(), norm, w.values.as_slice(), bias.values.as_slice(), residual);
    let exact = reference::<Exact>(inputs.0, inputs.1, inputs.2, inputs.3, inputs.4, inputs.5);
    let plain = match dtype {
        DType::F32 => reference::<PlainF32>,
        DType::Bf16 => reference::<PlainBf16>,
    };
    let plain = plain(inputs.0, inputs.1, inputs.2, inputs.3, inputs.4, inputs.5);
    checks.push(harness::compare("y", dtype, &got, &exact, &plain));
    Ok(checks)
}

/// The statistics of every tile and channel against those of the values `y` that were stored.
fn check_partial(shape: &Shape, y: &[f32], partial: &[f32]) -> Vec<Check> {
    fn tile_stats<P: Precision>(shape: &Shape, y: &[f32]) -> [Vec<f64>; 2] {
        let (mut means, mut squares) = (Vec::new(), Vec::new());
        let Shape { images, height, width, c_out, .. } = *shape;
        for image in 0..images {
            for (y0, x0) in (0..height)
                .step_by(TILE_MMA.0)
                .flat_map(|y0| (0..width).step_by(TILE_MMA.1).map(move |x0| (y0, x0)))
            {
                for c in 0..c_out {
                    let at = |row: usize, col: usize| ((image * height + row) * width + col) * c_out + c;
                    let values: Vec<P::T> = (y0..height.min(y0 + TILE_MMA.0))
                        .flat_map(|row| (x0..width.min(x0 + TILE_MMA.1)).map(move |col| (row, col)))
                        .map(|(row, col)| P::load(y[at(row, col)]))
                        .collect();
                    let count = P::constant(values.len() as f64);
                    let mean = values.iter().copied().sum::<P::T>() / count;
                    means.push(P::widen(mean));
                    squares.push(P::widen(values.iter().map(|&v| (v - mean) * (v - mean)).sum()));
                }
            }
        }
        [means, squares]
    }
    let (exact, plain) = (tile_stats::<Exact>(shape, y), tile_stats::<PlainF32>(shape, y));
    ["mean of a tile", "deviations of a tile"]
        .into_iter()
        .enumerate()
        .map(|(i, name)| {
            let got: Vec<f32> = partial.iter().copied().skip(i).step_by(2).collect();
            harness::compare(name, DType::F32, &got, &exact[i], &plain[i])
        })
        .collect()
}
