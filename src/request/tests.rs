use super::*;
use proptest::prelude::*;

/// The limits of a released model with a table of 32 x 32 positions.
const LIMITS: Limits = Limits {
    down_factor: 16,
    max_image_tokens: 16_384,
    position_table_rows: Some(1024),
    max_images: 64,
    max_prompt_bytes: 32 << 10,
};

fn demo() -> GenerateRequest {
    resolve(r#"{"prompt": "a red circle", "seed": 1}"#, ModelKind::Demo)
}

fn resolve(json: &str, kind: ModelKind) -> GenerateRequest {
    RequestFields::from_json(json).unwrap().resolve(&Defaults::for_model(kind)).unwrap()
}

fn refused<T: std::fmt::Debug>(result: Result<T>) -> (&'static str, String) {
    match result {
        Err(Error::InvalidRequest { field, reason }) => (field, reason),
        other => panic!("{other:?}"),
    }
}

/// The field that validation refuses.
fn field(request: &GenerateRequest) -> &'static str {
    refused(request.validate(&LIMITS)).0
}

fn with(change: impl FnOnce(&mut GenerateRequest)) -> GenerateRequest {
    let mut request = demo();
    change(&mut request);
    request
}

fn sampled(change: impl FnOnce(&mut SamplerConfig)) -> GenerateRequest {
    with(|r| change(&mut r.sampler))
}

