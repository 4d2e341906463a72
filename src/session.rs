//! One generation at a time: the token loop, its events, cancellation and checks.
//!
//! The loop replays one node list per image token and never waits for the host inside a row of tokens: at most
//! `TOKENS_IN_FLIGHT` tokens are enqueued beyond the last completed event. Progress, cancel and the check for
//! non-finite values act on events. Memory and lists are kept for the next request (`bound`).

mod bound;

use crate::device::{Copies, Event as DeviceEvent, nvtx};
use crate::engine::{Engine, Plan};
use crate::error::{Error, Result};
use crate::event::{CancelToken, Control, Event, Reuse, Timings, ask, milliseconds};
use crate::image::RgbImage;
use crate::model::arena::Stage;
use crate::model::plan::RunSpec;
use crate::model::run::Run;
use crate::ops::harness::decode;
use crate::request::GenerateRequest;
use crate::tokens::ImageTokens;
use bound::Bound;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

/// Tokens that may be enqueued beyond the last completed event.
const TOKENS_IN_FLIGHT: usize = 2;

/// Generates images with an engine. Used by one thread at a time; dropping it frees all memory it took.
///
/// After a request that went well a session keeps the memory that it took, [`kept_bytes`](Self::kept_bytes), and the
/// prepared lists (on a GPU the graphs) in it, for the next request of the same shape: image size, number of images,
/// steps, guidance branches, sampler, and prompts of about the same length; prompts, seeds, scales and times may
/// differ. It also keeps the keys and values of the prompts, so that one that comes again, such as a negative prompt,
/// does not go through the transformer again; the images of one request share theirs in any case. All else in the
/// memory is overwritten. A request of another shape first gives that memory back; text ([`complete`](Self::complete)) takes
/// its own beside it, and gives it back only where the memory budget or the device has no room for both. So a session
/// holds one plan of pictures, and while it completes a text one of text. After a request that failed or was stopped nothing is kept. Pictures are the same to the
/// last bit with and without. [`Images::reuse`] says what was found, [`forget`](Self::forget) gives everything back:
/// also what a server calls that may keep nothing of one user's prompts while it serves another. Rows that show input
/// pictures are never kept, and previews' lists are made anew.
pub struct Session {
    engine: Arc<Engine>,
    /// Wiped, and of a request that went well.
    kept: Option<Bound>,
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
    /// What was there from the request before, and what of its prompts was done once for all images.
    pub reuse: Reuse,
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
        Session { engine, kept: None }
    }

    /// Gives back the memory that is kept for the next request.
    pub fn forget(&mut self) {
        self.kept = None;
    }

    /// Device bytes that are kept for the next request.
    pub fn kept_bytes(&self) -> u64 {
        self.kept.as_ref().map_or(0, Bound::bytes)
    }

    /// Calls `build`, which takes `bytes` of device memory beside what is kept; where there is no room for both, that
    /// is given back.
    pub(crate) fn beside_kept<T>(&mut self, bytes: u64, build: impl Fn() -> Result<T>) -> Result<T> {
        if self.engine.check_budget(self.kept_bytes().saturating_add(bytes)).is_err() {
            self.forget();
        }
        match build() {
            Err(Error::OutOfMemory { .. }) if self.kept.is_some() => {
                self.forget();
                build()
            }
            result => result,
        }
    }

    /// Memory and lists for `spec`, and whether they were there already. Nothing is kept meanwhile: what comes of
    /// this request decides whether they are again.
    fn bind(&mut self, spec: RunSpec) -> Result<(Bound, bool)> {
        if let Some(mut bound) = self.kept.take()
            && bound.fits(&spec)?
        {
            bound.rebind(spec)?;
            return Ok((bound, true));
        }
        Ok((Bound::new(&self.engine, spec)?, false))
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
    /// Whatever comes back, the session may be used again; after an error all memory of the generation has been freed.
    /// The callback may take its time (the device waits for it after at most a few tokens), may generate with another
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
        let (mut bound, lists) = self.bind(prepared.spec)?;
        let tokens = bound.run.prompt_tokens();
        let reuse = Reuse {
            lists,
            prefilled_tokens: tokens.prefilled,
            repeated_tokens: tokens.repeated,
            kept_tokens: tokens.kept,
        };
        timings.setup_ms = milliseconds(mark.elapsed());
        listener.send(&Event::Started {
            prompt_tokens: plan.prompt_tokens.iter().copied().max().unwrap_or(0),
            image_tokens: plan.image_tokens,
            images: plan.images,
        })?;

        let mark = Instant::now();
        bound.encode(&listener)?;
        timings.vae_encode_ms = milliseconds(mark.elapsed());

        let mark = Instant::now();
        listener.check()?;
        bound.prefill()?;
        timings.prefill_ms = milliseconds(mark.elapsed());

        let mark = Instant::now();
        token_loop(&mut bound, &mut listener)?;
        bound.run.end_stage(Stage::Decode)?;
        timings.decode_ms = milliseconds(mark.elapsed());

        let tokens = match request.keep_tokens {
            true => Some(self.tokens(&mut bound.run)?),
            false => None,
        };
        let mark = Instant::now();
        listener.check()?;
        let images = bound.pictures()?;
        bound.run.end_stage(Stage::Image)?;
        timings.vae_decode_ms = milliseconds(mark.elapsed());
        for index in 0..images.len() {
            listener.send(&Event::Image { index: request.first_image as usize + index })?;
        }
        timings.total_ms = milliseconds(start.elapsed());
        listener.send(&Event::Finished { timings })?;
        // The pictures are right, whatever becomes of the memory: a device that fails here says so to the next request.
        if bound.run.wipe().is_ok() {
            self.kept = Some(bound);
        }
        Ok(Images { images, plan, timings, tokens, reuse })
    }

    /// The finished tokens, brought to the host.
    fn tokens(&self, run: &mut Run) -> Result<ImageTokens> {
        let span = run.buffers().tokens;
        let mut bytes = vec![0; span.bytes];
        run.stream().get(span, &mut bytes)?;
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

/// Enqueues every token; keeps at most [`TOKENS_IN_FLIGHT`] beyond the last one known to be finished.
fn token_loop(bound: &mut Bound, listener: &mut Listener<'_>) -> Result<()> {
    let (height, width) = bound.run.spec().grid;
    let preview_every = bound.run.spec().preview_every_rows.map(|rows| rows.get() as usize);
    let total = height * width;
    let mut pending: VecDeque<Box<dyn DeviceEvent>> = VecDeque::new();
    for index in 0..total {
        listener.check()?;
        let _range = nvtx::range(|| format!("token {index}"));
        bound.replay_token(index + 1 == total)?;
        pending.push_back(bound.run.stream().record()?);
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
            bound.run.check_tokens()?;
            let rows = (index + 1) / width;
            listener.send(&Event::Rows { done: rows, of: height })?;
            if preview_every.is_some_and(|every| rows < height && rows.is_multiple_of(every)) {
                let images = bound.preview(rows)?;
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
