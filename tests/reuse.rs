//! What a session keeps from request to request: memory, lists, and the keys and values of prompts that come again.
//! Whatever is kept, every picture is, to the last bit of its tokens, that of a session which has nothing.

use std::num::NonZeroU32;
use std::path::Path;
use std::sync::Arc;
use warpstep::Error;
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions, Fault};
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::event::{CancelToken, Control, Event, Reuse};
use warpstep::image::RgbImage;
use warpstep::ops::DType;
use warpstep::request::GenerateRequest;
use warpstep::sampler::Sampler;
use warpstep::session::{Images, Session};
use warpstep::text::TextRequest;

struct Rig {
    device: EmulatedDevice,
    engine: Arc<Engine>,
    session: Session,
}

const CAPTION: &str = "a red circle on a blue background";
const NEGATIVE: &str = "blurry, low quality, noise";

impl Rig {
    fn new() -> Rig {
        Rig::with(&ModelSource::Demo, EngineOptions::default())
    }

    fn with(source: &ModelSource, options: EngineOptions) -> Rig {
        let device = EmulatedDevice::new(EmulatedOptions::default()).unwrap();
        let engine = Arc::new(Engine::load(source, Arc::new(device.clone()), options).unwrap());
        Rig { device, session: engine.session(), engine }
    }

    /// Two tokens, two branches.
    fn request(&self) -> GenerateRequest {
        let mut request = self.engine.request(CAPTION).unwrap();
        (request.width, request.height, request.seed) = (32, 16, 3);
        (request.sampler.steps, request.sampler.guidance_scale) = (2, 2.0);
        request.negative_prompt = Some(NEGATIVE.into());
        request.keep_tokens = true;
        request
    }

    fn draw(&mut self, request: &GenerateRequest) -> warpstep::Result<Images> {
        self.session.generate(request, &CancelToken::new(), &mut |_| Control::Continue)
    }

    /// Draws with the session, and with a new one, which must come to the same.
    #[track_caller]
    fn check(&mut self, request: &GenerateRequest) -> Reuse {
        let made = self.draw(request).unwrap();
        let fresh = self.engine.session().generate(request, &CancelToken::new(), &mut |_| Control::Continue);
        let fresh = fresh.unwrap();
        assert!(made.images == fresh.images, "another picture than a new session's");
        let bits = |images: &Images| -> Vec<u32> {
            images.tokens.iter().flat_map(|tokens| tokens.values.iter().map(|v| v.to_bits())).collect()
        };
        assert!(bits(&made) == bits(&fresh) && !bits(&made).is_empty(), "other tokens than a new session's");
        // The images of a branch have one prompt, and no two branches here.
        let once: usize = made.plan.prompt_tokens.iter().sum();
        let all = once * made.plan.images;
        let first = Reuse { prefilled_tokens: once, repeated_tokens: all - once, ..Reuse::default() };
        assert_eq!(fresh.reuse, first);
        let Reuse { prefilled_tokens, repeated_tokens, kept_tokens, .. } = made.reuse;
        assert_eq!(prefilled_tokens + repeated_tokens + kept_tokens, all);
        assert_eq!(self.session.kept_bytes(), made.plan.request_bytes());
        assert_eq!(self.device.live_bytes(), made.plan.weight_bytes + made.plan.request_bytes());
        made.reuse
    }
}

