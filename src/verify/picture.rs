//! Cases of kind `picture`: prompt and draws in, pixels out, nothing recorded in between.
//!
//! They are small, so there can be many of them: what they tell is that errors which every stage is allowed do not
//! add up to another picture.

use super::free_run::drive;
use super::{Comparer, Context, Models, Outcome, Tolerance};
use crate::error::Result;
use crate::ops::DType;

/// Share of the values that may be more than one level off.
const OFF_SHARE: f64 = 0.005;

/// Runs one case.
pub(super) fn run(context: &Context<'_>, models: &mut Models) -> Result<Outcome> {
    let case = context.case;
    if context.dtype() != DType::F32 {
        return Ok(Outcome::Skipped("pictures are compared value by value in f32 only".into()));
    }
    let ran = drive(context, models, DType::F32)?;
    let mut comparer = Comparer::new(case);
    // Two libraries' powers of one base: an error in the last place of values up to one.
    comparer.tensor("rope_inv_freq", &ran.frequencies, "host", Tolerance::Max(1e-7))?;
    let got: Vec<f32> = ran.rgb.iter().map(|&v| f32::from(v)).collect();
    comparer.tensor("image_u8", &got, ran.kernel, Tolerance::OffShare(OFF_SHARE))?;
    Ok(Outcome::Ran(comparer.finish(&["rope_inv_freq".into(), "image_u8".into()])))
}
