//! The decoder as a list of steps with places in a scratch memory: what runs in which order, and which bytes
//! are whose in between. Knows the config; knows no device, no address and no weight.

use crate::error::{Error, Result};
use crate::model::config::VaeConfig;
use crate::ops::DType;

/// GroupNorm groups in every norm of the VAE.
pub const GROUPS: usize = 32;
/// Added to the variance in every norm of the VAE.
pub const EPS: f32 = 1e-6;

/// Every tensor starts at a multiple of this, as a fresh allocation would.
const ALIGNMENT: usize = 256;

/// The product of `dims`, or an error where a picture is too large to be counted.
pub fn elements(dims: &[usize]) -> Result<usize> {
    let product = dims.iter().try_fold(1usize, |product, &d| product.checked_mul(d));
    product.ok_or_else(|| Error::Internal(format!("a tensor of shape {dims:?} overflows")))
}

/// Where a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The decoder's input.
    Latent,
    /// The decoder's output.
    Image,
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
        upsample: bool,
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

/// The decoder of some pictures.
pub struct Steps {
    pub list: Vec<Step>,
    /// Bytes of scratch.
    pub bytes: usize,
}

impl Steps {
    /// The steps for `images` latents of (rows, columns). With `probe` the last norm is also stored.
    pub fn of(
        config: &VaeConfig,
        images: usize,
        (height, width): (usize, usize),
        dtype: DType,
        probe: bool,
    ) -> Result<Steps> {
        let channels = &config.block_out_channels;
        let (Some(&finest), Some(&coarsest)) = (channels.first(), channels.last()) else {
            return Err(Error::Internal("a VAE without levels".into()));
        };
        let mut b =
            Builder { images, element_bytes: dtype.bytes(), list: Vec::new(), scratch: Scratch::default() };

        let latent = Tensor { place: Place::Latent, height, width, channels: config.z_channels };
        let mut x = b.tensor(height, width, coarsest)?;
        b.conv("conv_in", latent, None, None, x, 3, false);
        b.tap("conv_in");
        x = b.res_block("mid.block_1", x, coarsest)?;
        x = b.attention("mid.attn_1", x)?;
        x = b.res_block("mid.block_2", x, coarsest)?;
        for (level, &out) in channels.iter().enumerate().rev() {
            for block in 0..config.num_res_blocks + 1 {
                x = b.res_block(&format!("up.{level}.block.{block}"), x, out)?;
            }
            if level > 0 {
                x = b.upsample(&format!("up.{level}.upsample"), x)?;
            }
        }
        let norm = b.norm("norm_out", x, true)?;
        if probe {
            let y = b.tensor(x.height, x.width, finest)?;
            let plain = Norm { silu: false, ..norm.clone() };
            b.conv("norm_out.probe", x, Some(plain), None, y, 1, false);
            b.tap("norm_out");
            if let Some(Step { kind: Kind::Conv { weight, .. }, .. }) = b.list.last_mut() {
                *weight = super::PROBE.into();
            }
            b.release(y);
        }
        let image = Tensor { place: Place::Image, channels: VaeConfig::IMAGE_CHANNELS, ..x };
        b.conv("conv_out", x, Some(norm), None, image, 3, false);
        Ok(Steps { list: b.list, bytes: b.scratch.bytes() })
    }
}

struct Builder {
    images: usize,
    element_bytes: usize,
    list: Vec<Step>,
    scratch: Scratch,
}

