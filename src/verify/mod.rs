//! Runs recorded cases of the official code, and of our own on the demo model, against the engine, stage by stage.
//!
//! Every stage is given its recorded input and draws (teacher forcing) in the case's own dtype and conditions;
//! every recorded output that the stage produces is compared. A committed list per kind names the tensors that
//! must be compared: one that is missing is a failure, so that nothing passes by not being looked at. Cases of kind
//! `picture` are the exception: they run freely, and what they compare is the picture, and the tokens and the picture
//! before rounding where these are recorded.

mod case;
mod center_crop;
mod continuation;
mod flow;
mod free_run;
mod models;
mod picture;
mod pipeline;
mod sources;
mod text;
mod vae;

pub use case::{CaseFile, Recorded};
pub use free_run::{Tensors, free_run};
pub use models::Models;

use crate::device::Device;
use crate::error::Result;
use crate::ops::{DType, Selection};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Files of a case folder that describe cases rather than hold one.
const NOT_CASES: [&str; 2] = ["index.json", "bf16_twin.json"];

/// What to run and on what.
#[derive(Clone, Debug, Default)]
pub struct VerifyOptions {
    /// Where the model folders that cases name are looked for; default: the parent of the case's folder.
    pub model_root: Option<PathBuf>,
    /// Overrides the dtype recorded with each case.
    pub precision: Option<DType>,
    /// Variants chosen by name.
    pub selection: Selection,
    /// Folder that gets what cases of kind `picture` draw: CASE.png, or CASE-0.png and so on.
    pub pictures: Option<PathBuf>,
}

/// One compared tensor.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Line {
    /// Name of the case.
    pub case: String,
    /// Name of the recorded tensor.
    pub tensor: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Kernels that produced it, or `host`.
    pub variants: String,
    /// Largest absolute error.
    pub max_error: f64,
    /// Mean absolute error.
    pub mean_error: f64,
    /// Largest error allowed.
    pub allowed_max: f64,
    /// Mean error allowed, where the fixtures give one.
    pub allowed_mean: Option<f64>,
    /// Share of the values that are more than one level off, of pictures that were run freely.
    pub off_share: Option<f64>,
    /// Largest such share allowed.
    pub allowed_share: Option<f64>,
    /// Whether it is within all of these.
    pub ok: bool,
}

/// The outcome of one case.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// Every compared tensor.
    Ran(Vec<Line>),
    /// Nothing was compared, and why.
    Skipped(String),
}

/// Runs one case file.
pub fn run_case(
    path: &Path,
    device: &Arc<dyn Device>,
    options: &VerifyOptions,
    models: &mut Models,
) -> Result<Option<Outcome>> {
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    if NOT_CASES.contains(&name) {
        return Ok(None);
    }
    let root = match &options.model_root {
        Some(root) => root.clone(),
        None => path.parent().and_then(Path::parent).map(Path::to_path_buf).unwrap_or_default(),
    };
    match name {
        "prompts.json" => return text::prompts(path, &root).map(|l| Some(Outcome::Ran(l))),
        "tokenizer.json" => return text::tokenizers(path, &root).map(|l| Some(Outcome::Ran(l))),
        _ => {}
    }
    let case = CaseFile::open(path)?;
    let context = Context { device, root: &root, options, case: &case };
    let outcome = match case.kind.as_str() {
        "pipeline" => pipeline::run(&context, models)?,
        "fmnet" => Outcome::Ran(flow::network(&context, models)?),
        "samplers" => Outcome::Ran(flow::samplers(&context, models)?),
        "vae" => vae::run(&context)?,
        "picture" => picture::run(&context, models)?,
        "text" => continuation::run(&context, models)?,
        "center_crop" => center_crop::run(&context)?,
        other => Outcome::Skipped(format!("unknown kind {other:?}")),
    };
    Ok(Some(outcome))
}

/// What the functions of this module need of their caller.
struct Context<'a> {
    device: &'a Arc<dyn Device>,
    root: &'a Path,
    options: &'a VerifyOptions,
    case: &'a CaseFile,
}

impl Context<'_> {
    /// The dtype to run in.
    fn dtype(&self) -> DType {
        self.options.precision.unwrap_or(self.case.dtype)
    }
}

