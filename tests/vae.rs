//! The VAE against the recorded runs of the official code and against its reference.
//!
//! `vae_psz2` is part of the repository; the other recorded cases are checked where the fixtures' folder lies
//! beside the checkout.

#[path = "support/streams.rs"]
mod streams;

use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use streams::TestStream;
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions, ReplayOrder};
use warpstep::device::{Device, NodeList, Stream};
use warpstep::model::config::VaeConfig;
use warpstep::model::upload::Uploader;
use warpstep::model::vae::{Decoded, VaeDecoder, VaeEncoder};
use warpstep::ops::harness::{Check, Rig, Scale, compare, decode, encode};
use warpstep::ops::{self, DType, Launch, Selection};
use warpstep::reference::vae::{Map, Vae};
use warpstep::reference::{Exact, PlainBf16, PlainF32, Precision};
use warpstep::weights::{Checkpoint, OpenOptions, VaeWeights, convert, vae_tensors};
use warpstep::{Result, device::Buffer};

/// Shapes of the shipped model, which `tests/ops.rs` leaves out.
#[test]
fn ops_agree_at_shipped_shapes() {
    let mut ran = 0;
    for name in ["conv2d", "group_stats", "merge_stats", "vae_attention", "encode_latent"] {
        let op = ops::find(name).unwrap();
        for case in (op.cases)().into_iter().filter(|c| c.scale == Scale::Real) {
            let device =
                EmulatedDevice::new(EmulatedOptions { sm_count: 132, ..Default::default() }).unwrap();
            let mut rig = Rig::new(Arc::new(device), 7).unwrap();
            let what = format!("{name} {} {} {}", case.variant, case.dtype.name(), case.label);
            let checks = (case.run)(&mut rig).unwrap_or_else(|e| panic!("{what}: {e}"));
            rig.check_guards().unwrap_or_else(|e| panic!("{what}: {e}"));
            assert!(!checks.is_empty() && checks.iter().all(|c| c.ok), "{what}: {checks:?}");
            ran += 1;
        }
    }
    assert!(ran >= 16, "{ran} cases");
}

/// A decoder on an emulated device, and everything that it needs to stay alive.
struct Rigged {
    device: Arc<dyn Device>,
    stream: Box<dyn Stream>,
    decoder: VaeDecoder,
    config: VaeConfig,
    dtype: DType,
    selection: Selection,
    _weights: Vec<Buffer>,
}

impl Rigged {
    fn new(config: VaeConfig, weights: &VaeWeights, dtype: DType, options: EmulatedOptions) -> Rigged {
        let device: Arc<dyn Device> = Arc::new(EmulatedDevice::new(options).unwrap());
        let stream = device.stream().unwrap();
        let selection = Selection::default();
        let mut up = Uploader::new(device.clone(), dtype, &selection).unwrap();
        let decoder = VaeDecoder::load(&config, weights, 2, &mut up).unwrap();
        up.wait().unwrap();
        let (buffers, _) = up.finish();
        Rigged { device, stream, decoder, config, dtype, selection, _weights: buffers }
    }

    fn open(dir: &Path, dtype: DType, options: EmulatedOptions) -> Rigged {
        let config = VaeConfig::load(dir).unwrap();
        let weights =
            VaeWeights::new(Checkpoint::open(dir, OpenOptions::default()).unwrap(), &config).unwrap();
        Rigged::new(config, &weights, dtype, options)
    }

    fn arena(&mut self, bytes: usize) -> Buffer {
        let arena = self.device.alloc(bytes, "vae arena").unwrap();
        // What nobody wrote must not be read.
        self.stream.set(arena.span(), 0xff).unwrap();
        arena
    }

