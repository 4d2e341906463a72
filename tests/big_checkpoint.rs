//! A checkpoint of the released 14B model's shapes, as sparse files: planning reads next to nothing of it, and
//! loading holds little memory of its own.

use serde_json::json;
use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use warpstep::device::planning::HOPPER_SMS;
use warpstep::device::{
    Buffer, Device, DeviceInfo, DevicePtr, Event, Executable, Node, NodeList, STAGING_BYTES, Span, Stream,
};
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::event::{CancelToken, Control};
use warpstep::model::config::{ModelConfig, VaeConfig};
use warpstep::ops::DType;
use warpstep::weights::{TensorSpec, model_tensors, vae_tensors};
use warpstep::{Error, Result};

const MIB: u64 = 1 << 20;
/// Of the released models: every projection of the flow head's blocks is square.
const FLOW_MLP: usize = 1536;

/// `layers` and `vocabulary` of 48 and 152064 give the whole model.
fn write_model(dir: &Path, layers: usize, vocabulary: usize) {
    let config = json!({
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": layers,
        "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": vocabulary,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "attention_bias": true, "o_attention_bias": false,
        "fm_head_dim": 1536, "fm_head_layers": 12, "latent_channels": 16, "latent_patch_size": 2,
        "use_gen_pos_embed": true, "base_image_grid_size": 32, "vae_name_or_path": "vae/",
        "boi": 501, "eoi": 502, "image_placeholder_id": 503,
    });
    let vae = json!({
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16,
        "scaling_factor": 0.3611, "shift_factor": 0.1159,
    });
    std::fs::create_dir(dir.join("vae")).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.join("vae/config.json"), vae.to_string()).unwrap();
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tiny-a/tokenizer.json");
    std::fs::copy(tokenizer, dir.join("tokenizer.json")).unwrap();

    let specs = model_tensors(&ModelConfig::load(dir).unwrap(), FLOW_MLP);
    let mut map = BTreeMap::new();
    let (mut total, mut shards) = (0, Vec::new());
    for (index, specs) in specs.chunks(specs.len().div_ceil(14)).enumerate() {
        let name = format!("model-{index:05}.safetensors");
        map.extend(specs.iter().map(|spec| (spec.name.clone(), name.clone())));
        total += write_sparse(&dir.join(&name), specs, "BF16", 2);
        shards.push(name);
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": map});
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    let specs = vae_tensors(&VaeConfig::load(dir.join("vae")).unwrap());
    write_sparse(&dir.join("vae/model.safetensors"), &specs, "F32", 4);
}

/// A safetensors file whose tensors are one hole; returns their bytes.
fn write_sparse(path: &Path, specs: &[TensorSpec], dtype: &str, element: u64) -> u64 {
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for spec in specs {
        let start = end;
        end += spec.elements() as u64 * element;
        let entry = json!({"dtype": dtype, "shape": spec.shape, "data_offsets": [start, end]});
        header.insert(spec.name.clone(), entry);
    }
    let header = serde_json::Value::Object(header).to_string();
    std::fs::write(path, [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()).unwrap();
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(8 + header.len() as u64 + end).unwrap();
    end
}

/// A field of `/proc/self/status`, in bytes.
fn memory(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
}

/// A device that takes every byte and keeps none, and notes how much memory the process holds that is no file's.
struct Sink {
    next: AtomicU64,
    state: Arc<Seen>,
}

#[derive(Default)]
struct Seen {
    uploads: AtomicU64,
    received: AtomicU64,
    most_anonymous: AtomicU64,
}

// SAFETY: nothing runs.
unsafe impl Device for Sink {
    fn info(&self) -> DeviceInfo {
        let name = "sink".into();
        DeviceInfo { kind: "emulated", name, sm_count: HOPPER_SMS, memory_bytes: None, l2_bytes: None }
    }

    fn alloc(&self, bytes: usize, _label: &str) -> Result<Buffer> {
        let ptr = self.next.fetch_add((bytes as u64).next_multiple_of(256), Ordering::Relaxed);
        // SAFETY: addresses that were not given out before, of a device that runs nothing.
        Ok(unsafe { Buffer::new(DevicePtr(ptr), bytes, Arc::new(())) })
    }

    fn name_span(&self, _span: Span, _label: &str) {}

    fn stream(&self) -> Result<Box<dyn Stream>> {
        Ok(Box::new(SinkStream { state: self.state.clone(), staging: vec![0; SLOTS * STAGING_BYTES] }))
    }
}

/// Slots of staging memory, as a GPU has them.
const SLOTS: usize = 3;

struct SinkStream {
    state: Arc<Seen>,
    staging: Vec<u8>,
}

impl Stream for SinkStream {
    unsafe fn upload_with(
        &mut self,
        _dst: DevicePtr,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let uploads = self.state.uploads.fetch_add(1, Ordering::Relaxed) as usize;
        fill(&mut self.staging[uploads % SLOTS * STAGING_BYTES..][..bytes])?;
        self.state.received.fetch_add(bytes as u64, Ordering::Relaxed);
        self.state.most_anonymous.fetch_max(memory("RssAnon"), Ordering::Relaxed);
        Ok(())
    }

    unsafe fn download(&mut self, _src: DevicePtr, _bytes: &mut [u8]) -> Result<()> {
        unreachable!("loading reads nothing back")
    }

    unsafe fn fill(&mut self, _span: Span, _byte: u8) -> Result<()> {
        Ok(())
    }

    unsafe fn launch(&mut self, _node: &Node) -> Result<()> {
        unreachable!("loading launches nothing")
    }

    unsafe fn instantiate(&mut self, _list: Arc<NodeList>) -> Result<Box<dyn Executable>> {
        unreachable!("loading launches nothing")
    }

    fn replay(&mut self, _executable: &dyn Executable) -> Result<()> {
        unreachable!("loading launches nothing")
    }

    fn record(&mut self) -> Result<Box<dyn Event>> {
        unreachable!("loading waits for nothing but the end")
    }

    fn record_timed(&mut self) -> Result<Box<dyn Event>> {
        unreachable!("loading waits for nothing but the end")
    }

    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }
}

