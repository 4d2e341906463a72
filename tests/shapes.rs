//! Every shape of picture: what can be planned, odd grids drawn and edited, and image tokens kept and decoded again.

use std::sync::{Arc, OnceLock};
use warpstep::Error;
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions};
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::event::{CancelToken, Control};
use warpstep::image::RgbImage;
use warpstep::ops::DType;
use warpstep::reconstruct::decode_tokens;
use warpstep::request::GenerateRequest;
use warpstep::session::Images;
use warpstep::tokens::ImageTokens;

fn load_from(source: &ModelSource, options: EngineOptions) -> Arc<Engine> {
    let device = Arc::new(EmulatedDevice::new(EmulatedOptions::default()).unwrap());
    Arc::new(Engine::load(source, device, options).unwrap())
}

/// One engine for all tests; sessions are independent.
fn engine() -> Arc<Engine> {
    static ENGINE: OnceLock<Arc<Engine>> = OnceLock::new();
    ENGINE.get_or_init(|| load_from(&ModelSource::Demo, EngineOptions::default())).clone()
}

/// One that fills buffers with NaN when their planned life ends.
fn poisoned() -> Arc<Engine> {
    static ENGINE: OnceLock<Arc<Engine>> = OnceLock::new();
    let options = EngineOptions { poison_dead_buffers: true, ..EngineOptions::default() };
    ENGINE.get_or_init(|| load_from(&ModelSource::Demo, options)).clone()
}

/// A picture of `rows` x `columns` tokens in as few steps as there can be.
fn request(engine: &Engine, rows: u32, columns: u32) -> GenerateRequest {
    let mut request = engine.request("a red circle on a blue background").unwrap();
    (request.width, request.height, request.seed) = (columns * 16, rows * 16, 5);
    request.sampler.steps = 2;
    request
}

/// The same, made from a picture of `source` rows and columns.
fn edit(engine: &Engine, source: (u32, u32), rows: u32, columns: u32) -> GenerateRequest {
    let mut request = request(engine, rows, columns);
    request.sampler.image_guidance_scale = 1.5;
    let pixels = source.0 * 16 * source.1 * 16 * 3;
    let data = (0..pixels).map(|i| (i * 7 % 251) as u8).collect();
    request.images = vec![RgbImage::new(source.1 * 16, source.0 * 16, data).unwrap()];
    request
}

fn run(engine: &Arc<Engine>, request: &GenerateRequest) -> Images {
    engine.session().generate(request, &CancelToken::new(), &mut |_| Control::Continue).unwrap()
}

/// The picture's size is right, it is not one flat colour, and no buffer is read after its life.
fn check(request: &GenerateRequest, what: &str) {
    let made = run(&engine(), request);
    let image = &made.images[0];
    assert_eq!((image.width(), image.height()), (request.width, request.height), "{what}");
    assert!(image.data().iter().any(|&v| v != image.data()[0]), "{what}: one flat colour");
    assert!(
        run(&poisoned(), request).images == made.images,
        "{what}: a buffer is read after its planned life"
    );
}

#[test]
fn every_grid_from_1x1_to_64x64_has_a_plan() {
    let engine = engine();
    for (rows, columns) in (1..=64).flat_map(|rows| (1..=64).map(move |columns| (rows, columns))) {
        let plan = engine.plan(&request(&engine, rows, columns)).unwrap();
        assert_eq!(plan.image_tokens, (rows * columns) as usize);
        assert_eq!(plan.prompt_tokens.len(), 2);
        // Keys and values of 4 layers, 2 rows, one head of 64, in bf16.
        assert!(plan.cache_bytes >= 2 * 4 * 2 * 64 * 2 * plan.image_tokens as u64, "{rows}x{columns}");
    }
}

#[test]
fn sources_and_targets_of_every_shape_have_a_plan() {
    let engine = engine();
    for i in 0..64 {
        let (source, rows, columns) = ((1 + i * 37 % 64, 1 + i * 11 % 64), 1 + i * 23 % 64, 1 + i);
        let plan = engine.plan(&edit(&engine, source, rows, columns)).unwrap();
        assert_eq!(plan.image_tokens, (rows * columns) as usize);
        let [conditional, image_only, nothing] = plan.prompt_tokens[..] else { panic!("{plan:?}") };
        let tokens = (source.0 * source.1) as usize;
        assert!(conditional > image_only && image_only > nothing + tokens, "{source:?}: {plan:?}");
    }
}

