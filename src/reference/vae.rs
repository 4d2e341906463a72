//! The whole VAE decoder, module by module as the official code is built, on the reference ops.

use super::Precision;
use super::conv2d::{Norm, Shape, conv2d};
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

/// The decoder of one config. `weight` gives a tensor by its official name, `decoder.conv_in.weight`, with
/// convolutions as `[O, kh, kw, I]`; `tap` is shown the output of every module, under its name.
pub struct Decoder<'a, P: Precision> {
    /// Sizes.
    pub config: &'a VaeConfig,
    /// Weights by official name.
    pub weight: &'a dyn Fn(&str) -> Result<Vec<f32>>,
    /// Called with every module's output.
    pub tap: &'a mut dyn FnMut(&str, &Map<P::T>),
}

impl<P: Precision> Decoder<'_, P> {
    /// Latent `[B, h, w, z_channels]` to image `[B, H, W, 3]`, not clamped.
    pub fn decode(&mut self, latent: &Map<P::T>) -> Result<Map<P::T>> {
        let channels = self.config.block_out_channels.clone();
        let coarsest = channels.last().copied().unwrap_or(0);
        let mut x = self.conv("decoder.conv_in", latent, None, coarsest, 3, false, None)?;
        (self.tap)("decoder.conv_in", &x);
        x = self.res_block("decoder.mid.block_1", &x, coarsest)?;
        x = self.attention("decoder.mid.attn_1", &x)?;
        x = self.res_block("decoder.mid.block_2", &x, coarsest)?;
        for (level, &out) in channels.iter().enumerate().rev() {
            for block in 0..=self.config.num_res_blocks {
                x = self.res_block(&format!("decoder.up.{level}.block.{block}"), &x, out)?;
            }
            if level > 0 {
                let name = format!("decoder.up.{level}.upsample");
                x = self.conv(&format!("{name}.conv"), &x, None, out, 3, true, None)?;
                (self.tap)(&name, &x);
            }
        }
        self.conv(
            "decoder.conv_out",
            &x,
            Some(("decoder.norm_out", true)),
            VaeConfig::IMAGE_CHANNELS,
            3,
            false,
            None,
        )
    }

    fn res_block(&mut self, name: &str, x: &Map<P::T>, channels: usize) -> Result<Map<P::T>> {
        let at = |part: &str| format!("{name}.{part}");
        let norm1 = at("norm1");
        let hidden = self.conv(&at("conv1"), x, Some((&norm1, true)), channels, 3, false, None)?;
        let skip = if x.channels == channels {
            x.clone()
        } else {
            self.conv(&at("nin_shortcut"), x, None, channels, 1, false, None)?
        };
        let norm2 = at("norm2");
        let y = self.conv(&at("conv2"), &hidden, Some((&norm2, true)), channels, 3, false, Some(&skip))?;
        (self.tap)(name, &y);
        Ok(y)
    }

    fn attention(&mut self, name: &str, x: &Map<P::T>) -> Result<Map<P::T>> {
        let at = |part: &str| format!("{name}.{part}");
        let norm = at("norm");
        let mut project =
            |part: &str| self.conv(&at(part), x, Some((&norm, false)), x.channels, 1, false, None);
        let (q, k, v) = (project("q")?, project("k")?, project("v")?);
        let scale = 1.0 / (x.channels as f32).sqrt();
        let pixels = x.height * x.width;
        let values = vae_attention::<P>(&q.values, &k.values, &v.values, pixels, x.channels, scale);
        let context = Map { values, ..q };
        let y = self.conv(&at("proj_out"), &context, None, x.channels, 1, false, Some(x))?;
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
        upsample: bool,
        residual: Option<&Map<P::T>>,
    ) -> Result<Map<P::T>> {
        let load = |name: String| Ok::<_, crate::Error>(P::load_all(&(self.weight)(&name)?));
        let factor = if upsample { 2 } else { 1 };
        let shape = Shape {
            images: x.images,
            height: x.height * factor,
            width: x.width * factor,
            c_in: x.channels,
            c_out: channels,
            ksize,
            upsample,
        };
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
            && **name == "decoder.norm_out"
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
