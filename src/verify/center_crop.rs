//! Cases of kind `center_crop`: the August code's preparation of input pictures, which Pillow does.

use super::{Comparer, Context, Outcome, Tolerance};
use crate::error::Result;
use crate::image::{ResizeMode, RgbImage, prepare};

/// Runs one case: pictures `c0`, `c1` and so on, each with its input, target side and output.
pub(super) fn run(context: &Context<'_>) -> Result<Outcome> {
    let case = context.case;
    let mut comparer = Comparer::new(case);
    let mut required = Vec::new();
    let count = case.names()?.iter().filter(|name| name.ends_with(".in_u8")).count();
    for index in 0..count.max(1) {
        let input = case.tensor(&format!("c{index}.in_u8"))?;
        let (_, size) = case.integers(&format!("c{index}.size"))?;
        let ([height, width, 3], [side]) = (&input.shape[..], &size[..]) else {
            return Err(case.invalid(format!("c{index}: input {:?}, size {size:?}", input.shape)));
        };
        let side = u32::try_from(*side).map_err(|_| case.invalid(format!("c{index}.size: {side}")))?;
        let pixels = input.values.iter().map(|&value| value as u8).collect();
        let image = RgbImage::new(*width as u32, *height as u32, pixels)?;
        let image = prepare(&image, ResizeMode::Crop { width: side, height: side })?;
        let got: Vec<f32> = image.data().iter().map(|&value| f32::from(value)).collect();
        let name = format!("c{index}.out_u8");
        comparer.tensor(&name, &got, "host", Tolerance::Exact)?;
        required.push(name);
    }
    Ok(Outcome::Ran(comparer.finish(&required)))
}