    /// Decodes channels-last latents `[images, h, w, C]`; `tap` is called with every tap, channels last.
    fn decode(
        &mut self,
        images: usize,
        (height, width): (usize, usize),
        latent: &[f32],
        mut tap: impl FnMut(&str, [usize; 4], Vec<f32>),
    ) -> (Vec<f32>, Vec<u8>) {
        let bytes = warpstep::model::vae::plan(&self.config, images, (height, width), self.dtype).unwrap();
        let arena = self.arena(bytes);
        let selection = self.selection.clone();
        let launch = Launch { selection: &selection, dtype: self.dtype, sm_count: 132, dependent: true };
        let mut list = NodeList::new();
        let size = (height, width);
        let decoded =
            self.decoder.record_latent(&launch, &mut list, images, size, arena.span(), true).unwrap();
        self.stream.put(decoded.latent.ptr, &encode(self.dtype, latent.to_vec()).0).unwrap();
        for (index, node) in list.nodes().iter().enumerate() {
            self.stream.start(node).unwrap();
            for found in decoded.taps.iter().filter(|t| t.node == index) {
                assert_eq!(found.label, node.label);
                let values = self.read(found.span);
                assert_eq!(values.len(), found.shape.iter().product::<usize>(), "{}", found.name);
                tap(&found.name, found.shape, values);
            }
        }
        self.outputs(&decoded)
    }

    fn read(&mut self, span: warpstep::device::Span) -> Vec<f32> {
        let mut bytes = vec![0; span.bytes];
        self.stream.get(span.ptr, &mut bytes).unwrap();
        decode(self.dtype, &bytes)
    }

    fn outputs(&mut self, decoded: &Decoded) -> (Vec<f32>, Vec<u8>) {
        let mut rgb = vec![0; decoded.rgb.bytes];
        self.stream.get(decoded.rgb.ptr, &mut rgb).unwrap();
        (self.read(decoded.image), rgb)
    }

    /// Decodes tokens `[images, T, K]` as a session does: one list, replayed.
    fn decode_tokens(&mut self, images: usize, grid: (usize, usize), tokens: &[f32]) -> Tokens {
        let bytes = self.decoder.plan(images, grid, self.dtype).unwrap();
        let arena = self.arena(bytes);
        let tokens = encode(self.dtype, tokens.to_vec()).0;
        let source = self.device.alloc(tokens.len(), "tokens").unwrap();
        self.stream.put(source.ptr(), &tokens).unwrap();
        let selection = Selection::default();
        let launch = Launch { selection: &selection, dtype: self.dtype, sm_count: 132, dependent: true };
        let mut list = NodeList::new();
        let span = source.span();
        let decoded = self.decoder.record(&launch, &mut list, span, images, grid, arena.span()).unwrap();
        let executable = self.stream.prepare(list).unwrap();
        self.stream.replay(executable.as_ref()).unwrap();
        let latent = self.read(decoded.latent);
        let (image, rgb) = self.outputs(&decoded);
        Tokens { latent, image, rgb, size: (decoded.height, decoded.width) }
    }
}

struct Tokens {
    latent: Vec<f32>,
    image: Vec<f32>,
    rgb: Vec<u8>,
    size: (usize, usize),
}

/// A recorded case.
struct Golden(Vec<u8>);

impl Golden {
    fn open(path: &Path) -> Golden {
        Golden(std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
    }

    fn find(&self, name: &str) -> Option<(Vec<usize>, Vec<f32>)> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let view = file.tensor(name).ok()?;
        let values = match view.dtype() {
            safetensors::Dtype::F32 => decode(DType::F32, view.data()),
            safetensors::Dtype::BF16 => decode(DType::Bf16, view.data()),
            safetensors::Dtype::U8 => view.data().iter().map(|&v| f32::from(v)).collect(),
            other => panic!("{name} is {other:?}"),
        };
        Some((view.shape().to_vec(), values))
    }

