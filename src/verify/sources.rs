//! Input pictures of `pipeline` cases: pixels to the latents that prefill embeds.

use super::pipeline::{Stages, read};
use super::vae::{channels_last, tolerance};
use super::{CaseFile, Recorded, Tolerance};
use crate::device::{Buffer, Copies};
use crate::error::Result;
use crate::image::RgbImage;
use crate::model::nextstep::NextStep;
use crate::model::run::Run;
use crate::model::sources::Sources;
use crate::model::vae::VaeEncoder;
use crate::ops::embed;
use crate::ops::encode_latent::Taps;
use crate::ops::harness::encode;

/// The pictures of a case, with their recorded draws where the VAE uses them. Every row with placeholders shows all of
/// them.
pub(super) fn read_sources(
    case: &CaseFile,
    model: &NextStep,
    prompts: &[Vec<u32>],
    images: usize,
) -> Result<Sources> {
    if !case.has("input_image_u8") {
        return Ok(Sources {
            rows: vec![embed::TEXT; prompts.iter().map(Vec::len).sum()],
            ..Sources::default()
        });
    }
    let recorded = case.tensor("input_image_u8")?;
    let [count, height, width, _] = recorded.shape[..] else {
        return Err(case.invalid(format!("input_image_u8 has shape {:?}", recorded.shape)));
    };
    let picture = |index: usize| {
        let levels = recorded.at(index).iter().map(|&v| v as u8).collect();
        RgbImage::new(width as u32, height as u32, levels)
    };
    let pictures = (0..count).map(picture).collect::<Result<Vec<_>>>()?;
    let placeholder = model.config.image_placeholder_id;
    let shown: Vec<Vec<usize>> = prompts
        .iter()
        .step_by(images.max(1))
        .map(|prompt| if prompt.contains(&placeholder) { (0..count).collect() } else { Vec::new() })
        .collect();
    let draws = match model.encoder.as_ref().is_some_and(VaeEncoder::draws) {
        true => case.tensor("draw.vae")?.values,
        false => Vec::new(),
    };
    Sources::new(model, pictures, &shown, prompts, images, &draws)
}

/// Tokens `[T, C * patch^2]` of a recorded latent `[C, h, w]`.
fn patchify(latent: &[f32], [channels, height, width]: [usize; 3], patch: usize) -> Vec<f32> {
    let mut tokens = Vec::with_capacity(latent.len());
    for token in 0..height / patch * (width / patch) {
        let (y0, x0) = (token / (width / patch) * patch, token % (width / patch) * patch);
        for c in 0..channels {
            for i in 0..patch * patch {
                tokens.push(latent[(c * height + y0 + i / patch) * width + x0 + i % patch]);
            }
        }
    }
    tokens
}

impl Stages<'_, '_> {
    /// Every picture from its pixels to moments, the recorded moments to latents; leaves the recorded latents as what
    /// prefill embeds.
    pub(super) fn sources(&mut self, run: &mut Run) -> Result<()> {
        let sources = run.spec().sources.clone();
        if sources.places.is_empty() {
            return Ok(());
        }
        let (case, dtype) = (self.case, self.dtype);
        let recorded = case.tensor("vae.moments")?;
        let latents = case.tensor("image_latents")?;
        let ([count, channels, height, width], patch) = (shape4(case, &latents)?, run.latent_patch_size());
        if count != sources.places.len() || recorded.shape[0] != count {
            return Err(case.invalid(format!("{count} latents for {} places", sources.places.len())));
        }
        let values = channels * height * width;
        let tap = |name: &str| -> Result<Vec<Buffer>> {
            (0..count).map(|_| self.device.alloc(values * dtype.bytes(), name)).collect()
        };
        let (means, stds) = (tap("vae.mean")?, tap("vae.std")?);
        let (mut pixels, mut moments) = (vec![Vec::new(); count], vec![Vec::new(); count]);
        let mut kernels = ["", ""];
        for (picture, image) in sources.pictures.iter().enumerate() {
            let (list, encoded) = run.record_source(picture, |place| Taps {
                mean: Some(means[place].span()),
                std: Some(stds[place].span()),
                sample: None,
            })?;
            let (bytes, levels) = encode(dtype, VaeEncoder::pixel_values(image));
            run.stream().put(encoded.pixels, &bytes)?;
            let shows: Vec<usize> = (0..count).filter(|&p| sources.places[p].picture == picture).collect();
            let Some(&first) = shows.first() else { continue };
            let given = channels_last(&[1, 2 * channels, height, width], recorded.at(first));
            kernels = [list.writer(encoded.moments), list.writer(means[first].span())];
            let last = list.nodes().iter().rposition(|node| node.writes.contains(&encoded.moments));
            let mut got = Vec::new();
            let mut index = 0;
            run.run_once(&list, |_, stream| {
                if Some(index) == last {
                    got = read(stream, encoded.moments, dtype)?;
                    stream.put(encoded.moments, &encode(dtype, given.clone()).0)?;
                }
                index += 1;
                Ok(())
            })?;
            for place in shows {
                pixels[place] = levels.clone();
                moments[place] = got.clone();
            }
        }
        self.compare_source("pixel_values", &pixels.concat(), "host", Tolerance::Exact)?;
        self.compare_source("vae.moments", &moments.concat(), kernels[0], tolerance(dtype))?;
        for (name, buffers) in [("vae.mean", &means), ("vae.std", &stds)] {
            let mut got = Vec::new();
            for buffer in buffers {
                got.extend(read(run.stream(), buffer.span(), dtype)?);
            }
            self.compare_source(name, &got, kernels[1], tolerance(dtype))?;
        }
        let span = run.source_tokens()?;
        let got = read(run.stream(), span, dtype)?;
        let size = [channels, height, width];
        let expected: Vec<f32> = (0..count).flat_map(|p| patchify(latents.at(p), size, patch)).collect();
        let shape = latents.shape.clone();
        self.comparer.values("image_latents", shape, &got, &expected, kernels[1], tolerance(dtype));
        run.stream().put(span, &encode(dtype, expected).0)
    }

    /// Compares channels-last values with a recorded `[B, C, H, W]` tensor.
    fn compare_source(&mut self, name: &str, got: &[f32], kernel: &str, tolerance: Tolerance) -> Result<()> {
        let recorded = self.case.tensor(name)?;
        let expected = channels_last(&recorded.shape, &recorded.values);
        self.comparer.values(name, recorded.shape, got, &expected, kernel, tolerance);
        Ok(())
    }
}

fn shape4(case: &CaseFile, recorded: &Recorded) -> Result<[usize; 4]> {
    let shape = recorded.shape[..].try_into();
    shape.map_err(|_| case.invalid(format!("a latent has shape {:?}", recorded.shape)))
}
