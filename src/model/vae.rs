//! The VAE decoder: device weights, and the nodes from image tokens to pixels.
//!
//! The decoder is first laid out as a list of steps (`vae/steps.rs`), from the config and the picture's size
//! alone: every step with the place of its tensors in the arena. The plan is that list's size, and recording
//! is that list with addresses and weights, so the two cannot disagree.
//!
//! Activations are channels last and live as long as the steps that need them; a residual block adds its
//! result onto its own input. One 512x512 picture takes 289 MB in bf16: 268 MB at the first block of level 0,
//! and gaps. Several pictures are decoded together as long as that stays within [`PASS_BYTES`], then in passes
//! over the same memory, one after another; every picture comes out the same whichever pass it is in.

mod steps;

use super::config::VaeConfig;
use super::upload::Uploader;
use crate::device::{NodeList, Span};
use crate::error::{Error, Result};
use crate::ops::{self, DType, Launch};
use crate::reference::{conv2d::Shape as ConvShape, unpatchify::Shape as LatentShape};
use crate::weights::{Part, VaeWeights, convert};
use std::collections::HashMap;
use steps::{Kind, Place, Scratch, Steps, Tensor, elements};

/// Activations of one pass stay below this if a single picture's do.
pub const PASS_BYTES: usize = 1 << 30;

/// Weights of the decoder on a device.
pub struct VaeDecoder {
    config: VaeConfig,
    patch: usize,
    /// By official name, `decoder.conv_in.weight`; convolutions as `[O, kh, kw, I]`.
    tensors: HashMap<String, Span>,
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
    /// Rows of a picture.
    pub height: usize,
    /// Columns of a picture.
    pub width: usize,
    /// Intermediate tensors that can be read after their node, before the next one runs.
    pub taps: Vec<Tap>,
}

/// An intermediate tensor under its official module name.
#[derive(Clone, Debug)]
pub struct Tap {
    /// `decoder.up.3.block.2`.
    pub name: String,
    /// The node that completes it: index in the list, and label.
    pub node: usize,
    /// Label of that node.
    pub label: String,
    /// First picture of the pass that it belongs to.
    pub first_image: usize,
    /// `[images of the pass, height, width, channels]`.
    pub shape: [usize; 4],
    /// Where it is; later nodes overwrite it.
    pub span: Span,
}

/// The arena: latent, pictures, pixels, then the scratch of a pass.
struct Layout {
    latent: usize,
    image: usize,
    rgb: usize,
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
        let mut tensors = HashMap::new();
        for spec in weights.specs().iter().filter(|spec| spec.part == Part::VaeDecoder) {
            let mut values = convert::to_f32(&weights.get(&spec.name)?)?;
            if let &[o, i, kh, kw] = spec.shape.as_slice() {
                values = convert::conv_to_ohwi(&values, [o, i, kh, kw])?;
            }
            let span = up.values(&format!("vae.{}", spec.name), values)?;
            tensors.insert(spec.name.clone(), span);
        }
        // The probe of norm_out is a convolution by one.
        let channels = config.block_out_channels.first().copied().unwrap_or(0);
        let identity = (0..channels * channels).map(|i| f32::from(u8::from(i % (channels + 1) == 0)));
        tensors.insert(PROBE_WEIGHT.into(), up.values("vae.probe.weight", identity.collect())?);
        tensors.insert(PROBE_BIAS.into(), up.values("vae.probe.bias", vec![0.0; channels])?);
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
            height,
            width,
            taps: Vec::new(),
        };
        for first in (0..images).step_by(layout.pass) {
            let count = layout.pass.min(images - first);
            let steps = Steps::of(&self.config, count, latent, launch.dtype, probe)?;
            let part = |span: Span| {
                let bytes = span.bytes / images;
                span.slice(first * bytes, count * bytes)
            };
            let pass = Pass {
                decoder: self,
                launch,
                latent: part(decoded.latent),
                image: part(decoded.image),
                scratch: arena.slice(layout.scratch, steps.bytes),
                images: count,
            };
            for step in &steps.list {
                let node = pass.record(list, &step.label, &step.kind)?;
                if let (Some(name), Some(tensor)) = (&step.tap, step.kind.output()) {
                    decoded.taps.push(Tap {
                        name: name.clone(),
                        node,
                        label: step.label.clone(),
                        first_image: first,
                        shape: [count, tensor.height, tensor.width, tensor.channels],
                        span: pass.span(tensor)?,
                    });
                }
            }
        }
        let args = ops::to_rgb8::Args { x: decoded.image, rgb: decoded.rgb, elements: pixels };
        list.push(ops::to_rgb8::node(launch, "vae.to_rgb8", &args)?);
        Ok(decoded)
    }

    fn tensor(&self, name: &str) -> Result<Span> {
        let missing = || Error::Internal(format!("the VAE decoder has no tensor {name}"));
        self.tensors.get(name).copied().ok_or_else(missing)
    }
}

