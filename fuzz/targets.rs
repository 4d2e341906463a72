//! What a fuzzer does with bytes: every reader of outside input, once by itself, and what is then asked of what it
//! accepts. Nothing here may panic, and nothing may take long. Included by the targets in this folder and by
//! `tests/fuzz_seeds.rs`.

use std::path::Path;
use tempfile::TempDir;
use warpstep::model::config::{ModelConfig, VaeConfig};
use warpstep::prompt::{Prompt, build_rows, with_marks};
use warpstep::request::{Limits, Preset, RequestFields};
use warpstep::tokenizer::{ModelTokenIds, Tokenizer, TokenizerFiles};
use warpstep::weights::{Checkpoint, Dtype, OpenOptions, convert, model_tensors, vae_tensors};

/// What takes the bytes.
pub type Target = fn(&[u8]);

/// Every target by the name of its folder of seeds.
pub const TARGETS: [(&str, Target); 6] = [
    ("safetensors", safetensors),
    ("index", index),
    ("pt", pt),
    ("config", config),
    ("tokenizer", tokenizer),
    ("request", request),
];

thread_local! {
    static FOLDER: TempDir = tempfile::tempdir().expect("a temporary folder");
    static TOKENIZER: Tokenizer =
        load_tokenizer(include_bytes!("seeds/tokenizer/bytes.json")).expect("the seed is a tokenizer");
}

/// A safetensors file.
pub fn safetensors(bytes: &[u8]) {
    if let Ok(checkpoint) = Checkpoint::from_bytes("fuzz", bytes.to_vec()) {
        read_everything(&checkpoint);
    }
}

/// An index of one shard. The input is the index, a line with three dashes, and the shard.
pub fn index(bytes: &[u8]) {
    const MARK: &[u8] = b"\n---\n";
    let at = bytes.windows(MARK.len()).position(|window| window == MARK);
    let (index, shard) = at.map_or((bytes, &[][..]), |at| (&bytes[..at], &bytes[at + MARK.len()..]));
    FOLDER.with(|folder| {
        let folder = folder.path();
        write(&folder.join("model.safetensors.index.json"), index);
        write(&folder.join("a.safetensors"), shard);
        if let Ok(checkpoint) = Checkpoint::open(folder, OpenOptions { mmap: false }) {
            read_everything(&checkpoint);
        }
    });
}

/// A file that `torch.save` wrote.
pub fn pt(bytes: &[u8]) {
    FOLDER.with(|folder| {
        let path = folder.path().join("fuzz.pt");
        write(&path, bytes);
        if let Ok(checkpoint) = Checkpoint::open(&path, OpenOptions { mmap: false }) {
            read_everything(&checkpoint);
        }
    });
}

/// `config.json` of a model or of a VAE.
pub fn config(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(config) = ModelConfig::parse(Path::new("fuzz"), text) {
        assert!(config.num_attention_heads.is_multiple_of(config.num_key_value_heads));
        assert!(config.boi.max(config.eoi).max(config.image_placeholder_id) < config.vocab_size as u32);
        assert!(config.rms_norm_eps > 0.0 && config.rope_theta > 0.0);
        if config.num_hidden_layers <= 64 && config.fm_head_layers <= 64 {
            assert!(!model_tensors(&config, config.fm_head_dim).is_empty());
        }
    }
    if let Ok(config) = VaeConfig::parse(Path::new("fuzz"), text) {
        assert!(config.scaling_factor != 0.0 && config.downsample_factor() >= 1);
        assert!(!vae_tensors(&config).is_empty());
    }
}

/// `tokenizer.json`.
pub fn tokenizer(bytes: &[u8]) {
    if let Ok(tokenizer) = load_tokenizer(bytes) {
        for text in ["", "a red circle on a blue background", "\u{202e}e\u{301} <|image_area|> 12 \n\0"] {
            if let Ok(ids) = tokenizer.encode(text, true) {
                let limit = tokenizer.model_ids().vocab_size;
                assert!(ids.iter().all(|&id| (id as usize) < limit), "an id beyond the embedding table");
                let _ = tokenizer.decode(&ids, false);
            }
            let _ = tokenizer.special_token_in(text);
        }
    }
}

/// A request as JSON: what is accepted is validated, tokenized and written again.
pub fn request(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(fields) = RequestFields::from_json(text) else { return };
    let defaults = Preset::T2i.defaults();
    let Ok(request) = fields.resolve(&defaults) else { return };
    let limits = Limits::new(16, Some(1024));
    if request.validate(&limits).is_err() {
        return;
    }
    let again = serde_json::to_value(&request).expect("a valid request can be written");
    let again = RequestFields::from_value(&again).and_then(|fields| fields.resolve(&defaults));
    assert_eq!(again.expect("and read again"), request);
    let target = request.grid(&limits).expect("checked by validate");
    let branches = request.sampler.branches().expect("checked by validate");
    assert!(request.sampler.guidance(target.tokens()).iter().flatten().all(|scale| scale.is_finite()));
    if request.sampler.steps <= 1000 {
        let solver = request.sampler.solver().expect("checked by validate");
        assert!(solver.times.iter().all(|time| time.is_finite()));
    }
    let caption = with_marks(&request.prompt, 0);
    let prompt = Prompt {
        caption: &caption,
        positive_prompt: request.positive_prompt.as_deref(),
        negative_prompt: request.negative_prompt.as_deref(),
        images: &[],
        target,
        branches,
    };
    TOKENIZER.with(|tokenizer| {
        if let Ok(rows) = build_rows(tokenizer, request.sampler.sampler.generation(), &prompt, 4096) {
            assert_eq!(rows.len(), branches.count());
        }
    });
}

/// The ids that the seeds were made for.
const IDS: ModelTokenIds = ModelTokenIds { vocab_size: 300, boi: 258, eoi: 259, image_placeholder_id: 260 };

pub fn load_tokenizer(bytes: &[u8]) -> warpstep::Result<Tokenizer> {
    let files = TokenizerFiles { tokenizer: bytes, tokenizer_config: None, special_tokens_map: None };
    Tokenizer::from_bytes(files, Path::new("fuzz"), IDS)
}

/// Reads and converts every tensor; what was accepted must be there.
fn read_everything(checkpoint: &Checkpoint) {
    for tensor in checkpoint.tensors() {
        let product = tensor.shape().iter().product::<usize>();
        assert_eq!(product, tensor.elements());
        assert_eq!(tensor.bytes().expect("was checked").len(), tensor.byte_len());
        let count = tensor.elements().min(64);
        let mut values = vec![0; count * 4];
        convert::write_range_as(&tensor, 0..count, Dtype::F32, &mut values).expect("was checked");
        checkpoint.get(tensor.name()).expect("every tensor is found by its name");
    }
}

fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).expect("the temporary folder is ours");
}
