//! Whole pictures from the embedded demo model: determinism, batches, cancel, progress, the memory plan.

use std::num::NonZeroU32;
use std::sync::{Arc, OnceLock};
use warpstep::Error;
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions};
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::event::{CancelToken, Control, Event, LoadProgress};
use warpstep::request::GenerateRequest;
use warpstep::session::Images;

fn load(options: EngineOptions) -> Arc<Engine> {
    let device = Arc::new(EmulatedDevice::new(EmulatedOptions::default()).unwrap());
    Arc::new(Engine::load(&ModelSource::Demo, device, options).unwrap())
}

/// One engine for all tests; sessions are independent.
fn engine() -> Arc<Engine> {
    static ENGINE: OnceLock<Arc<Engine>> = OnceLock::new();
    ENGINE.get_or_init(|| load(EngineOptions::default())).clone()
}

/// A small, quick request.
fn request(engine: &Engine, prompt: &str) -> GenerateRequest {
    let mut request = engine.request(prompt).unwrap();
    (request.width, request.height) = (48, 32);
    request.sampler.steps = 3;
    request.seed = 11;
    request
}

fn run(engine: &Arc<Engine>, request: &GenerateRequest) -> Images {
    engine.session().generate(request, &CancelToken::new(), &mut |_| Control::Continue).unwrap()
}

#[test]
fn the_same_request_gives_the_same_bytes() {
    let engine = engine();
    let request = request(&engine, "a red circle on a blue background");
    let (first, second) = (run(&engine, &request), run(&engine, &request));
    assert_eq!(first.images[0].data(), second.images[0].data());
    let mut other = request.clone();
    other.seed = 12;
    assert_ne!(first.images[0].data(), run(&engine, &other).images[0].data());
    assert_eq!((first.images[0].width(), first.images[0].height()), (48, 32));
}

#[test]
fn every_image_of_a_batch_is_what_it_is_alone() {
    let engine = engine();
    let mut request = request(&engine, "a small blue star on a yellow background");
    // Ten sequences: two groups of rows while decoding, and more prompt rows than one block takes.
    request.n = 5;
    let batch = run(&engine, &request);
    assert_eq!(batch.images.len(), 5);
    for index in [0, 2, 4] {
        let mut alone = request.clone();
        (alone.n, alone.first_image) = (1, index);
        assert!(
            run(&engine, &alone).images[0].data() == batch.images[index as usize].data(),
            "image {index} of the batch differs from the same image made alone"
        );
    }
    assert_ne!(batch.images[0].data(), batch.images[1].data());
}

#[test]
fn buffers_filled_with_nan_after_their_life_change_nothing() {
    let engine = engine();
    let request = request(&engine, "a green square on a white background");
    let plain = run(&engine, &request);
    let poisoned = load(EngineOptions { poison_dead_buffers: true, ..EngineOptions::default() });
    assert!(run(&poisoned, &request).images[0].data() == plain.images[0].data());
}

#[test]
fn every_sampler_and_branch_count_makes_a_picture() {
    use warpstep::sampler::Sampler;
    let engine = engine();
    for sampler in Sampler::ALL {
        for cfg in [1.0, 2.0] {
            let mut request = request(&engine, "a black triangle on an orange background");
            request.sampler.sampler = sampler;
            request.sampler.guidance_scale = cfg;
            let images = run(&engine, &request);
            let first = images.images[0].data()[0];
            assert!(
                images.images[0].data().iter().any(|&p| p != first),
                "{sampler:?}, cfg {cfg}: one flat colour"
            );
        }
    }
}

#[test]
fn events_come_in_order_and_count_every_token() {
    let engine = engine();
    let request = request(&engine, "a red circle on a blue background");
    let mut log = Vec::new();
    engine
        .session()
        .generate(&request, &CancelToken::new(), &mut |event| {
            log.push(match event {
                Event::Started { image_tokens, .. } => format!("started {image_tokens}"),
                Event::Token { done, of } => format!("token {done}/{of}"),
                Event::Rows { done, of } => format!("rows {done}/{of}"),
                Event::Image { index } => format!("image {index}"),
                Event::Finished { timings } => {
                    assert!(timings.total_ms >= timings.decode_ms && timings.decode_ms > 0.0);
                    "finished".into()
                }
                _ => "other".into(),
            });
            Control::Continue
        })
        .unwrap();
    let expected = [
        "started 6",
        "token 1/6",
        "token 2/6",
        "token 3/6",
        "rows 1/2",
        "token 4/6",
        "token 5/6",
        "token 6/6",
        "rows 2/2",
        "image 0",
        "finished",
    ];
    assert_eq!(log, expected);
}