/// How large an error may be. Figures: the fixtures' README, section "Tolerances".
#[derive(Clone, Copy, Debug)]
enum Tolerance {
    /// Every value equal.
    Exact,
    /// Absolute.
    Max(f64),
    /// Absolute, or this fraction of the largest recorded value: residual streams of a trained model.
    Scaled { max: f64, of_largest: f64 },
    /// At most one level of 255 on fewer than 0.5 % of the values.
    Pixels,
    /// At most this share of the values more than one level of 255 off: whole pictures, whose tokens each depend on
    /// the ones before, so that a rounding may grow where an outline passes.
    OffShare(f64),
    /// Mean and maximum, for bf16.
    MeanMax { mean: f64, max: f64 },
    /// Mean and maximum as above for values of size about 1. Above that in proportion to the mean size, and the
    /// maximum at least 5 % of the largest value, as the README accepts it of the trained model's stream.
    Stream { mean: f64, max: f64 },
}

/// Collects the lines of a case.
struct Comparer<'a> {
    case: &'a CaseFile,
    lines: Vec<Line>,
}

impl<'a> Comparer<'a> {
    fn new(case: &'a CaseFile) -> Comparer<'a> {
        Comparer { case, lines: Vec::new() }
    }

    /// Compares `got` with the recorded tensor of that name.
    fn tensor(&mut self, name: &str, got: &[f32], variants: &str, tolerance: Tolerance) -> Result<()> {
        let recorded = self.case.tensor(name)?;
        self.values(name, recorded.shape.clone(), got, &recorded.values, variants, tolerance);
        Ok(())
    }

    /// Compares `got` with given values under a name.
    fn values(
        &mut self,
        name: &str,
        shape: Vec<usize>,
        got: &[f32],
        expected: &[f32],
        variants: &str,
        tolerance: Tolerance,
    ) {
        let mut max_error = 0.0f64;
        let mut sum = 0.0;
        let (mut largest, mut size) = (0.0f64, 0.0);
        let mut off = 0usize;
        for (&g, &e) in got.iter().zip(expected) {
            let (g, e) = (f64::from(g), f64::from(e));
            // NaN on either side counts as infinitely wrong.
            let error = if g.is_finite() && e.is_finite() { (g - e).abs() } else { f64::INFINITY };
            max_error = max_error.max(error);
            sum += error;
            off += usize::from(error > 1.0);
            largest = largest.max(e.abs());
            size += e.abs();
        }
        let count = expected.len().max(1) as f64;
        let (mean_error, size) = (sum / count, size / count);
        let (allowed_max, allowed_mean) = match tolerance {
            Tolerance::Exact => (0.0, None),
            Tolerance::Max(max) => (max, None),
            // Levels are whole: a mean below 0.005 with a maximum of one is fewer than 0.5 % of the values.
            Tolerance::Pixels => (1.0, Some(0.005)),
            Tolerance::OffShare(_) => (255.0, None),
            Tolerance::Scaled { max, of_largest } => (max.max(of_largest * largest), None),
            Tolerance::Stream { mean, max } if size > 1.0 => {
                ((max * size).max(0.05 * largest), Some(mean * size))
            }
            Tolerance::MeanMax { mean, max } | Tolerance::Stream { mean, max } => (max, Some(mean)),
        };
        let (off_share, allowed_share) = match tolerance {
            Tolerance::OffShare(share) => (Some(off as f64 / count), Some(share)),
            _ => (None, None),
        };
        let ok = got.len() == expected.len()
            && !expected.is_empty()
            && max_error <= allowed_max
            && allowed_mean.is_none_or(|m| mean_error <= m)
            && allowed_share.is_none_or(|share| off_share.is_some_and(|off| off <= share));
        self.lines.push(Line {
            case: self.case.name.clone(),
            tensor: name.into(),
            shape,
            variants: variants.into(),
            max_error,
            mean_error,
            allowed_max,
            allowed_mean,
            off_share,
            allowed_share,
            ok,
        });
    }

    /// Finishes: adds a failure for every required tensor that was not compared.
    fn finish(mut self, required: &[String]) -> Vec<Line> {
        for name in required {
            if !self.lines.iter().any(|l| &l.tensor == name) {
                self.lines.push(Line {
                    case: self.case.name.clone(),
                    tensor: name.clone(),
                    shape: Vec::new(),
                    variants: "not compared".into(),
                    max_error: f64::INFINITY,
                    mean_error: f64::INFINITY,
                    allowed_max: 0.0,
                    allowed_mean: None,
                    off_share: None,
                    allowed_share: None,
                    ok: false,
                });
            }
        }
        self.lines
    }
}
