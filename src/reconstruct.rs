//! Pictures through the VAE and back: what the tokenizer of images keeps of them.

use crate::device::{Copies, NodeList, Stream};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::image::RgbImage;
use crate::model::vae::{Decoded, LatentOutputs, VaeEncoder};
use crate::ops::harness::{decode, encode};
use crate::ops::{self, Launch};
use crate::rng::{CudaRandn, H100_MAX_THREADS};
use crate::tokens::ImageTokens;
use std::sync::Arc;

/// A picture that was encoded and decoded.
#[derive(Clone, Debug)]
pub struct Reconstruction {
    /// The decoder's picture, of the same size.
    pub image: RgbImage,
    /// Mean and standard deviation of every channel of the latent that the model reads, noise not included.
    pub channels: Vec<ChannelStats>,
}

/// A channel of a latent, over its pixels.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct ChannelStats {
    /// Mean.
    pub mean: f64,
    /// Standard deviation (biased).
    pub std: f64,
}

/// Gaussian noise on the latent that the model reads.
#[derive(Clone, Copy, Debug, Default)]
pub struct LatentNoise {
    /// Its standard deviation; 0 is none.
    pub sigma: f32,
    /// Its seed.
    pub seed: u64,
}

/// Device bytes that [`reconstruct`] takes on top of the weights; no device work. Refuses what that refuses, also of an
/// engine that only plans.
pub fn plan_reconstruction(engine: &Engine, image: &RgbImage, noise: LatentNoise) -> Result<u64> {
    let [tokens, arena] = buffer_bytes(engine, image, noise)?;
    Ok((tokens as u64).saturating_add(arena as u64))
}

/// Bytes of the tokens and of the arena.
fn buffer_bytes(engine: &Engine, image: &RgbImage, noise: LatentNoise) -> Result<[usize; 2]> {
    if !(noise.sigma.is_finite() && noise.sigma >= 0.0) {
        return Err(Error::request(
            "noise",
            format!("is {}; it must be 0 or a positive number", noise.sigma),
        ));
    }
    engine.check_pictures(std::slice::from_ref(image))?;
    let (model, dtype) = (&engine.model, engine.model.dtype);
    let pixels = (image.height() as usize, image.width() as usize);
    let grid = (pixels.0 / model.down_factor(), pixels.1 / model.down_factor());
    let tokens = grid.0 * grid.1 * model.config.token_dim() * dtype.bytes();
    let arena = encoder(engine)?.plan(pixels, dtype)?.max(model.vae.plan(1, grid, dtype)?);
    engine.check_budget((tokens as u64).saturating_add(arena as u64))?;
    Ok([tokens, arena])
}

fn encoder(engine: &Engine) -> Result<&VaeEncoder> {
    engine.model.encoder.as_ref().ok_or_else(|| Error::Internal("an encoder was checked for".into()))
}

/// Encodes `image` (the posterior's mean), adds the noise and decodes. Refuses sides that the VAE cannot encode,
/// and pictures that do not fit the engine's memory budget.
pub fn reconstruct(engine: &Engine, image: &RgbImage, noise: LatentNoise) -> Result<Reconstruction> {
    let [bytes, arena_bytes] = buffer_bytes(engine, image, noise)?;
    let (model, encoder) = (&engine.model, encoder(engine)?);
    let (dtype, device) = (model.dtype, &engine.device);
    let (height, width) = (image.height() as usize, image.width() as usize);
    let factor = model.down_factor();
    let grid = (height / factor, width / factor);
    let tokens = device.alloc(bytes, "tokens")?;
    let arena = device.alloc(arena_bytes, "vae")?;
    let mut stream = device.stream()?;
    let launch = Launch {
        selection: &engine.options.kernels,
        dtype,
        sm_count: device.info().sm_count,
        dependent: true,
    };
    let mut list = NodeList::new();
    let encoded = encoder.record(&launch, &mut list, (height, width), arena.span(), false)?;
    let outputs = LatentOutputs {
        draw: None,
        tokens: tokens.span(),
        patch: model.config.latent_patch_size,
        taps: ops::encode_latent::Taps::default(),
    };
    encoder.record_tokens(&launch, &mut list, &encoded, &outputs)?;
    stream.put(encoded.pixels, &encode(dtype, VaeEncoder::pixel_values(image)).0)?;
    run(stream.as_mut(), list)?;
    let mut raw = vec![0; bytes];
    stream.get(tokens.span(), &mut raw)?;
    let mut values = decode(dtype, &raw);
    let area = model.config.latent_patch_size.pow(2);
    let channels = channel_stats(&values, model.config.latent_channels, area);

    if noise.sigma > 0.0 {
        let mut draws = vec![0.0; values.len()];
        CudaRandn::new(noise.seed, 0, values.len() as u64, H100_MAX_THREADS).fill(0, &mut draws);
        for (value, draw) in values.iter_mut().zip(draws) {
            *value += noise.sigma * draw;
        }
        stream.put(tokens.span(), &encode(dtype, values).0)?;
    }
    let mut list = NodeList::new();
    let decoded = model.vae.record(&launch, &mut list, tokens.span(), 1, grid, arena.span())?;
    let mut pictures = pictures(stream.as_mut(), list, &decoded)?;
    let image = pictures.pop().ok_or_else(|| Error::Internal("the decoder made no picture".into()))?;
    Ok(Reconstruction { image, channels })
}

