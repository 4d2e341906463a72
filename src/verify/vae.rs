//! Cases of kind `vae`, and the last stage of `pipeline` cases: latents to pixels.

use super::models::folder;
use super::pipeline::read;
use super::{Comparer, Context, Outcome, Tolerance};
use crate::device::{NodeList, Stream};
use crate::error::Result;
use crate::model::config::VaeConfig;
use crate::model::upload::Uploader;
use crate::model::vae::{Decoded, VaeDecoder};
use crate::ops::harness::encode;
use crate::ops::{DType, Launch};
use crate::weights::{Checkpoint, OpenOptions, VaeWeights};

/// Shape `[B, C, H, W]` of a recorded tensor to channels last.
fn channels_last(shape: &[usize], values: &[f32]) -> Vec<f32> {
    let [images, channels, height, width] = shape[..] else {
        return values.to_vec();
    };
    let pixels = height * width;
    let mut out = Vec::with_capacity(values.len());
    for image in 0..images {
        for pixel in 0..pixels {
            out.extend((0..channels).map(|c| values[(image * channels + c) * pixels + pixel]));
        }
    }
    out
}

fn tolerance(dtype: DType) -> Tolerance {
    match dtype {
        DType::F32 => Tolerance::Max(5e-5),
        // The fixtures give a mean for the decoder; the maximum is the one given for bf16 values of size one.
        DType::Bf16 => Tolerance::MeanMax { mean: 0.02, max: 0.15 },
    }
}

/// Compares latent, decoder output and pixels with the tensors of these names; an empty name is not compared.
pub(super) fn compare_decoded(
    comparer: &mut Comparer<'_>,
    stream: &mut dyn Stream,
    list: &NodeList,
    decoded: &Decoded,
    dtype: DType,
    [latent, image, pixels]: [&str; 3],
) -> Result<()> {
    let spans = [(latent, decoded.latent), (image, decoded.image)];
    for (name, span) in spans.into_iter().filter(|(name, _)| !name.is_empty()) {
        let recorded = comparer.case.tensor(name)?;
        let expected = channels_last(&recorded.shape, &recorded.values);
        let got = read(stream, span, dtype)?;
        comparer.values(name, recorded.shape, &got, &expected, list.writer(span), tolerance(dtype));
    }
    let mut rgb = vec![0; decoded.rgb.bytes];
    stream.download(decoded.rgb.ptr, &mut rgb)?;
    let got: Vec<f32> = rgb.iter().map(|&v| f32::from(v)).collect();
    let recorded = comparer.case.tensor(pixels)?;
    let tolerance = match dtype {
        DType::F32 => Tolerance::Pixels,
        // Twice the decoder's bounds: a level is 1/255 of half the range of its output.
        DType::Bf16 => Tolerance::MeanMax { mean: 0.02 * 127.5, max: 0.15 * 127.5 },
    };
    comparer.values(pixels, recorded.shape, &got, &recorded.values, list.writer(decoded.rgb), tolerance);
    Ok(())
}

/// Runs the decoder half of a `vae` case.
pub(super) fn run(context: &Context<'_>) -> Result<Outcome> {
    let case = context.case;
    let dtype = context.dtype();
    let dir = folder(context, case.text("vae")?)?;
    let config = VaeConfig::load(&dir)?;
    let weights = VaeWeights::new(Checkpoint::open(&dir, OpenOptions::default())?, &config)?;
    let mut stream = context.device.stream()?;
    let mut up = Uploader::new(context.device.clone(), stream.as_mut(), dtype);
    // The patch size belongs to the tokens, which this case does not have.
    let decoder = VaeDecoder::load(&config, &weights, 1, &mut up)?;
    let (_weights, _) = up.finish();
    let input = case.tensor("decode.in")?;
    let [images, _, height, width] = input.shape[..] else {
        return Err(case.invalid(format!("decode.in has shape {:?}", input.shape)));
    };
    let bytes = decoder.plan(images, (height, width), dtype)?;
    let arena = context.device.alloc(bytes, "vae")?;
    let launch = Launch {
        selection: &context.options.selection,
        dtype,
        sm_count: context.device.info().sm_count,
        dependent: true,
    };
    let mut list = NodeList::new();
    let decoded = decoder.record_latent(&launch, &mut list, images, (height, width), arena.span(), true)?;
    let (latent, _) = encode(dtype, channels_last(&input.shape, &input.values));
    stream.upload(decoded.latent.ptr, &latent)?;
    let mut comparer = Comparer::new(case);
    let mut required = vec!["decode.out".to_string(), "decode.out_u8".to_string()];
    for (index, node) in list.nodes().iter().enumerate() {
        stream.launch(node)?;
        for tap in decoded.taps.iter().filter(|tap| tap.node == index) {
            let name = format!("tap.{}", tap.name);
            if !case.has(&name) {
                continue;
            }
            let recorded = case.tensor(&name)?;
            let expected = channels_last(&recorded.shape, &recorded.values);
            let got = read(stream.as_mut(), tap.span, dtype)?;
            // Activations inside grow above one: the bound scales with them.
            let bound = match dtype {
                DType::F32 => Tolerance::Scaled { max: 5e-5, of_largest: 5e-5 },
                DType::Bf16 => Tolerance::Stream { mean: 0.02, max: 0.15 },
            };
            comparer.values(&name, recorded.shape, &got, &expected, node.kernel.symbol, bound);
        }
    }
    stream.synchronize()?;
    let names = ["", "decode.out", "decode.out_u8"];
    compare_decoded(&mut comparer, stream.as_mut(), &list, &decoded, dtype, names)?;
    required.extend(case.names()?.into_iter().filter(|n| n.starts_with("tap.decoder.")));
    Ok(Outcome::Ran(comparer.finish(&required)))
}