#[test]
fn previews_show_finished_rows_and_change_nothing() {
    let engine = load(EngineOptions { poison_dead_buffers: true, ..EngineOptions::default() });
    let mut request = request(&engine, "a red circle on a blue background");
    (request.width, request.height) = (32, 64);
    let plain = run(&engine, &request);
    request.preview_every_rows = NonZeroU32::new(2);
    assert!(engine.plan(&request).unwrap().activation_bytes >= plain.plan.activation_bytes);
    let mut previews = Vec::new();
    let with = engine
        .session()
        .generate(&request, &CancelToken::new(), &mut |event| {
            if let Event::Preview { rows, of, images } = event {
                previews.push((*rows, *of, images.clone()));
            }
            Control::Continue
        })
        .unwrap();
    assert_eq!(with.images[0].data(), plain.images[0].data());
    let [(2, 4, images)] = &previews[..] else {
        panic!("{} previews", previews.len());
    };
    assert_eq!((images.len(), images[0].width(), images[0].height()), (1, 32, 32));
    // Close to what the rows will be, and far from another picture's.
    let distance = |other: &[u8]| -> f64 {
        let values = images[0].data().iter().zip(other);
        values.map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / images[0].data().len() as f64
    };
    request.seed += 1;
    request.prompt = "a white star on a black background".into();
    let (same, other) = (distance(plain.images[0].data()), distance(run(&engine, &request).images[0].data()));
    assert!(same < 15.0 && same < other / 3.0, "{same} levels from the picture, {other} from another");
}

#[test]
fn cancel_before_the_start_does_nothing() {
    let engine = engine();
    let cancel = CancelToken::new();
    cancel.cancel();
    cancel.cancel();
    let mut events = 0;
    let result = engine.session().generate(&request(&engine, "a circle"), &cancel, &mut |_| {
        events += 1;
        Control::Continue
    });
    assert!(matches!(result, Err(Error::Cancelled { tokens: 0 })));
    assert_eq!(events, 0);
}

#[test]
fn cancel_takes_effect_within_the_tokens_in_flight() {
    let engine = engine();
    let cancel = CancelToken::new();
    let mut seen = 0;
    let result = engine.session().generate(&request(&engine, "a circle"), &cancel, &mut |event| {
        if let Event::Token { done, .. } = event {
            seen = *done;
            if *done == 2 {
                cancel.cancel();
            }
        }
        Control::Continue
    });
    assert!(matches!(result, Err(Error::Cancelled { tokens: 2 })), "{result:?}");
    assert_eq!(seen, 2);
    // The engine is as good as new.
    run(&engine, &request(&engine, "a circle"));
}

#[test]
fn a_callback_can_stop() {
    let engine = engine();
    let result = engine.session().generate(
        &request(&engine, "a circle"),
        &CancelToken::new(),
        &mut |event| match event {
            Event::Rows { .. } => Control::Stop,
            _ => Control::Continue,
        },
    );
    assert!(matches!(result, Err(Error::Cancelled { tokens: 3 })), "{result:?}");
}

#[test]
fn the_plan_is_known_before_and_a_budget_refuses() {
    let engine = engine();
    let mut small = request(&engine, "a circle");
    let mut large = small.clone();
    large.n = 4;
    let (a, b) = (engine.plan(&small).unwrap(), engine.plan(&large).unwrap());
    assert!(a.weight_bytes > 1_000_000 && a.request_bytes() > 0);
    assert_eq!(b.cache_bytes, 4 * a.cache_bytes);
    small.n = 1;
    assert_eq!(run(&engine, &small).plan, a);
    let budget = Some(b.weight_bytes + a.request_bytes());
    let tight = load(EngineOptions { memory_budget_bytes: budget, ..EngineOptions::default() });
    run(&tight, &small);
    match tight.session().generate(&large, &CancelToken::new(), &mut |_| Control::Continue) {
        Err(Error::OutOfMemory { what, requested_bytes, free_bytes }) => {
            assert_eq!((requested_bytes, free_bytes), (b.request_bytes(), a.request_bytes()));
            assert!(what.contains(&b.weight_bytes.to_string()), "{what}");
        }
        other => panic!("{other:?}"),
    }
    // Not even the weights: no progress is reported, because none of them is read.
    let options = EngineOptions { memory_budget_bytes: Some(b.weight_bytes - 1), ..EngineOptions::default() };
    let device = Arc::new(EmulatedDevice::new(EmulatedOptions::default()).unwrap());
    let mut progress = |_: &LoadProgress<'_>| panic!("weights were read");
    match Engine::load_with(&ModelSource::Demo, device, options, &mut progress) {
        Err(Error::OutOfMemory { requested_bytes, free_bytes, .. }) => {
            assert_eq!((requested_bytes, free_bytes), (b.weight_bytes, b.weight_bytes - 1));
        }
        other => panic!("{:?}", other.err()),
    }
}

#[test]
fn two_sessions_on_two_threads_do_not_disturb_each_other() {
    let engine = engine();
    let requests = [request(&engine, "a red circle on blue"), request(&engine, "two green squares on black")];
    let alone: Vec<_> = requests.iter().map(|r| run(&engine, r).images[0].data().to_vec()).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let handles: Vec<_> =
            requests.iter().map(|r| scope.spawn(|| run(&engine, r).images[0].data().to_vec())).collect();
        handles.into_iter().map(|h| h.join().unwrap()).collect()
    });
    assert_eq!(alone, together);
}

/// Every list is recorded with programmatic dependent launches. In the race build a kernel that touches what another
/// node writes before it has waited, or never waits, fails here; the planted bugs show that it would.
#[test]
fn a_whole_picture_of_dependent_launches() {
    let engine = engine();
    let mut request = request(&engine, "a red circle on a blue background");
    (request.width, request.height) = (32, 16);
    request.sampler.steps = 2;
    // Two, so that the prompts are repeated.
    request.n = 2;
    run(&engine, &request);
}
