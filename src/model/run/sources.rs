//! Input pictures of a run: from pixels to the image tokens that prefill embeds.

use super::{Run, stage_selection};
use crate::device::{Copies, NodeList, Span, Stream};
use crate::error::{Error, Result};
use crate::image::RgbImage;
use crate::model::arena::{Arena, Stage};
use crate::model::nextstep::NextStep;
use crate::model::plan::SourceSlots;
use crate::model::sources::Sources;
use crate::model::vae::{Encoded, LatentOutputs, VaeEncoder};
use crate::ops::product::ProductScratch;
use crate::ops::{self, Launch};
use std::sync::Arc;

/// What runs of every kind have of their input pictures.
#[derive(Clone, Copy)]
pub(in crate::model) struct SourceParts<'a> {
    model: &'a NextStep,
    arena: &'a Arena,
    /// None for a run without pictures.
    slots: Option<&'a SourceSlots>,
    sources: &'a Sources,
}

impl<'a> SourceParts<'a> {
    /// Of a run's fields, so that its stream stays free to be used.
    pub(in crate::model) fn new(
        model: &'a NextStep,
        arena: &'a Arena,
        slots: &'a Option<SourceSlots>,
        sources: &'a Sources,
    ) -> SourceParts<'a> {
        SourceParts { model, arena, slots: slots.as_ref(), sources }
    }

    fn present(&self) -> Result<(&SourceSlots, &VaeEncoder)> {
        let parts = self.slots.zip(self.model.encoder.as_ref());
        parts.ok_or_else(|| Error::Internal("a run without input pictures".into()))
    }

    /// Uploads the draws, and which image token each of the prompt's `rows` takes.
    pub(in crate::model) fn upload(&self, stream: &mut dyn Stream, rows: &[u32]) -> Result<()> {
        let Some(slots) = self.slots else { return Ok(()) };
        let sources = self.sources;
        let draws: Vec<f32> = sources.places.iter().flat_map(|place| place.draw.iter().copied()).collect();
        let span = self.arena.span(slots.rows);
        if size_of_val(rows) > span.bytes {
            return Err(Error::Internal(format!("{} prompt rows for {} bytes", rows.len(), span.bytes)));
        }
        stream.put(span, bytemuck::cast_slice(rows))?;
        match draws.is_empty() {
            true => Ok(()),
            false => stream.put(self.arena.span(slots.draws), bytemuck::cast_slice(&draws)),
        }
    }

    /// See [`Run::record_source`].
    fn record(
        &self,
        launch: &Launch<'_>,
        picture: usize,
        taps: impl Fn(usize) -> ops::encode_latent::Taps,
    ) -> Result<(NodeList, Encoded)> {
        let (slots, encoder) = self.present()?;
        let sources = self.sources;
        let image = sources.pictures.get(picture);
        let image = image.ok_or_else(|| Error::Internal(format!("there is no picture {picture}")))?;
        let size = (image.height() as usize, image.width() as usize);
        let mut list = NodeList::new();
        let encoded = encoder.record(launch, &mut list, size, self.arena.span(slots.encoder), false)?;
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
            encoder.record_tokens(launch, &mut list, &encoded, &outputs)?;
        }
        Ok((list, encoded))
    }

    fn upload_pixels(&self, stream: &mut dyn Stream, image: &RgbImage, encoded: &Encoded) -> Result<()> {
        let (bytes, _) = ops::harness::encode(self.model.dtype, VaeEncoder::pixel_values(image));
        stream.put(encoded.pixels, &bytes)
    }

    /// Encodes every picture, one after another over the same memory. `between` is called before each and may end it.
    pub(in crate::model) fn encode(
        &self,
        launch: &Launch<'_>,
        stream: &mut dyn Stream,
        between: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        for (picture, image) in self.sources.pictures.iter().enumerate() {
            between()?;
            let (list, encoded) = self.record(launch, picture, |_| Default::default())?;
            self.upload_pixels(stream, image, &encoded)?;
            // SAFETY: as for all lists of a run (see `model::run`), and it goes no further than this turn.
            let executable = unsafe { stream.instantiate(Arc::new(list)) }?;
            stream.replay(executable.as_ref())?;
            stream.synchronize()?;
        }
        Ok(())
    }

    /// Nodes that project the image tokens; what the embedding then takes.
    pub(in crate::model) fn record_rows(
        &self,
        launch: &Launch<'_>,
        list: &mut NodeList,
        scratch: Option<ProductScratch>,
    ) -> Result<Option<ops::embed::Source>> {
        let Some(slots) = self.slots else { return Ok(None) };
        let (tokens, x) = (self.arena.span(slots.tokens), self.arena.span(slots.x));
        let count = self.sources.tokens();
        self.model.flow.record_in_projector(launch, list, tokens, x, count, scratch)?;
        Ok(Some(ops::embed::Source { x, rows: self.arena.span(slots.rows), count }))
    }
}

impl Run {
    pub(super) fn source_parts(&self) -> SourceParts<'_> {
        SourceParts::new(&self.model, &self.arena, &self.slots.sources, &self.spec.sources)
    }

    /// `[tokens, K]` E: the image tokens of all places; until prefill is over.
    pub fn source_tokens(&self) -> Result<Span> {
        let parts = self.source_parts();
        let (slots, _) = parts.present()?;
        Ok(self.arena.span(slots.tokens))
    }

    /// Nodes from the pixels of one picture to the tokens of every place that shows it. `taps` gives the optional
    /// outputs of a place, by its index.
    pub fn record_source(
        &self,
        picture: usize,
        taps: impl Fn(usize) -> ops::encode_latent::Taps,
    ) -> Result<(NodeList, Encoded)> {
        let selection = stage_selection(&self.model, &self.selection, Stage::Prefill)?;
        self.source_parts().record(&self.launch(&selection), picture, taps)
    }

    /// Uploads a picture to where the list that [`record_source`](Self::record_source) made for it reads the pixels.
    pub fn upload_source(&mut self, picture: usize, encoded: &Encoded) -> Result<()> {
        let parts = SourceParts::new(&self.model, &self.arena, &self.slots.sources, &self.spec.sources);
        let image = self.spec.sources.pictures.get(picture);
        let image = image.ok_or_else(|| Error::Internal(format!("there is no picture {picture}")))?;
        parts.upload_pixels(self.stream.as_mut(), image, encoded)
    }

    /// Encodes every picture, one after another over the same memory.
    pub fn encode_sources(&mut self) -> Result<()> {
        let selection = stage_selection(&self.model, &self.selection, Stage::Prefill)?;
        let launch = self.launch(&selection);
        let parts = SourceParts::new(&self.model, &self.arena, &self.slots.sources, &self.spec.sources);
        parts.encode(&launch, self.stream.as_mut(), &mut || Ok(()))
    }
}
