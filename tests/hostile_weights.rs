//! Weights that no training gives, and files that change under the loader: items 9 and 10 of the list of bad inputs
//! that the engine promises to survive. Every model here is tiny-a after a change.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tempfile::TempDir;
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions};
use warpstep::device::{Buffer, Device, DeviceInfo, Span, Stream};
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::event::{CancelToken, Control};
use warpstep::ops::DType;
use warpstep::weights::{Checkpoint, Dtype, OpenOptions, convert, describe};
use warpstep::{Error, Result};

/// Shape and values of every tensor, by stored name.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-a")
}

fn read(path: &Path) -> Tensors {
    let checkpoint = Checkpoint::open(path, OpenOptions::default()).unwrap();
    let tensor = |view: warpstep::weights::TensorView<'_>| {
        let mut bytes = vec![0; view.elements() * 4];
        convert::write_as(&view, Dtype::F32, &mut bytes).unwrap();
        let values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        (view.name().to_owned(), (view.shape().to_vec(), values))
    };
    checkpoint.tensors().map(tensor).collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, (shape, values)) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        let offsets = [start, data.len()];
        let entry = serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": offsets});
        header.insert(name.clone(), entry);
    }
    let header = serde_json::Value::Object(header).to_string();
    std::fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()).unwrap();
}

/// tiny-a as safetensors in a folder of its own.
struct Model(TempDir);

impl Model {
    fn new(change: impl FnOnce(&mut Tensors), change_vae: impl FnOnce(&mut Tensors)) -> Model {
        let folder = tempfile::tempdir().unwrap();
        for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
            std::fs::copy(golden().join(file), folder.path().join(file)).unwrap();
        }
        std::fs::create_dir(folder.path().join("vae")).unwrap();
        let vae = golden().join("vae_diffusers");
        std::fs::copy(vae.join("config.json"), folder.path().join("vae/config.json")).unwrap();
        let model = Model(folder);
        for (from, to, change) in [
            (golden(), model.weights(), Box::new(change) as Box<dyn FnOnce(&mut Tensors)>),
            (vae, model.0.path().join("vae/model.safetensors"), Box::new(change_vae)),
        ] {
            let mut tensors = read(&from);
            change(&mut tensors);
            write(&to, &tensors);
        }
        model
    }

    fn filled(value: f32) -> Model {
        Model::new(|tensors| fill(tensors, "", value), |_| {})
    }

    fn weights(&self) -> PathBuf {
        self.0.path().join("model.safetensors")
    }

    fn load(&self, device: Arc<dyn Device>, mmap: bool) -> Result<Engine> {
        let options = EngineOptions { dtype: DType::F32, mmap, ..EngineOptions::default() };
        Engine::load(&ModelSource::Dir(self.0.path().into()), device, options)
    }

    fn draw(&self) -> Result<Vec<u8>> {
        let device = EmulatedDevice::new(EmulatedOptions::default()).unwrap();
        draw(Arc::new(self.load(Arc::new(device.clone()), true)?))
    }
}

fn draw(engine: Arc<Engine>) -> Result<Vec<u8>> {
    let mut request = engine.request("a red circle")?;
    (request.width, request.height, request.seed) = (32, 32, 3);
    request.sampler.steps = 2;
    let images = engine.session().generate(&request, &CancelToken::new(), &mut |_| Control::Continue)?;
    Ok(images.images[0].data().to_vec())
}

/// Sets every value of the tensors whose name contains `part`.
fn fill(tensors: &mut Tensors, part: &str, value: f32) {
    let mut filled = 0;
    for (_, (_, values)) in tensors.iter_mut().filter(|(name, _)| name.contains(part)) {
        values.fill(value);
        filled += 1;
    }
    assert!(filled > 0, "no tensor is called {part}");
}

#[track_caller]
fn assert_not_finite(result: Result<Vec<u8>>, expected: (&str, usize)) {
    match result {
        Err(Error::NonFinite { stage, token }) => assert_eq!((stage, token), expected),
        other => panic!("{:?}", other.map(|picture| picture.len())),
    }
}

// Item 9: values.

#[test]
fn all_nan_weights() {
    let model = Model::filled(f32::NAN);
    assert_not_finite(model.draw(), ("flow head", 0));
    let summary = describe(model.0.path(), OpenOptions::default(), true).unwrap();
    let warned = summary.warnings.iter().filter(|warning| warning.contains("NaN and 0 infinite")).count();
    assert_eq!(warned, read(&model.weights()).len(), "inspect --check-values names every tensor");
}

#[test]
fn all_infinite_weights() {
    for value in [f32::INFINITY, f32::NEG_INFINITY] {
        assert_not_finite(Model::filled(value).draw(), ("flow head", 0));
    }
}

/// They are tiny, and numbers: a picture of nothing, not an error.
#[test]
fn denormal_weights() {
    let smallest = f32::from_bits(1);
    assert_eq!(Model::filled(smallest).draw().unwrap().len(), 32 * 32 * 3);
    assert_eq!(Model::filled(-1e-40).draw().unwrap().len(), 32 * 32 * 3);
}

/// The first token is sampled before anything is fed back, so that the second is the first that shows it.
#[test]
fn a_nan_that_only_the_second_token_sees() {
    let model = Model::new(|tensors| fill(tensors, "image_in_projector", f32::NAN), |_| {});
    assert_not_finite(model.draw(), ("flow head", 1));
}

