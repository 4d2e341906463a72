//! What can happen to a generation while it runs: cancels, callbacks, threads, drops. The items are those of the list
//! of bad inputs that the engine promises to survive (24 to 26); item 23, memory that runs out, is in `containment`,
//! item 27 in `cuda_stub`, item 28 in `emulator`. After each, the same engine draws the same picture as before.

use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};
use warpstep::Error;
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions, Fault};
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::event::{CancelToken, Control, Event};
use warpstep::request::GenerateRequest;
use warpstep::session::Images;

struct Rig {
    device: EmulatedDevice,
    engine: Arc<Engine>,
    request: GenerateRequest,
    /// Device memory in use when nothing runs.
    loaded: u64,
    /// What the request gives.
    picture: Vec<u8>,
}

/// Two rows of two.
const TOKENS: usize = 4;

impl Rig {
    fn new() -> Rig {
        let device = EmulatedDevice::new(EmulatedOptions::default()).unwrap();
        let options = EngineOptions::default();
        let engine = Engine::load(&ModelSource::Demo, Arc::new(device.clone()), options).unwrap();
        let engine = Arc::new(engine);
        let mut request = engine.request("a red circle on a blue background").unwrap();
        (request.width, request.height, request.seed) = (32, 32, 3);
        request.sampler.steps = 2;
        let loaded = device.live_bytes();
        let mut rig = Rig { device, engine, request, loaded, picture: Vec::new() };
        rig.picture =
            rig.draw(&CancelToken::new(), &mut |_| Control::Continue).unwrap().images[0].data().into();
        rig
    }

    fn draw(
        &self,
        cancel: &CancelToken,
        callback: &mut dyn FnMut(&Event) -> Control,
    ) -> warpstep::Result<Images> {
        self.engine.session().generate(&self.request, cancel, callback)
    }

    /// Nothing is left of what went before.
    #[track_caller]
    fn assert_as_new(&self) {
        assert_eq!(self.device.live_bytes(), self.loaded);
        let again = self.draw(&CancelToken::new(), &mut |_| Control::Continue).unwrap();
        assert!(again.images[0].data() == self.picture, "another picture than before");
    }
}

#[track_caller]
fn cancelled(result: warpstep::Result<Images>) -> usize {
    match result {
        Err(Error::Cancelled { tokens }) => tokens,
        other => panic!("{other:?}"),
    }
}

// Item 24: cancel.

#[test]
fn cancel_before_the_start() {
    let rig = Rig::new();
    let cancel = CancelToken::new();
    cancel.cancel();
    rig.device.set_fault(None);
    assert_eq!(cancelled(rig.draw(&cancel, &mut |event| panic!("{event:?}"))), 0);
    assert_eq!(rig.device.requests(), (0, 0), "the device was asked for something");
    rig.assert_as_new();
}

#[test]
fn cancel_at_every_event() {
    let rig = Rig::new();
    let mut kinds = Vec::new();
    rig.draw(&CancelToken::new(), &mut |event| {
        kinds.push(std::mem::discriminant(event));
        Control::Continue
    })
    .unwrap();
    // Started, four tokens, two rows, an image, the end.
    assert_eq!(kinds.len(), 1 + TOKENS + 2 + 1 + 1);
    for at in 0..kinds.len() {
        let (cancel, mut seen, mut tokens) = (CancelToken::new(), 0, 0);
        let result = rig.draw(&cancel, &mut |event| {
            if let Event::Token { done, .. } = event {
                tokens = *done;
            }
            if seen == at {
                cancel.cancel();
            }
            seen += 1;
            Control::Continue
        });
        assert_eq!(cancelled(result), tokens, "event {at}");
        assert_eq!(seen, at + 1, "events came after the cancel");
        assert_eq!(rig.device.live_bytes(), rig.loaded, "event {at}");
    }
    rig.assert_as_new();
}

