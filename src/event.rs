//! What a running generation or load tells its caller, and how the caller stops it.

use crate::error::{Error, Result};
use crate::image::RgbImage;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Sent to the callback of [`crate::session::Session::generate`] and [`crate::session::Session::complete`], on the
/// calling thread.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// Memory is allocated and the prompt is tokenized.
    Started {
        /// Prompt tokens of the longest guidance branch.
        prompt_tokens: usize,
        /// Image tokens per image that will be made.
        image_tokens: usize,
        /// Images in the batch.
        images: usize,
    },
    /// An image token of every image in the batch has been finished by the device.
    Token {
        /// Tokens finished so far, per image.
        done: usize,
        /// Tokens in all, per image.
        of: usize,
    },
    /// A row of tokens is finished and was found finite.
    Rows {
        /// Rows of tokens finished so far.
        done: usize,
        /// Rows in all.
        of: usize,
    },
    /// What is finished of the pictures, if the request asked for it: close to what it will be, not the same, because
    /// the decoder's norms and convolutions look at the whole picture.
    Preview {
        /// Rows of tokens that the pictures show.
        rows: usize,
        /// Rows in all.
        of: usize,
        /// One picture per image of the batch, as high as the rows that are there.
        images: Vec<RgbImage>,
    },
    /// A token of text has been written.
    Text {
        /// The characters that it completes: none where it ends within one.
        piece: String,
        /// Tokens written so far.
        tokens: usize,
    },
    /// An image is decoded.
    Image {
        /// Index in the request's numbering (`first_image` is the first).
        index: usize,
    },
    /// Everything is done.
    Finished {
        /// Where the time went.
        timings: Timings,
    },
}

/// How far loading has come. Sent to the callback of [`crate::engine::Engine::load_with`], on the calling thread:
/// before every piece of weights, at most 8 MiB, and once when the device holds them all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LoadProgress<'a> {
    /// Name of the weights that come next; empty in the last call.
    pub what: &'a str,
    /// Bytes handed to the device so far, in the element type that it keeps.
    pub done_bytes: u64,
    /// Bytes in all.
    pub of_bytes: u64,
}

/// The callback's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Go on.
    Continue,
    /// Stop as soon as possible; the call returns [`Error::Cancelled`], or [`Error::LoadCancelled`] where it loads.
    Stop,
}

/// A caller's answer. Its panic ends here, as an error.
pub(crate) fn ask(callback: impl FnOnce() -> Control) -> Result<Control> {
    // Nothing of ours is in the closure, so that a panic leaves nothing of ours half done.
    catch_unwind(AssertUnwindSafe(callback))
        .map_err(|panic| Error::CallbackPanicked { message: panic_message(&*panic) })
}

/// The text of `panic!`, if it has one.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("with a value that is no text").to_owned()
}

/// Stops a generation from another thread: looked at between image tokens, texts' tokens and input pictures, before the
/// prompts' pass through the transformer and before the pictures' through the VAE. Until the call returns goes what is
/// under way then: at most the longest of these.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// A token that nobody has cancelled.
    pub fn new() -> CancelToken {
        CancelToken::default()
    }

    /// Asks the generation to stop; harmless before the start, after the end, and twice.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether someone asked.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Wall-clock time of each stage, always measured.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Timings {
    /// Prompt to token ids, in milliseconds.
    pub tokenize_ms: f64,
    /// Memory, tables and node lists.
    pub setup_ms: f64,
    /// Input pictures to image tokens.
    pub vae_encode_ms: f64,
    /// Prompt tokens through the transformer.
    pub prefill_ms: f64,
    /// All image tokens.
    pub decode_ms: f64,
    /// Latents to pixels, copy to the host included.
    pub vae_decode_ms: f64,
    /// From the call to its return.
    pub total_ms: f64,
}

/// What a generation took over from the one before it in its session, and what its images took from each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Reuse {
    /// Memory and token lists (on a GPU the graphs) were there already.
    pub lists: bool,
    /// Prompt tokens, over all images and guidance branches, that went through the transformer.
    pub prefilled_tokens: usize,
    /// Those whose keys and values were copied from another image or branch, which has the same prompt: all images of a
    /// batch but one.
    pub repeated_tokens: usize,
    /// Those whose keys and values were still in the cache: of prompts that the last request had too.
    pub kept_tokens: usize,
}

/// A duration in the unit of [`Timings`].
pub fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