#[test]
fn odd_grids_are_drawn() {
    for (rows, columns) in [(1, 1), (1, 2), (2, 1), (1, 7), (7, 1), (3, 5), (5, 3), (2, 9), (17, 1), (1, 17)]
    {
        check(&request(&engine(), rows, columns), &format!("{rows} x {columns} tokens"));
    }
}

#[test]
fn odd_grids_are_edited_into_others() {
    for (source, rows, columns) in [((1, 1), 1, 1), ((3, 1), 1, 3), ((1, 5), 2, 3), ((4, 3), 1, 2)] {
        check(&edit(&engine(), source, rows, columns), &format!("{source:?} to {rows} x {columns} tokens"));
    }
}

#[test]
fn a_grid_beyond_the_position_table_is_refused_with_the_reason() {
    // The demo model with a position table, which it then computes: 32 x 32 rows.
    let dir = tempfile::tempdir().unwrap();
    let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/demo/model");
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(model.join(name), dir.path().join(name)).unwrap();
    }
    std::fs::create_dir(dir.path().join("vae")).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(model.join("vae").join(name), dir.path().join("vae").join(name)).unwrap();
    }
    let config = dir.path().join("config.json");
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    json["use_gen_pos_embed"] = true.into();
    std::fs::write(&config, json.to_string()).unwrap();
    let engine = load_from(&ModelSource::Dir(dir.path().into()), EngineOptions::default());
    let small = |rows, columns| {
        let mut request = request(&engine, rows, columns);
        (request.negative_prompt, request.positive_prompt) = (None, None);
        request
    };
    for (rows, columns) in [(32, 32), (1, 1024), (64, 16)] {
        engine.plan(&small(rows, columns)).unwrap();
    }
    for (rows, columns) in [(32, 33), (1025, 1), (64, 64)] {
        match engine.plan(&small(rows, columns)) {
            Err(Error::InvalidRequest { field: "size", reason }) => {
                assert!(reason.contains("gen_pos_embed") && reason.contains("1024"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
    run(&engine, &small(2, 3));
}

#[test]
fn kept_tokens_decode_to_the_same_pictures() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tokens.safetensors");
    let exact =
        load_from(&ModelSource::Demo, EngineOptions { dtype: DType::F32, ..EngineOptions::default() });
    for engine in [engine(), exact] {
        let plain = GenerateRequest { n: 2, ..request(&engine, 3, 2) };
        let kept = run(&engine, &GenerateRequest { keep_tokens: true, ..plain.clone() });
        let without = run(&engine, &plain);
        assert!(without.tokens.is_none() && without.images == kept.images);
        let tokens = kept.tokens.unwrap();
        assert_eq!((tokens.images, tokens.grid, tokens.model.as_str()), (2, (3, 2), "demo"));
        // The model normalises its tokens: mean 0 and variance 1 of every 64.
        assert!(tokens.use_norm);
        for token in tokens.values.chunks_exact(64) {
            let mean = token.iter().sum::<f32>() / 64.0;
            let variance = token.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / 64.0;
            assert!(mean.abs() < 0.01 && (variance - 1.0).abs() < 0.02, "mean {mean}, variance {variance}");
        }
        tokens.save(&path).unwrap();
        let loaded = ImageTokens::load(&path).unwrap();
        assert_eq!(loaded, tokens);
        assert!(decode_tokens(&engine, &loaded).unwrap() == kept.images);
        let mut other = loaded.clone();
        other.layout.patch = 1;
        assert!(matches!(decode_tokens(&engine, &other), Err(Error::InvalidRequest { field: "tokens", .. })));
        // A file may be larger than what any request makes.
        let (most, tokens) = (engine.limits().max_images as usize, loaded.values[..64].to_vec());
        let crowd = |images: usize, grid: (usize, usize)| {
            let values = tokens.repeat(images * grid.0 * grid.1);
            decode_tokens(&engine, &ImageTokens { images, grid, values, ..loaded.clone() })
        };
        for refused in [crowd(most + 1, (1, 1)), crowd(1, (1, engine.limits().max_image_tokens + 1))] {
            assert!(matches!(refused, Err(Error::InvalidRequest { field: "tokens", .. })), "{refused:?}");
        }
    }
}