/// The tokens are fine. One of the decoder's last three biases is NaN, which every pixel shows.
#[test]
fn a_nan_that_only_the_vae_decoder_makes() {
    let model = Model::new(|_| {}, |vae| vae.get_mut("decoder.conv_out.bias").unwrap().1[1] = f32::NAN);
    match model.draw() {
        Err(Error::NonFinitePixel { picture: 0, row: 0, column: 0 }) => {}
        other => panic!("{:?}", other.map(|picture| picture.len())),
    }
}

/// Square matrices cannot be told from their transposes; every other one is refused by name.
#[test]
fn transposed_weights() {
    for part in ["layers.0.mlp.gate_proj.weight", "layers.1.self_attn.k_proj.weight", "embed_tokens.weight"] {
        let mut name = String::new();
        let transpose = |tensors: &mut Tensors| {
            let (found, (shape, values)) =
                tensors.iter_mut().find(|(name, _)| name.ends_with(part)).expect("a tensor of this name");
            name = found.clone();
            let (rows, columns) = (shape[0], shape[1]);
            assert_ne!(rows, columns);
            *values = (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect();
            shape.reverse();
        };
        let model = Model::new(transpose, |_| {});
        match model.draw() {
            Err(Error::ShapeMismatch { tensor, expected, found, .. }) => {
                assert!(name.ends_with(&tensor) || tensor == name, "{tensor}, not {name}");
                assert!(expected.iter().rev().eq(found.iter()) && expected != found);
            }
            other => panic!("{part}: {other:?}"),
        }
    }
}

// Item 10: files that change.

/// An emulated device that does something to the files once, at an allocation in the middle of loading.
struct Meddling {
    inner: EmulatedDevice,
    allocations: AtomicUsize,
    at: usize,
    act: Box<dyn Fn() + Send + Sync>,
}

// SAFETY: the inner device does everything.
unsafe impl Device for Meddling {
    fn info(&self) -> DeviceInfo {
        self.inner.info()
    }

    fn alloc(&self, bytes: usize, label: &str) -> Result<Buffer> {
        if self.allocations.fetch_add(1, Ordering::Relaxed) == self.at {
            (self.act)();
        }
        self.inner.alloc(bytes, label)
    }

    fn name_span(&self, span: Span, label: &str) {
        self.inner.name_span(span, label);
    }

    fn stream(&self) -> Result<Box<dyn Stream>> {
        self.inner.stream()
    }
}

/// Loads while `act` does something to the weights' file, and draws.
fn meddle(model: &Model, mmap: bool, act: impl Fn(&Path) + Send + Sync + 'static) -> Result<Vec<u8>> {
    let inner = EmulatedDevice::new(EmulatedOptions::default()).unwrap();
    let path = model.weights();
    let act = Box::new(move || act(&path));
    let device = Meddling { inner: inner.clone(), allocations: AtomicUsize::new(0), at: 5, act };
    let picture = model.load(Arc::new(device), mmap).map(Arc::new).and_then(draw);
    assert_eq!(inner.live_bytes(), 0, "all memory was freed");
    picture
}

fn plain() -> Model {
    Model::new(|_| {}, |_| {})
}

#[test]
fn file_truncated_while_it_is_read() {
    let model = plain();
    let picture = model.draw().unwrap();
    let kept = std::fs::read(model.weights()).unwrap();
    for length in [0, 4096, kept.len() as u64 / 2] {
        let truncate = move |path: &Path| {
            std::fs::File::options().write(true).open(path).unwrap().set_len(length).unwrap();
        };
        match meddle(&model, false, truncate) {
            Err(Error::Checkpoint { path, reason }) => {
                assert_eq!(path, model.weights());
                assert!(reason.contains("past the end of the file"), "{reason}");
            }
            other => panic!("{length}: {:?}", other.map(|picture| picture.len())),
        }
        std::fs::write(model.weights(), &kept).unwrap();
    }
    assert!(model.draw().unwrap() == picture);
}

/// The open file keeps its bytes, mapped or not.
#[test]
fn file_unlinked_while_it_is_read() {
    for mmap in [false, true] {
        let model = plain();
        let picture = model.draw().unwrap();
        assert!(meddle(&model, mmap, |path| std::fs::remove_file(path).unwrap()).unwrap() == picture);
        assert!(matches!(model.draw(), Err(Error::Checkpoint { .. })), "it is gone");
    }
}

/// As a download that is moved into place does it: whoever has the old file open reads the old one.
#[test]
fn file_replaced_while_it_is_read() {
    for mmap in [false, true] {
        let model = plain();
        let picture = model.draw().unwrap();
        let replace = |path: &Path| {
            let new = path.with_extension("new");
            std::fs::write(&new, b"not a checkpoint").unwrap();
            std::fs::rename(new, path).unwrap();
        };
        assert!(meddle(&model, mmap, replace).unwrap() == picture);
        assert!(matches!(model.draw(), Err(Error::Checkpoint { .. })));
    }
}

/// Other bytes of the same length: nobody can notice, and nothing but the picture suffers.
#[test]
fn file_overwritten_in_place_while_it_is_read() {
    for mmap in [false, true] {
        let model = plain();
        let overwrite = |path: &Path| {
            use std::os::unix::fs::FileExt;
            let file = std::fs::File::options().write(true).open(path).unwrap();
            let length = file.metadata().unwrap().len();
            file.write_all_at(&vec![0xff; length as usize], 0).unwrap();
        };
        assert_not_finite(meddle(&model, mmap, overwrite), ("flow head", 0));
    }
}