#[test]
fn what_does_not_change_is_not_done_again() {
    let mut rig = Rig::new();
    let first = rig.request();
    let [caption, negative] = rig.engine.plan(&first).unwrap().prompt_tokens[..] else { panic!("two rows") };
    assert!(negative > 8 && caption != negative);
    let reuse = |prefilled_tokens| Reuse {
        lists: true,
        prefilled_tokens,
        repeated_tokens: 0,
        kept_tokens: caption + negative - prefilled_tokens,
    };
    assert!(!rig.check(&first).lists);
    assert_eq!(rig.check(&first), reuse(0));
    rig.device.set_fault(None);
    rig.draw(&first).unwrap();
    assert_eq!(rig.device.requests().1, 0, "allocations");

    let mut other = first.clone();
    (other.seed, other.first_image) = (u64::MAX, 3);
    assert_eq!(rig.check(&other), reuse(0));
    other.sampler.guidance_scale = 4.5;
    other.sampler.timesteps_shift *= 1.5;
    assert_eq!(rig.check(&other), reuse(0));
    // A caption of as many tokens, and then other negative prompts.
    other.prompt = "a green circle on a white background".into();
    assert_eq!(rig.check(&other), reuse(caption));
    other.negative_prompt = None;
    let [_, short] = rig.engine.plan(&other).unwrap().prompt_tokens[..] else { panic!("two rows") };
    let changed = rig.check(&other);
    assert_eq!((changed.prefilled_tokens, changed.kept_tokens), (short, caption));
    assert_eq!(rig.check(&first), reuse(caption + negative));
    // Caption and negative prompt change places: neither row has what it had.
    std::mem::swap(&mut other.prompt, other.negative_prompt.get_or_insert(NEGATIVE.into()));
    assert!(rig.check(&other).lists);
    assert_eq!(rig.check(&first), reuse(caption + negative));
}

#[test]
fn other_shapes_begin_anew_and_come_back_right() {
    let mut rig = Rig::new();
    let first = rig.request();
    rig.check(&first);
    let change = |change: &dyn Fn(&mut GenerateRequest)| {
        let mut request = first.clone();
        change(&mut request);
        request
    };
    let long = "a red circle and a blue square and ".repeat(12) + "a star";
    let others = [
        change(&|r| (r.width, r.height) = (16, 32)),
        change(&|r| (r.width, r.height) = (48, 16)),
        change(&|r| r.n = 2),
        change(&|r| r.sampler.steps = 3),
        change(&|r| (r.sampler.guidance_scale, r.negative_prompt) = (1.0, None)),
        change(&|r| r.sampler.use_norm = !r.sampler.use_norm),
        change(&|r| r.sampler.rescale = !r.sampler.rescale),
        change(&|r| r.preview_every_rows = NonZeroU32::new(1)),
        change(&|r| r.prompt = long.clone()),
        first.clone(),
    ];
    for (index, other) in others.iter().enumerate() {
        let reuse = rig.check(other);
        assert!(!reuse.lists && reuse.kept_tokens == 0, "change {index}: {reuse:?}");
    }
    // Whether samplers share lists is theirs to know.
    for sampler in Sampler::ALL {
        rig.check(&change(&|r| r.sampler.sampler = sampler));
    }
    // Two sizes by turns.
    for _ in 0..2 {
        assert!(!rig.check(&others[0]).lists && !rig.check(&first).lists);
    }
    assert!(rig.check(&first).lists);
}

#[test]
fn the_images_of_a_batch_keep_their_prompts() {
    let mut rig = Rig::new();
    let mut request = rig.request();
    request.n = 3;
    let [caption, negative] = rig.engine.plan(&request).unwrap().prompt_tokens[..] else {
        panic!("two rows")
    };
    rig.check(&request);
    request.prompt = "a white star on a black background, large".into();
    let other = rig.engine.plan(&request).unwrap().prompt_tokens[0];
    assert_ne!(other, caption);
    let expected =
        Reuse { lists: true, prefilled_tokens: other, repeated_tokens: 2 * other, kept_tokens: 3 * negative };
    assert_eq!(rig.check(&request), expected);
    let again =
        Reuse { prefilled_tokens: 0, repeated_tokens: 0, kept_tokens: 3 * (other + negative), ..expected };
    assert_eq!(rig.check(&request), again);
    // Without guidance only captions are there.
    (request.sampler.guidance_scale, request.negative_prompt) = (1.0, None);
    rig.check(&request);
    let reuse = rig.check(&GenerateRequest { seed: 77, ..request });
    assert!(reuse.lists && reuse.prefilled_tokens == 0, "{reuse:?}");
}