/// After the last token nothing but the VAE is left; a cancel there still costs the picture, and no `Image` comes.
#[test]
fn cancel_before_the_vae_decodes() {
    let rig = Rig::new();
    let cancel = CancelToken::new();
    let result = rig.draw(&cancel, &mut |event| {
        match event {
            Event::Rows { done, of } if done == of => cancel.cancel(),
            Event::Image { .. } => panic!("decoded after the cancel"),
            _ => {}
        }
        Control::Continue
    });
    assert_eq!(cancelled(result), TOKENS);
    rig.assert_as_new();
}

#[test]
fn cancel_after_the_end_is_for_the_next_generation_with_that_token() {
    let rig = Rig::new();
    let cancel = CancelToken::new();
    let images = rig.draw(&cancel, &mut |_| Control::Continue).unwrap();
    cancel.cancel();
    cancel.cancel();
    assert!(images.images[0].data() == rig.picture);
    assert_eq!(cancelled(rig.draw(&cancel, &mut |_| Control::Continue)), 0);
    rig.assert_as_new();
}

#[test]
fn cancel_twice_from_two_threads() {
    let rig = Rig::new();
    let (cancel, start) = (CancelToken::new(), Barrier::new(3));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                start.wait();
                cancel.cancel();
                cancel.cancel();
            });
        }
        let mut waited = false;
        let result = rig.draw(&cancel, &mut |event| {
            if matches!(event, Event::Token { done: 2, .. }) {
                start.wait();
                waited = true;
                while !cancel.is_cancelled() {
                    std::thread::yield_now();
                }
            }
            Control::Continue
        });
        assert!(waited);
        assert_eq!(cancelled(result), 2);
    });
    rig.assert_as_new();
}

// Item 25: callbacks.

