//! Loading a model, with a bar while it takes long.

use anyhow::Result;
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};
use warpstep::device::Device;
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::event::Control;

/// A load that is over sooner shows no bar.
const SHOWN_AFTER: Duration = Duration::from_millis(500);

/// How a model is loaded.
#[derive(Args, Clone)]
pub struct LoadArgs {
    /// Read copies of the weight files instead of mapping them.
    #[arg(long)]
    no_mmap: bool,

    /// Threads that convert and pack weights while a model is loaded; on a terminal a bar shows how far it is [default:
    /// one per core, at most 16].
    #[arg(long, value_name = "N")]
    load_threads: Option<NonZeroUsize>,
}

impl LoadArgs {
    /// The defaults with what was asked for.
    pub fn options(&self) -> EngineOptions {
        EngineOptions { mmap: !self.no_mmap, load_threads: self.load_threads, ..EngineOptions::default() }
    }
}

/// Loads a model. On a terminal a bar shows how far it is.
pub fn load(source: &ModelSource, device: Arc<dyn Device>, options: EngineOptions) -> Result<Engine> {
    // Hidden at first, it counts all the same: its rate is that of the whole load.
    let bar = ProgressBar::hidden();
    let style = ProgressStyle::with_template(
        "loading {bar:24} {decimal_bytes}/{decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left {wide_msg}",
    );
    if let Ok(style) = style {
        bar.set_style(style);
    }
    let start = Instant::now();
    let mut shown = false;
    let loaded = Engine::load_with(source, device, options, &mut |progress| {
        bar.set_length(progress.of_bytes);
        bar.set_position(progress.done_bytes);
        if !shown && start.elapsed() > SHOWN_AFTER {
            shown = true;
            // indicatif draws nothing when stderr is not a terminal.
            bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        if shown {
            bar.set_message(progress.what.to_owned());
        }
        Control::Continue
    });
    bar.finish_and_clear();
    Ok(loaded?)
}
