//! Editing and reconstruction with the embedded demo model: whose rows show what, batches, sizes, refusals.

use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, OnceLock};
use warpstep::Error;
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions};
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::event::{CancelToken, Control};
use warpstep::image::{RgbImage, write_png};
use warpstep::metrics::psnr;
use warpstep::reconstruct::{LatentNoise, reconstruct};
use warpstep::request::{GenerateRequest, Preset};
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

/// A disc of `colour` on blue.
fn disc(width: u32, height: u32, colour: [u8; 3]) -> RgbImage {
    let radius = f64::from(width.min(height)) / 3.0;
    let pixel = |x: u32, y: u32| {
        let (dx, dy) = (f64::from(x) - f64::from(width) / 2.0, f64::from(y) - f64::from(height) / 2.0);
        if dx.hypot(dy) < radius { colour } else { [40, 60, 220] }
    };
    let data = (0..height).flat_map(|y| (0..width).flat_map(move |x| pixel(x, y))).collect();
    RgbImage::new(width, height, data).unwrap()
}

/// A small, quick edit with three branches.
fn request(engine: &Engine, images: Vec<RgbImage>) -> GenerateRequest {
    let mut request = engine.request("make the circle black").unwrap();
    (request.width, request.height, request.seed) = (32, 32, 11);
    (request.sampler.steps, request.sampler.guidance_scale) = (3, 3.0);
    request.sampler.image_guidance_scale = 1.5;
    request.images = images;
    request
}

fn run(engine: &Arc<Engine>, request: &GenerateRequest) -> Images {
    engine.session().generate(request, &CancelToken::new(), &mut |_| Control::Continue).unwrap()
}

fn field(result: warpstep::Result<impl Sized>) -> &'static str {
    match result {
        Err(Error::InvalidRequest { field, .. }) => field,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("not refused"),
    }
}

#[test]
fn an_image_of_an_edited_batch_is_what_it_is_alone() {
    let engine = engine();
    let batch = GenerateRequest { n: 2, ..request(&engine, vec![disc(32, 48, [230, 30, 30])]) };
    let together = run(&engine, &batch);
    assert_ne!(together.images[0], together.images[1]);
    for (index, image) in together.images.iter().enumerate() {
        assert!(run(&engine, &batch.single(index as u32)).images[0] == *image, "image {index}");
    }
    let poisoned = load(EngineOptions { poison_dead_buffers: true, ..EngineOptions::default() });
    assert!(run(&poisoned, &batch).images == together.images, "a buffer is read after its planned life");
}

#[test]
fn branches_are_ragged_and_pictures_keep_their_sizes() {
    let engine = engine();
    // 2 and 6 image tokens.
    let two = request(&engine, vec![disc(32, 16, [230, 30, 30]), disc(32, 48, [30, 200, 30])]);
    let plan = engine.plan(&two).unwrap();
    let without = engine.plan(&GenerateRequest { images: vec![], ..two.clone() });
    assert_eq!(field(without), "image_guidance_scale");
    let [conditional, image_only, nothing] = plan.prompt_tokens[..] else { panic!("{plan:?}") };
    assert!(conditional > image_only && image_only >= nothing + 8, "{plan:?}");
    assert!(plan.request_bytes() > 0);
    let made = run(&engine, &two);
    assert_eq!((made.images[0].width(), made.images[0].height()), (32, 32));
    // The order of pictures counts, and a mark in front is what no mark means.
    let turned = GenerateRequest { images: two.images.iter().rev().cloned().collect(), ..two.clone() };
    assert!(run(&engine, &turned).images != made.images);
    let marked = GenerateRequest { prompt: format!("<image><image>{}", two.prompt), ..two.clone() };
    assert!(run(&engine, &marked).images == made.images);
    let mut two_branches = two.clone();
    two_branches.sampler.image_guidance_scale = 1.0;
    assert_eq!(engine.plan(&two_branches).unwrap().prompt_tokens, [conditional, nothing]);
}

