//! The VAE: device weights, and the nodes from image tokens to pixels. The way back is in `vae/encoder.rs`.
//!
//! Either way is first laid out as a list of steps (`vae/steps.rs`), from the config and the picture's size
//! alone: every step with the place of its tensors in the arena. The plan is that list's size, and recording
//! is that list with addresses and weights, so the two cannot disagree.
//!
//! Activations are channels last and live as long as the steps that need them; a residual block adds its
//! result onto its own input. One 512x512 picture takes 289 MB in bf16: 268 MB at the first block of level 0,
//! and gaps. Several pictures are decoded together as long as that stays within [`PASS_BYTES`], then in passes
//! over the same memory, one after another; every picture comes out the same whichever pass it is in.

mod encoder;
mod pass;
mod scratch;
mod steps;

pub use encoder::{Encoded, LatentOutputs, VaeEncoder};
pub use pass::Tap;

use super::config::VaeConfig;
use super::upload::Uploader;
use crate::device::{Copies, NodeList, Span, Stream};
use crate::error::{Error, Result};
use crate::image::RgbImage;
use crate::ops::{self, DType, Launch};
use crate::reference::unpatchify::Shape as LatentShape;
use crate::weights::{Part, VaeWeights};
use pass::{PROBE, Pass, Tensors};
use scratch::Scratch;
use steps::{Steps, elements};

/// Activations of one pass stay below this if a single picture's do.
pub const PASS_BYTES: usize = 1 << 30;

/// Weights of the decoder on a device.
pub struct VaeDecoder {
    config: VaeConfig,
    patch: usize,
    tensors: Tensors,
}

/// Where the results of a recorded decoder are. All of it is in the arena, until that is used again.
#[derive(Clone, Debug)]
pub struct Decoded {
    /// `[B, h, w, C]` E: the latent, `tokens / scaling_factor + shift_factor`.
    pub latent: Span,
    /// `[B, height, width, 3]` E: the decoder's output, not clamped.
    pub image: Span,
    /// `[B, height, width, 3]` uint8.
    pub rgb: Span,
    /// Which values of `image` are not finite, a bit each.
    pub bad: Span,
    /// Rows of a picture.
    pub height: usize,
    /// Columns of a picture.
    pub width: usize,
    /// Intermediate tensors that can be read after their node, before the next one runs.
    pub taps: Vec<Tap>,
}

impl Decoded {
    /// The pictures, brought to the host after everything enqueued so far; an error if a value of the decoder was not
    /// finite, which a level from 0 to 255 no longer shows.
    pub(crate) fn download(&self, stream: &mut dyn Stream) -> Result<Vec<RgbImage>> {
        let mut bad = vec![0; self.bad.bytes];
        stream.get(self.bad, &mut bad)?;
        if let Some(value) = ops::to_rgb8::first_bad(&bad) {
            let pixel = value / VaeConfig::IMAGE_CHANNELS;
            let (row, column) = (pixel / self.width % self.height, pixel % self.width);
            return Err(Error::NonFinitePixel { picture: pixel / (self.width * self.height), row, column });
        }
        let mut rgb = vec![0; self.rgb.bytes];
        stream.get(self.rgb, &mut rgb)?;
        rgb.chunks_exact((self.width * self.height * VaeConfig::IMAGE_CHANNELS).max(1))
            .map(|pixels| RgbImage::new(self.width as u32, self.height as u32, pixels.to_vec()))
            .collect()
    }
}

/// The arena: latent, pictures, pixels, then the scratch of a pass.
struct Layout {
    latent: usize,
    image: usize,
    rgb: usize,
    bad: usize,
    scratch: usize,
    bytes: usize,
    /// Pictures per pass.
    pass: usize,
    /// Rows and columns of a picture.
    size: (usize, usize),
}

impl VaeDecoder {
    /// Uploads the decoder's weights. `patch` is the model's `latent_patch_size`.
    pub fn load(
        config: &VaeConfig,
        weights: &VaeWeights,
        patch: usize,
        up: &mut Uploader<'_>,
    ) -> Result<VaeDecoder> {
        let channels = config.block_out_channels.first().copied().unwrap_or(0);
        let tensors = Tensors::load(weights, Part::VaeDecoder, channels, up)?;
        Ok(VaeDecoder { config: config.clone(), patch, tensors })
    }

    /// Bytes of the arena for `images` pictures of `grid` (rows, columns) image tokens.
    pub fn plan(&self, images: usize, grid: (usize, usize), dtype: DType) -> Result<usize> {
        let latent = (elements(&[grid.0, self.patch])?, elements(&[grid.1, self.patch])?);
        plan(&self.config, images, latent, dtype)
    }

