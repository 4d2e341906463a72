//! Input pictures of a run: from pixels to the image tokens that prefill embeds.

use super::Run;
use crate::device::{NodeList, Span};
use crate::error::{Error, Result};
use crate::model::arena::Stage;
use crate::model::plan::SourceSlots;
use crate::model::vae::{Encoded, LatentOutputs, VaeEncoder};
use crate::ops;
use std::sync::Arc;

impl Run {
    fn source_parts(&self) -> Result<(&SourceSlots, &VaeEncoder)> {
        let parts = self.slots.sources.as_ref().zip(self.model.encoder.as_ref());
        parts.ok_or_else(|| Error::Internal("a run without input pictures".into()))
    }

    /// Uploads the draws, and which rows take which image token.
    pub(super) fn upload_sources(&mut self) -> Result<()> {
        let Some(slots) = &self.slots.sources else { return Ok(()) };
        let sources = &self.spec.sources;
        let draws: Vec<f32> = sources.places.iter().flat_map(|place| place.draw.iter().copied()).collect();
        self.stream.upload(self.arena.span(slots.rows).ptr, bytemuck::cast_slice(&sources.rows))?;
        match draws.is_empty() {
            true => Ok(()),
            false => self.stream.upload(self.arena.span(slots.draws).ptr, bytemuck::cast_slice(&draws)),
        }
    }

    /// `[tokens, K]` E: the image tokens of all places; until prefill is over.
    pub fn source_tokens(&self) -> Result<Span> {
        let (slots, _) = self.source_parts()?;
        Ok(self.arena.span(slots.tokens))
    }

    /// Nodes from the pixels of one picture to the tokens of every place that shows it. `taps` gives the optional
    /// outputs of a place, by its index.
    pub fn record_source(
        &self,
        picture: usize,
        taps: impl Fn(usize) -> ops::encode_latent::Taps,
    ) -> Result<(NodeList, Encoded)> {
        let (slots, encoder) = self.source_parts()?;
        let sources = &self.spec.sources;
        let image = sources.pictures.get(picture);
        let image = image.ok_or_else(|| Error::Internal(format!("there is no picture {picture}")))?;
        let size = (image.height() as usize, image.width() as usize);
        let selection = self.stage_selection(Stage::Prefill)?;
        let launch = self.launch(&selection);
        let mut list = NodeList::new();
        let encoded = encoder.record(&launch, &mut list, size, self.arena.span(slots.encoder), false)?;
        let token_bytes = self.model.config.token_dim() * self.model.dtype.bytes();
        let (tokens, draws) = (self.arena.span(slots.tokens), self.arena.span(slots.draws));
        let mut first_value = 0;
        for (index, place) in sources.places.iter().enumerate() {
            let draw = draws.slice(first_value * 4, place.draw.len() * 4);
            first_value += place.draw.len();
            if place.picture != picture {
                continue;
            }
            let outputs = LatentOutputs {
                draw: Some(draw).filter(|draw| draw.bytes > 0),
                tokens: tokens.slice(place.first_token * token_bytes, place.tokens * token_bytes),
                patch: self.model.config.latent_patch_size,
                taps: taps(index),
            };
            encoder.record_tokens(&launch, &mut list, &encoded, &outputs)?;
        }
        Ok((list, encoded))
    }

    /// Encodes every picture, one after another over the same memory.
    pub fn encode_sources(&mut self) -> Result<()> {
        for picture in 0..self.spec.sources.pictures.len() {
            let (list, encoded) = self.record_source(picture, |_| Default::default())?;
            let values = VaeEncoder::pixel_values(&self.spec.sources.pictures[picture]);
            let (bytes, _) = ops::harness::encode(self.model.dtype, values);
            self.stream.upload(encoded.pixels.ptr, &bytes)?;
            let executable = self.stream.instantiate(Arc::new(list))?;
            self.stream.replay(executable.as_ref())?;
            self.stream.synchronize()?;
        }
        Ok(())
    }

    /// Nodes that project the image tokens; what the embedding then takes.
    pub(super) fn record_source_rows(&self, list: &mut NodeList) -> Result<Option<ops::embed::Source>> {
        let Some(slots) = &self.slots.sources else { return Ok(None) };
        let selection = self.stage_selection(Stage::Prefill)?;
        let launch = self.launch(&selection);
        let (tokens, x) = (self.arena.span(slots.tokens), self.arena.span(slots.x));
        let count = self.spec.sources.tokens();
        self.model.flow.record_in_projector(&launch, list, tokens, x, count, self.scratch())?;
        Ok(Some(ops::embed::Source { x, rows: self.arena.span(slots.rows), count }))
    }
}