/// Each prompt goes through the transformer once, for all images of a batch; what they draw is what each draws alone.
#[test]
fn the_images_of_a_batch_share_their_prefill() {
    let mut rig = Rig::new();
    let text = rig.request();
    let mut edit = GenerateRequest { images: vec![picture(32, 16, 7)], ..text.clone() };
    edit.sampler.image_guidance_scale = 1.5;
    let without = GenerateRequest { negative_prompt: None, ..text.clone() };
    let same = GenerateRequest { negative_prompt: Some(CAPTION.into()), ..text.clone() };
    let mut one_branch = without.clone();
    one_branch.sampler.guidance_scale = 1.0;
    for (request, distinct) in [(text, 2), (without, 2), (same, 1), (one_branch, 1), (edit, 3)] {
        let batch = GenerateRequest { n: 3, ..request.clone() };
        rig.session.forget();
        let made = rig.draw(&batch).unwrap();
        let tokens = &made.plan.prompt_tokens;
        let once: usize = tokens[..distinct].iter().sum();
        let expected = Reuse {
            prefilled_tokens: once,
            repeated_tokens: 3 * tokens.iter().sum::<usize>() - once,
            ..Reuse::default()
        };
        assert_eq!(made.reuse, expected, "{:?}", request.negative_prompt);
        let bits = |images: &Images| -> Vec<u32> {
            images.tokens.iter().flat_map(|tokens| tokens.values.iter().map(|v| v.to_bits())).collect()
        };
        let mut alone = Vec::new();
        for index in 0..3 {
            let single =
                rig.engine
                    .session()
                    .generate(&batch.single(index), &CancelToken::new(), &mut |_| Control::Continue);
            let single = single.unwrap();
            assert!(single.images[0] == made.images[index as usize], "image {index}");
            alone.extend(bits(&single));
        }
        assert!(bits(&made) == alone && made.images[0] != made.images[1]);
    }
}

fn picture(width: u32, height: u32, factor: u32) -> RgbImage {
    let data = (0..width * height * 3).map(|i| (i * factor % 251) as u8).collect();
    RgbImage::new(width, height, data).unwrap()
}

#[test]
fn rows_that_show_pictures_are_made_again_and_the_negative_row_is_not() {
    let mut rig = Rig::new();
    let mut request = rig.request();
    request.sampler.image_guidance_scale = 1.5;
    request.images = vec![picture(32, 16, 7)];
    let [_, _, nothing] = rig.engine.plan(&request).unwrap().prompt_tokens[..] else { panic!("three rows") };
    assert!(!rig.check(&request).lists);
    let kept = |reuse: Reuse| (reuse.lists, reuse.kept_tokens);
    assert_eq!(kept(rig.check(&request)), (true, nothing));
    request.prompt = "make the circle black".into();
    assert_eq!(kept(rig.check(&request)), (true, nothing));
    // The same ids, and another picture behind them.
    request.images = vec![picture(32, 16, 11)];
    assert_eq!(kept(rig.check(&request)), (true, nothing));
    request.images = vec![picture(16, 32, 11)];
    assert_eq!(kept(rig.check(&request)), (false, 0));
    request.images = Vec::new();
    request.sampler.image_guidance_scale = 1.0;
    assert_eq!(kept(rig.check(&request)), (false, 0));
}

/// In f32, and wherever weights are not packed, fewer than eight prompt rows at the end of a tile are summed in another
/// order: prompts are then kept only where that changes no bit.
#[test]
fn kept_prompts_change_no_bit_in_any_precision() {
    let tiny = ModelSource::Dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-a"));
    for (source, dtype) in [(&ModelSource::Demo, DType::F32), (&tiny, DType::F32), (&tiny, DType::Bf16)] {
        let mut rig = Rig::with(source, EngineOptions { dtype, ..EngineOptions::default() });
        let mut request = rig.request();
        (request.prompt, request.negative_prompt) = ("a cat and a dog".into(), Some("blurry".into()));
        let (mut kept, mut not) = (0, 0);
        rig.check(&request);
        let mut words = String::new();
        for round in 0..9 {
            words += " so";
            request.prompt = format!("a bird sits on the roof{words}");
            let reuse = rig.check(&request);
            assert!(reuse.lists || round > 0, "{reuse:?}");
            *if reuse.kept_tokens > 0 { &mut kept } else { &mut not } += 1;
        }
        // A negative row of its own, too short for a tile.
        request.negative_prompt = None;
        let reuse = rig.check(&request);
        let [_, short] = rig.engine.plan(&request).unwrap().prompt_tokens[..] else { panic!("two rows") };
        assert!(short < 8 && (reuse.kept_tokens == 0) == (dtype == DType::F32), "{reuse:?}");
        eprintln!("{source:?} {}: the negative prompt was kept {kept} times, {not} times not", dtype.name());
        assert!(kept > 0, "{kept} of {}", kept + not);
    }
}

