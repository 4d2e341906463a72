//! The encoder: pixels to the moments of the posterior, and those to image tokens.
//!
//! Pictures are encoded one at a time over the same arena, each in its own size; what is kept of one is its tokens.

use super::pass::{Pass, Tap, Tensors};
use super::scratch::Scratch;
use super::steps::{Steps, elements};
use crate::device::{NodeList, Span};
use crate::error::{Error, Result};
use crate::image::RgbImage;
use crate::model::config::VaeConfig;
use crate::model::upload::Uploader;
use crate::ops::{self, DType, Launch};
use crate::reference::encode_latent::Shape;
use crate::weights::{Part, VaeWeights};

/// Weights of the encoder on a device.
pub struct VaeEncoder {
    config: VaeConfig,
    tensors: Tensors,
}

/// Where the results of a recorded encoder are: in its arena, until that is used again.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// `[height, width, 3]` E, to be uploaded: [`pixel_values`](VaeEncoder::pixel_values).
    pub pixels: Span,
    /// `[h, w, 2 * z_channels]` E: means, then log variances.
    pub moments: Span,
    /// Rows and columns of the latent.
    pub latent: (usize, usize),
    /// Intermediate tensors that can be read after their node, before the next one runs.
    pub taps: Vec<Tap>,
}

/// Where the tokens of a picture go, and what they are made with.
#[derive(Clone, Copy, Debug)]
pub struct LatentOutputs {
    /// `[h, w, z_channels]` float: the posterior's draw; absent: its mean is taken.
    pub draw: Option<Span>,
    /// `[T, z_channels * patch^2]` E, written.
    pub tokens: Span,
    /// Side of the patch that a token holds; with 1 the tokens are the latent, channels last.
    pub patch: usize,
    /// What verification looks at.
    pub taps: ops::encode_latent::Taps,
}

/// The arena: pixels, moments, scratch.
struct Layout {
    pixels: Span,
    moments: Span,
    scratch: usize,
    bytes: usize,
    latent: (usize, usize),
}

impl VaeEncoder {
    /// Uploads the encoder's weights, if the checkpoint has them.
    pub fn load(
        config: &VaeConfig,
        weights: &VaeWeights,
        up: &mut Uploader<'_>,
    ) -> Result<Option<VaeEncoder>> {
        if !weights.has_encoder() {
            return Ok(None);
        }
        let channels = config.block_out_channels.last().copied().unwrap_or(0);
        let tensors = Tensors::load(weights, Part::VaeEncoder, channels, up)?;
        Ok(Some(VaeEncoder { config: config.clone(), tensors }))
    }

    /// Whether the posterior's draw has an effect.
    pub fn draws(&self) -> bool {
        !self.config.deterministic
    }

    /// Both sides of a picture divide by this many pixels.
    pub fn size_unit(&self) -> usize {
        self.config.downsample_factor() * self.config.encoder_norm.map_or(1, |norm| norm.psz)
    }

    /// `[height, width, 3]`: the values from -1 to 1 that the encoder takes, in the official order of operations.
    pub fn pixel_values(image: &RgbImage) -> Vec<f32> {
        image.data().iter().map(|&v| (f32::from(v) / 255.0 - 0.5) / 0.5).collect()
    }

    /// Bytes of the arena for a picture of (rows, columns) pixels.
    pub fn plan(&self, size: (usize, usize), dtype: DType) -> Result<usize> {
        // Addresses are of no account here.
        let nowhere = Span { ptr: crate::device::DevicePtr(0), bytes: usize::MAX };
        Ok(self.layout(size, dtype, nowhere)?.bytes)
    }

    fn layout(&self, (height, width): (usize, usize), dtype: DType, arena: Span) -> Result<Layout> {
        let (config, factor) = (&self.config, self.config.downsample_factor());
        let latent = (height / factor, width / factor);
        let scratch_bytes = Steps::encoder(config, 1, (height, width), dtype, true)?.bytes;
        let pixels = elements(&[height, width, VaeConfig::IMAGE_CHANNELS, dtype.bytes()])?;
        let moments = elements(&[latent.0, latent.1, 2, config.z_channels, dtype.bytes()])?;
        if pixels == 0 || moments == 0 {
            return Err(Error::Internal(format!("a picture of {width}x{height} pixels to encode")));
        }
        let mut ends = Scratch::default();
        let places = [ends.take(pixels)?, ends.take(moments)?, ends.take(scratch_bytes)?];
        let bytes = ends.bytes();
        if arena.bytes < bytes {
            let reason = format!("the VAE encoder needs {bytes} bytes, its arena has {}", arena.bytes);
            return Err(Error::Internal(reason));
        }
        let [pixels, moments, scratch] = places;
        let span = |region: super::scratch::Region| arena.slice(region.offset, region.bytes);
        Ok(Layout { pixels: span(pixels), moments: span(moments), scratch: scratch.offset, bytes, latent })
    }

    /// Nodes from the pixels, which are uploaded to [`Encoded::pixels`], to the moments. With `probe` there is one more
    /// tap, `encoder.norm_out`: the last norm without its swish, which no other node stores.
    pub fn record(
        &self,
        launch: &Launch,
        list: &mut NodeList,
        size: (usize, usize),
        arena: Span,
        probe: bool,
    ) -> Result<Encoded> {
        let layout = self.layout(size, launch.dtype, arena)?;
        let steps = Steps::encoder(&self.config, 1, size, launch.dtype, probe)?;
        let pass = Pass {
            tensors: &self.tensors,
            launch,
            input: layout.pixels,
            output: layout.moments,
            scratch: arena.slice(layout.scratch, steps.bytes),
            images: 1,
            first_image: 0,
        };
        let taps = pass.record(list, &steps)?;
        Ok(Encoded { pixels: layout.pixels, moments: layout.moments, latent: layout.latent, taps })
    }

    /// The node from moments to tokens. The same moments may be used again, with another draw.
    pub fn record_tokens(
        &self,
        launch: &Launch,
        list: &mut NodeList,
        encoded: &Encoded,
        outputs: &LatentOutputs,
    ) -> Result<()> {
        let args = ops::encode_latent::Args {
            moments: encoded.moments,
            draw: outputs.draw.filter(|_| self.draws()),
            tokens: outputs.tokens,
            taps: outputs.taps,
            shape: Shape {
                height: encoded.latent.0,
                width: encoded.latent.1,
                channels: self.config.z_channels,
                patch: outputs.patch,
                psz: self.config.encoder_norm.map(|norm| norm.psz),
            },
            scale: self.config.scaling_factor as f32,
            shift: self.config.shift_factor as f32,
        };
        list.push(ops::encode_latent::node(launch, "vae.encode_latent", &args)?);
        Ok(())
    }
}