/// The panic ends the generation and goes no further, at whatever event it comes; the session goes on.
#[test]
fn a_callback_that_panics() {
    // The host's hook would print every panic below.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|info| {
        let text = info.payload_as_str().unwrap_or_default();
        if !text.contains("on purpose") {
            eprintln!("{info}");
        }
    }));
    let rig = Rig::new();
    let mut session = rig.engine.session();
    for at in 0..1 + TOKENS + 2 + 1 + 1 {
        let mut seen = 0;
        let result = session.generate(&rig.request, &CancelToken::new(), &mut |_| {
            seen += 1;
            if seen > at {
                panic!("on purpose, event {at}");
            }
            Control::Continue
        });
        match result {
            Err(Error::CallbackPanicked { message }) => {
                assert_eq!(message, format!("on purpose, event {at}"))
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(rig.device.live_bytes(), rig.loaded, "event {at}");
    }
    let again = session.generate(&rig.request, &CancelToken::new(), &mut |_| Control::Continue).unwrap();
    assert!(again.images[0].data() == rig.picture);
    // What it keeps for its next request.
    drop(session);
    let result = rig.draw(&CancelToken::new(), &mut |_| std::panic::panic_any(7u8));
    let message = result.unwrap_err().to_string();
    assert_eq!(message, "the callback panicked: with a value that is no text");
    rig.assert_as_new();
    std::panic::set_hook(hook);
}

/// As far as the borrow checker lets a callback: it cannot have its own session, so it makes another.
#[test]
fn a_callback_that_generates() {
    let rig = Rig::new();
    let mut inner = Vec::new();
    let result = rig.draw(&CancelToken::new(), &mut |event| {
        if let Event::Token { done: 1 | 3, .. } | Event::Image { .. } = event {
            inner.push(rig.draw(&CancelToken::new(), &mut |_| Control::Continue).unwrap());
        }
        Control::Continue
    });
    assert!(result.unwrap().images[0].data() == rig.picture);
    assert_eq!(inner.len(), 3);
    assert!(inner.iter().all(|images| images.images[0].data() == rig.picture));
    rig.assert_as_new();
}

#[test]
fn a_callback_that_is_slow() {
    let rig = Rig::new();
    let (pause, start) = (Duration::from_millis(60), Instant::now());
    let mut events = 0u32;
    let result = rig.draw(&CancelToken::new(), &mut |_| {
        events += 1;
        std::thread::sleep(pause);
        Control::Continue
    });
    assert!(start.elapsed() >= pause * events && events > 8);
    assert!(result.unwrap().images[0].data() == rig.picture);
    rig.assert_as_new();
}

/// What the callback holds may go while it runs: the session keeps the engine.
#[test]
fn a_callback_that_drops_the_engine() {
    let rig = Rig::new();
    let Rig { device, engine, request, picture, .. } = rig;
    let mut session = engine.session();
    let mut engine = Some(engine);
    let result = session.generate(&request, &CancelToken::new(), &mut |_| {
        engine = None;
        Control::Continue
    });
    assert!(result.unwrap().images[0].data() == picture);
    drop(session);
    assert_eq!(device.live_bytes(), 0);
}

// Item 26: threads and drops.

#[test]
fn two_sessions_on_two_threads_one_failing_and_the_other_right() {
    let rig = Rig::new();
    let start = Barrier::new(2);
    std::thread::scope(|scope| {
        let right = scope.spawn(|| {
            start.wait();
            (0..3).all(|_| {
                let images = rig.draw(&CancelToken::new(), &mut |_| Control::Continue);
                images.unwrap().images[0].data() == rig.picture
            })
        });
        start.wait();
        for round in 0..4 {
            let mut wrong = rig.request.clone();
            // Refused, or stopped in the middle.
            if round % 2 == 0 {
                wrong.width = 47;
                let refused =
                    rig.engine.session().generate(&wrong, &CancelToken::new(), &mut |_| Control::Continue);
                assert!(matches!(refused, Err(Error::InvalidRequest { .. })), "{refused:?}");
            } else {
                let stopped = rig.draw(&CancelToken::new(), &mut |event| match event {
                    Event::Token { done: 3, .. } => Control::Stop,
                    _ => Control::Continue,
                });
                assert_eq!(cancelled(stopped), 3);
            }
        }
        assert!(right.join().unwrap(), "the failing session changed the other's picture");
    });
    rig.assert_as_new();
}

/// A call that fails hits one of the two sessions, whichever asks next; the other does not notice.
#[test]
fn a_device_call_that_fails_ends_one_of_two_sessions() {
    let rig = Rig::new();
    for n in [3, 40, 60] {
        let start = Barrier::new(2);
        let results: Vec<_> = std::thread::scope(|scope| {
            let draw = || {
                start.wait();
                rig.draw(&CancelToken::new(), &mut |_| Control::Continue)
            };
            rig.device.set_fault(Some(Fault::Call(n)));
            let threads = [scope.spawn(draw), scope.spawn(draw)];
            threads.map(|thread| thread.join().unwrap()).into()
        });
        let failed = results.iter().filter(|result| matches!(result, Err(Error::Device(_)))).count();
        let right = results.iter().flatten().filter(|images| images.images[0].data() == rig.picture).count();
        assert_eq!((failed, right), (1, 1), "call {n}");
        rig.device.set_fault(None);
        rig.assert_as_new();
    }
}

#[test]
fn an_engine_dropped_while_a_session_lives() {
    let Rig { device, engine, request, picture, loaded } = Rig::new();
    let mut session = engine.session();
    drop(engine);
    assert_eq!(device.live_bytes(), loaded);
    for _ in 0..2 {
        let images = session.generate(&request, &CancelToken::new(), &mut |_| Control::Continue).unwrap();
        assert!(images.images[0].data() == picture);
    }
    drop(session);
    assert_eq!(device.live_bytes(), 0, "the last session takes the weights with it");
}

/// A session that is dropped in mid generation: `generate` borrows it, so that the only way is to leave `generate`
/// early, by a stop.
#[test]
fn a_session_dropped_in_mid_generation() {
    let rig = Rig::new();
    let mut session = rig.engine.session();
    let result = session.generate(&rig.request, &CancelToken::new(), &mut |event| match event {
        Event::Token { done: 3, .. } => Control::Stop,
        _ => Control::Continue,
    });
    drop(session);
    assert_eq!(cancelled(result), 3);
    rig.assert_as_new();
}