/// Decodes image tokens: the same pictures as of the request that made them, on the same device and in the same element
/// type. Refuses those of another layout ([`check_layout`](ImageTokens::check_layout) names the file) and more than a
/// request could have made.
pub fn decode_tokens(engine: &Engine, tokens: &ImageTokens) -> Result<Vec<RgbImage>> {
    let model = &engine.model;
    let (dtype, device) = (model.dtype, &engine.device);
    let values = [tokens.images, tokens.grid.0, tokens.grid.1, model.config.token_dim()];
    let count = values.into_iter().try_fold(1usize, usize::checked_mul);
    if !tokens.layout.agrees(&engine.token_layout()) || count != Some(tokens.values.len()) || count == Some(0)
    {
        let reason = format!("have {} values of another layout, {:?}", tokens.values.len(), tokens.layout);
        return Err(Error::request("tokens", reason));
    }
    let (limits, per_image) = (engine.limits(), tokens.grid.0 * tokens.grid.1);
    if tokens.images > limits.max_images as usize || per_image > limits.max_image_tokens {
        let reason = format!(
            "are {} images of {per_image}; a request makes at most {} of {}",
            tokens.images, limits.max_images, limits.max_image_tokens
        );
        return Err(Error::request("tokens", reason));
    }
    let arena_bytes = model.vae.plan(tokens.images, tokens.grid, dtype)?;
    let (bytes, _) = encode(dtype, tokens.values.clone());
    engine.check_budget((bytes.len() as u64).saturating_add(arena_bytes as u64))?;
    let arena = device.alloc(arena_bytes, "vae")?;
    let source = device.alloc(bytes.len(), "tokens")?;
    let mut stream = device.stream()?;
    stream.put(source.span(), &bytes)?;
    let launch = Launch {
        selection: &engine.options.kernels,
        dtype,
        sm_count: device.info().sm_count,
        dependent: true,
    };
    let mut list = NodeList::new();
    let decoded =
        model.vae.record(&launch, &mut list, source.span(), tokens.images, tokens.grid, arena.span())?;
    pictures(stream.as_mut(), list, &decoded)
}

/// Enqueues the nodes of the model's encoder or decoder.
fn run(stream: &mut dyn Stream, list: NodeList) -> Result<()> {
    // SAFETY: over the weights of the engine's model and an arena and tokens of the sizes that the two plan, on the
    // engine's device; the callers hold all of it until they have the results. No tables.
    let executable = unsafe { stream.instantiate(Arc::new(list)) }?;
    stream.replay(executable.as_ref())
}

/// Runs a decoder's nodes and brings its pictures to the host.
fn pictures(stream: &mut dyn Stream, list: NodeList, decoded: &Decoded) -> Result<Vec<RgbImage>> {
    run(stream, list)?;
    decoded.download(stream)
}

/// Statistics of tokens `[T, channels * area]`, whose vectors hold one channel after another.
fn channel_stats(tokens: &[f32], channels: usize, area: usize) -> Vec<ChannelStats> {
    let stats = |channel: usize| {
        let values = || tokens.chunks(channels * area).flat_map(move |t| &t[channel * area..][..area]);
        let count = values().count().max(1) as f64;
        let mean = values().map(|&v| f64::from(v)).sum::<f64>() / count;
        let variance = values().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / count;
        ChannelStats { mean, std: variance.sqrt() }
    };
    (0..channels).map(stats).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tokens_channels_follow_one_another() {
        // Two tokens of two channels and two pixels.
        let stats = channel_stats(&[1.0, 3.0, 10.0, 10.0, 1.0, 3.0, 10.0, 10.0], 2, 2);
        assert_eq!(stats, [ChannelStats { mean: 2.0, std: 1.0 }, ChannelStats { mean: 10.0, std: 0.0 }]);
    }
}
