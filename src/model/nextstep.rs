//! The whole model on a device: weights of the transformer, the flow head and the VAE.

use super::backbone::Backbone;
use super::config::{ModelConfig, VaeConfig};
use super::flow_head::FlowHead;
use super::lm_head::LmHead;
use super::upload::Uploader;
use super::vae::{VaeDecoder, VaeEncoder};
use crate::device::{Buffer, Device};
use crate::error::{Error, Result};
use crate::ops::{DType, Selection};
use crate::weights::{ModelWeights, VaeWeights};
use std::sync::Arc;

/// Weights on a device. Constant after loading, shared by all sessions.
pub struct NextStep {
    /// The transformer and `image_out_projector`.
    pub(crate) backbone: Backbone,
    /// The flow head and `image_in_projector`.
    pub(crate) flow: FlowHead,
    /// The VAE decoder.
    pub(crate) vae: VaeDecoder,
    /// The VAE encoder, if the checkpoint has one.
    pub(crate) encoder: Option<VaeEncoder>,
    /// The LM head, if text was asked for.
    pub(crate) text: Option<LmHead>,
    /// Sizes of the transformer and the flow head.
    pub(crate) config: ModelConfig,
    /// Sizes of the VAE.
    pub(crate) vae_config: VaeConfig,
    /// Element type of weights, activations and cache.
    pub(crate) dtype: DType,
    /// Variants chosen by name when the weights were laid out.
    pub(crate) kernels: Selection,
    weight_bytes: u64,
    read_bytes: u64,
    load_threads: usize,
    device: Arc<dyn Device>,
    _buffers: Vec<Buffer>,
}

impl NextStep {
    /// Uploads every tensor that text-to-image and editing read, in the layouts that the variants of the uploader's
    /// selection and the defaults read; with `text` the LM head too. Returns when all of it is on the device.
    pub fn load(
        mut up: Uploader<'_>,
        (config, weights): (&ModelConfig, &ModelWeights),
        (vae_config, vae_weights): (&VaeConfig, &VaeWeights),
        text: bool,
    ) -> Result<NextStep> {
        let (dtype, kernels, device) = (up.dtype(), up.kernels().clone(), up.device());
        let backbone = Backbone::load(config, weights, &mut up)?;
        let flow = FlowHead::load(config, weights, &mut up)?;
        let vae = VaeDecoder::load(vae_config, vae_weights, config.latent_patch_size, &mut up)?;
        let encoder = VaeEncoder::load(vae_config, vae_weights, &mut up)?;
        let text = match text {
            true => Some(LmHead::load(config, weights, &backbone, &kernels, &mut up)?),
            false => None,
        };
        up.wait()?;
        let (read_bytes, threads) = (up.stored_bytes(), up.threads());
        let (buffers, bytes) = up.finish();
        Ok(NextStep {
            backbone,
            flow,
            vae,
            encoder,
            text,
            config: config.clone(),
            vae_config: vae_config.clone(),
            dtype,
            kernels,
            weight_bytes: bytes as u64,
            read_bytes,
            load_threads: threads,
            device,
            _buffers: buffers,
        })
    }

    /// A model of these shapes with random weights, made on the device from `seed`: for measuring, where only bytes
    /// and operations count.
    pub fn random(
        device: &Arc<dyn Device>,
        (config, vae_config): (&ModelConfig, &VaeConfig),
        dtype: DType,
        kernels: &Selection,
        seed: u64,
    ) -> Result<NextStep> {
        let weights = ModelWeights::of_shapes(config)?;
        let vae_weights = VaeWeights::of_shapes(vae_config)?;
        let up = Uploader::random(device.clone(), dtype, kernels, seed)?;
        NextStep::load(up, (config, &weights), (vae_config, &vae_weights), false)
    }

    /// Refuses any device but the one that holds the weights: their addresses mean nothing on another.
    pub(super) fn check_device(&self, device: &Arc<dyn Device>) -> Result<()> {
        match std::ptr::addr_eq(Arc::as_ptr(&self.device), Arc::as_ptr(device)) {
            true => Ok(()),
            false => Err(Error::Internal("a run on another device than its model's".into())),
        }
    }

    /// Sizes of the transformer and the flow head.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Element type of weights, activations and cache.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of device memory that the weights take.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// Bytes of the checkpoint's tensors that the weights were made of; 0 of random ones.
    pub fn read_bytes(&self) -> u64 {
        self.read_bytes
    }

    /// Threads that converted and packed the weights.
    pub fn load_threads(&self) -> usize {
        self.load_threads
    }

    /// Pixels per token and axis: VAE downsampling times patch size.
    pub fn down_factor(&self) -> usize {
        self.vae_config.downsample_factor() * self.config.latent_patch_size
    }
}
