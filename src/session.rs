//! One generation at a time: the token loop, its events, cancellation and checks.
//!
//! The loop replays one node list per image token and never waits for the host inside a row of tokens: at most
//! `TOKENS_IN_FLIGHT` tokens are enqueued beyond the last completed event. Progress, cancel and the check for
//! non-finite values act on events.

use crate::device::{Event as DeviceEvent, Executable, nvtx};
use crate::engine::{Engine, Plan};
use crate::error::{Error, Result};
use crate::event::{CancelToken, Control, Event, Timings, ask, milliseconds};
use crate::image::RgbImage;
use crate::model::arena::Stage;
use crate::model::run::Run;
use crate::model::vae::Decoded;
use crate::ops::harness::decode;
use crate::request::GenerateRequest;
use crate::tokens::ImageTokens;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

/// Tokens that may be enqueued beyond the last completed event.
const TOKENS_IN_FLIGHT: usize = 2;

/// Generates images with an engine. Used by one thread at a time; dropping it frees all memory it took.
pub struct Session {
    engine: Arc<Engine>,
}

/// What a generation returns.
#[derive(Clone, Debug)]
pub struct Images {
    /// The pictures, in the order of their indices.
    pub images: Vec<RgbImage>,
    /// What was planned.
    pub plan: Plan,
    /// Where the time went.
    pub timings: Timings,
    /// The pictures' tokens, if the request asked for them; without notes.
    pub tokens: Option<ImageTokens>,
}

/// Sends events and turns a caller's wish to stop into an error.
pub(crate) struct Listener<'a> {
    pub(crate) callback: &'a mut dyn FnMut(&Event) -> Control,
    pub(crate) cancel: &'a CancelToken,
    pub(crate) tokens_done: usize,
}

impl Listener<'_> {
    pub(crate) fn send(&mut self, event: &Event) -> Result<()> {
        match ask(|| (self.callback)(event))? {
            Control::Continue => self.check(),
            Control::Stop => Err(Error::Cancelled { tokens: self.tokens_done }),
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        match self.cancel.is_cancelled() {
            true => Err(Error::Cancelled { tokens: self.tokens_done }),
            false => Ok(()),
        }
    }
}

impl Session {
    pub(crate) fn new(engine: Arc<Engine>) -> Session {
        Session { engine }
    }

    /// The engine of this session.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    pub(crate) fn shared_engine(&self) -> Arc<Engine> {
        self.engine.clone()
    }

    /// Makes the images of a request. `callback` is called on this thread; `cancel` may be set from any.
    ///
    /// Whatever comes back, all memory of the generation has been freed, and the session may be used again. The
    /// callback may take its time (the device waits for it after at most a few tokens), may generate with another
    /// session, and may panic, which ends the generation with [`Error::CallbackPanicked`]. It cannot use this session,
    /// and cannot drop it:
    ///
    /// ```compile_fail,E0499
    /// # use warpstep::{event::{CancelToken, Control}, request::GenerateRequest, session::Session};
    /// fn reenter(session: &mut Session, request: &GenerateRequest) {
    ///     let cancel = CancelToken::new();
    ///     let _ = session.generate(request, &cancel, &mut |_| {
    ///         let _ = session.generate(request, &cancel, &mut |_| Control::Continue);
    ///         Control::Continue
    ///     });
    /// }
    /// ```
    pub fn generate(
        &mut self,
        request: &GenerateRequest,
        cancel: &CancelToken,
        callback: &mut dyn FnMut(&Event) -> Control,
    ) -> Result<Images> {
        let _request = nvtx::range(|| "request");
        let start = Instant::now();
        let mut timings = Timings::default();
        let mut listener = Listener { callback, cancel, tokens_done: 0 };
        listener.check()?;
        let prepared = self.engine.prepare(request)?;
        let plan = prepared.plan;
        timings.tokenize_ms = milliseconds(start.elapsed());

        let mark = Instant::now();
        let mut run = Run::new(
            self.engine.model.clone(),
            &self.engine.device,
            self.engine.options.kernels.clone(),
            prepared.spec,
        )?;
        let lists = Lists::new(&mut run)?;
        timings.setup_ms = milliseconds(mark.elapsed());
        listener.send(&Event::Started {
            prompt_tokens: plan.prompt_tokens.iter().copied().max().unwrap_or(0),
            image_tokens: plan.image_tokens,
            images: plan.images,
        })?;

        let mark = Instant::now();
        encode(&mut run)?;
        timings.vae_encode_ms = milliseconds(mark.elapsed());

        let mark = Instant::now();
        prefill(&mut run)?;
        timings.prefill_ms = milliseconds(mark.elapsed());

        let mark = Instant::now();
        token_loop(&mut run, &lists, &mut listener)?;
        run.end_stage(Stage::Decode)?;
        timings.decode_ms = milliseconds(mark.elapsed());

        let tokens = match request.keep_tokens {
            true => Some(self.tokens(&mut run)?),
            false => None,
        };
        let mark = Instant::now();
        listener.check()?;
        let images = lists.pictures(&mut run)?;
        run.end_stage(Stage::Image)?;
        timings.vae_decode_ms = milliseconds(mark.elapsed());
        for index in 0..images.len() {
            listener.send(&Event::Image { index: request.first_image as usize + index })?;
        }
        timings.total_ms = milliseconds(start.elapsed());
        listener.send(&Event::Finished { timings })?;
        Ok(Images { images, plan, timings, tokens })
    }

    /// The finished tokens, brought to the host.
    fn tokens(&self, run: &mut Run) -> Result<ImageTokens> {
        let span = run.buffers().tokens;
        let mut bytes = vec![0; span.bytes];
        run.stream().download(span.ptr, &mut bytes)?;
        let spec = run.spec();
        Ok(ImageTokens {
            model: self.engine.name().to_owned(),
            dtype: run.dtype(),
            images: spec.images,
            grid: spec.grid,
            layout: self.engine.token_layout(),
            use_norm: spec.use_norm,
            values: decode(run.dtype(), &bytes),
            notes: Vec::new(),
        })
    }
}