/// One test, so that the peak of the second part cannot hide in the first's figures.
#[test]
fn a_14b_checkpoint_is_planned_in_a_second_and_200_mb_and_loading_holds_at_most_256_mib() {
    plan_is_quick_and_small();
    for (dtype, mmap, threads) in
        [(DType::Bf16, true, None), (DType::F32, true, Some(16)), (DType::Bf16, false, Some(16))]
    {
        loading_holds_little(dtype, mmap, threads.and_then(NonZeroUsize::new));
    }
}

fn plan_is_quick_and_small() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path(), 48, 152_064);
    let start = Instant::now();
    let source = ModelSource::Dir(folder.path().into());
    let engine = Engine::for_planning(&source, HOPPER_SMS, EngineOptions::default()).unwrap();
    let mut request = engine.request("a red circle on a blue background").unwrap();
    (request.width, request.height) = (512, 512);
    let plan = engine.plan(&request).unwrap();
    let (time, peak) = (start.elapsed(), memory("VmHWM"));
    eprintln!("planned in {time:?}, peak {} MB; {plan:?}", peak / 1_000_000);
    assert!(time < Duration::from_secs(1), "{time:?}");
    assert!(peak < 200_000_000, "{peak} bytes of memory");

    // 14.8 billion parameters; lm_head is not loaded.
    assert!((27_000_000_000..32_000_000_000).contains(&plan.weight_bytes), "{plan:?}");
    assert_eq!((plan.image_tokens, plan.branches), (1024, 2));
    // Prompts are planned for in steps of 64 tokens.
    let slots = plan.prompt_tokens.iter().max().unwrap().next_multiple_of(64) + 1024;
    assert_eq!(plan.cache_bytes, 2 * 48 * 2 * slots as u64 * 8 * 128 * 2);

    let engine = Arc::new(engine);
    let refused = engine.session().generate(&request, &CancelToken::new(), &mut |_| Control::Continue);
    let Err(Error::Device(reason)) = refused else { panic!("{refused:?}") };
    assert!(reason.contains("loaded to plan"), "{reason}");
    let tight = EngineOptions { memory_budget_bytes: Some(plan.weight_bytes), ..EngineOptions::default() };
    let tight = Engine::for_planning(&source, HOPPER_SMS, tight).unwrap();
    assert!(matches!(tight.plan(&request), Err(Error::OutOfMemory { .. })));
}

fn loading_holds_little(dtype: DType, mmap: bool, load_threads: Option<NonZeroUsize>) {
    let folder = tempfile::tempdir().unwrap();
    // A layer, and an embedding table that by itself is larger than what may be held.
    write_model(folder.path(), 1, 32_768);
    let state = Arc::new(Seen::default());
    let sink = Sink { next: AtomicU64::new(256), state: state.clone() };
    let before = memory("RssAnon");
    let options = EngineOptions { dtype, mmap, load_threads, ..EngineOptions::default() };
    let source = ModelSource::Dir(folder.path().into());
    let engine = Engine::load(&source, Arc::new(sink), options.clone()).unwrap();
    let held = state.most_anonymous.load(Ordering::Relaxed).saturating_sub(before);
    let received = state.received.load(Ordering::Relaxed);
    eprintln!(
        "{dtype:?}, mmap {mmap}, {} threads: {} MB loaded, at most {} MB held",
        engine.loading().threads,
        received / 1_000_000,
        held / 1_000_000
    );
    assert!(received > 1_000_000_000, "{received} bytes");
    assert!(held <= 256 * MIB, "{held} bytes held");
    let request = engine.request("x").unwrap();
    let plan = engine.plan(&request).unwrap();
    assert_eq!(plan.weight_bytes, received);
    let planned = Engine::for_planning(&source, HOPPER_SMS, options).unwrap();
    assert_eq!(planned.plan(&engine.request("x").unwrap()).unwrap(), plan);
}
