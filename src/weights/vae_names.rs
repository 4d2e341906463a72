//! The tensors of the VAE. Slots carry the official names (`encoder.down.0.block.1.conv1.weight`); the names that
//! diffusers gives the same tensors are aliases.

use super::slots::{Expected, Part, Slots, TensorSpec};
use super::{Checkpoint, TensorView};
use crate::error::Result;
use crate::model::config::VaeConfig;

/// Every tensor that `config` asks for, encoder first, in the order of execution.
pub fn vae_tensors(config: &VaeConfig) -> Vec<TensorSpec> {
    expected_tensors(config).into_iter().map(|expected| expected.spec).collect()
}

fn expected_tensors(config: &VaeConfig) -> Vec<Expected> {
    let channels = &config.block_out_channels;
    let levels = channels.len();
    let (finest, coarsest) = (channels[0], channels[levels - 1]);

    let mut list = List { part: Part::VaeEncoder, side: "encoder", expected: Vec::new() };
    list.conv("conv_in", "conv_in", config.ch, VaeConfig::IMAGE_CHANNELS, 3);
    let mut width = config.ch;
    for (level, &out) in channels.iter().enumerate() {
        for block in 0..config.num_res_blocks {
            let (name, alias) =
                (format!("down.{level}.block.{block}"), format!("down_blocks.{level}.resnets.{block}"));
            list.res_block(&name, &alias, out, width);
            width = out;
        }
        if level + 1 < levels {
            let alias = format!("down_blocks.{level}.downsamplers.0.conv");
            list.conv(&format!("down.{level}.downsample.conv"), &alias, out, out, 3);
        }
    }
    list.middle(coarsest);
    list.norm("norm_out", "conv_norm_out", coarsest);
    // mean and log variance
    list.conv("conv_out", "conv_out", 2 * config.z_channels, coarsest, 3);

    (list.part, list.side) = (Part::VaeDecoder, "decoder");
    list.conv("conv_in", "conv_in", coarsest, config.z_channels, 3);
    list.middle(coarsest);
    let mut width = coarsest;
    for (level, &out) in channels.iter().enumerate().rev() {
        // Official indices name the level, diffusers' the order of execution: the one is the other reversed.
        let step = levels - 1 - level;
        for block in 0..config.num_res_blocks + 1 {
            let (name, alias) =
                (format!("up.{level}.block.{block}"), format!("up_blocks.{step}.resnets.{block}"));
            list.res_block(&name, &alias, out, width);
            width = out;
        }
        if level > 0 {
            let alias = format!("up_blocks.{step}.upsamplers.0.conv");
            list.conv(&format!("up.{level}.upsample.conv"), &alias, out, out, 3);
        }
    }
    list.norm("norm_out", "conv_norm_out", finest);
    list.conv("conv_out", "conv_out", VaeConfig::IMAGE_CHANNELS, finest, 3);
    list.expected
}

struct List {
    part: Part,
    /// `encoder` or `decoder`, the first component of every name.
    side: &'static str,
    expected: Vec<Expected>,
}

impl List {
    /// `weight` of the given shape and `bias` [shape[0]].
    fn add(&mut self, name: &str, alias: &str, shape: &[usize], pointwise: bool) {
        for (what, shape) in [("weight", shape), ("bias", &shape[..1])] {
            let alias = (alias != name).then(|| format!("{}.{alias}.{what}", self.side));
            self.expected.push(Expected {
                spec: TensorSpec {
                    name: format!("{}.{name}.{what}", self.side),
                    shape: shape.to_vec(),
                    part: self.part,
                },
                aliases: alias.into_iter().collect(),
                optional: false,
                pointwise: pointwise && what == "weight",
            });
        }
    }

    /// `[O, I, side, side]`.
    fn conv(&mut self, name: &str, alias: &str, outputs: usize, inputs: usize, side: usize) {
        self.add(name, alias, &[outputs, inputs, side, side], false);
    }

    fn norm(&mut self, name: &str, alias: &str, channels: usize) {
        self.add(name, alias, &[channels], false);
    }

