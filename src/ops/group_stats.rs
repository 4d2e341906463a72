//! `group_stats`: mean and inverse deviation of every group of channels, for the GroupNorm that `conv2d` applies.

use super::harness::{self, Case, Check, Rig};
use super::params::GroupStatsParams;
use super::shared::{Checks, case, scale_for};
use super::{DType, Launch, Op, Variant};
use crate::device::{Geometry, Node, ParamBytes, Span};
use crate::error::Result;
use crate::reference::group_stats::group_stats as reference;
use crate::reference::{Exact, PlainF32};

/// The row of the registry.
pub static OP: Op = Op {
    name: "group_stats",
    summary: "mean and 1/std over the pixels and channels of each group (GroupNorm)",
    bound: "bytes: one read of the activation, 67 MB at 512x512x128 in bf16",
    variants: &[Variant {
        name: "plain",
        kernels: crate::kernels!("group_stats", f32: "group_stats_plain_f32", bf16: "group_stats_plain_bf16"),
        summary: "one block per group and image, merged means and squared deviations, any shape",
    }],
    cases,
};

const THREADS: u32 = 256;

/// One reduction.
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// `[images, pixels, channels]` E.
    pub x: Span,
    /// `[images, groups, 2]` float, written.
    pub stats: Span,
    /// Pictures.
    pub images: usize,
    /// Pixels of a picture.
    pub pixels: usize,
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
    let Args { images, pixels, channels, groups, eps, .. } = *args;
    if groups == 0 || channels % groups != 0 {
        return Err(checks.refuse(format!("{channels} channels do not divide into {groups} groups")));
    }
    if images > 65_535 {
        return Err(checks.refuse(format!("images: {images}, must be at most 65535")));
    }
    let x = checks.span("x", args.x, launch.dtype.bytes(), &[images, pixels, channels])?;
    let stats = checks.span("stats", args.stats, 4, &[images, groups, 2])?;
    let params = GroupStatsParams {
        x: x.ptr.0,
        stats: stats.ptr.0,
        images: checks.dim("images", images)?,
        pixels: checks.dim("pixels", pixels)?,
        channels: checks.dim("channels", channels)?,
        groups: checks.dim("groups", groups)?,
        eps,
        pad: 0,
    };
    let mut geometry = Geometry::linear(params.groups, THREADS);
    geometry.grid[1] = params.images;
    geometry.dependent = launch.dependent;
    Ok(Node {
        label: label.into(),
        kernel: variant.kernel(OP.name, launch.dtype)?,
        geometry,
        params: ParamBytes::of(&params),
        reads: vec![x],
        writes: vec![stats],
    })
}

fn cases() -> Vec<Case> {
    // images, pixels, channels, groups, mean of the data: a large one shows cancellation
    let shapes = [
        (1, 1, 32, 32, 0.0),
        (3, 15, 32, 32, 0.5),
        (1, 63, 64, 32, 0.0),
        (2, 63, 33, 11, -2.0),
        (1, 1, 7, 1, 0.0),
        (1, 35, 600, 2, 0.0),
        (2, 97, 48, 3, 100.0),
        (1, 256, 128, 32, 1000.0),
        (1, 4096, 64, 32, 3.0),
        (3, 1000, 96, 32, 0.0),
    ];
    let real = [(1, 65_536, 128, 32, 0.5), (1, 4096, 512, 32, 0.5)];
    let mut cases = Vec::new();
    for (i, &shape) in shapes.iter().chain(&real).enumerate() {
        let (images, pixels, channels, groups, mean) = shape;
        for &dtype in DType::ALL {
            let values = (images * pixels * channels) as u64;
            let scale = if i < shapes.len() { scale_for(values * 8) } else { harness::Scale::Real };
            let label =
                format!("images={images},pixels={pixels},channels={channels},groups={groups},mean={mean}");
            let cost = (values * dtype.bytes() as u64, values * 3);
            cases.push(case(&OP, "plain", dtype, scale, cost, label, move |rig, launch| {
                run(rig, launch, shape)
            }));
        }
    }
    cases
}

fn run(
    rig: &mut Rig,
    launch: &Launch,
    (images, pixels, channels, groups, mean): (usize, usize, usize, usize, f32),
) -> Result<Vec<Check>> {
    let eps = 1e-6;
    let values = rig.normal(images * pixels * channels, 1.0).iter().map(|v| v + mean).collect();
    let x = rig.input("x", launch.dtype, values)?;
    let stats = rig.output("stats", DType::F32, images * groups * 2)?;
    let args = Args { x: x.span, stats, images, pixels, channels, groups, eps };
    rig.run(&node(launch, "group_stats", &args)?)?;
    let got = rig.read(stats, DType::F32)?;
    let wide: Vec<f64> = x.values.iter().map(|&v| f64::from(v)).collect();
    let exact = reference::<Exact>(&wide, images, channels, groups, eps);
    let plain = reference::<PlainF32>(&x.values, images, channels, groups, eps);
    // What the statistics are for: the normalised values. A mean is right to the precision of the data that it is
    // subtracted from, which its own size does not tell.
    let normalised = |stats: &[f64]| -> Vec<f64> {
        let at = |i: usize| {
            let (image, c) = (i / (pixels * channels), i % channels);
            let stats = &stats[(image * groups + c / (channels / groups)) * 2..][..2];
            (wide[i] - stats[0]) * stats[1]
        };
        (0..wide.len()).map(at).collect()
    };
    let widen = |values: &[f32]| -> Vec<f64> { values.iter().map(|&v| f64::from(v)).collect() };
    let (got, plain) = (widen(&got), widen(&plain));
    let narrow = |values: Vec<f64>| -> Vec<f32> { values.into_iter().map(|v| v as f32).collect() };
    let deviations = |stats: &[f64]| -> Vec<f64> { stats.iter().copied().skip(1).step_by(2).collect() };
    let check = |name: &str, of: &dyn Fn(&[f64]) -> Vec<f64>| {
        harness::compare(name, DType::F32, &narrow(of(&got)), &of(&exact), &of(&plain))
    };
    Ok(vec![check("(x - mean) / std", &normalised), check("1/std", &deviations)])
}
