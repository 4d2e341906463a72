//! A run with everything that is replayed in it, prepared once and used by request after request.

use super::Listener;
use crate::device::{Executable, Node, NodeList, nvtx};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::image::RgbImage;
use crate::model::arena::Stage;
use crate::model::plan::RunSpec;
use crate::model::run::{PrefillShape, Run};
use crate::model::vae::{Decoded, Encoded};

/// A generation's memory, and the lists in it.
pub(super) struct Bound {
    // Before the run: executables go before their stream and memory.
    lists: Lists,
    pub(super) run: Run,
}

struct Lists {
    /// One image token and the transformer pass after it.
    token: Box<dyn Executable>,
    /// The last image token.
    last: Box<dyn Executable>,
    /// Index in each of the two of the node whose parameters hold the seed.
    draws: [usize; 2],
    /// Tokens to pixels.
    image: Box<dyn Executable>,
    decoded: Decoded,
    /// Input pictures to image tokens.
    sources: Vec<(Box<dyn Executable>, Encoded)>,
    /// The newest prompts' own; others of the same shape use it too.
    prefill: (PrefillShape, Box<dyn Executable>),
}

/// Where in `list` the node is that a later request changes.
fn index_of(list: &NodeList, node: &Node) -> Result<usize> {
    let index = list.nodes().iter().position(|other| other.label == node.label);
    index.ok_or_else(|| Error::Internal(format!("a token list without {node:?}")))
}

fn draws_node(run: &Run) -> Result<Node> {
    run.record_draws()?.ok_or_else(|| Error::Internal("a session with recorded draws".into()))
}

fn prefill_list(run: &mut Run) -> Result<(PrefillShape, Box<dyn Executable>)> {
    let list = run.record_prefill(true)?;
    Ok((run.prefill_shape(), run.instantiate(list)?))
}

impl Bound {
    /// Takes memory for `spec` and prepares its lists.
    pub(super) fn new(engine: &Engine, spec: RunSpec) -> Result<Bound> {
        let mut run = Run::new(engine.model.clone(), &engine.device, engine.options.kernels.clone(), spec)?;
        let draws = draws_node(&run)?;
        let (token, last) = (run.record_token(false)?, run.record_token(true)?);
        let draws = [index_of(&token, &draws)?, index_of(&last, &draws)?];
        let (image, decoded) = run.record_image()?;
        let [token, last, image] = [run.instantiate(token)?, run.instantiate(last)?, run.instantiate(image)?];
        let mut sources = Vec::new();
        for picture in 0..run.spec().sources.pictures.len() {
            let (list, encoded) = run.record_source(picture, |_| Default::default())?;
            sources.push((run.instantiate(list)?, encoded));
        }
        let prefill = prefill_list(&mut run)?;
        Ok(Bound { lists: Lists { token, last, draws, image, decoded, sources, prefill }, run })
    }

    /// Whether [`rebind`](Self::rebind) takes `spec`.
    pub(super) fn fits(&self, spec: &RunSpec) -> Result<bool> {
        self.run.fits(spec)
    }

    /// Begins another generation in the same memory, with the same lists.
    pub(super) fn rebind(&mut self, spec: RunSpec) -> Result<()> {
        self.run.rebind(spec)?;
        let lists = &mut self.lists;
        for (list, index) in [&mut lists.token, &mut lists.last].into_iter().zip(lists.draws) {
            self.run.set_draws(list.as_mut(), index)?;
        }
        if lists.prefill.0 != self.run.prefill_shape() {
            lists.prefill = prefill_list(&mut self.run)?;
        }
        Ok(())
    }

    /// Device bytes of it.
    pub(super) fn bytes(&self) -> u64 {
        self.run.bytes()
    }

    /// Input pictures to image tokens, one after another over the same memory, each awaited, so that whoever stops the
    /// request waits for one.
    pub(super) fn encode(&mut self, listener: &Listener<'_>) -> Result<()> {
        let _range = nvtx::range(|| "vae encode");
        for (picture, (list, encoded)) in self.lists.sources.iter().enumerate() {
            listener.check()?;
            self.run.upload_source(picture, encoded)?;
            self.run.stream().replay(list.as_ref())?;
            self.run.stream().synchronize()?;
        }
        Ok(())
    }

    /// The prompts through the transformer.
    pub(super) fn prefill(&mut self) -> Result<()> {
        let _range = nvtx::range(|| "prefill");
        let stream = self.run.stream();
        stream.replay(self.lists.prefill.1.as_ref())?;
        stream.synchronize()?;
        self.run.end_stage(Stage::Prefill)
    }

    /// Enqueues an image token, and the transformer pass after it unless it is the last.
    pub(super) fn replay_token(&mut self, last: bool) -> Result<()> {
        let list = if last { &self.lists.last } else { &self.lists.token };
        self.run.stream().replay(list.as_ref())
    }

    /// The finished pictures.
    pub(super) fn pictures(&mut self) -> Result<Vec<RgbImage>> {
        pictures(&mut self.run, self.lists.image.as_ref(), &self.lists.decoded)
    }

    /// The first `rows` rows of every image, decoded as pictures of their own, by lists that nobody keeps: there would
    /// be one per image and preview.
    pub(super) fn preview(&mut self, rows: usize) -> Result<Vec<RgbImage>> {
        let run = &mut self.run;
        let mut all = Vec::new();
        for image in 0..run.spec().images {
            let (list, decoded) = run.record_preview(image, rows)?;
            let list = run.instantiate(list)?;
            all.extend(pictures(run, list.as_ref(), &decoded)?);
        }
        Ok(all)
    }
}

/// Replays a decoder list and brings its pictures to the host.
fn pictures(run: &mut Run, list: &dyn Executable, decoded: &Decoded) -> Result<Vec<RgbImage>> {
    let _range = nvtx::range(|| "vae");
    run.stream().replay(list)?;
    decoded.download(run.stream())
}
