//! Cases of kind `picture`: prompt and draws in, pixels out, nothing recorded in between.
//!
//! They are small, so there can be many of them: what they tell is that errors which every stage is allowed do not
//! add up to another picture. Some also hold the tokens, or the picture before rounding: those are compared within what
//! the recorded run itself moved by when its draws were moved a little.

use super::free_run::drive;
use super::vae::channels_last;
use super::{Comparer, Context, Models, Outcome, Tolerance};
use crate::error::{Error, Result};
use crate::image::{RgbImage, write_png};
use crate::ops::DType;
use std::path::Path;

/// Share of the values that may be more than one level off.
const OFF_SHARE: f64 = 0.005;

/// Runs one case.
pub(super) fn run(context: &Context<'_>, models: &mut Models) -> Result<Outcome> {
    let (case, dtype) = (context.case, context.dtype());
    let folder = context.options.pictures.as_deref();
    let skipped = || Outcome::Skipped("pictures are compared value by value in f32 only".into());
    if dtype != DType::F32 && folder.is_none() {
        return Ok(skipped());
    }
    let ran = drive(context, models, dtype)?;
    if let Some(folder) = folder {
        write(folder, &case.name, &ran.pictures)?;
    }
    if dtype != DType::F32 {
        return Ok(skipped());
    }
    let mut comparer = Comparer::new(case);
    let mut required = vec!["rope_inv_freq".to_owned(), "image_u8".to_owned()];
    // Two libraries' powers of one base: an error in the last place of values up to one.
    comparer.tensor("rope_inv_freq", &ran.frequencies, "host", Tolerance::Max(1e-7))?;
    let [tokens_kernel, kernel] = ran.kernels;
    for (name, kernel) in [("tokens", tokens_kernel), ("image", kernel)] {
        if !case.has(name) {
            continue;
        }
        let amplification = case.meta.get("amplification").and_then(|a| a.get(name)).and_then(|a| a.as_f64());
        let moved =
            amplification.ok_or_else(|| case.invalid(format!("metadata: no amplification of {name}")))?;
        let recorded = case.tensor(name)?;
        let expected = channels_last(&recorded.shape, &recorded.values);
        let got = ran.tensors.get(name).map_or(&[][..], Vec::as_slice);
        // The bound of the fixtures' README for whole runs.
        let tolerance = Tolerance::Max(f64::max(1e-4, 30.0 * moved));
        comparer.values(name, recorded.shape, got, &expected, kernel, tolerance);
        required.push(name.to_owned());
    }
    let got: Vec<f32> = ran.pictures.iter().flat_map(|p| p.data()).map(|&v| f32::from(v)).collect();
    comparer.tensor("image_u8", &got, kernel, Tolerance::OffShare(OFF_SHARE))?;
    Ok(Outcome::Ran(comparer.finish(&required)))
}

fn write(folder: &Path, name: &str, pictures: &[RgbImage]) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
    for (index, picture) in pictures.iter().enumerate() {
        let file = match pictures.len() {
            1 => format!("{name}.png"),
            _ => format!("{name}-{index}.png"),
        };
        write_png(&folder.join(file), picture, None)?;
    }
    Ok(())
}
