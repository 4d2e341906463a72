//! `merge_stats`: GroupNorm's statistics from what `conv2d`'s variant `mma` left of every tile of its result.

use super::conv2d;
use super::harness::{self, Case, Check, Rig, Scale};
use super::params::MergeStatsParams;
use super::shared::{Checks, case, scale_for};
use super::{DType, Launch, Op, Variant};
use crate::device::{Geometry, Node, ParamBytes, Span};
use crate::error::Result;
use crate::reference::merge_stats::{merge_stats as reference, tile_pixels};
use crate::reference::{Exact, PlainF32};

/// The row of the registry.
pub static OP: Op = Op {
    name: "merge_stats",
    summary: "mean and 1/std of each group (GroupNorm), from those of every tile and channel",
    bound: "latency: 8 bytes per channel and tile of 8x16 pixels",
    variants: &[Variant {
        name: "plain",
        kernels: crate::kernels!("merge_stats", f32: "merge_stats_plain", bf16: "merge_stats_plain"),
        summary: "one block per group and image, merged in a fixed order, any shape",
    }],
    cases,
};

const THREADS: u32 = 256;

/// One reduction.
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// `[images, tiles, channels, 2]` float: `conv2d::Args::partial`.
    pub partial: Span,
    /// `[images, groups, 2]` float, written.
    pub stats: Span,
    /// Pictures.
    pub images: usize,
    /// Rows of a picture.
    pub height: usize,
    /// Columns of a picture.
    pub width: usize,
    /// Channels.
    pub channels: usize,
    /// Groups; a divisor of `channels`.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f32,
}

/// Checks and records one launch.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let variant = launch.selection.variant(&OP, "plain")?;
    let checks = Checks::new(OP.name, variant.name);
    let Args { images, height, width, channels, groups, eps, .. } = *args;
    if groups == 0 || channels % groups != 0 {
        return Err(checks.refuse(format!("{channels} channels do not divide into {groups} groups")));
    }
    if images > 65_535 {
        return Err(checks.refuse(format!("images: {images}, must be at most 65535")));
    }
    checks.product("pixels", &[height, width])?;
    let tiles = conv2d::partial_tiles(height, width);
    let partial = checks.span("partial", args.partial, 4, &[images, tiles, channels, 2])?;
    let stats = checks.span("stats", args.stats, 4, &[images, groups, 2])?;
    let params = MergeStatsParams {
        partial: partial.ptr.0,
        stats: stats.ptr.0,
        images: checks.dim("images", images)?,
        height: checks.dim("height", height)?,
        width: checks.dim("width", width)?,
        channels: checks.dim("channels", channels)?,
        groups: checks.dim("groups", groups)?,
        eps,
    };
    let mut geometry = Geometry::linear(params.groups, THREADS);
    geometry.grid[1] = params.images;
    geometry.dependent = launch.dependent;
    Ok(Node {
        label: label.into(),
        kernel: variant.kernel(OP.name, launch.dtype)?,
        geometry,
        params: ParamBytes::of(&params),
        reads: vec![partial],
        writes: vec![stats],
    })
}

fn cases() -> Vec<Case> {
    // images, height, width, channels, groups, mean of the data: a large one shows cancellation
    let shapes = [
        (1, 1, 1, 32, 32, 0.0),
        (3, 9, 17, 32, 32, 0.5),
        (2, 8, 16, 33, 11, -2.0),
        (1, 7, 50, 600, 2, 0.0),
        (2, 33, 31, 48, 3, 1000.0),
        (1, 64, 64, 128, 32, 3.0),
    ];
    let real = [(1, 512, 512, 128, 32, 0.5), (1, 64, 64, 512, 32, 0.5)];
    let mut cases = Vec::new();
    for (i, &shape) in shapes.iter().chain(&real).enumerate() {
        let (images, height, width, channels, groups, mean) = shape;
        let values = (images * conv2d::partial_tiles(height, width) * channels * 2) as u64;
        let scale = if i < shapes.len() { scale_for(values * 8) } else { Scale::Real };
        let label = format!(
            "images={images},height={height},width={width},channels={channels},groups={groups},mean={mean}"
        );
        let run = move |rig: &mut Rig, launch: &Launch| run(rig, launch, shape);
        cases.push(case(&OP, "plain", DType::Bf16, scale, (values * 4, values * 4), label, run));
    }
    cases
}

fn run(
    rig: &mut Rig,
    launch: &Launch,
    (images, height, width, channels, groups, mean): (usize, usize, usize, usize, usize, f32),
) -> Result<Vec<Check>> {
    let eps = 1e-6;
    let pixels = tile_pixels(height, width);
    let mut values = rig.normal(images * pixels.len() * channels * 2, 1.0);
    for (i, pair) in values.chunks_exact_mut(2).enumerate() {
        pair[0] = pair[0] * 0.2 + mean;
        // About one per pixel.
        pair[1] = (0.7 + pair[1].abs()) * (pixels[i / channels % pixels.len()] - 1) as f32;
    }
    let partial = rig.input("partial", DType::F32, values)?;
    let stats = rig.output("stats", DType::F32, images * groups * 2)?;
    let args = Args { partial: partial.span, stats, images, height, width, channels, groups, eps };
    rig.run(&node(launch, "merge_stats", &args)?)?;
    let got = rig.read(stats, DType::F32)?;
    let wide: Vec<f64> = partial.values.iter().map(|&v| f64::from(v)).collect();
    let exact = reference::<Exact>(&wide, (height, width), channels, groups, eps);
    let plain = reference::<PlainF32>(&partial.values, (height, width), channels, groups, eps);
    // As in group_stats: a mean is right to the precision of the data that it is subtracted from, here the tiles' means,
    // which its own size does not tell.
    let normalised = |stats: &[f64]| -> Vec<f64> {
        let at = |i: usize| {
            let (image, c) = (i / (pixels.len() * channels), i % channels);
            let stats = &stats[(image * groups + c / (channels / groups)) * 2..][..2];
            (wide[i * 2] - stats[0]) * stats[1]
        };
        (0..wide.len() / 2).map(at).collect()
    };
    let deviations = |stats: &[f64]| -> Vec<f64> { stats.iter().copied().skip(1).step_by(2).collect() };
    let widen = |values: &[f32]| -> Vec<f64> { values.iter().map(|&v| f64::from(v)).collect() };
    let (got, plain) = (widen(&got), widen(&plain));
    let check = |name: &str, of: &dyn Fn(&[f64]) -> Vec<f64>| {
        let got: Vec<f32> = of(&got).into_iter().map(|v| v as f32).collect();
        harness::compare(name, DType::F32, &got, &of(&exact), &of(&plain))
    };
    Ok(vec![check("(mean of a tile - mean) / std", &normalised), check("1/std", &deviations)])
}