/// Names that no checkpoint has.
const PROBE: &str = "probe";
const PROBE_WEIGHT: &str = "probe.weight";
const PROBE_BIAS: &str = "probe.bias";

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
        let one = Steps::of(config, 1, latent, dtype, false)?.bytes;
        let pass = (PASS_BYTES / one.max(1)).clamp(1, images);
        let scratch_bytes = Steps::of(config, pass, latent, dtype, false)?.bytes;
        let pixels = elements(&[images, size.0, size.1, VaeConfig::IMAGE_CHANNELS])?;
        // Outputs of all pictures live to the end; only the scratch of a pass is packed by lifetime.
        let mut ends = Scratch::default();
        let latent_bytes = elements(&[images, latent.0, latent.1, config.z_channels, dtype.bytes()])?;
        let mut next = |bytes: usize| ends.take(bytes).map(|region| region.offset);
        let (latent, image) = (next(latent_bytes)?, next(elements(&[pixels, dtype.bytes()])?)?);
        let (rgb, scratch) = (next(pixels)?, next(scratch_bytes)?);
        Ok(Layout { latent, image, rgb, scratch, bytes: ends.bytes(), pass, size })
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

/// The steps of some pictures, bound to addresses.
struct Pass<'a> {
    decoder: &'a VaeDecoder,
    launch: &'a Launch<'a>,
    latent: Span,
    image: Span,
    scratch: Span,
    images: usize,
}

impl Pass<'_> {
    fn span(&self, tensor: &Tensor) -> Result<Span> {
        match tensor.place {
            Place::Latent => Ok(self.latent),
            Place::Image => Ok(self.image),
            Place::Scratch { offset, bytes } => {
                if offset + bytes > self.scratch.bytes {
                    return Err(Error::Internal(format!("scratch at {offset} of {}", self.scratch.bytes)));
                }
                Ok(self.scratch.slice(offset, bytes))
            }
        }
    }

    fn record(&self, list: &mut NodeList, label: &str, kind: &Kind) -> Result<usize> {
        let node = match kind {
            Kind::Stats { x, stats } => {
                let args = ops::group_stats::Args {
                    x: self.span(x)?,
                    stats: self.span(stats)?,
                    images: self.images,
                    pixels: x.height * x.width,
                    channels: x.channels,
                    groups: steps::GROUPS,
                    eps: steps::EPS,
                };
                ops::group_stats::node(self.launch, label, &args)?
            }
            Kind::Conv { x, norm, weight, residual, y, ksize, upsample } => {
                let weights = |what: &str| self.decoder.tensor(&format!("{weight}.{what}"));
                let norm = match norm {
                    None => None,
                    Some(norm) => Some(ops::conv2d::Norm {
                        stats: self.span(&norm.stats)?,
                        gamma: self.decoder.tensor(&format!("{}.weight", norm.name))?,
                        beta: self.decoder.tensor(&format!("{}.bias", norm.name))?,
                        groups: steps::GROUPS,
                        silu: norm.silu,
                    }),
                };
                let args = ops::conv2d::Args {
                    x: self.span(x)?,
                    norm,
                    w: weights("weight")?,
                    bias: weights("bias")?,
                    residual: residual.as_ref().map(|r| self.span(r)).transpose()?,
                    y: self.span(y)?,
                    shape: ConvShape {
                        images: self.images,
                        height: y.height,
                        width: y.width,
                        c_in: x.channels,
                        c_out: y.channels,
                        ksize: *ksize,
                        upsample: *upsample,
                    },
                };
                ops::conv2d::node(self.launch, label, &args)?
            }
            Kind::Attention { q, k, v, out } => {
                let args = ops::vae_attention::Args {
                    q: self.span(q)?,
                    k: self.span(k)?,
                    v: self.span(v)?,
                    out: self.span(out)?,
                    images: self.images,
                    pixels: q.height * q.width,
                    channels: q.channels,
                };
                ops::vae_attention::node(self.launch, label, &args)?
            }
        };
        Ok(list.push(node))
    }
}
