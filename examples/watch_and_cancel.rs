//! What a server does: one engine for all requests, loaded with progress, a session per request, progress and previews
//! while it runs, and a cancel from another thread. `cargo run --release --example watch_and_cancel`.

use std::num::NonZeroU32;
use std::sync::{Arc, mpsc};
use std::thread;
use warpstep::Error;
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions};
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::event::{CancelToken, Control, Event};

fn main() -> warpstep::Result<()> {
    let device = Arc::new(EmulatedDevice::new(EmulatedOptions::default())?);
    // A budget turns a request that would not fit into an error before anything is allocated.
    let options = EngineOptions { memory_budget_bytes: Some(256 << 20), ..EngineOptions::default() };
    let engine = Engine::load_with(&ModelSource::Demo, device, options, &mut |progress| {
        // Of a large model this takes a while; Control::Stop would end it.
        if progress.done_bytes == progress.of_bytes {
            println!("{} bytes of weights loaded", progress.of_bytes);
        }
        Control::Continue
    })?;
    let engine = Arc::new(engine);
    let mut request = engine.request("a small blue star on a yellow background")?;
    (request.seed, request.preview_every_rows) = (7, NonZeroU32::new(1));
    println!("{} bytes for this request", engine.plan(&request)?.request_bytes());

    // The callback runs on the thread that generates, so it only hands events on.
    let cancel = CancelToken::new();
    let (events, watched) = mpsc::channel();
    let worker = {
        let (engine, request, cancel) = (engine.clone(), request.clone(), cancel.clone());
        thread::spawn(move || {
            engine.session().generate(&request, &cancel, &mut |event| match events.send(event.clone()) {
                Ok(()) => Control::Continue,
                // Nobody is watching any more.
                Err(_) => Control::Stop,
            })
        })
    };
    for event in watched {
        match event {
            Event::Started { image_tokens, .. } => println!("{image_tokens} image tokens to make"),
            Event::Preview { rows, of, images } => {
                println!(
                    "rows {rows} of {of}: {} x {} pixels to show",
                    images[0].width(),
                    images[0].height()
                );
                if 2 * rows >= of {
                    println!("the client has gone away");
                    cancel.cancel();
                }
            }
            _ => {}
        }
    }
    match worker.join() {
        Ok(Err(Error::Cancelled { tokens })) => println!("stopped after {tokens} tokens"),
        Ok(Ok(_)) => println!("finished before the cancel"),
        Ok(Err(error)) => return Err(error),
        Err(_) => return Err(Error::Internal("the worker panicked".into())),
    }

    // The engine is as good as new.
    request.preview_every_rows = None;
    let result = engine.session().generate(&request, &CancelToken::new(), &mut |_| Control::Continue)?;
    println!("made {} picture in {:.0} ms", result.images.len(), result.timings.total_ms);
    Ok(())
}