#[test]
fn nothing_of_a_request_that_fails_is_used_again() {
    let mut rig = Rig::new();
    let request = rig.request();
    let picture = rig.draw(&request).unwrap().images;
    let loaded = rig.device.live_bytes() - rig.session.kept_bytes();
    let mut events = 0;
    rig.session
        .generate(&request, &CancelToken::new(), &mut |_| {
            events += 1;
            Control::Continue
        })
        .unwrap();
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    for at in 0..events {
        for panics in [false, true] {
            assert!(rig.session.kept_bytes() > 0);
            let mut seen = 0;
            let result = rig.session.generate(&request, &CancelToken::new(), &mut |_| {
                seen += 1;
                match seen > at {
                    true if panics => panic!("on purpose"),
                    true => Control::Stop,
                    false => Control::Continue,
                }
            });
            let expected = matches!(
                (&result, panics),
                (Err(Error::Cancelled { .. }), false) | (Err(Error::CallbackPanicked { .. }), true)
            );
            assert!(expected, "{result:?}");
            assert_eq!((rig.session.kept_bytes(), rig.device.live_bytes()), (0, loaded), "event {at}");
            let again = rig.draw(&request).unwrap();
            assert!(again.images == picture && !again.reuse.lists && again.reuse.kept_tokens == 0);
        }
    }
    std::panic::set_hook(hook);
    // What never began changes nothing.
    let cancel = CancelToken::new();
    cancel.cancel();
    let refused = GenerateRequest { width: 47, ..request.clone() };
    assert!(matches!(rig.draw(&refused), Err(Error::InvalidRequest { .. })));
    let cancelled = rig.session.generate(&request, &cancel, &mut |_| Control::Continue);
    assert!(matches!(cancelled, Err(Error::Cancelled { tokens: 0 })));
    let again = rig.draw(&request).unwrap();
    assert!(again.images == picture && again.reuse.lists && again.reuse.prefilled_tokens == 0);
}

/// Also what is kept can fail to be used, at any call; the next request is right.
#[test]
fn every_device_call_of_a_second_request_fails_in_turn() {
    let mut rig = Rig::new();
    let mut request = rig.request();
    (request.width, request.height, request.sampler.steps) = (16, 16, 1);
    let first = rig.draw(&request).unwrap().images;
    let loaded = rig.device.live_bytes() - rig.session.kept_bytes();
    // With a caption of another length, so that a prefill list is made.
    let second = GenerateRequest { prompt: "a large green star".into(), seed: 9, ..request.clone() };
    rig.device.set_fault(None);
    let expected = rig.draw(&second).unwrap();
    assert!(expected.reuse.lists && expected.reuse.kept_tokens > 0);
    let (calls, allocations) = rig.device.requests();
    assert!(calls > 30 && allocations == 0, "{calls} calls, {allocations} allocations");
    let mut unnoticed = 0;
    for n in 1..=calls {
        assert!(rig.draw(&request).unwrap().images == first, "after call {n}");
        rig.device.set_fault(Some(Fault::Call(n)));
        match rig.draw(&second) {
            Err(Error::Device(reason)) => assert!(reason.contains(&format!("(call {n})")), "{reason}"),
            Err(other) => panic!("call {n}: {other}"),
            // The pictures were there: only what is left in memory could not be overwritten.
            Ok(images) => {
                assert!(images.images == expected.images);
                unnoticed += 1;
            }
        }
        rig.device.set_fault(None);
        assert_eq!((rig.session.kept_bytes(), rig.device.live_bytes()), (0, loaded), "after call {n}");
    }
    // Pieces of the arena, and keys and values of two rows of four layers.
    assert!((17..=20).contains(&unnoticed), "{unnoticed} of {calls}");
    assert!(rig.draw(&second).unwrap().images == expected.images);
}

