//! What is written, and what the caller hears of it.

use crate::{complete, demo, golden, load, recorded, recorded_prompt, tiny, with_text};
use std::num::NonZeroU32;
use warpstep::Error;
use warpstep::engine::{EngineOptions, ModelSource};
use warpstep::event::{CancelToken, Control, Event};
use warpstep::image::RgbImage;
use warpstep::text::{Opening, RandomSampling, TextEnd, TextRequest, TextSampling};
use warpstep::tokenizer::{ModelTokenIds, Tokenizer};

#[test]
fn greedy_text_is_what_the_official_code_wrote() {
    let (_, official) = recorded().integers("official_generate_ids").unwrap();
    let mut request = TextRequest::new(recorded_prompt());
    request.max_tokens = 16;
    let mut pieces = String::new();
    let mut counts = Vec::new();
    let made = tiny().session().complete(&request, &CancelToken::new(), &mut |event| {
        if let Event::Text { piece, tokens } = event {
            pieces += piece;
            counts.push(*tokens);
        }
        Control::Continue
    });
    let made = made.unwrap();
    assert_eq!(made.plan.prompt_tokens, 34);
    let written: Vec<i64> = made.ids.iter().map(|&id| i64::from(id)).collect();
    assert_eq!(written, official[34..]);
    assert_eq!(made.end, TextEnd::MaxTokens);
    let ids = ModelTokenIds { vocab_size: 528, boi: 501, eoi: 502, image_placeholder_id: 503 };
    let tokenizer = Tokenizer::from_dir(&golden("tiny-a"), ids).unwrap();
    assert_eq!(made.text, tokenizer.decode(&made.ids, false).unwrap());
    assert_eq!(pieces, made.text);
    assert_eq!(counts[..16], (1..=16).collect::<Vec<_>>());
}

#[test]
fn the_demo_model_ends_its_caption_where_the_picture_begins() {
    let engine = demo();
    let made = complete(&engine, &TextRequest::new("a red")).unwrap();
    assert_eq!(made.end, TextEnd::Token("<|image_area|>".into()), "{:?}", made.text);
    assert!(made.text.contains("background") || made.text.contains(" on "), "{:?}", made.text);
    // An opening keeps the caption and ends at any special token.
    let thought =
        TextRequest { opening: Some(Opening::Thinking), max_tokens: 8, ..TextRequest::new("a red circle") };
    let plan = engine.plan_text(&thought).unwrap();
    let without = engine.plan_text(&TextRequest { opening: None, ..thought.clone() }).unwrap();
    assert_eq!(plan.prompt_tokens, without.prompt_tokens + 1);
    let made = complete(&engine, &thought).unwrap();
    assert!(made.ids.len() <= 8 && !made.text.contains("<|"), "{:?}", made.text);
}

#[test]
fn memory_may_be_poisoned_and_pictures_are_seen() {
    let picture = |colour: [u8; 3]| RgbImage::new(32, 16, colour.repeat(32 * 16)).unwrap();
    let poisoned =
        load(&ModelSource::Demo, EngineOptions { poison_dead_buffers: true, ..with_text() }).unwrap();
    let engine = demo();
    let random = RandomSampling { temperature: 3.0, ..RandomSampling::default() };
    let mut request = TextRequest::new("a");
    (request.seed, request.max_tokens, request.sampling) = (5, 12, TextSampling::Random(random));
    request.images = vec![picture([200, 30, 30])];
    let made = complete(&engine, &request).unwrap();
    assert_eq!(
        complete(&poisoned, &request).unwrap().ids,
        made.ids,
        "a buffer is read after its planned life"
    );
    // Two image tokens, h * w in three, and the three tokens around them.
    let without = TextRequest { images: Vec::new(), ..request.clone() };
    assert_eq!(made.plan.prompt_tokens, engine.plan_text(&without).unwrap().prompt_tokens + 8);
    let marked = TextRequest { prompt: "<image>a".into(), ..request.clone() };
    assert_eq!(complete(&engine, &marked).unwrap().ids, made.ids, "the picture stands in front");
    let moved = TextRequest { prompt: "a<image>".into(), ..request.clone() };
    let other = TextRequest { images: vec![picture([30, 30, 200])], ..request.clone() };
    let texts = [&moved, &other, &without].map(|request| complete(&engine, request).unwrap().ids);
    assert!(texts.iter().any(|ids| *ids != made.ids), "the picture has no effect at all");
}

