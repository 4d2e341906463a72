//! Encoder and decoder as lists of steps with places in a scratch memory: what runs in which order, and which bytes
//! are whose in between. Knows the config; knows no device, no address and no weight.

use super::scratch::{ALIGNMENT, Scratch};
use crate::error::{Error, Result};
use crate::model::config::VaeConfig;
use crate::ops::DType;
use crate::ops::conv2d::partial_tiles;
use crate::reference::conv2d::Resample;

/// GroupNorm groups in every norm of the VAE.
pub const GROUPS: usize = 32;
/// Added to the variance in every norm of the VAE.
pub const EPS: f32 = 1e-6;

/// The product of `dims`, or an error where a picture is too large to be counted.
pub fn elements(dims: &[usize]) -> Result<usize> {
    let product = dims.iter().try_fold(1usize, |product, &d| product.checked_mul(d));
    product.ok_or_else(|| Error::Internal(format!("a tensor of shape {dims:?} overflows")))
}

/// Where a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// What is encoded or decoded.
    Input,
    /// What comes out of it.
    Output,
    /// Bytes of the scratch memory.
    Scratch {
        /// First byte.
        offset: usize,
        /// Length.
        bytes: usize,
    },
}

/// An activation `[images, height, width, channels]`, or statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tensor {
    pub place: Place,
    pub height: usize,
    pub width: usize,
    pub channels: usize,
}

/// A GroupNorm that a convolution applies to its input.
#[derive(Clone, Debug)]
pub struct Norm {
    /// `[images, GROUPS, 2]` float.
    pub stats: Tensor,
    /// Official name of the module.
    pub name: String,
    pub silu: bool,
}

/// What a step does.
#[derive(Clone, Debug)]
pub enum Kind {
    Stats {
        x: Tensor,
        stats: Tensor,
    },
    Conv {
        x: Tensor,
        norm: Option<Norm>,
        /// Official name of the module.
        weight: String,
        residual: Option<Tensor>,
        y: Tensor,
        ksize: usize,
        resample: Resample,
    },
    Attention {
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
    },
}

impl Kind {
    /// The activation that the step makes; statistics are none.
    pub fn output(&self) -> Option<&Tensor> {
        match self {
            Kind::Stats { .. } => None,
            Kind::Conv { y, .. } => Some(y),
            Kind::Attention { out, .. } => Some(out),
        }
    }
}

/// One launch.
#[derive(Clone, Debug)]
pub struct Step {
    /// `vae.decoder.mid.block_1.conv1`.
    pub label: String,
    pub kind: Kind,
    /// Official name of the module whose output is complete with this step.
    pub tap: Option<String>,
}

/// The encoder or the decoder of some pictures.
pub struct Steps {
    pub list: Vec<Step>,
    /// Bytes of scratch.
    pub bytes: usize,
    /// Where in the scratch a convolution leaves the statistics of its tiles, until they are merged by the step after
    /// it. Convolutions whose result is normalised are directly before the statistics of it.
    pub partial: Place,
}

impl Steps {
    /// The decoder's steps for `images` latents of (rows, columns). With `probe` the last norm is also stored.
    pub fn decoder(
        config: &VaeConfig,
        images: usize,
        (height, width): (usize, usize),
        dtype: DType,
        probe: bool,
    ) -> Result<Steps> {
        let channels = &config.block_out_channels;
        let mut b = Builder::new("decoder", images, dtype);
        let latent = Tensor { place: Place::Input, height, width, channels: config.z_channels };
        let coarsest = channels.last().copied().unwrap_or(0);
        let mut x = b.tensor(height, width, coarsest)?;
        b.conv("conv_in", latent, None, None, x, 3, Resample::Same);
        b.tap("conv_in");
        x = b.middle(x)?;
        for (level, &out) in channels.iter().enumerate().rev() {
            for block in 0..config.num_res_blocks + 1 {
                x = b.res_block(&format!("up.{level}.block.{block}"), x, out)?;
            }
            if level > 0 {
                x = b.resample(&format!("up.{level}.upsample"), x, Resample::Up)?;
            }
        }
        b.finish(x, VaeConfig::IMAGE_CHANNELS, probe)
    }

