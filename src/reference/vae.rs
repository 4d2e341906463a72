//! The whole VAE encoder and decoder, module by module as the official code is built, on the reference ops.

use super::Precision;
use super::conv2d::{Norm, Resample, Shape, conv2d};
use super::group_stats::group_stats;
use super::vae_attention::vae_attention;
use crate::error::Result;
use crate::model::config::VaeConfig;

const GROUPS: usize = 32;
const EPS: f32 = 1e-6;

/// An activation `[images, height, width, channels]`.
#[derive(Clone, Debug)]
pub struct Map<T> {
    /// Pictures.
    pub images: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Channels.
    pub channels: usize,
    /// Channels last.
    pub values: Vec<T>,
}

/// Encoder and decoder of one config. `weight` gives a tensor by its official name, `decoder.conv_in.weight`, with
/// convolutions as `[O, kh, kw, I]`; `tap` is shown the output of every module, under its name.
pub struct Vae<'a, P: Precision> {
    /// Sizes.
    pub config: &'a VaeConfig,
    /// Weights by official name.
    pub weight: &'a dyn Fn(&str) -> Result<Vec<f32>>,
    /// Called with every module's output.
    pub tap: &'a mut dyn FnMut(&str, &Map<P::T>),
}

impl<P: Precision> Vae<'_, P> {
    /// Latent `[B, h, w, z_channels]` to image `[B, H, W, 3]`, not clamped.
    pub fn decode(&mut self, latent: &Map<P::T>) -> Result<Map<P::T>> {
        let channels = self.config.block_out_channels.clone();
        let coarsest = channels.last().copied().unwrap_or(0);
        let mut x = self.conv("decoder.conv_in", latent, None, coarsest, 3, Resample::Same, None)?;
        (self.tap)("decoder.conv_in", &x);
        x = self.middle("decoder", &x)?;
        for (level, &out) in channels.iter().enumerate().rev() {
            for block in 0..=self.config.num_res_blocks {
                x = self.res_block(&format!("decoder.up.{level}.block.{block}"), &x, out)?;
            }
            if level > 0 {
                let name = format!("decoder.up.{level}.upsample");
                x = self.conv(&format!("{name}.conv"), &x, None, out, 3, Resample::Up, None)?;
                (self.tap)(&name, &x);
            }
        }
        self.conv(
            "decoder.conv_out",
            &x,
            Some(("decoder.norm_out", true)),
            VaeConfig::IMAGE_CHANNELS,
            3,
            Resample::Same,
            None,
        )
    }

    /// Pixels `[B, H, W, 3]` from -1 to 1, sides divisible by the VAE's factor, to moments `[B, h, w, 2 z_channels]`.
    pub fn encode(&mut self, pixels: &Map<P::T>) -> Result<Map<P::T>> {
        let channels = self.config.block_out_channels.clone();
        let mut x = self.conv("encoder.conv_in", pixels, None, self.config.ch, 3, Resample::Same, None)?;
        (self.tap)("encoder.conv_in", &x);
        for (level, &out) in channels.iter().enumerate() {
            for block in 0..self.config.num_res_blocks {
                x = self.res_block(&format!("encoder.down.{level}.block.{block}"), &x, out)?;
            }
            if level + 1 < channels.len() {
                let name = format!("encoder.down.{level}.downsample");
                x = self.conv(&format!("{name}.conv"), &x, None, out, 3, Resample::Down, None)?;
                (self.tap)(&name, &x);
            }
        }
        x = self.middle("encoder", &x)?;
        let (norm, moments) = (Some(("encoder.norm_out", true)), 2 * self.config.z_channels);
        self.conv("encoder.conv_out", &x, norm, moments, 3, Resample::Same, None)
    }

    /// The blocks at the coarsest level.
    fn middle(&mut self, side: &str, x: &Map<P::T>) -> Result<Map<P::T>> {
        let x = self.res_block(&format!("{side}.mid.block_1"), x, x.channels)?;
        let x = self.attention(&format!("{side}.mid.attn_1"), &x)?;
        self.res_block(&format!("{side}.mid.block_2"), &x, x.channels)
    }

    fn res_block(&mut self, name: &str, x: &Map<P::T>, channels: usize) -> Result<Map<P::T>> {
        let at = |part: &str| format!("{name}.{part}");
        let norm1 = at("norm1");
        let hidden = self.conv(&at("conv1"), x, Some((&norm1, true)), channels, 3, Resample::Same, None)?;
        let skip = if x.channels == channels {
            x.clone()
        } else {
            self.conv(&at("nin_shortcut"), x, None, channels, 1, Resample::Same, None)?
        };
        let norm2 = at("norm2");
        let y =
            self.conv(&at("conv2"), &hidden, Some((&norm2, true)), channels, 3, Resample::Same, Some(&skip))?;
        (self.tap)(name, &y);
        Ok(y)
    }

    fn attention(&mut self, name: &str, x: &Map<P::T>) -> Result<Map<P::T>> {
        let at = |part: &str| format!("{name}.{part}");
        let norm = at("norm");
        let mut project =
            |part: &str| self.conv(&at(part), x, Some((&norm, false)), x.channels, 1, Resample::Same, None);
        let (q, k, v) = (project("q")?, project("k")?, project("v")?);
        let scale = 1.0 / (x.channels as f32).sqrt();
        let pixels = x.height * x.width;
        let values = vae_attention::<P>(&q.values, &k.values, &v.values, pixels, x.channels, scale);
        let context = Map { values, ..q };
        let y = self.conv(&at("proj_out"), &context, None, x.channels, 1, Resample::Same, Some(x))?;
        (self.tap)(name, &y);
        Ok(y)
    }

    #[allow(clippy::too_many_arguments, reason = "one argument per property of a convolution, all different")]
    fn conv(
        &mut self,
        name: &str,
        x: &Map<P::T>,
        norm: Option<(&str, bool)>,
        channels: usize,
        ksize: usize,
        resample: Resample,
        residual: Option<&Map<P::T>>,
    ) -> Result<Map<P::T>> {
        let load = |name: String| Ok::<_, crate::Error>(P::load_all(&(self.weight)(&name)?));
        let (height, width) = match resample {
            Resample::Same => (x.height, x.width),
            Resample::Up => (x.height * 2, x.width * 2),
            Resample::Down => (x.height / 2, x.width / 2),
        };
        let shape =
            Shape { images: x.images, height, width, c_in: x.channels, c_out: channels, ksize, resample };
        let norm = match norm {
            None => None,
            Some((name, silu)) => {
                let stats = group_stats::<P>(&x.values, x.images, x.channels, GROUPS, EPS);
                Some((name, stats, load(format!("{name}.weight"))?, load(format!("{name}.bias"))?, silu))
            }
        };
        let norm = norm.as_ref().map(|(name, stats, gamma, beta, silu)| {
            (name, Norm { stats, gamma, beta, groups: GROUPS, silu: *silu })
        });
        // The last norm has a name of its own among the recorded outputs: what it gives before its swish.
        if let Some((name, norm)) = &norm
            && name.ends_with(".norm_out")
        {
            let plain = Norm { silu: false, ..*norm };
            let image_len = x.values.len() / x.images;
            let images = x.values.chunks(image_len).enumerate();
            let values = images
                .flat_map(|(i, image)| super::conv2d::normalise::<P>(&plain, i, image, x.channels))
                .map(P::store)
                .collect();
            (self.tap)(name, &Map { values, ..*x });
        }
        let norm = norm.map(|(_, norm)| norm);
        let (w, bias) = (load(format!("{name}.weight"))?, load(format!("{name}.bias"))?);
        let residual = residual.map(|r| r.values.as_slice());
        let values = conv2d::<P>(&shape, &x.values, norm.as_ref(), &w, &bias, residual);
        Ok(Map { images: x.images, height: shape.height, width: shape.width, channels, values })
    }
}