#[test]
fn sampling_is_seeded_and_narrows_to_greedy() {
    let engine = tiny();
    let text = |sampling, seed| {
        let request = TextRequest { sampling, seed, max_tokens: 12, ..TextRequest::new(recorded_prompt()) };
        complete(&engine, &request).unwrap().ids
    };
    let random = |sampling| TextSampling::Random(sampling);
    let plain = random(RandomSampling::default());
    assert_eq!(text(plain, 1), text(plain, 1));
    assert_ne!(text(plain, 1), text(plain, 2));
    let greedy = text(TextSampling::Greedy, 1);
    for narrow in [
        RandomSampling { top_k: NonZeroU32::new(1), temperature: 4.0, ..Default::default() },
        RandomSampling { top_p: Some(1e-6), ..Default::default() },
        RandomSampling { temperature: 1e-6, ..Default::default() },
    ] {
        assert_eq!(text(random(narrow), 7), greedy, "{narrow:?}");
    }
}

#[test]
fn first_tokens_are_drawn_as_the_recorded_logits_say() {
    let case = recorded();
    let logits = case.tensor("logits_all").unwrap();
    let row = &logits.at(0)[33 * 528..34 * 528];
    let sampling = RandomSampling { temperature: 0.5, ..RandomSampling::default() };
    let weights: Vec<f64> = row.iter().map(|&logit| (2.0 * f64::from(logit)).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let engine = tiny();
    let draws = 300u32;
    let mut counts = vec![0u32; 528];
    for seed in 0..draws {
        let mut request = TextRequest::new(recorded_prompt());
        (request.seed, request.max_tokens) = (u64::from(seed), 1);
        request.sampling = TextSampling::Random(sampling);
        let made = complete(&engine, &request).unwrap();
        // A special token that ends the text is told by its name alone.
        if let Some(&id) = made.ids.first() {
            counts[id as usize] += 1;
        }
    }
    // Tokens that are expected at least five times, and one bin for all others.
    let (mut chi, mut bins, mut rest, mut rest_count) = (0.0, 0, f64::from(draws), draws);
    for (weight, &count) in weights.iter().zip(&counts) {
        let mean = weight / sum * f64::from(draws);
        if mean >= 5.0 {
            chi += (f64::from(count) - mean).powi(2) / mean;
            bins += 1;
            rest -= mean;
            rest_count -= count;
        }
    }
    chi += (f64::from(rest_count) - rest).powi(2) / rest;
    let freedom = f64::from(bins);
    println!("chi-square {chi:.1} of {freedom} degrees of freedom");
    assert!(bins >= 5, "only {bins} bins");
    assert!(chi < freedom + 4.0 * (2.0 * freedom).sqrt(), "chi-square {chi} of {freedom}");
}

#[test]
fn a_text_stops_when_it_is_told_to() {
    let engine = tiny();
    let request = TextRequest { max_tokens: 16, ..TextRequest::new(recorded_prompt()) };
    let stop_at = |wanted: usize, cancel: bool| {
        let token = CancelToken::new();
        engine.session().complete(&request, &token, &mut |event| match event {
            Event::Text { tokens, .. } if *tokens == wanted && cancel => {
                token.cancel();
                Control::Continue
            }
            Event::Text { tokens, .. } if *tokens == wanted => Control::Stop,
            _ => Control::Continue,
        })
    };
    for cancel in [false, true] {
        let result = stop_at(3, cancel);
        assert!(matches!(result, Err(Error::Cancelled { tokens: 3 })), "{result:?}");
    }
    let cancelled = CancelToken::new();
    cancelled.cancel();
    let result = engine.session().complete(&request, &cancelled, &mut |_| panic!("an event"));
    assert!(matches!(result, Err(Error::Cancelled { tokens: 0 })), "{result:?}");
}