    /// The encoder's steps for `images` pictures of (rows, columns) pixels; both must divide by the VAE's factor.
    pub fn encoder(
        config: &VaeConfig,
        images: usize,
        (height, width): (usize, usize),
        dtype: DType,
        probe: bool,
    ) -> Result<Steps> {
        let factor = config.downsample_factor();
        if height % factor != 0 || width % factor != 0 {
            return Err(Error::Internal(format!(
                "a picture of {width}x{height} pixels to encode by {factor}"
            )));
        }
        let mut b = Builder::new("encoder", images, dtype);
        let picture = Tensor { place: Place::Input, height, width, channels: VaeConfig::IMAGE_CHANNELS };
        let mut x = b.tensor(height, width, config.ch)?;
        b.conv("conv_in", picture, None, None, x, 3, Resample::Same);
        b.tap("conv_in");
        let levels = config.block_out_channels.len();
        for (level, &out) in config.block_out_channels.iter().enumerate() {
            for block in 0..config.num_res_blocks {
                x = b.res_block(&format!("down.{level}.block.{block}"), x, out)?;
            }
            if level + 1 < levels {
                x = b.resample(&format!("down.{level}.downsample"), x, Resample::Down)?;
            }
        }
        x = b.middle(x)?;
        // mean and log variance
        b.finish(x, 2 * config.z_channels, probe)
    }
}

struct Builder {
    /// `encoder` or `decoder`, the first component of every name.
    side: &'static str,
    images: usize,
    element_bytes: usize,
    list: Vec<Step>,
    scratch: Scratch,
}

impl Builder {
    fn new(side: &'static str, images: usize, dtype: DType) -> Builder {
        let (list, scratch) = (Vec::new(), Scratch::default());
        Builder { side, images, element_bytes: dtype.bytes(), list, scratch }
    }

    /// The last norm and convolution, into the output.
    fn finish(mut self, x: Tensor, channels: usize, probe: bool) -> Result<Steps> {
        let norm = self.norm("norm_out", x, true)?;
        if probe {
            let y = self.tensor(x.height, x.width, x.channels)?;
            let plain = Norm { silu: false, ..norm.clone() };
            self.conv("norm_out.probe", x, Some(plain), None, y, 1, Resample::Same);
            self.tap("norm_out");
            if let Some(Step { kind: Kind::Conv { weight, .. }, .. }) = self.list.last_mut() {
                *weight = super::PROBE.into();
            }
            self.release(y);
        }
        let output = Tensor { place: Place::Output, channels, ..x };
        self.conv("conv_out", x, Some(norm), None, output, 3, Resample::Same);
        let mut partial = 0;
        for step in &self.list {
            if let Kind::Stats { x, .. } = &step.kind {
                let tiles = partial_tiles(x.height, x.width);
                partial = partial.max(elements(&[self.images, tiles, x.channels, 2, size_of::<f32>()])?);
            }
        }
        let offset = self.scratch.bytes();
        let bytes = elements(&[partial.div_ceil(ALIGNMENT), ALIGNMENT])?;
        let end = offset.checked_add(bytes);
        let end = end.ok_or_else(|| Error::Internal(format!("{bytes} bytes of statistics overflow")))?;
        Ok(Steps { list: self.list, bytes: end, partial: Place::Scratch { offset, bytes } })
    }

    /// The blocks at the coarsest level. Takes over `x`.
    fn middle(&mut self, x: Tensor) -> Result<Tensor> {
        let x = self.res_block("mid.block_1", x, x.channels)?;
        let x = self.attention("mid.attn_1", x)?;
        self.res_block("mid.block_2", x, x.channels)
    }

    fn tensor(&mut self, height: usize, width: usize, channels: usize) -> Result<Tensor> {
        let bytes = elements(&[self.images, height, width, channels, self.element_bytes])?;
        let region = self.scratch.take(bytes)?;
        let place = Place::Scratch { offset: region.offset, bytes: region.bytes };
        Ok(Tensor { place, height, width, channels })
    }

    /// The bytes of `tensor` are free for what comes after the last step.
    fn release(&mut self, tensor: Tensor) {
        if let Place::Scratch { offset, .. } = tensor.place {
            self.scratch.give(offset);
        }
    }

    fn push(&mut self, name: &str, kind: Kind) {
        self.list.push(Step { label: format!("vae.{}.{name}", self.side), kind, tap: None });
    }

    /// The last step completes module `name`.
    fn tap(&mut self, name: &str) {
        if let Some(step) = self.list.last_mut() {
            step.tap = Some(format!("{}.{name}", self.side));
        }
    }

    /// Statistics of `x`, for the convolutions that follow.
    fn norm(&mut self, name: &str, x: Tensor, silu: bool) -> Result<Norm> {
        let bytes = elements(&[self.images, GROUPS, 2, size_of::<f32>()])?;
        let region = self.scratch.take(bytes)?;
        let place = Place::Scratch { offset: region.offset, bytes: region.bytes };
        let stats = Tensor { place, height: 1, width: 1, channels: 2 * GROUPS };
        self.push(name, Kind::Stats { x, stats });
        Ok(Norm { stats, name: format!("{}.{name}", self.side), silu })
    }

