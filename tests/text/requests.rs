//! What is refused, by the field that is wrong, before anything is allocated.

use crate::{complete, demo, load, tiny, with_text};
use warpstep::Error;
use warpstep::engine::{EngineOptions, MAX_POSITIONS, ModelSource};
use warpstep::image::RgbImage;
use warpstep::text::{RandomSampling, TextRequest, TextSampling};

fn refused<T>(result: warpstep::Result<T>) -> (&'static str, String) {
    match result {
        Err(Error::InvalidRequest { field, reason }) => (field, reason),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("not refused"),
    }
}

#[test]
fn senseless_requests_are_refused_by_field() {
    let engine = demo();
    let field = |change: &dyn Fn(&mut TextRequest)| {
        let mut request = TextRequest::new("a red");
        change(&mut request);
        let planned = refused(engine.plan_text(&request));
        assert_eq!(refused(complete(&engine, &request)), planned);
        planned.0
    };
    for temperature in [f64::NAN, -1.0, 0.0, f64::INFINITY] {
        let random = RandomSampling { temperature, ..RandomSampling::default() };
        assert_eq!(field(&|r| r.sampling = TextSampling::Random(random)), "temperature");
    }
    for top_p in [0.0, 1.5, -0.1, f64::NAN] {
        let random = RandomSampling { top_p: Some(top_p), ..RandomSampling::default() };
        assert_eq!(field(&|r| r.sampling = TextSampling::Random(random)), "top_p");
    }
    for max_tokens in [0, MAX_POSITIONS as u32, u32::MAX] {
        assert_eq!(field(&|r| r.max_tokens = max_tokens), "max_tokens");
    }
    let prompts: [String; 8] = [
        String::new(),
        "x".repeat(33 << 10),
        "a\0b".into(),
        "a <image>".into(),
        "a<|begin_of_image|>".into(),
        "a<|image_area|>4*4".into(),
        "a<|endoftext|>".into(),
        "[PAD]".into(),
    ];
    for prompt in prompts {
        assert_eq!(field(&|r| r.prompt = prompt.clone()), "prompt", "{:.20}", prompt);
    }
    // With the tokens to be written it is too long: each number is a token.
    let long = |r: &mut TextRequest| {
        r.prompt = "1 ".repeat(1000);
        r.max_tokens = MAX_POSITIONS as u32 - 1000;
    };
    assert_eq!(field(&long), "prompt");
    assert_eq!(field(&|r| r.images = vec![RgbImage::new(16, 20, vec![0; 960]).unwrap()]), "images");
    let two = |r: &mut TextRequest| {
        r.prompt = "<image>".into();
        r.images = vec![RgbImage::new(16, 16, vec![0; 768]).unwrap(); 2];
    };
    assert_eq!(field(&two), "prompt");
}

#[test]
fn tokens_around_thoughts_are_allowed_in_captions_alone() {
    let engine = demo();
    let prompt = "a cat<|begin_of_thinking|>red<|end_of_thinking|>";
    assert!(engine.plan_text(&TextRequest::new(prompt)).unwrap().prompt_tokens > 4);
    let mut picture = engine.request(prompt).unwrap();
    let plain = engine.plan(&engine.request("a catred").unwrap()).unwrap();
    let plan = engine.plan(&picture).unwrap();
    assert!(plan.prompt_tokens[0] > plain.prompt_tokens[0]);
    picture.negative_prompt = Some("<|begin_of_thinking|>".into());
    assert_eq!(refused(engine.plan(&picture)).0, "negative_prompt");
}

#[test]
fn an_engine_without_the_head_says_so_and_is_smaller() {
    let without = load(&ModelSource::Demo, EngineOptions::default()).unwrap();
    let (field, reason) = refused(without.plan_text(&TextRequest::new("a red")));
    assert_eq!(field, "text");
    assert!(reason.contains("EngineOptions::text"), "{reason}");
    let bytes = without.plan(&without.request("a red").unwrap()).unwrap().weight_bytes;
    let plan = demo().plan_text(&TextRequest::new("a red")).unwrap();
    // lm_head [400, 192] in bf16.
    assert_eq!(plan.weight_bytes - bytes, 400 * 192 * 2);
}

#[test]
fn a_text_that_does_not_fit_the_budget_is_refused_before_it_is_allocated() {
    let request = TextRequest { max_tokens: 32_000, ..TextRequest::new("a red") };
    let plan = demo().plan_text(&request).unwrap();
    let needed = plan.weight_bytes + plan.cache_bytes + plan.activation_bytes;
    let budget = |bytes| EngineOptions { memory_budget_bytes: Some(bytes), ..with_text() };
    assert!(load(&ModelSource::Demo, budget(needed)).unwrap().plan_text(&request).is_ok());
    let tight = load(&ModelSource::Demo, budget(needed - 1)).unwrap();
    let result = tight.plan_text(&request);
    assert!(
        matches!(result, Err(Error::OutOfMemory { requested_bytes, .. }) if requested_bytes == plan.request_bytes()),
        "{result:?}"
    );
}

#[test]
fn prompts_of_other_models_keep_their_length() {
    // No token is put in front of or behind a text.
    assert_eq!(tiny().plan_text(&TextRequest::new("Hello")).unwrap().prompt_tokens, 3);
}