    /// Nodes from `tokens` `[B, T, K]` to pixels.
    pub fn record(
        &self,
        launch: &Launch,
        list: &mut NodeList,
        tokens: Span,
        images: usize,
        grid: (usize, usize),
        arena: Span,
    ) -> Result<Decoded> {
        let (height, width) = (elements(&[grid.0, self.patch])?, elements(&[grid.1, self.patch])?);
        let layout = Layout::new(&self.config, images, (height, width), launch.dtype)?;
        layout.check(arena)?;
        let shape =
            LatentShape { images, height, width, channels: self.config.z_channels, patch: self.patch };
        let args = ops::unpatchify::Args {
            tokens,
            latent: layout.latent_span(arena, images, &self.config, (height, width), launch.dtype)?,
            shape,
            scale: self.config.scaling_factor as f32,
            shift: self.config.shift_factor as f32,
        };
        list.push(ops::unpatchify::node(launch, "vae.unpatchify", &args)?);
        self.record_latent(launch, list, images, (height, width), arena, false)
    }

    /// Nodes from the latent, which is already in the arena (at [`Decoded::latent`]), to pixels. With `probe`
    /// there is one more tap, `decoder.norm_out`: the last norm without its swish, which no other node stores.
    pub fn record_latent(
        &self,
        launch: &Launch,
        list: &mut NodeList,
        images: usize,
        latent: (usize, usize),
        arena: Span,
        probe: bool,
    ) -> Result<Decoded> {
        let layout = Layout::new(&self.config, images, latent, launch.dtype)?;
        layout.check(arena)?;
        let (height, width) = layout.size;
        let pixels = elements(&[images, height, width, VaeConfig::IMAGE_CHANNELS])?;
        let mut decoded = Decoded {
            latent: layout.latent_span(arena, images, &self.config, latent, launch.dtype)?,
            image: arena.slice(layout.image, pixels * launch.dtype.bytes()),
            rgb: arena.slice(layout.rgb, pixels),
            bad: arena.slice(layout.bad, ops::to_rgb8::bad_bytes(pixels)),
            height,
            width,
            taps: Vec::new(),
        };
        for first in (0..images).step_by(layout.pass) {
            let count = layout.pass.min(images - first);
            let steps = Steps::decoder(&self.config, count, latent, launch.dtype, probe)?;
            let part = |span: Span| {
                let bytes = span.bytes / images;
                span.slice(first * bytes, count * bytes)
            };
            let pass = Pass {
                tensors: &self.tensors,
                launch,
                input: part(decoded.latent),
                output: part(decoded.image),
                scratch: arena.slice(layout.scratch, steps.bytes),
                images: count,
                first_image: first,
            };
            decoded.taps.extend(pass.record(list, &steps)?);
        }
        let args =
            ops::to_rgb8::Args { x: decoded.image, rgb: decoded.rgb, bad: decoded.bad, elements: pixels };
        list.push(ops::to_rgb8::node(launch, "vae.to_rgb8", &args)?);
        Ok(decoded)
    }
}

/// Bytes of the arena for `images` latents of `latent` (rows, columns), known from the config alone.
pub fn plan(config: &VaeConfig, images: usize, latent: (usize, usize), dtype: DType) -> Result<usize> {
    Ok(Layout::new(config, images, latent, dtype)?.bytes)
}

impl Layout {
    fn new(config: &VaeConfig, images: usize, latent: (usize, usize), dtype: DType) -> Result<Layout> {
        if images == 0 || latent.0 == 0 || latent.1 == 0 {
            return Err(Error::Internal(format!("{images} latents of {}x{} to decode", latent.0, latent.1)));
        }
        let factor = config.downsample_factor();
        let size = (elements(&[latent.0, factor])?, elements(&[latent.1, factor])?);
        let one = Steps::decoder(config, 1, latent, dtype, false)?.bytes;
        let pass = (PASS_BYTES / one.max(1)).clamp(1, images);
        let scratch_bytes = Steps::decoder(config, pass, latent, dtype, false)?.bytes;
        let pixels = elements(&[images, size.0, size.1, VaeConfig::IMAGE_CHANNELS])?;
        // Outputs of all pictures live to the end; only the scratch of a pass is packed by lifetime.
        let mut ends = Scratch::default();
        let latent_bytes = elements(&[images, latent.0, latent.1, config.z_channels, dtype.bytes()])?;
        let mut next = |bytes: usize| ends.take(bytes).map(|region| region.offset);
        let (latent, image) = (next(latent_bytes)?, next(elements(&[pixels, dtype.bytes()])?)?);
        let (rgb, bad) = (next(pixels)?, next(ops::to_rgb8::bad_bytes(pixels))?);
        let scratch = next(scratch_bytes)?;
        Ok(Layout { latent, image, rgb, bad, scratch, bytes: ends.bytes(), pass, size })
    }

    fn check(&self, arena: Span) -> Result<()> {
        if arena.bytes < self.bytes {
            let reason = format!("the VAE decoder needs {} bytes, its arena has {}", self.bytes, arena.bytes);
            return Err(Error::Internal(reason));
        }
        Ok(())
    }

    fn latent_span(
        &self,
        arena: Span,
        images: usize,
        config: &VaeConfig,
        (height, width): (usize, usize),
        dtype: DType,
    ) -> Result<Span> {
        Ok(arena.slice(self.latent, elements(&[images, height, width, config.z_channels, dtype.bytes()])?))
    }
}