    #[allow(clippy::too_many_arguments, reason = "one argument per property of a convolution, all different")]
    fn conv(
        &mut self,
        name: &str,
        x: Tensor,
        norm: Option<Norm>,
        residual: Option<Tensor>,
        y: Tensor,
        ksize: usize,
        resample: Resample,
    ) {
        let weight = format!("{}.{name}", self.side);
        self.push(name, Kind::Conv { x, norm, weight, residual, y, ksize, resample });
    }

    /// `skip(x) + conv2(act(norm2(conv1(act(norm1(x))))))`, in the place of the skip, which is `x` itself where
    /// the number of channels stays. Takes over `x`.
    fn res_block(&mut self, name: &str, x: Tensor, channels: usize) -> Result<Tensor> {
        let at = |part: &str| format!("{name}.{part}");
        let norm1 = self.norm(&at("norm1"), x, true)?;
        let hidden = self.tensor(x.height, x.width, channels)?;
        let stats1 = norm1.stats;
        self.conv(&at("conv1"), x, Some(norm1), None, hidden, 3, Resample::Same);
        self.release(stats1);
        let norm2 = self.norm(&at("norm2"), hidden, true)?;
        let skip = if x.channels == channels {
            x
        } else {
            let skip = self.tensor(x.height, x.width, channels)?;
            self.conv(&at("nin_shortcut"), x, None, None, skip, 1, Resample::Same);
            self.release(x);
            skip
        };
        let stats2 = norm2.stats;
        self.conv(&at("conv2"), hidden, Some(norm2), Some(skip), skip, 3, Resample::Same);
        self.tap(name);
        self.release(stats2);
        self.release(hidden);
        Ok(skip)
    }

    /// `x + proj_out(attention(q, k, v of norm(x)))`, in the place of `x`.
    fn attention(&mut self, name: &str, x: Tensor) -> Result<Tensor> {
        let at = |part: &str| format!("{name}.{part}");
        let norm = self.norm(&at("norm"), x, false)?;
        let mut projections = [x; 3];
        for (projection, part) in projections.iter_mut().zip(["q", "k", "v"]) {
            *projection = self.tensor(x.height, x.width, x.channels)?;
            self.conv(&at(part), x, Some(norm.clone()), None, *projection, 1, Resample::Same);
        }
        self.release(norm.stats);
        let [q, k, v] = projections;
        let out = self.tensor(x.height, x.width, x.channels)?;
        self.push(&at("attention"), Kind::Attention { q, k, v, out });
        for projection in projections {
            self.release(projection);
        }
        self.conv(&at("proj_out"), out, None, Some(x), x, 1, Resample::Same);
        self.tap(name);
        self.release(out);
        Ok(x)
    }

