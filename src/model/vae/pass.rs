//! Steps bound to addresses and weights.

use super::steps::{self, Kind, Place, Steps, Tensor};
use crate::device::{NodeList, Span};
use crate::error::{Error, Result};
use crate::model::upload::Uploader;
use crate::ops::{self, Launch};
use crate::reference::conv2d::{Resample, Shape as ConvShape};
use crate::weights::{Part, VaeWeights};
use std::collections::HashMap;

/// Name of the identity that stores a norm; no checkpoint has it.
pub(super) const PROBE: &str = "probe";

/// Weights of the encoder or of the decoder, by official name, `decoder.conv_in.weight`; convolutions as
/// `[O, kh, kw, I]`.
pub(super) struct Tensors(HashMap<String, Span>);

impl Tensors {
    /// Uploads one half of the VAE; its last norm has `channels`.
    pub(super) fn load(
        weights: &VaeWeights,
        part: Part,
        channels: usize,
        up: &mut Uploader<'_>,
    ) -> Result<Tensors> {
        let mut tensors = HashMap::new();
        for spec in weights.specs().iter().filter(|spec| spec.part == part) {
            let view = weights.get(&spec.name)?;
            let label = format!("vae.{}", spec.name);
            let span = match *spec.shape.as_slice() {
                // Random ones are as many values in whichever order.
                [o, i, kh, kw] if !up.is_random() => up.convolution(&label, &view, [o, i, kh, kw])?,
                _ => up.one(&label, &view)?,
            };
            tensors.insert(spec.name.clone(), span);
        }
        // The probe of norm_out is a convolution by one.
        let mut probe =
            |what: &str, rows: usize, value: &(dyn Fn(usize, usize) -> f32 + Sync)| -> Result<()> {
                let name = format!("{PROBE}.{what}");
                let span = up.rows(&format!("vae.{name}"), (rows, channels), |row, out| {
                    out.extend((0..channels).map(|column| value(row, column)));
                    Ok(())
                })?;
                tensors.insert(name, span);
                Ok(())
            };
        probe("weight", channels, &|row, column| f32::from(u8::from(row == column)))?;
        probe("bias", 1, &|_, _| 0.0)?;
        Ok(Tensors(tensors))
    }

    fn get(&self, name: &str) -> Result<Span> {
        let missing = || Error::Internal(format!("the VAE has no tensor {name}"));
        self.0.get(name).copied().ok_or_else(missing)
    }
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

/// The steps of some pictures, bound to addresses.
pub(super) struct Pass<'a> {
    pub(super) tensors: &'a Tensors,
    pub(super) launch: &'a Launch<'a>,
    pub(super) input: Span,
    pub(super) output: Span,
    pub(super) scratch: Span,
    pub(super) images: usize,
    /// Number of the pass's first picture.
    pub(super) first_image: usize,
}

impl Pass<'_> {
    fn span(&self, tensor: &Tensor) -> Result<Span> {
        match tensor.place {
            Place::Input => Ok(self.input),
            Place::Output => Ok(self.output),
            Place::Scratch { offset, bytes } => {
                if offset + bytes > self.scratch.bytes {
                    return Err(Error::Internal(format!("scratch at {offset} of {}", self.scratch.bytes)));
                }
                Ok(self.scratch.slice(offset, bytes))
            }
        }
    }

    /// Records every step; returns what can be read in between.
    pub(super) fn record(&self, list: &mut NodeList, steps: &Steps) -> Result<Vec<Tap>> {
        let mut taps = Vec::new();
        for (index, step) in steps.list.iter().enumerate() {
            let first = match step.kind {
                Kind::Stats { .. } => index.checked_sub(1),
                _ => Some(index),
            };
            let partial = first.map(|first| self.partial(steps, first)).transpose()?.flatten();
            let node = self.record_step(list, &step.label, &step.kind, partial)?;
            if let (Some(name), Some(tensor)) = (&step.tap, step.kind.output()) {
                taps.push(Tap {
                    name: name.clone(),
                    node,
                    label: step.label.clone(),
                    first_image: self.first_image,
                    shape: [self.images, tensor.height, tensor.width, tensor.channels],
                    span: self.span(tensor)?,
                });
            }
        }
        Ok(taps)
    }

    /// Where step `index` leaves the statistics of its tiles, if it is a convolution that makes them and the step
    /// after it wants them.
    fn partial(&self, steps: &Steps, index: usize) -> Result<Option<Span>> {
        let Some([step, next]) = steps.list.get(index..index + 2) else { return Ok(None) };
        let (Kind::Conv { x, y, ksize, resample, .. }, Kind::Stats { x: wanted, .. }) =
            (&step.kind, &next.kind)
        else {
            return Ok(None);
        };
        if y != wanted || !ops::conv2d::makes_partial(self.launch, &self.conv_shape(x, y, *ksize, *resample))?
        {
            return Ok(None);
        }
        self.span(&Tensor { place: steps.partial, ..*y }).map(Some)
    }

    fn conv_shape(&self, x: &Tensor, y: &Tensor, ksize: usize, resample: Resample) -> ConvShape {
        ConvShape {
            images: self.images,
            height: y.height,
            width: y.width,
            c_in: x.channels,
            c_out: y.channels,
            ksize,
            resample,
        }
    }

    fn record_step(
        &self,
        list: &mut NodeList,
        label: &str,
        kind: &Kind,
        partial: Option<Span>,
    ) -> Result<usize> {
        let node = match (kind, partial) {
            (Kind::Stats { x, stats }, Some(partial)) => {
                let args = ops::merge_stats::Args {
                    partial,
                    stats: self.span(stats)?,
                    images: self.images,
                    height: x.height,
                    width: x.width,
                    channels: x.channels,
                    groups: steps::GROUPS,
                    eps: steps::EPS,
                };
                ops::merge_stats::node(self.launch, label, &args)?
            }
            (Kind::Stats { x, stats }, None) => {
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
            (Kind::Conv { x, norm, weight, residual, y, ksize, resample }, partial) => {
                let weights = |what: &str| self.tensors.get(&format!("{weight}.{what}"));
                let norm = match norm {
                    None => None,
                    Some(norm) => Some(ops::conv2d::Norm {
                        stats: self.span(&norm.stats)?,
                        gamma: self.tensors.get(&format!("{}.weight", norm.name))?,
                        beta: self.tensors.get(&format!("{}.bias", norm.name))?,
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
                    partial,
                    shape: self.conv_shape(x, y, *ksize, *resample),
                };
                ops::conv2d::node(self.launch, label, &args)?
            }
            (Kind::Attention { q, k, v, out }, _) => {
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