impl Builder {
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
        self.list.push(Step { label: format!("vae.decoder.{name}"), kind, tap: None });
    }

    /// The last step completes module `name`.
    fn tap(&mut self, name: &str) {
        if let Some(step) = self.list.last_mut() {
            step.tap = Some(format!("decoder.{name}"));
        }
    }

    /// Statistics of `x`, for the convolutions that follow.
    fn norm(&mut self, name: &str, x: Tensor, silu: bool) -> Result<Norm> {
        let bytes = elements(&[self.images, GROUPS, 2, size_of::<f32>()])?;
        let region = self.scratch.take(bytes)?;
        let place = Place::Scratch { offset: region.offset, bytes: region.bytes };
        let stats = Tensor { place, height: 1, width: 1, channels: 2 * GROUPS };
        self.push(name, Kind::Stats { x, stats });
        Ok(Norm { stats, name: format!("decoder.{name}"), silu })
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
        upsample: bool,
    ) {
        let weight = format!("decoder.{name}");
        self.push(name, Kind::Conv { x, norm, weight, residual, y, ksize, upsample });
    }

    /// `skip(x) + conv2(act(norm2(conv1(act(norm1(x))))))`, in the place of the skip, which is `x` itself where
    /// the number of channels stays. Takes over `x`.
    fn res_block(&mut self, name: &str, x: Tensor, channels: usize) -> Result<Tensor> {
        let at = |part: &str| format!("{name}.{part}");
        let norm1 = self.norm(&at("norm1"), x, true)?;
        let hidden = self.tensor(x.height, x.width, channels)?;
        let stats1 = norm1.stats;
        self.conv(&at("conv1"), x, Some(norm1), None, hidden, 3, false);
        self.release(stats1);
        let skip = if x.channels == channels {
            x
        } else {
            let skip = self.tensor(x.height, x.width, channels)?;
            self.conv(&at("nin_shortcut"), x, None, None, skip, 1, false);
            self.release(x);
            skip
        };
        let norm2 = self.norm(&at("norm2"), hidden, true)?;
        let stats2 = norm2.stats;
        self.conv(&at("conv2"), hidden, Some(norm2), Some(skip), skip, 3, false);
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
            self.conv(&at(part), x, Some(norm.clone()), None, *projection, 1, false);
        }
        self.release(norm.stats);
        let [q, k, v] = projections;
        let out = self.tensor(x.height, x.width, x.channels)?;
        self.push(&at("attention"), Kind::Attention { q, k, v, out });
        for projection in projections {
            self.release(projection);
        }
        self.conv(&at("proj_out"), out, None, Some(x), x, 1, false);
        self.tap(name);
        self.release(out);
        Ok(x)
    }

    /// Twice the size, then a convolution. Takes over `x`.
    fn upsample(&mut self, name: &str, x: Tensor) -> Result<Tensor> {
        let y = self.tensor(elements(&[x.height, 2])?, elements(&[x.width, 2])?, x.channels)?;
        self.conv(&format!("{name}.conv"), x, None, None, y, 3, true);
        self.tap(name);
        self.release(x);
        Ok(y)
    }
}

/// Bytes of a memory.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    pub offset: usize,
    pub bytes: usize,
}

/// A memory that is as large as the most that was in use at once; first fit.
#[derive(Debug, Default)]
pub struct Scratch {
    /// In use, by offset.
    taken: Vec<Region>,
    bytes: usize,
}

impl Scratch {
    /// The lowest free place for `bytes`.
    pub fn take(&mut self, bytes: usize) -> Result<Region> {
        let mut offset = 0usize;
        let mut index = 0;
        for (i, region) in self.taken.iter().enumerate() {
            if offset.checked_add(bytes).is_some_and(|end| end <= region.offset) {
                break;
            }
            offset = (region.offset + region.bytes).next_multiple_of(ALIGNMENT);
            index = i + 1;
        }
        let region = Region { offset, bytes };
        let end = offset.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(ALIGNMENT));
        let end = end.ok_or_else(|| Error::Internal(format!("{bytes} bytes of VAE activations overflow")))?;
        self.bytes = self.bytes.max(end);
        self.taken.insert(index, region);
        Ok(region)
    }

    /// Frees the region at `offset`.
    pub fn give(&mut self, offset: usize) {
        self.taken.retain(|region| region.offset != offset);
    }

    /// The most that was in use.
    pub fn bytes(&self) -> usize {
        self.bytes
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
        let steps = Steps::of(&config(SMALL), 1, (2, 3), DType::F32, true).unwrap();
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
        assert_eq!((last.place, last.height, last.width, last.channels), (Place::Image, 8, 12, 3));
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
            for probe in [false, true] {
                let steps = Steps::of(&config(text), 2, size, DType::Bf16, probe).unwrap();
                // What is intact at this point; a write ends all that it overlaps.
                let mut intact: Vec<Tensor> = Vec::new();
                for step in &steps.list {
                    let (reads, write) = accesses(&step.kind);
                    for read in reads.iter().filter(|r| r.place != Place::Latent) {
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
        }
    }

    #[test]
    fn a_512x512_picture_takes_what_its_largest_block_holds() {
        let of =
            |images, probe| Steps::of(&config("{}"), images, (64, 64), DType::Bf16, probe).unwrap().bytes;
        // Input of 256 channels, hidden activation and skip of 128 each; statistics lie in a gap or after them.
        let block = 512 * 512 * (256 + 128 + 128) * 2;
        // First fit leaves gaps: up to a tenth above what the largest block needs.
        assert!((block..block + block / 10).contains(&of(1, false)), "{} for {block}", of(1, false));
        assert_eq!(of(1, true), of(1, false), "a probe fits into what is planned anyway");
        assert!(of(3, false) <= 3 * of(1, false));
    }

    #[test]
    fn scratch_gives_the_lowest_gap_and_refuses_what_overflows() {
        let mut scratch = Scratch::default();
        let offsets: Vec<usize> = [100, 300, 1].map(|bytes| scratch.take(bytes).unwrap().offset).to_vec();
        assert_eq!(offsets, [0, 256, 768]);
        scratch.give(256);
        assert_eq!(scratch.take(513).unwrap().offset, 1024);
        assert_eq!(scratch.take(512).unwrap().offset, 256);
        assert!(scratch.take(usize::MAX - 100).is_err());
        assert_eq!(scratch.bytes(), 1792);
    }
}