    fn get(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        self.find(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// A tensor `[B, C, H, W]` as `[B, H, W, C]`.
    fn channels_last(&self, name: &str) -> ([usize; 4], Vec<f32>) {
        let (shape, values) = self.get(name);
        let [b, c, h, w] = shape[..] else { panic!("{name} has shape {shape:?}") };
        let at = |i: usize| {
            let (image, y, x, channel) = (i / (h * w * c), i / (w * c) % h, i / c % w, i % c);
            values[((image * c + channel) * h + y) * w + x]
        };
        ([b, h, w, c], (0..values.len()).map(at).collect())
    }
}

/// Largest and mean absolute difference; NaN counts as infinite.
fn difference(got: &[f32], expected: &[f32]) -> (f32, f32) {
    assert_eq!(got.len(), expected.len());
    let errors = || {
        got.iter()
            .zip(expected)
            .map(|(g, e)| (g - e).abs())
            .map(|d| if d.is_nan() { f32::INFINITY } else { d })
    };
    (errors().fold(0.0, f32::max), errors().sum::<f32>() / got.len() as f32)
}

/// The bounds of the fixtures' README, which are for values of size about one: the bf16 one grows with the values of
/// activations inside the decoder, which are larger.
fn assert_close(what: &str, dtype: DType, got: &[f32], expected: &[f32]) {
    let (max, mean) = difference(got, expected);
    let size = expected.iter().map(|v| v.abs()).sum::<f32>() / expected.len() as f32;
    match dtype {
        DType::F32 => assert!(max <= 5e-5, "{what}: largest error {max:e}, allowed 5e-5"),
        DType::Bf16 => {
            let allowed = 0.02 * size.max(1.0);
            assert!(mean < allowed, "{what}: mean error {mean:e}, allowed {allowed:e}")
        }
    }
}

fn assert_levels(what: &str, dtype: DType, got: &[u8], expected: &[f32]) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let apart: Vec<f32> =
        got.iter().zip(expected).map(|(&g, &e)| (f32::from(g) - e).abs()).filter(|&d| d > 0.0).collect();
    if dtype == DType::F32 {
        let largest = apart.iter().copied().fold(0.0, f32::max);
        let share = apart.len() as f32 / got.len() as f32;
        assert!(largest <= 1.0 && share < 0.005, "{what}: {} levels differ, by up to {largest}", apart.len());
    }
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// The folder of all recorded cases, where there is one beside the checkout.
fn fixtures() -> Option<PathBuf> {
    Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/fixtures")).filter(|p| p.is_dir())
}

/// `decode.in` to `decode.out`, every recorded tap on the way, and the pixels.
fn check_decoder_case(root: &Path, case: &str, vae: &str, dtype: DType) {
    let golden = Golden::open(&root.join("cases").join(format!("{case}.safetensors")));
    let mut rig = Rigged::open(&root.join(vae), dtype, EmulatedOptions::default());
    let ([images, height, width, _], latent) = golden.channels_last("decode.in");
    let mut seen = 0;
    let (image, rgb) = rig.decode(images, (height, width), &latent, |name, shape, values| {
        let name = format!("tap.{name}");
        if golden.find(&name).is_none() {
            return;
        }
        let (expected_shape, expected) = golden.channels_last(&name);
        assert_eq!(shape, expected_shape, "{case} {name}");
        assert_close(&format!("{case} {name}"), dtype, &values, &expected);
        seen += 1;
    });
    let recorded = SafeTensors::deserialize(&golden.0).unwrap();
    let recorded = recorded.names().into_iter().filter(|n| n.starts_with("tap.decoder.")).count();
    assert_eq!(seen, recorded, "{case}: every recorded tap is compared");
    let (_, expected) = golden.channels_last("decode.out");
    assert_close(&format!("{case} decode.out"), dtype, &image, &expected);
    let (_, expected) = golden.get("decode.out_u8");
    assert_levels(&format!("{case} decode.out_u8"), dtype, &rgb, &expected);
}

#[test]
fn the_decoder_agrees_with_the_official_one() {
    check_decoder_case(&golden(), "vae_psz2", "vae-psz2", DType::F32);
}

#[test]
fn the_decoder_agrees_with_the_official_one_on_all_cases() {
    let Some(root) = fixtures() else { return };
    check_decoder_case(&root, "vae_a", "tiny-a/vae", DType::F32);
    check_decoder_case(&root, "vae_a", "tiny-a/vae_diffusers", DType::F32);
    check_decoder_case(&root, "vae_a_feb", "tiny-a/vae", DType::F32);
    check_decoder_case(&root, "vae_a_bf16", "tiny-a/vae", DType::Bf16);
}

#[test]
fn recorded_tokens_become_the_recorded_pictures() {
    let Some(root) = fixtures() else { return };
    let cases = [
        ("t2i_feb_ode_9x7", "tiny-a/vae", DType::F32, (9, 7)),
        ("t2i_aug_batch2x2", "tiny-a/vae", DType::F32, (3, 3)),
        ("edit_aug_vae_psz2_posterior_noise", "vae-psz2", DType::F32, (3, 3)),
        ("t2i_demo_aug_cfg2", "demo/vae", DType::F32, (4, 4)),
        ("t2i_aug_cfg_bf16", "tiny-a/vae", DType::Bf16, (3, 3)),
        ("t2i_demo_aug_bf16", "demo/vae", DType::Bf16, (4, 4)),
    ];
    for (case, vae, dtype, grid) in cases {
        let golden = Golden::open(&root.join("cases").join(format!("{case}.safetensors")));
        let (shape, tokens) = golden.get("tokens");
        let mut rig = Rigged::open(&root.join(vae), dtype, EmulatedOptions::default());
        let made = rig.decode_tokens(shape[0], grid, &tokens);
        let (_, latents) = golden.channels_last("latents");
        let (largest, _) = difference(&made.latent, &latents);
        assert!(largest <= 2e-6, "{case} latents: {largest:e}");
        let ([_, height, width, _], image) = golden.channels_last("image");
        assert_eq!(made.size, (height, width), "{case}");
        assert_close(&format!("{case} image"), dtype, &made.image, &image);
        assert_levels(&format!("{case} image_u8"), dtype, &made.rgb, &golden.get("image_u8").1);
    }
}

#[test]
fn pictures_do_not_depend_on_the_batch_or_on_the_order_of_nodes() {
    let dir = golden().join("vae-psz2");
    let mut rig = Rigged::open(&dir, DType::F32, EmulatedOptions::default());
    let tokens = Rig::new(rig.device.clone(), 3).unwrap().normal(3 * 2 * 64, 0.8);
    let together = rig.decode_tokens(3, (1, 2), &tokens);
    for (image, tokens) in tokens.chunks(2 * 64).enumerate() {
        let alone = rig.decode_tokens(1, (1, 2), tokens);
        let len = alone.rgb.len();
        assert_eq!(alone.image, together.image[image * len..][..len]);
        assert_eq!(alone.rgb, together.rgb[image * len..][..len]);
    }
    for seed in 1..4 {
        let options = EmulatedOptions { replay_order: ReplayOrder::Legal(seed), ..Default::default() };
        let shuffled = Rigged::open(&dir, DType::F32, options).decode_tokens(3, (1, 2), &tokens);
        assert_eq!(shuffled.image, together.image);
    }
}

#[test]
fn bad_arenas_and_sizes_are_errors() {
    let mut rig = Rigged::open(&golden().join("vae-psz2"), DType::F32, EmulatedOptions::default());
    assert!(rig.decoder.plan(0, (1, 1), DType::F32).is_err());
    assert!(rig.decoder.plan(1, (usize::MAX / 2, 3), DType::F32).is_err());
    assert!(rig.decoder.plan(usize::MAX / 1000, (8, 8), DType::F32).is_err());
    let bytes = rig.decoder.plan(1, (1, 1), DType::F32).unwrap();
    let arena = rig.arena(bytes);
    let selection = Selection::default();
    let launch = Launch { selection: &selection, dtype: DType::F32, sm_count: 4, dependent: false };
    let short = arena.span().slice(0, bytes - 256);
    let mut list = NodeList::new();
    assert!(rig.decoder.record_latent(&launch, &mut list, 1, (2, 2), short, false).is_err());
    assert!(rig.decoder.record_latent(&launch, &mut list, 1, (2, 2), arena.span(), false).is_ok());
}

/// The shipped VAE's sizes with random weights, stored as bf16.
fn full_width() -> (VaeConfig, VaeWeights) {
    let config = VaeConfig::parse(Path::new("config.json"), "{}").unwrap();
    let device: Arc<dyn Device> = Arc::new(EmulatedDevice::new(EmulatedOptions::default()).unwrap());
    let mut random = Rig::new(device, 11).unwrap();
    let tensors = vae_tensors(&config);
    let stored: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|spec| {
            let fan_in: usize = spec.shape[1..].iter().product();
            let norm = spec.name.contains("norm") && spec.name.ends_with("weight");
            let scale = if fan_in == 1 { 0.1 } else { 1.0 / (fan_in as f32).sqrt() };
            let values = random.normal(spec.elements(), scale);
            let values = values.into_iter().map(|v| if norm { 1.0 + v } else { v }).collect();
            (spec.name.clone(), spec.shape.clone(), encode(DType::Bf16, values).0)
        })
        .collect();
    let views = stored.iter().map(|(name, shape, bytes)| {
        (name, safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, shape.clone(), bytes).unwrap())
    });
    let file = safetensors::serialize(views, None).unwrap();
    let weights = VaeWeights::new(Checkpoint::from_bytes("random", file).unwrap(), &config).unwrap();
    (config, weights)
}