    /// A convolution to twice or half the size. Takes over `x`.
    fn resample(&mut self, name: &str, x: Tensor, resample: Resample) -> Result<Tensor> {
        let (height, width) = match resample {
            Resample::Up => (elements(&[x.height, 2])?, elements(&[x.width, 2])?),
            Resample::Down => (x.height / 2, x.width / 2),
            Resample::Same => (x.height, x.width),
        };
        let y = self.tensor(height, width, x.channels)?;
        self.conv(&format!("{name}.conv"), x, None, None, y, 3, resample);
        self.tap(name);
        self.release(x);
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn config(text: &str) -> VaeConfig {
        VaeConfig::parse(Path::new("config.json"), text).unwrap()
    }

    const SMALL: &str = r#"{"ch": 32, "ch_mult": [1, 3, 2], "num_res_blocks": 1, "z_channels": 4}"#;

    #[test]
    fn module_names_and_their_order_are_the_official_ones() {
        let steps = Steps::decoder(&config(SMALL), 1, (2, 3), DType::F32, true).unwrap();
        let taps: Vec<&str> = steps.list.iter().filter_map(|s| s.tap.as_deref()).collect();
        let expected = [
            "decoder.conv_in",
            "decoder.mid.block_1",
            "decoder.mid.attn_1",
            "decoder.mid.block_2",
            "decoder.up.2.block.0",
            "decoder.up.2.block.1",
            "decoder.up.2.upsample",
            "decoder.up.1.block.0",
            "decoder.up.1.block.1",
            "decoder.up.1.upsample",
            "decoder.up.0.block.0",
            "decoder.up.0.block.1",
            "decoder.norm_out",
        ];
        assert_eq!(taps, expected);
        let shortcuts = |s: &&Step| s.label.ends_with("nin_shortcut");
        let shortcuts: Vec<&str> = steps.list.iter().filter(shortcuts).map(|s| s.label.as_str()).collect();
        assert_eq!(
            shortcuts,
            ["vae.decoder.up.1.block.0.nin_shortcut", "vae.decoder.up.0.block.0.nin_shortcut"]
        );
        let last = steps.list.last().and_then(|s| s.kind.output()).unwrap();
        assert_eq!((last.place, last.height, last.width, last.channels), (Place::Output, 8, 12, 3));
    }

    #[test]
    fn the_encoder_goes_the_other_way() {
        let steps = Steps::encoder(&config(SMALL), 1, (8, 12), DType::F32, true).unwrap();
        let taps: Vec<&str> = steps.list.iter().filter_map(|s| s.tap.as_deref()).collect();
        let expected = [
            "encoder.conv_in",
            "encoder.down.0.block.0",
            "encoder.down.0.downsample",
            "encoder.down.1.block.0",
            "encoder.down.1.downsample",
            "encoder.down.2.block.0",
            "encoder.mid.block_1",
            "encoder.mid.attn_1",
            "encoder.mid.block_2",
            "encoder.norm_out",
        ];
        assert_eq!(taps, expected);
        let last = steps.list.last().and_then(|s| s.kind.output()).unwrap();
        assert_eq!((last.place, last.height, last.width, last.channels), (Place::Output, 2, 3, 8));
        assert!(Steps::encoder(&config(SMALL), 1, (8, 14), DType::F32, false).is_err());
    }

    /// Reads of a step, and what it writes.
    fn accesses(kind: &Kind) -> (Vec<Tensor>, Tensor) {
        match kind {
            Kind::Stats { x, stats } => (vec![*x], *stats),
            Kind::Conv { x, norm, residual, y, .. } => {
                let norm = norm.as_ref().map(|n| n.stats);
                ([Some(*x), norm, *residual].into_iter().flatten().collect(), *y)
            }
            Kind::Attention { q, k, v, out } => (vec![*q, *k, *v], *out),
        }
    }

    #[test]
    fn a_tensor_keeps_its_bytes_until_its_last_reader() {
        for (text, size) in [(SMALL, (3, 5)), ("{}", (8, 8)), (r#"{"ch": 64, "ch_mult": [2]}"#, (1, 1))] {
            let config = config(text);
            let pixels = (size.0 * config.downsample_factor(), size.1 * config.downsample_factor());
            for probe in [false, true] {
                check_lives(&Steps::decoder(&config, 2, size, DType::Bf16, probe).unwrap());
                check_lives(&Steps::encoder(&config, 2, pixels, DType::Bf16, probe).unwrap());
            }
        }
    }

    fn check_lives(steps: &Steps) {
        // What is intact at this point; a write ends all that it overlaps.
        let mut intact: Vec<Tensor> = Vec::new();
        for step in &steps.list {
            let (reads, write) = accesses(&step.kind);
            for read in reads.iter().filter(|r| r.place != Place::Input) {
                assert!(intact.contains(read), "{} reads {read:?}, which is gone", step.label);
            }
            let Place::Scratch { offset, bytes } = write.place else { continue };
            assert!(offset + bytes <= steps.bytes && offset % ALIGNMENT == 0);
            intact.retain(|t| match t.place {
                Place::Scratch { offset: o, bytes: b } => o + b <= offset || offset + bytes <= o,
                _ => true,
            });
            intact.push(write);
        }
    }

    #[test]
    fn a_512x512_picture_takes_what_its_largest_block_holds() {
        let of = |images, probe| {
            Steps::decoder(&config("{}"), images, (64, 64), DType::Bf16, probe).unwrap().bytes
        };
        // Input of 256 channels, hidden activation and skip of 128 each; statistics lie in a gap or after them.
        let block = 512 * 512 * (256 + 128 + 128) * 2;
        // First fit leaves gaps: up to a tenth above what the largest block needs.
        assert!((block..block + block / 10).contains(&of(1, false)), "{} for {block}", of(1, false));
        assert_eq!(of(1, true), of(1, false), "a probe fits into what is planned anyway");
        assert!(of(3, false) <= 3 * of(1, false));
        // The encoder's largest block makes 128 channels of 128.
        let encoder = Steps::encoder(&config("{}"), 1, (512, 512), DType::Bf16, false).unwrap().bytes;
        assert!(encoder < of(1, false), "{encoder}");
    }
}
