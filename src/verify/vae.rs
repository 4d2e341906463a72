//! Cases of kind `vae`, and the VAE stages of `pipeline` cases: pictures to latents, latents to pixels.

use super::models::folder;
use super::pipeline::read;
use super::{Comparer, Context, Outcome, Tolerance};
use crate::device::{Copies, Node, NodeList, Stream};
use crate::error::Result;
use crate::image::RgbImage;
use crate::model::config::VaeConfig;
use crate::model::upload::Uploader;
use crate::model::vae::{Decoded, Encoded, LatentOutputs, Tap, VaeDecoder, VaeEncoder};
use crate::ops::encode_latent::Taps;
use crate::ops::harness::encode;
use crate::ops::{DType, Launch};
use crate::weights::{Checkpoint, OpenOptions, VaeWeights};

/// Shape `[B, C, H, W]` of a recorded tensor to channels last.
pub(super) fn channels_last(shape: &[usize], values: &[f32]) -> Vec<f32> {
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

pub(super) fn tolerance(dtype: DType) -> Tolerance {
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
    stream.get(decoded.rgb, &mut rgb)?;
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

/// Runs a `vae` case: the encoder from its recorded picture, what follows from the recorded moments, and the decoder.
pub(super) fn run(context: &Context<'_>) -> Result<Outcome> {
    let case = context.case;
    let dtype = context.dtype();
    let dir = folder(context, case.text("vae")?)?;
    let config = VaeConfig::load(&dir)?;
    let weights = VaeWeights::new(Checkpoint::open(&dir, OpenOptions::default())?, &config)?;
    let mut stream = context.device.stream()?;
    let mut up = Uploader::new(context.device.clone(), dtype, &context.options.selection)?;
    // The patch size belongs to the tokens, which this case does not have.
    let decoder = VaeDecoder::load(&config, &weights, 1, &mut up)?;
    let encoder = VaeEncoder::load(&config, &weights, &mut up)?;
    let encoder = encoder.ok_or_else(|| case.invalid("the VAE has no encoder"))?;
    up.wait()?;
    let (_weights, _) = up.finish();
    let mut half = Half {
        context,
        dtype,
        launch: Launch {
            selection: &context.options.selection,
            dtype,
            sm_count: context.device.info().sm_count,
            dependent: true,
        },
        stream: stream.as_mut(),
        comparer: Comparer::new(case),
    };
    half.encode(&encoder)?;
    half.decode(&decoder)?;
    // Everything that is recorded but what the stages are given.
    let given = ["image_u8", "draw", "decode.in"];
    let required: Vec<String> = case.names()?.into_iter().filter(|n| !given.contains(&n.as_str())).collect();
    Ok(Outcome::Ran(half.comparer.finish(&required)))
}

/// One half of a case, and what both need.
struct Half<'a, 'b> {
    context: &'a Context<'a>,
    dtype: DType,
    launch: Launch<'a>,
    stream: &'b mut dyn Stream,
    comparer: Comparer<'a>,
}

impl Half<'_, '_> {
    /// Picture to moments, recorded moments and draw to the latent.
    fn encode(&mut self, encoder: &VaeEncoder) -> Result<()> {
        let (case, dtype) = (self.context.case, self.dtype);
        let picture = case.tensor("image_u8")?;
        let [height, width, _] = picture.shape[..] else {
            return Err(case.invalid(format!("image_u8 has shape {:?}", picture.shape)));
        };
        let levels = picture.values.iter().map(|&v| v as u8).collect();
        let image = RgbImage::new(width as u32, height as u32, levels)?;
        let (bytes, pixels) = encode(dtype, VaeEncoder::pixel_values(&image));
        self.compare_last("pixel_values", &pixels, "host", Tolerance::Exact)?;

        let arena = self.context.device.alloc(encoder.plan((height, width), dtype)?, "vae.encoder")?;
        let mut list = NodeList::new();
        let encoded = encoder.record(&self.launch, &mut list, (height, width), arena.span(), true)?;
        self.stream.put(encoded.pixels, &bytes)?;
        self.run_tapped(&list, &encoded.taps)?;
        let moments = read(self.stream, encoded.moments, dtype)?;
        self.compare_last("moments", &moments, list.writer(encoded.moments), tolerance(dtype))?;

        // The rest from the recorded moments.
        let recorded = case.tensor("moments")?;
        let (bytes, _) = encode(dtype, channels_last(&recorded.shape, &recorded.values));
        self.stream.put(encoded.moments, &bytes)?;
        self.latent(encoder, &encoded)
    }

    fn latent(&mut self, encoder: &VaeEncoder, encoded: &Encoded) -> Result<()> {
        let (case, dtype, device) = (self.context.case, self.dtype, self.context.device);
        let recorded = case.tensor("draw")?;
        let draw = channels_last(&recorded.shape, &recorded.values);
        let drawn = device.alloc(draw.len() * 4, "draw")?;
        self.stream.put(drawn.span(), bytemuck::cast_slice(&draw))?;
        let output = |name: &str| device.alloc(draw.len() * dtype.bytes(), name);
        let (mean, sample, latent) = (output("mean")?, output("sample")?, output("latent")?);
        let outputs = LatentOutputs {
            draw: Some(drawn.span()),
            tokens: latent.span(),
            patch: 1,
            taps: Taps { mean: Some(mean.span()), std: None, sample: Some(sample.span()) },
        };
        let mut list = NodeList::new();
        encoder.record_tokens(&self.launch, &mut list, encoded, &outputs)?;
        list.nodes().iter().try_for_each(|node| self.launch(node))?;
        let spans = [("mean", mean.span()), ("sample", sample.span()), ("latent_for_model", latent.span())];
        for (name, span) in spans {
            let got = read(self.stream, span, dtype)?;
            self.compare_last(name, &got, list.writer(span), tolerance(dtype))?;
        }
        Ok(())
    }

    /// Recorded latent to pixels.
    fn decode(&mut self, decoder: &VaeDecoder) -> Result<()> {
        let (case, dtype) = (self.context.case, self.dtype);
        let input = case.tensor("decode.in")?;
        let [images, _, height, width] = input.shape[..] else {
            return Err(case.invalid(format!("decode.in has shape {:?}", input.shape)));
        };
        let arena = self.context.device.alloc(decoder.plan(images, (height, width), dtype)?, "vae")?;
        let mut list = NodeList::new();
        let size = (height, width);
        let decoded = decoder.record_latent(&self.launch, &mut list, images, size, arena.span(), true)?;
        let (latent, _) = encode(dtype, channels_last(&input.shape, &input.values));
        self.stream.put(decoded.latent, &latent)?;
        self.run_tapped(&list, &decoded.taps)?;
        let names = ["", "decode.out", "decode.out_u8"];
        compare_decoded(&mut self.comparer, self.stream, &list, &decoded, dtype, names)
    }

    fn launch(&mut self, node: &Node) -> Result<()> {
        // SAFETY: nodes of the case's encoder and decoder, over an arena of the size that they plan and buffers of the
        // outputs' sizes, all of which is held until results were read. No tables.
        unsafe { self.stream.launch(node) }
    }

    /// Runs a list; compares every module's output that is recorded, before it is overwritten.
    fn run_tapped(&mut self, list: &NodeList, taps: &[Tap]) -> Result<()> {
        for (index, node) in list.nodes().iter().enumerate() {
            self.launch(node)?;
            for tap in taps.iter().filter(|tap| tap.node == index) {
                let name = format!("tap.{}", tap.name);
                if !self.context.case.has(&name) {
                    continue;
                }
                let got = read(self.stream, tap.span, self.dtype)?;
                // Activations inside grow above one: the bound scales with them.
                let bound = match self.dtype {
                    DType::F32 => Tolerance::Scaled { max: 5e-5, of_largest: 5e-5 },
                    DType::Bf16 => Tolerance::Stream { mean: 0.02, max: 0.15 },
                };
                self.compare_last(&name, &got, node.kernel.symbol, bound)?;
            }
        }
        self.stream.synchronize()
    }

    /// Compares channels-last values with a recorded `[B, C, H, W]` tensor.
    fn compare_last(&mut self, name: &str, got: &[f32], kernel: &str, tolerance: Tolerance) -> Result<()> {
        let recorded = self.context.case.tensor(name)?;
        let expected = channels_last(&recorded.shape, &recorded.values);
        self.comparer.values(name, recorded.shape, got, &expected, kernel, tolerance);
        Ok(())
    }
}