/// A tensor as the references take it.
fn weight(weights: &VaeWeights, name: &str) -> Result<Vec<f32>> {
    let view = weights.get(name)?;
    let values = convert::to_f32(&view)?;
    match view.shape() {
        &[o, i, kh, kw] => convert::conv_to_ohwi(&values, [o, i, kh, kw]),
        _ => Ok(values),
    }
}

fn reference<P: Precision>(
    config: &VaeConfig,
    weights: &VaeWeights,
    (height, width): (usize, usize),
    latent: &[f32],
) -> Result<Vec<f64>> {
    let weight = |name: &str| weight(weights, name);
    let latent = Map { images: 1, height, width, channels: config.z_channels, values: P::load_all(latent) };
    let image = Vae::<P> { config, weight: &weight, tap: &mut |_, _| {} }.decode(&latent)?;
    Ok(P::widen_all(&image.values))
}

fn check_against_reference(
    config: VaeConfig,
    weights: &VaeWeights,
    dtype: DType,
    size: (usize, usize),
) -> Check {
    let mut rig =
        Rigged::new(config.clone(), weights, dtype, EmulatedOptions { sm_count: 132, ..Default::default() });
    let latent = Rig::new(rig.device.clone(), 5).unwrap().normal(size.0 * size.1 * config.z_channels, 1.0);
    let latent = encode(dtype, latent).1;
    let started = std::time::Instant::now();
    let (image, _) = rig.decode(1, size, &latent, |_, _, _| {});
    let emulated = started.elapsed();
    let exact = reference::<Exact>(&config, weights, size, &latent).unwrap();
    let plain = match dtype {
        DType::F32 => reference::<PlainF32>(&config, weights, size, &latent),
        DType::Bf16 => reference::<PlainBf16>(&config, weights, size, &latent),
    };
    let check = compare("image", dtype, &image, &exact, &plain.unwrap());
    eprintln!("emulated in {emulated:.1?}, with references {:.1?}: {check:?}", started.elapsed());
    check
}

