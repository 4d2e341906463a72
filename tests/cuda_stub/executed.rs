//! Whole requests on the CUDA device, with every launch run in the emulator as late as a driver may run it: the results
//! must be the emulated device's, bit for bit. What the executor gets wrong (an upload's memory used again too early, a
//! parameter that comes too late, a fill of the wrong range) changes them.

use crate::stub::{Stub, all_images};
use std::path::Path;
use std::sync::Arc;
use warpstep::bench::{ceilings, model, samples::Effort, synthetic};
use warpstep::conformance;
use warpstep::device::Device;
use warpstep::device::cuda::{CudaDevice, CudaOptions};
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions};
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::event::{CancelToken, Control, Event};
use warpstep::image::RgbImage;
use warpstep::ops::harness::{Rig, Scale};
use warpstep::ops::{self, DType, Selection};
use warpstep::request::GenerateRequest;
use warpstep::verify::{Models, Outcome, VerifyOptions, run_case};

/// A stub that runs what is launched.
fn executing() -> Stub {
    let stub = Stub::new();
    stub.execute();
    stub
}

fn emulated() -> Arc<dyn Device> {
    Arc::new(EmulatedDevice::new(EmulatedOptions::default()).unwrap())
}

/// Pixels and tokens of each of `requests`, one after another in one session, previews first.
fn draw(
    device: Arc<dyn Device>,
    requests: impl Fn(&Engine) -> Vec<GenerateRequest>,
) -> Vec<(Vec<RgbImage>, Vec<f32>)> {
    let engine = Arc::new(Engine::load(&ModelSource::Demo, device, EngineOptions::default()).unwrap());
    let mut session = engine.session();
    let draw = |request: GenerateRequest| {
        let mut pictures = Vec::new();
        let mut keep = |event: &Event| {
            if let Event::Preview { images, .. } = event {
                pictures.extend(images.iter().cloned());
            }
            Control::Continue
        };
        let images = session.generate(&request, &CancelToken::new(), &mut keep).unwrap();
        pictures.extend(images.images);
        (pictures, images.tokens.unwrap().values)
    };
    requests(&engine).into_iter().map(draw).collect()
}

#[test]
fn requests_one_after_another_give_the_bits_of_the_emulated_device() {
    let requests = |engine: &Engine| {
        let mut first = engine.request("a red circle on a blue background").unwrap();
        (first.width, first.height, first.seed, first.n) = (48, 32, 5, 2);
        (first.sampler.steps, first.keep_tokens) = (2, true);
        first.preview_every_rows = Some(1.try_into().unwrap());
        // The same graphs with another seed, other prompts in the same memory, another shape, a picture to edit.
        let seed = GenerateRequest { seed: 6, ..first.clone() };
        let prompt = GenerateRequest { prompt: "two green squares".into(), ..first.clone() };
        let shape = GenerateRequest { width: 32, n: 1, ..first.clone() };
        let edit = GenerateRequest {
            prompt: "make the circle black".into(),
            images: vec![
                RgbImage::new(32, 32, (0..32 * 32 * 3).map(|i| (i * 7 % 251) as u8).collect()).unwrap(),
            ],
            ..shape.clone()
        };
        vec![first, seed, prompt, shape, edit]
    };
    let expected = draw(emulated(), requests);
    let stub = executing();
    let found = draw(Arc::new(stub.open().unwrap()), requests);
    for (number, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert!(found.1 == expected.1, "tokens of request {number}");
        assert!(found.0 == expected.0, "pictures of request {number}");
    }
    assert!(expected.windows(2).all(|pair| pair[0] != pair[1]));
    stub.take_log();
    assert_eq!(stub.live(), "");
}

#[test]
fn recorded_cases_of_the_official_code_pass() {
    let stub = executing();
    let device: Arc<dyn Device> = Arc::new(stub.open().unwrap());
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cases");
    for case in ["t2i_feb_cps_norm", "t2i_aug_cfg_bf16_f32rope", "vae_psz2", "text_tiny-a"] {
        let path = cases.join(case).with_extension("safetensors");
        match run_case(&path, &device, &VerifyOptions::default(), &mut Models::default()).unwrap() {
            Some(Outcome::Ran(lines)) => {
                let wrong: Vec<_> = lines.iter().filter(|line| !line.ok).collect();
                assert!(!lines.is_empty() && wrong.is_empty(), "{case}: {wrong:#?}");
            }
            other => panic!("{case}: {other:?}"),
        }
    }
    stub.take_log();
}

#[test]
fn every_variant_passes_its_small_cases() {
    let stub = executing();
    let device: Arc<dyn Device> = Arc::new(stub.open().unwrap());
    for op in ops::registry() {
        for case in (op.cases)().iter().filter(|case| case.scale == Scale::Small) {
            let checks = (case.run)(&mut Rig::new(device.clone(), 1).unwrap()).unwrap();
            let wrong: Vec<_> = checks.iter().filter(|check| !check.ok).collect();
            assert!(
                !checks.is_empty() && wrong.is_empty(),
                "{} {} {}: {wrong:?}",
                op.name,
                case.variant,
                case.label
            );
        }
    }
    stub.take_log();
}

#[test]
fn every_unit_of_conformance_is_as_the_manual_says() {
    let stub = executing();
    let options = CudaOptions { cubins: Some(all_images().into()), ..stub.options() };
    let device = CudaDevice::open(options).unwrap();
    for unit in conformance::UNITS {
        assert_eq!(unit.check(&unit.run(&device).unwrap()), None, "{}", unit.name);
    }
    stub.take_log();
}

#[test]
fn a_model_is_timed() {
    let stub = executing();
    let device: Arc<dyn Device> = Arc::new(stub.open().unwrap());
    let effort = Effort { warm_up: 1, repeats: 3, seconds: 10.0, in_flight: 2 };
    let options = model::Options {
        steps: 2,
        branches: 2,
        images: 2,
        prompt: 5,
        positions: vec![6, 12],
        sizes: vec![(32, 16)],
        end_to_end: true,
        kernels: Selection::default(),
        effort,
        pictures: 2,
        seed: 1,
    };
    let configs = synthetic::configs("tiny", None).unwrap();
    let made = synthetic::model(&device, &configs, DType::Bf16, &options.kernels, 1).unwrap();
    let sizes = ceilings::Sizes { stream_bytes: 1 << 16, gemm_side: 64 };
    let ceilings = ceilings::Ceilings::measure(&device, &options.effort, sizes).unwrap();
    let rows = model::run(&device, &Arc::new(made), &options, &ceilings, &mut |_| {}).unwrap();
    let picture = rows.iter().find(|row| row.test == "image 32x16").unwrap();
    assert!(
        picture.note.contains("the same bits") && picture.note.contains("enqueuing a token"),
        "{picture:?}"
    );
    stub.take_log();
}