fn encode(run: &mut Run) -> Result<()> {
    let _range = nvtx::range(|| "vae encode");
    run.encode_sources()
}

fn prefill(run: &mut Run) -> Result<()> {
    let _range = nvtx::range(|| "prefill");
    let list = Arc::new(run.record_prefill(true)?);
    let executable = run.stream().instantiate(list)?;
    run.stream().replay(executable.as_ref())?;
    run.stream().synchronize()?;
    run.end_stage(Stage::Prefill)
}

/// What is replayed, prepared once.
struct Lists {
    /// One image token and the transformer pass after it.
    token: Box<dyn Executable>,
    /// The last image token.
    last: Box<dyn Executable>,
    /// Tokens to pixels.
    image: Box<dyn Executable>,
    decoded: Decoded,
}

impl Lists {
    fn new(run: &mut Run) -> Result<Lists> {
        let token = Arc::new(run.record_token(false)?);
        let last = Arc::new(run.record_token(true)?);
        let (image, decoded) = run.record_image()?;
        let stream = run.stream();
        Ok(Lists {
            token: stream.instantiate(token)?,
            last: stream.instantiate(last)?,
            image: stream.instantiate(Arc::new(image))?,
            decoded,
        })
    }

    /// The finished pictures.
    fn pictures(&self, run: &mut Run) -> Result<Vec<RgbImage>> {
        pictures(run, self.image.as_ref(), &self.decoded)
    }
}

/// Replays a decoder list and brings its pictures to the host.
fn pictures(run: &mut Run, list: &dyn Executable, decoded: &Decoded) -> Result<Vec<RgbImage>> {
    let _range = nvtx::range(|| "vae");
    run.stream().replay(list)?;
    decoded.download(run.stream())
}

/// The first `rows` rows of every image, decoded as pictures of their own.
fn preview(run: &mut Run, rows: usize) -> Result<Vec<RgbImage>> {
    let mut all = Vec::new();
    for image in 0..run.spec().images {
        let (list, decoded) = run.record_preview(image, rows)?;
        let list = run.stream().instantiate(Arc::new(list))?;
        all.extend(pictures(run, list.as_ref(), &decoded)?);
    }
    Ok(all)
}

/// Enqueues every token; keeps at most [`TOKENS_IN_FLIGHT`] beyond the last one known to be finished.
fn token_loop(run: &mut Run, lists: &Lists, listener: &mut Listener<'_>) -> Result<()> {
    let (height, width) = run.spec().grid;
    let preview_every = run.spec().preview_every_rows.map(|rows| rows.get() as usize);
    let total = height * width;
    let mut pending: VecDeque<Box<dyn DeviceEvent>> = VecDeque::new();
    for index in 0..total {
        listener.check()?;
        let _range = nvtx::range(|| format!("token {index}"));
        let list = if index + 1 == total { &lists.last } else { &lists.token };
        run.stream().replay(list.as_ref())?;
        pending.push_back(run.stream().record()?);
        let row_ends = (index + 1) % width == 0;
        // The end of a row is the only place where the host reads device memory, so everything is awaited.
        let keep = if row_ends { 0 } else { TOKENS_IN_FLIGHT };
        while pending.len() > keep {
            if let Some(event) = pending.pop_front() {
                event.wait()?;
                listener.tokens_done += 1;
                listener.send(&Event::Token { done: listener.tokens_done, of: total })?;
            }
        }
        if row_ends {
            let state = run.state()?;
            // First: what a stalled token holds means nothing.
            if state.stalled != 0 {
                return Err(Error::Stalled { op: "flow_chain", token: state.stalled as usize - 1 });
            }
            if state.nonfinite != 0 {
                return Err(Error::NonFinite { stage: "flow head", token: state.nonfinite as usize - 1 });
            }
            let rows = (index + 1) / width;
            listener.send(&Event::Rows { done: rows, of: height })?;
            if preview_every.is_some_and(|every| rows < height && rows.is_multiple_of(every)) {
                let images = preview(run, rows)?;
                listener.send(&Event::Preview { rows, of: height, images })?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_are_shared_and_sessions_move() {
        fn shared<T: Send + Sync>() {}
        fn moved<T: Send>() {}
        shared::<Engine>();
        shared::<CancelToken>();
        shared::<Error>();
        moved::<Session>();
        moved::<Event>();
    }
}