#[test]
fn pictures_that_cannot_be_read_in_are_refused_by_name() {
    let engine = engine();
    let with = |images| engine.plan(&request(&engine, images));
    assert_eq!(field(with(vec![disc(40, 40, [0; 3])])), "images");
    assert_eq!(field(with(vec![disc(32, 24, [0; 3])])), "images");
    assert_eq!(field(with(vec![disc(16, 16, [0; 3]); 65])), "images");
    let mut marks = request(&engine, vec![disc(16, 16, [0; 3])]);
    marks.prompt = "<image> and <image>".into();
    assert_eq!(field(engine.plan(&marks)), "prompt");
    assert_eq!(Preset::Edit.defaults().sampler.image_guidance_scale, 2.0);
}

#[test]
fn reconstruction_is_close_and_noise_takes_it_away() {
    let engine = engine();
    // A picture of the kind that the demo model's VAE was trained on; others lose more.
    let circle = GenerateRequest { seed: 1, ..engine.request("a red circle on a blue background").unwrap() };
    let picture = run(&engine, &circle).images.remove(0);
    let through = |sigma| reconstruct(&engine, &picture, LatentNoise { sigma, seed: 3 }).unwrap();
    let (plain, noisy) = (through(0.0), through(0.5));
    let figures = [&plain, &noisy].map(|made| psnr(&picture, &made.image).unwrap());
    assert!(figures[0] > 35.0 && figures[0] > figures[1] + 3.0, "{figures:?}");
    assert_eq!(plain.channels.len(), 16);
    assert_eq!(plain.channels, noisy.channels, "statistics are of the latent without noise");
    assert_eq!(through(0.5).image, noisy.image);
    let noise = LatentNoise { sigma: f32::NAN, seed: 0 };
    assert_eq!(field(reconstruct(&engine, &picture, noise)), "noise");
    let odd = disc(40, 48, [0; 3]);
    assert_eq!(field(reconstruct(&engine, &odd, LatentNoise::default())), "images");
}

#[test]
fn a_reconstruction_keeps_to_the_memory_budget() {
    let weight_bytes = engine().plan(&engine().request("a").unwrap()).unwrap().weight_bytes;
    // Room for the smallest picture's activations, not for those of a large one.
    let budget = weight_bytes + (8 << 20);
    let tight = load(EngineOptions { memory_budget_bytes: Some(budget), ..EngineOptions::default() });
    let through = |side| reconstruct(&tight, &disc(side, side, [0; 3]), LatentNoise::default());
    assert!(through(16).is_ok());
    match through(512) {
        Err(Error::OutOfMemory { requested_bytes, free_bytes, .. }) => {
            assert!(requested_bytes > 8 << 20 && free_bytes == 8 << 20);
        }
        other => panic!("{:?}", other.map(|made| made.channels)),
    }
}

fn warpstep(arguments: &[&str], files: &[&Path]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_warpstep")).args(arguments).args(files).output().unwrap()
}

#[test]
fn the_commands_write_pictures_and_figures() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b, out] = ["a.png", "b.png", "out.png"].map(|name| dir.path().join(name));
    write_png(&a, &disc(32, 48, [230, 30, 30]), None).unwrap();
    write_png(&b, &disc(32, 32, [30, 200, 30]), None).unwrap();
    let path = a.to_str().unwrap();
    let options = ["edit", path, "make the circle black", "--cfg-img", "1.5", "--steps", "2", "-o"];
    let output = warpstep(&options, &[&out]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // The first picture's size.
    let info = warpstep::image::read_png_info(&out).unwrap();
    assert_eq!((info.width, info.height), (32, 48));
    let output = warpstep(&["reconstruct", "-o", out.to_str().unwrap()], &[&a, &b]);
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(
        table.contains("SSIM") && table.contains("mean  ") && table.contains("latent channel"),
        "{table}"
    );
    assert!(dir.path().join("out-1.png").exists());
    assert_eq!(warpstep(&["edit"], &[&a]).status.code(), Some(2), "an instruction is missing");
    assert_eq!(warpstep(&["reconstruct"], &[Path::new("/no/such.png")]).status.code(), Some(1));
}