#[test]
fn a_session_holds_no_more_than_one_plan_and_gives_it_back() {
    let mut rig = Rig::new();
    let small = rig.request();
    let large = GenerateRequest { n: 2, ..small.clone() };
    let plan = rig.engine.plan(&large).unwrap();
    let most = plan.weight_bytes + plan.request_bytes();
    rig.device.set_planned_bytes(Some(most));
    for request in [&large, &small, &large, &large] {
        rig.draw(request).unwrap();
        assert_eq!(rig.session.kept_bytes(), rig.engine.plan(request).unwrap().request_bytes());
    }
    assert_eq!(rig.device.peak_bytes(), most);
    rig.device.set_planned_bytes(None);
    rig.session.forget();
    assert_eq!((rig.session.kept_bytes(), rig.device.live_bytes()), (0, plan.weight_bytes));
    assert!(!rig.check(&large).lists);
    // The kept memory is there for whatever needs it: here none is left at first.
    rig.device.set_fault(Some(Fault::Allocation(2)));
    assert!(matches!(rig.draw(&small), Err(Error::OutOfMemory { .. })));
    assert_eq!(rig.device.live_bytes(), plan.weight_bytes);
    assert!(!rig.check(&small).lists && rig.check(&small).lists);
    drop(rig.session);
    assert_eq!(rig.device.live_bytes(), plan.weight_bytes);
}

#[test]
fn text_is_written_beside_what_is_kept_where_there_is_room() {
    let mut rig = Rig::with(&ModelSource::Demo, EngineOptions { text: true, ..EngineOptions::default() });
    let request = rig.request();
    let text = TextRequest { max_tokens: 2, seed: 1, ..TextRequest::new("a red circle") };
    let write =
        |rig: &mut Rig| rig.session.complete(&text, &CancelToken::new(), &mut |_| Control::Continue).unwrap();
    let alone = write(&mut rig).ids;
    let kept = rig.draw(&request).unwrap().plan.request_bytes();
    assert_eq!((write(&mut rig).ids, rig.session.kept_bytes()), (alone.clone(), kept));
    assert!(rig.check(&request).lists);
    rig.device.set_fault(Some(Fault::Allocation(3)));
    assert_eq!((write(&mut rig).ids, rig.session.kept_bytes()), (alone.clone(), 0));
    rig.device.set_fault(None);

    let weights = rig.engine.plan(&request).unwrap().weight_bytes;
    let budget = weights + kept.max(rig.engine.plan_text(&text).unwrap().request_bytes());
    let options = EngineOptions { text: true, memory_budget_bytes: Some(budget), ..EngineOptions::default() };
    let mut tight = Rig::with(&ModelSource::Demo, options);
    tight.device.set_planned_bytes(Some(budget));
    tight.draw(&request).unwrap();
    assert_eq!((write(&mut tight).ids, tight.session.kept_bytes()), (alone, 0));
    assert!(!tight.draw(&request).unwrap().reuse.lists);
}

#[test]
fn events_and_timings_are_as_ever() {
    let mut rig = Rig::new();
    let request = rig.request();
    let log = |rig: &mut Rig| {
        let mut log = Vec::new();
        rig.session
            .generate(&request, &CancelToken::new(), &mut |event| {
                log.push(match event {
                    Event::Finished { timings } => {
                        assert!(timings.total_ms >= timings.decode_ms);
                        "finished".to_owned()
                    }
                    other => format!("{other:?}"),
                });
                Control::Continue
            })
            .unwrap();
        log
    };
    let first = log(&mut rig);
    assert!(first.len() > 4);
    assert_eq!(log(&mut rig), first);
}