#[test]
fn the_decoder_agrees_with_its_reference_at_odd_sizes() {
    let dir = golden().join("vae-psz2");
    let config = VaeConfig::load(&dir).unwrap();
    let open = || VaeWeights::new(Checkpoint::open(&dir, OpenOptions::default()).unwrap(), &config).unwrap();
    for (size, dtype) in [((1, 1), DType::F32), ((3, 1), DType::F32), ((1, 3), DType::Bf16)] {
        let check = check_against_reference(config.clone(), &open(), dtype, size);
        assert!(check.ok, "{size:?} {dtype:?} {check:?}");
    }
}

#[test]
fn the_full_width_decoder_agrees_with_its_reference() {
    let (config, weights) = full_width();
    let check = check_against_reference(config.clone(), &weights, DType::Bf16, (8, 8));
    assert!(check.ok, "{check:?}");

    // Four times the pixels, which the reference would take minutes for: the two sets of kernels against each other.
    // Values are of the same size there, and both may err as much as at 8x8.
    let options = EmulatedOptions { sm_count: 132, ..Default::default() };
    let mut rig = Rigged::new(config, &weights, DType::Bf16, options);
    let latent = Rig::new(rig.device.clone(), 6).unwrap().normal(16 * 16 * rig.config.z_channels, 1.0);
    let latent = encode(DType::Bf16, latent).1;
    let (fast, _) = rig.decode(1, (16, 16), &latent, |_, _, _| {});
    rig.selection = Selection::parse(&["conv2d=plain", "vae_attention=plain"]).unwrap();
    let (plain, _) = rig.decode(1, (16, 16), &latent, |_, _, _| {});
    assert_ne!(fast, plain, "the default kernels are others than the plain ones");
    let (largest, mean) = difference(&fast, &plain);
    assert!(f64::from(largest) <= 2.0 * check.allowed, "{largest:e} (mean {mean:e}), {check:?}");
}