#[test]
fn every_models_defaults_are_valid() {
    for kind in [ModelKind::Demo, ModelKind::NextStep1Large, ModelKind::NextStep11] {
        resolve(r#"{"prompt": "x"}"#, kind).validate(&LIMITS).unwrap();
        resolve(r#"{"prompt": "x", "cfg": 1}"#, kind).validate(&LIMITS).unwrap();
    }
    let edit = resolve(r#"{"prompt": "<image>x"}"#, ModelKind::NextStep1LargeEdit);
    edit.validate_with_pictures(&LIMITS, 1).unwrap();
    assert_eq!(field(&edit), "image_guidance_scale", "editing needs its picture");
    resolve(r#"{"prompt": "<image>x", "cfg": 1}"#, ModelKind::NextStep1LargeEdit)
        .validate_with_pictures(&LIMITS, 1)
        .unwrap();
    for (name, kind) in [("t2i", ModelKind::NextStep1Large), ("edit", ModelKind::NextStep1LargeEdit)] {
        assert_eq!(Preset::from_name(name).unwrap().defaults(), Defaults::for_model(kind));
    }
    assert_eq!(Preset::from_name("T2I"), None);
}

// C.3 item 16: prompts.

#[test]
fn an_empty_prompt_is_unconditional_and_allowed() {
    with(|r| r.prompt.clear()).validate(&LIMITS).unwrap();
}

#[test]
fn a_megabyte_of_prompt_is_refused() {
    let long = "x".repeat(1 << 20);
    assert_eq!(field(&with(|r| r.prompt = long.clone())), "prompt");
    assert_eq!(field(&with(|r| r.negative_prompt = Some(long.clone()))), "negative_prompt");
    assert_eq!(field(&with(|r| r.positive_prompt = Some(long.clone()))), "positive_prompt");
    with(|r| r.prompt = "x".repeat(32 << 10)).validate(&LIMITS).unwrap();
}

#[test]
fn a_nul_inside_a_text_is_refused() {
    let (field, reason) = refused(with(|r| r.prompt = "a\0b".into()).validate(&LIMITS));
    assert_eq!((field, reason.as_str()), ("prompt", "has a NUL character at byte 1"));
}

#[test]
fn image_marks_outside_the_prompt_are_refused() {
    assert_eq!(field(&with(|r| r.negative_prompt = Some("<image>".into()))), "negative_prompt");
    assert_eq!(field(&with(|r| r.positive_prompt = Some("<image>".into()))), "positive_prompt");
}

#[test]
fn a_negative_prompt_without_guidance_is_refused() {
    let request = |negative: &str| {
        let mut request = sampled(|s| s.guidance_scale = 1.0);
        request.negative_prompt = Some(negative.into());
        request
    };
    assert_eq!(field(&request("blurry")), "negative_prompt");
    request("").validate(&LIMITS).unwrap();
}

// C.3 item 18: sizes.

#[test]
fn sizes_that_are_no_whole_cells_are_refused() {
    for (width, height, expected) in [
        (0, 64, "width"),
        (64, 0, "height"),
        (1, 1, "width"),
        (17, 16, "width"),
        (16, 17, "height"),
        (24, 32, "width"),
    ] {
        assert_eq!(field(&with(|r| (r.width, r.height) = (width, height))), expected, "{width}x{height}");
    }
}

#[test]
fn sizes_of_more_tokens_than_positions_are_refused() {
    let huge = u32::MAX - 15;
    for (width, height) in [(528, 512), (16, 16 * 1025), (65_536, 65_536), (46_352, 46_352), (huge, huge)] {
        assert_eq!(field(&with(|r| (r.width, r.height) = (width, height))), "size", "{width}x{height}");
    }
    let (_, reason) = refused(with(|r| (r.width, r.height) = (528, 512)).validate(&LIMITS));
    assert!(
        reason.contains("33 x 32") && reason.contains("gen_pos_embed") && reason.contains("1024"),
        "{reason}"
    );
    let without_table = Limits::new(16, None);
    with(|r| (r.width, r.height) = (1024, 2048)).validate(&without_table).unwrap();
    let (field, _) = refused(with(|r| (r.width, r.height) = (65_536, 65_536)).validate(&without_table));
    assert_eq!(field, "size");
}

#[test]
fn non_square_sizes_work() {
    for (width, height, grid) in [
        (512, 16, Grid { height: 1, width: 32 }),
        (112, 144, Grid { height: 9, width: 7 }),
        (16, 16, Grid { height: 1, width: 1 }),
        (512, 512, Grid { height: 32, width: 32 }),
    ] {
        let request = with(|r| (r.width, r.height) = (width, height));
        request.validate(&LIMITS).unwrap();
        assert_eq!(request.grid(&LIMITS).unwrap(), grid);
    }
}

// C.3 item 19: numbers.

#[test]
fn image_counts_outside_their_range_are_refused() {
    for n in [0, 65, 1_000_000, u32::MAX] {
        assert_eq!(field(&with(|r| r.n = n)), "n");
    }
    assert_eq!(field(&with(|r| r.first_image = 1024)), "first_image");
    assert_eq!(field(&with(|r| (r.first_image, r.n) = (u32::MAX, 1))), "first_image");
    with(|r| (r.first_image, r.n) = (1000, 24)).validate(&LIMITS).unwrap();
}

#[test]
fn step_counts_outside_their_range_are_refused() {
    for steps in [0, 1, 1001, 1_000_000_000] {
        assert_eq!(field(&sampled(|s| (s.sampler, s.steps) = (Sampler::Aug, steps))), "steps", "{steps}");
    }
    sampled(|s| s.steps = 2).validate(&LIMITS).unwrap();
    sampled(|s| (s.sampler, s.steps) = (Sampler::Ode, 1)).validate(&LIMITS).unwrap();
}

#[test]
fn guidance_outside_its_range_is_refused() {
    for scale in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, 0.0, 0.5, 1e30] {
        assert_eq!(field(&sampled(|s| s.guidance_scale = scale)), "guidance_scale", "{scale}");
        assert_eq!(field(&sampled(|s| s.image_guidance_scale = scale)), "image_guidance_scale", "{scale}");
    }
    sampled(|s| s.guidance_scale = 1.0).validate(&LIMITS).unwrap();
}

#[test]
fn image_guidance_without_text_guidance_or_picture_is_refused() {
    let without_text = sampled(|s| (s.guidance_scale, s.image_guidance_scale) = (1.0, 2.0));
    let (field, reason) = refused(without_text.validate_with_pictures(&LIMITS, 1));
    assert!(field == "image_guidance_scale" && reason.contains("needs text guidance"), "{reason}");
    let without_picture = sampled(|s| s.image_guidance_scale = 2.0);
    let (field, reason) = refused(without_picture.validate(&LIMITS));
    assert!(field == "image_guidance_scale" && reason.contains("no input picture"), "{reason}");
    without_picture.validate_with_pictures(&LIMITS, 1).unwrap();
}

#[test]
fn shifts_outside_their_range_are_refused() {
    for shift in [0.0, -0.0, -1.0, f64::NAN, f64::INFINITY, 1e30] {
        assert_eq!(field(&sampled(|s| s.timesteps_shift = shift)), "timesteps_shift", "{shift}");
    }
}

#[test]
fn settings_without_effect_are_refused() {
    assert_eq!(field(&sampled(|s| s.noise_level = Some(0.5))), "noise_level");
    for sampler in [Sampler::Sde, Sampler::Cps] {
        sampled(|s| (s.sampler, s.noise_level) = (sampler, Some(0.5))).validate(&LIMITS).unwrap();
        assert_eq!(field(&sampled(|s| (s.sampler, s.noise_level) = (sampler, Some(1.5)))), "noise_level");
    }
    sampled(|s| s.rescale = true).validate(&LIMITS).unwrap();
    assert_eq!(field(&sampled(|s| (s.rescale, s.guidance_scale) = (true, 1.0))), "rescale");
    let linear = GuidanceSchedule::Linear;
    let unguided = sampled(|s| (s.guidance_schedule, s.guidance_scale) = (linear, 1.0));
    assert_eq!(field(&unguided), "guidance_schedule");
}

#[test]
fn seeds_are_unsigned_64_bit() {
    for seed in [0, 1 << 63, u64::MAX] {
        let json = format!(r#"{{"prompt": "x", "seed": {seed}}}"#);
        assert_eq!(resolve(&json, ModelKind::Demo).seed, seed);
    }
    for seed in ["-1", "18446744073709551616", "1.5", "\"7\""] {
        let json = format!(r#"{{"prompt": "x", "seed": {seed}}}"#);
        assert_eq!(refused(RequestFields::from_json(&json)).0, "seed", "{seed}");
    }
    // None given: a random one, which the request then holds.
    let seeds: std::collections::BTreeSet<u64> =
        (0..8).map(|_| resolve(r#"{"prompt": "x"}"#, ModelKind::Demo).seed).collect();
    assert!(seeds.len() > 1);
}

// C.3 item 20: JSON.

#[test]
fn unknown_fields_are_refused_by_name() {
    let (field, reason) = refused(RequestFields::from_json(r#"{"prompt": "x", "partial_images": 3}"#));
    assert!(field == "request" && reason.contains("\"partial_images\""), "{reason}");
    refused(RequestFields::from_json(r#"{"partial_images": null}"#));
}

#[test]
fn a_field_given_twice_is_refused() {
    for json in [r#"{"cfg": 2, "cfg": 2}"#, r#"{"seed": 1, "seed": 2}"#, r#"{"size": null, "size": "64x64"}"#]
    {
        let (field, reason) = refused(RequestFields::from_json(json));
        assert!(field == "request" && reason.contains("twice"), "{reason}");
    }
}

#[test]
fn values_of_the_wrong_kind_are_refused() {
    for (json, expected) in [
        (r#"{"prompt": 7}"#, "prompt"),
        (r#"{"prompt": ["a"]}"#, "prompt"),
        (r#"{"width": "64"}"#, "width"),
        (r#"{"width": -64}"#, "width"),
        (r#"{"height": 64.5}"#, "height"),
        (r#"{"steps": 4294967296}"#, "steps"),
        (r#"{"steps": 50.0}"#, "steps"),
        (r#"{"cfg": "7.5"}"#, "guidance_scale"),
        (r#"{"cfg_img": [2]}"#, "image_guidance_scale"),
        (r#"{"use_norm": 1}"#, "use_norm"),
        (r#"{"sampler": "euler"}"#, "sampler"),
        (r#"{"cfg_schedule": "cosine"}"#, "guidance_schedule"),
        (r#"{"size": "64"}"#, "size"),
        (r#"{"size": "64x"}"#, "size"),
        (r#"{"size": "+64x64"}"#, "size"),
        (r#"{"size": "64x64x64"}"#, "size"),
        (r#"{"size": "99999999999x64"}"#, "size"),
        (r#"{"hw": 512}"#, "size"),
        (r#"{"hw": [512]}"#, "size"),
        (r#"{"hw": [512, "512"]}"#, "width"),
    ] {
        assert_eq!(refused(RequestFields::from_json(json)).0, expected, "{json}");
    }
}

#[test]
fn json_that_is_no_request_is_refused() {
    let deep = format!(r#"{{"prompt": {}1{}}}"#, "[".repeat(100), "]".repeat(100));
    assert_eq!(refused(RequestFields::from_json(&deep)).0, "prompt");
    let deeper = "[".repeat(10_000);
    let long = format!(r#"{{"prompt": "{}"}}"#, "x".repeat(1 << 20));
    for json in ["", "null", "[]", "7", "{", r#"{"cfg": 1e400}"#, r#"{"cfg": NaN}"#, "{} {}", &deeper, &long]
    {
        assert_eq!(refused(RequestFields::from_json(json)).0, "request");
    }
}

#[test]
fn an_alias_may_repeat_its_canonical_name_but_not_contradict_it() {
    for (same, field) in [
        (r#"{"cfg": 2, "guidance_scale": 2.0}"#, "guidance_scale"),
        (r#"{"hw": [64, 32], "size": "32x64", "width": 32}"#, "size"),
        (r#"{"n": 2, "num_images_per_caption": 2, "num_images_per_prompt": 2}"#, "n"),
    ] {
        RequestFields::from_json(same).unwrap_or_else(|e| panic!("{field}: {e}"));
    }
    for (different, expected) in [
        (r#"{"cfg": 2, "guidance_scale": 2.5}"#, "guidance_scale"),
        (r#"{"cfg_img": 2, "image_guidance_scale": 1}"#, "image_guidance_scale"),
        (r#"{"hw": [64, 32], "size": "64x32"}"#, "width"),
        (r#"{"size": "64x32", "height": 64}"#, "height"),
        (r#"{"n": 2, "num_images_per_caption": 3}"#, "n"),
        (r#"{"steps": 2, "num_sampling_steps": 3}"#, "steps"),
        (r#"{"num_inference_steps": 2, "num_sampling_steps": 3}"#, "steps"),
        (r#"{"cfg_schedule": "linear", "guidance_schedule": "constant"}"#, "guidance_schedule"),
        (r#"{"prompt": "a", "captions": "b"}"#, "prompt"),
    ] {
        let (field, reason) = refused(RequestFields::from_json(different));
        assert_eq!(field, expected, "{different}: {reason}");
    }
}

#[test]
fn the_official_names_are_understood() {
    let fields = RequestFields::from_json(
        r#"{"captions": "a cat", "num_images_per_caption": 4, "positive_prompt": "sharp", "negative_prompt": "",
            "hw": [512, 256], "use_norm": true, "cfg": 7.5, "cfg_img": 1, "cfg_schedule": "linear",
            "timesteps_shift": 3.2, "num_sampling_steps": 28, "sde_type": "cps", "seed": 42}"#,
    )
    .unwrap();
    let request = fields.resolve(&Defaults::for_model(ModelKind::NextStep11)).unwrap();
    assert_eq!((request.width, request.height, request.n), (256, 512, 4));
    assert_eq!(request.negative_prompt, None, "an empty text switches the default off");
    let expected = SamplerConfig {
        sampler: Sampler::Cps,
        steps: 28,
        guidance_scale: 7.5,
        image_guidance_scale: 1.0,
        guidance_schedule: GuidanceSchedule::Linear,
        timesteps_shift: 3.2,
        noise_level: None,
        use_norm: true,
        rescale: false,
    };
    assert_eq!(request.sampler, expected);
}

#[test]
fn models_are_recognised_by_width_and_name() {
    let kind = |name, hidden_size| ModelKind::recognise(name, hidden_size);
    assert_eq!(kind("NextStep-1-Large", 5120), Some(ModelKind::NextStep1Large));
    assert_eq!(kind("NextStep-1-Large-Pretrain", 5120), Some(ModelKind::NextStep1Large));
    assert_eq!(kind("nextstep-1-large-edit", 5120), Some(ModelKind::NextStep1LargeEdit));
    assert_eq!(kind("models--stepfun-ai--NextStep-1.1", 5120), Some(ModelKind::NextStep11));
    assert_eq!(kind("demo", 192), Some(ModelKind::Demo));
    assert_eq!(kind("something-else", 5120), None);
    assert_eq!(kind("NextStep-1.1", 2048), None);
}

#[test]
fn a_missing_prompt_is_refused() {
    let fields = RequestFields::from_json("{}").unwrap();
    assert_eq!(refused(fields.resolve(&Defaults::for_model(ModelKind::Demo))).0, "prompt");
}

#[test]
fn given_fields_win_over_a_base() {
    let base = RequestFields::from_json(r#"{"prompt": "a", "cfg": 3, "seed": 9}"#).unwrap();
    let merged = RequestFields::from_json(r#"{"cfg": 4}"#).unwrap().over(base);
    assert_eq!(
        (merged.prompt.as_deref(), merged.guidance_scale, merged.seed),
        (Some("a"), Some(4.0), Some(9))
    );
}

#[test]
fn one_image_of_a_request_names_its_place_in_the_batch() {
    let single = with(|r| (r.n, r.first_image) = (4, 2)).single(3);
    assert_eq!((single.n, single.first_image), (1, 5));
}

#[test]
fn parameters_are_written_as_viewers_read_them() {
    let request = resolve(
        r#"{"prompt": "a cat, sitting", "seed": 7, "n": 3, "size": "256x512", "noise_level": 0.5}"#,
        ModelKind::NextStep11,
    );
    let text = request.single(1).webui_parameters("NextStep-1.1,\n evil");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], "a cat, sitting");
    assert!(lines[1].starts_with("Negative prompt: lowres, bad anatomy"), "{text}");
    assert_eq!(
        lines[2],
        "Steps: 30, Sampler: sde, CFG scale: 7.5, Seed: 7, Size: 256x512, Image: 1, Noise level: 0.5, Shift: 1, \
         Use norm: false, Model: NextStep-1.1   evil, RNG: torch-cuda"
    );
    assert!(request.describe().contains("Image: 0-2,"), "{}", request.describe());
    let positive = with(|r| r.positive_prompt = Some("sharp".into()));
    assert!(positive.webui_parameters("m").starts_with("a red circle sharp\nSteps: 5"));
}

proptest! {
    /// What is written into a picture gives the same request back, whatever the defaults are then.
    #[test]
    fn serialised_requests_read_back_as_they_were(
        texts in proptest::array::uniform3(".{0,20}"),
        numbers in proptest::array::uniform4(any::<u32>()),
        seed in any::<u64>(),
        // Numbers as users write them: up to 15 digits serde_json's reader is exact.
        scales in proptest::array::uniform3((-1_000_000i32..1_000_000).prop_map(|n| f64::from(n) / 1e3)),
        (sampler, schedule, level, flags) in (0usize..5, 0usize..3, proptest::option::of((0u32..1000).prop_map(|n| f64::from(n) / 1e3)), 0u8..4),
    ) {
        let [prompt, negative, positive] = texts;
        let [width, height, n, first_image] = numbers;
        let some = |text: String| Some(text).filter(|text| !text.is_empty());
        let request = GenerateRequest {
            prompt, negative_prompt: some(negative), positive_prompt: some(positive),
            width, height, n, first_image, seed, images: Vec::new(), preview_every_rows: None, keep_tokens: false,
            sampler: SamplerConfig {
                sampler: Sampler::ALL[sampler], steps: width, guidance_scale: scales[0],
                image_guidance_scale: scales[1], guidance_schedule: GuidanceSchedule::ALL[schedule],
                timesteps_shift: scales[2], noise_level: level, use_norm: flags & 1 == 1, rescale: flags & 2 == 2,
            },
        };
        let json = serde_json::to_string(&request).unwrap();
        let found: RequestFields = serde_json::from_str(&json).unwrap();
        prop_assert_eq!(&found, &RequestFields::from_json(&json).unwrap());
        let found = found.resolve(&Defaults::for_model(ModelKind::NextStep1Large)).unwrap();
        prop_assert_eq!(found, request);
    }
}