    fn res_block(&mut self, name: &str, alias: &str, outputs: usize, inputs: usize) {
        let at = |what: &str| (format!("{name}.{what}"), format!("{alias}.{what}"));
        let (n, a) = at("norm1");
        self.norm(&n, &a, inputs);
        let (n, a) = at("conv1");
        self.conv(&n, &a, outputs, inputs, 3);
        let (n, a) = at("norm2");
        self.norm(&n, &a, outputs);
        let (n, a) = at("conv2");
        self.conv(&n, &a, outputs, outputs, 3);
        if inputs != outputs {
            self.conv(&format!("{name}.nin_shortcut"), &format!("{alias}.conv_shortcut"), outputs, inputs, 1);
        }
    }

    fn middle(&mut self, channels: usize) {
        self.res_block("mid.block_1", "mid_block.resnets.0", channels, channels);
        let (name, alias) = ("mid.attn_1", "mid_block.attentions.0");
        self.norm(&format!("{name}.norm"), &format!("{alias}.group_norm"), channels);
        // 1x1 convolutions in the one, linear layers in the other: [C, C] here.
        for (what, other) in [("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")] {
            self.add(&format!("{name}.{what}"), &format!("{alias}.{other}"), &[channels, channels], true);
        }
        self.res_block("mid.block_2", "mid_block.resnets.1", channels, channels);
    }
}

/// The checkpoint of a VAE: every tensor is there once and has the shape that follows from the config. The whole
/// encoder may be missing; such a VAE makes images from text but reads none.
pub struct VaeWeights {
    checkpoint: Checkpoint,
    slots: Slots,
    has_encoder: bool,
}

impl VaeWeights {
    /// Checks `checkpoint` against `config`.
    pub fn new(checkpoint: Checkpoint, config: &VaeConfig) -> Result<VaeWeights> {
        let has_encoder = checkpoint.tensors.iter().any(|tensor| tensor.name.starts_with("encoder."));
        let mut expected = expected_tensors(config);
        if !has_encoder {
            expected.retain(|expected| expected.spec.part != Part::VaeEncoder);
        }
        let slots = Slots::bind(&checkpoint, expected)?;
        Ok(VaeWeights { checkpoint, slots, has_encoder })
    }

    /// Shapes without values; see `Checkpoint::of_shapes`.
    pub(crate) fn of_shapes(config: &VaeConfig) -> Result<VaeWeights> {
        VaeWeights::new(Checkpoint::of_shapes(&vae_tensors(config))?, config)
    }

    /// The tensor of this official name. The weights of the attention's q, k, v and proj_out are [C, C].
    pub fn get(&self, name: &str) -> Result<TensorView<'_>> {
        self.slots.find(&self.checkpoint, name).ok_or_else(|| self.checkpoint.missing(name))
    }

    /// Whether pictures can be encoded (editing needs it).
    pub fn has_encoder(&self) -> bool {
        self.has_encoder
    }

    /// The tensors that are there, in the order of execution.
    pub fn specs(&self) -> &[TensorSpec] {
        self.slots.specs()
    }

    /// The files underneath.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn parameter_counts_of_the_default_vae() {
        let config = VaeConfig::parse(Path::new("config.json"), "{}").unwrap();
        let count = |part: Part| -> usize {
            vae_tensors(&config).iter().filter(|spec| spec.part == part).map(TensorSpec::elements).sum()
        };
        assert_eq!(count(Part::VaeEncoder), 34_274_208);
        assert_eq!(count(Part::VaeDecoder), 49_545_475);
    }

    #[test]
    fn a_vae_of_one_level_has_no_resampling() {
        let config = VaeConfig::parse(Path::new("config.json"), r#"{"ch":32,"ch_mult":[2]}"#).unwrap();
        let specs = vae_tensors(&config);
        assert!(!specs.iter().any(|spec| spec.name.contains("sample")));
        let shape = |name: &str| specs.iter().find(|spec| spec.name == name).map(|spec| &spec.shape[..]);
        assert_eq!(shape("encoder.conv_in.weight"), Some(&[32, 3, 3, 3][..]));
        assert_eq!(shape("encoder.down.0.block.0.nin_shortcut.weight"), Some(&[64, 32, 1, 1][..]));
        assert_eq!(shape("decoder.conv_out.weight"), Some(&[3, 64, 3, 3][..]));
        assert_eq!(config.downsample_factor(), 1);
    }
}