/// Moments of one picture of random pixels, `[h, w, 2 * z_channels]`, against the reference's.
fn check_encoder(
    config: VaeConfig,
    weights: &VaeWeights,
    dtype: DType,
    (height, width): (usize, usize),
) -> Check {
    let options = EmulatedOptions { sm_count: 132, ..Default::default() };
    let device: Arc<dyn Device> = Arc::new(EmulatedDevice::new(options).unwrap());
    let mut stream = device.stream().unwrap();
    let selection = Selection::default();
    let mut up = Uploader::new(device.clone(), dtype, &selection).unwrap();
    let encoder = VaeEncoder::load(&config, weights, &mut up).unwrap().expect("an encoder");
    up.wait().unwrap();
    let _weights = up.finish();
    let pixels = Rig::new(device.clone(), 9).unwrap().normal(height * width * 3, 0.4);
    let (bytes, pixels) = encode(dtype, pixels);
    let arena = device.alloc(encoder.plan((height, width), dtype).unwrap(), "encoder").unwrap();
    stream.set(arena.span(), 0xff).unwrap();
    let launch = Launch { selection: &selection, dtype, sm_count: 132, dependent: true };
    let mut list = NodeList::new();
    let encoded = encoder.record(&launch, &mut list, (height, width), arena.span(), false).unwrap();
    let short = arena.span().slice(0, arena.bytes() - 256);
    assert!(encoder.record(&launch, &mut NodeList::new(), (height, width), short, false).is_err());
    stream.put(encoded.pixels.ptr, &bytes).unwrap();
    let executable = stream.prepare(list).unwrap();
    stream.replay(executable.as_ref()).unwrap();
    let mut got = vec![0; encoded.moments.bytes];
    stream.get(encoded.moments.ptr, &mut got).unwrap();

    fn moments<P: Precision>(
        config: &VaeConfig,
        weights: &VaeWeights,
        (height, width): (usize, usize),
        pixels: &[f32],
    ) -> Vec<f64> {
        let weight = |name: &str| weight(weights, name);
        let pixels = Map { images: 1, height, width, channels: 3, values: P::load_all(pixels) };
        let moments = Vae::<P> { config, weight: &weight, tap: &mut |_, _| {} }.encode(&pixels).unwrap();
        P::widen_all(&moments.values)
    }
    let size = (height, width);
    let exact = moments::<Exact>(&config, weights, size, &pixels);
    let plain = match dtype {
        DType::F32 => moments::<PlainF32>(&config, weights, size, &pixels),
        DType::Bf16 => moments::<PlainBf16>(&config, weights, size, &pixels),
    };
    compare("moments", dtype, &decode(dtype, &got), &exact, &plain)
}

#[test]
fn the_encoder_agrees_with_its_reference_at_odd_sizes() {
    let dir = golden().join("vae-psz2");
    let config = VaeConfig::load(&dir).unwrap();
    let open = || VaeWeights::new(Checkpoint::open(&dir, OpenOptions::default()).unwrap(), &config).unwrap();
    for (size, dtype) in [((8, 8), DType::F32), ((24, 8), DType::F32), ((8, 40), DType::Bf16)] {
        let check = check_encoder(config.clone(), &open(), dtype, size);
        assert!(check.ok, "{size:?} {dtype:?} {check:?}");
    }
}

#[test]
fn the_full_width_encoder_agrees_with_its_reference() {
    let (config, weights) = full_width();
    let check = check_encoder(config, &weights, DType::Bf16, (64, 64));
    assert!(check.ok, "{check:?}");
}
