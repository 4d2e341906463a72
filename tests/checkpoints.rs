//! Whole checkpoints: the golden models bind strictly, two forms of one VAE are equal bit for bit, and every way in
//! which a checkpoint can disagree with its config is an error.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use warpstep::model::config::{ModelConfig, VaeConfig};
use warpstep::weights::{
    Checkpoint, Dtype, ModelWeights, OpenOptions, Part, TensorView, VaeWeights, convert, describe,
};
use warpstep::{Error, Result};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// The full set of recorded models, which a plain clone does not have: `WARPSTEP_FIXTURES`, or beside the clone.
fn fixtures() -> Option<PathBuf> {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/fixtures");
    let dir = std::env::var_os("WARPSTEP_FIXTURES").map_or_else(beside, PathBuf::from);
    dir.is_dir().then_some(dir)
}

fn open_model(dir: &Path, mmap: bool) -> Result<ModelWeights> {
    ModelWeights::new(Checkpoint::open(dir, OpenOptions { mmap })?, &ModelConfig::load(dir)?)
}

fn open_vae(dir: &Path, mmap: bool) -> Result<VaeWeights> {
    VaeWeights::new(Checkpoint::open(dir, OpenOptions { mmap })?, &VaeConfig::load(dir)?)
}

fn bf16(view: TensorView<'_>) -> Vec<u8> {
    let mut out = vec![0; view.elements() * 2];
    convert::write_as(&view, Dtype::Bf16, &mut out).unwrap();
    out
}

/// A tensor of a checkpoint that a test takes apart: dtype, shape, bytes.
type Parts = BTreeMap<String, (&'static str, Vec<usize>, Vec<u8>)>;

fn take_apart(checkpoint: &Checkpoint) -> Parts {
    let part = |view: TensorView<'_>| {
        let dtype = match view.dtype() {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::Bf16 => "BF16",
        };
        (view.name().to_owned(), (dtype, view.shape().to_vec(), view.bytes().unwrap().into_owned()))
    };
    checkpoint.tensors().map(part).collect()
}

fn put_together(parts: &Parts) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, (dtype, shape, bytes)) in parts {
        let start = data.len();
        data.extend_from_slice(bytes);
        let offsets = [start, data.len()];
        header.insert(
            name.clone(),
            serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}),
        );
    }
    let header = serde_json::Value::Object(header).to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

fn tiny_config() -> ModelConfig {
    ModelConfig::load(golden("tiny-a")).unwrap()
}

/// tiny-a after `change`.
fn changed_model(config: &ModelConfig, change: impl Fn(&mut Parts)) -> Result<ModelWeights> {
    let mut parts = take_apart(&Checkpoint::open(golden("tiny-a"), OpenOptions::default()).unwrap());
    change(&mut parts);
    ModelWeights::new(Checkpoint::from_bytes("changed", put_together(&parts))?, config)
}

/// The VAE of tiny-a (diffusers names) after `change`.
fn changed_vae(change: impl Fn(&mut Parts)) -> Result<VaeWeights> {
    let dir = golden("tiny-a/vae_diffusers");
    let mut parts = take_apart(&Checkpoint::open(&dir, OpenOptions::default()).unwrap());
    change(&mut parts);
    VaeWeights::new(Checkpoint::from_bytes("changed", put_together(&parts))?, &VaeConfig::load(&dir).unwrap())
}

fn rename(parts: &mut Parts, from: &str, to: &str) {
    let part = parts.remove(from).unwrap();
    parts.insert(to.to_owned(), part);
}

#[test]
fn golden_models_bind_mapped_and_read() {
    for mmap in [true, false] {
        let model = open_model(&golden("tiny-a"), mmap).unwrap();
        assert_eq!((model.specs().len(), model.flow_mlp_dim()), (80, 96));
        assert_eq!(model.get("layers.2.self_attn.k_proj.weight").unwrap().shape(), [32, 64]);
        assert_eq!(open_vae(&golden("tiny-a/vae_diffusers"), mmap).unwrap().specs().len(), 240);
        let vae = open_vae(&golden("vae-psz2"), mmap).unwrap();
        assert_eq!((vae.specs().len(), vae.has_encoder()), (172, true));
    }
}

#[test]
fn a_sharded_model_equals_the_single_file() {
    let dir = tempfile::tempdir().unwrap();
    let whole = open_model(&golden("tiny-a"), true).unwrap();
    let parts = take_apart(whole.checkpoint());
    let mut weight_map = BTreeMap::new();
    for shard in 0..3 {
        let mine = parts.iter().enumerate().filter(|(i, _)| i % 3 == shard).map(|(_, part)| part);
        let mine: Parts = mine.map(|(name, part)| (name.clone(), part.clone())).collect();
        let file = format!("model-{:05}-of-00003.safetensors", shard + 1);
        weight_map.extend(mine.keys().map(|name| (name.clone(), file.clone())));
        std::fs::write(dir.path().join(file), put_together(&mine)).unwrap();
    }
    let total_size: usize = parts.values().map(|(_, _, bytes)| bytes.len()).sum();
    let index = serde_json::json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
    std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    for mmap in [true, false] {
        let checkpoint = Checkpoint::open(dir.path(), OpenOptions { mmap }).unwrap();
        let sharded = ModelWeights::new(checkpoint, &tiny_config()).unwrap();
        assert_eq!(sharded.specs(), whole.specs());
        for spec in whole.specs() {
            let (a, b) = (sharded.get(&spec.name).unwrap(), whole.get(&spec.name).unwrap());
            assert!(convert::to_f32(&a).unwrap() == convert::to_f32(&b).unwrap(), "{}", spec.name);
        }
    }
}

#[test]
fn both_ways_of_opening_give_the_same_values() {
    for (name, vae) in [("tiny-a", false), ("vae-psz2", true)] {
        let [mapped, read] =
            [true, false].map(|mmap| Checkpoint::open(golden(name), OpenOptions { mmap }).unwrap());
        assert!(mapped.tensors().zip(read.tensors()).all(|(a, b)| a.bytes().unwrap() == b.bytes().unwrap()));
        assert_eq!(mapped.len(), if vae { 172 } else { 80 });
    }
}

#[test]
fn every_recorded_model_binds() {
    let Some(root) = fixtures() else { return };
    for name in ["tiny-a", "tiny-a-bf16", "gqa5-b", "demo"] {
        open_model(&root.join(name), true).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    for name in ["tiny-a/vae", "tiny-a/vae_diffusers", "vae-psz2", "demo/vae"] {
        open_vae(&root.join(name), true).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    let demo = root.join("../weights/demo128-start");
    open_model(&demo, true).unwrap();
    open_vae(&demo.join("vae"), true).unwrap();
    // Sharded, with a VAE beside the model.
    let summary = describe(&root.join("gqa5-b"), OpenOptions::default(), true).unwrap();
    assert_eq!(summary.model.unwrap().files.len(), 3);
    assert_eq!(summary.vae.unwrap().path, root.join("gqa5-b/../tiny-a/vae"));
    assert_eq!(summary.warnings, [""; 0]);
}

#[test]
fn bf16_model_is_the_f32_model_rounded() {
    let Some(root) = fixtures() else { return };
    let exact = open_model(&root.join("tiny-a"), true).unwrap();
    let rounded = open_model(&root.join("tiny-a-bf16"), true).unwrap();
    for spec in exact.specs() {
        let (exact, rounded) = (exact.get(&spec.name).unwrap(), rounded.get(&spec.name).unwrap());
        assert_eq!((exact.dtype(), rounded.dtype()), (Dtype::F32, Dtype::Bf16));
        assert!(bf16(exact) == bf16(rounded), "{}", spec.name);
    }
}

#[test]
fn torch_archive_and_diffusers_file_hold_the_same_vae() {
    let Some(root) = fixtures() else { return };
    let archive = open_vae(&root.join("tiny-a/vae"), true).unwrap();
    let diffusers = open_vae(&golden("tiny-a/vae_diffusers"), true).unwrap();
    assert_eq!(archive.specs(), diffusers.specs());
    for spec in archive.specs() {
        let (a, b) = (archive.get(&spec.name).unwrap(), diffusers.get(&spec.name).unwrap());
        assert_eq!((a.shape(), b.shape()), (&spec.shape[..], &spec.shape[..]));
        assert!(bf16(a) == bf16(b), "{}", spec.name);
    }
}

#[test]
fn diffusers_up_blocks_count_backwards() {
    // Level 2 of [32, 32, 32, 64] is the first one below the coarsest: diffusers executes it second.
    let vae = open_vae(&golden("tiny-a/vae_diffusers"), true).unwrap();
    let stored = vae.checkpoint().get("decoder.up_blocks.1.resnets.0.conv_shortcut.weight").unwrap();
    let slot = vae.get("decoder.up.2.block.0.nin_shortcut.weight").unwrap();
    assert_eq!(stored.bytes().unwrap(), slot.bytes().unwrap());
    assert_eq!(slot.name(), "decoder.up.2.block.0.nin_shortcut.weight");
    assert!(
        vae.get("decoder.up_blocks.1.resnets.0.conv_shortcut.weight").is_err(),
        "slots have official names"
    );
}

#[test]
fn missing_tensor() {
    for name in
        ["norm.weight", "layers.1.self_attn.v_proj.bias", "lm_head.weight", "image_head.net.cond_embed.bias"]
    {
        let result = changed_model(&tiny_config(), |parts| drop(parts.remove(name)));
        assert!(
            matches!(&result, Err(Error::MissingTensor { tensor, .. }) if tensor.starts_with(name)),
            "{name}"
        );
    }
    let name = "image_head.net.res_blocks.0.mlp.0.weight";
    let result = changed_model(&tiny_config(), |parts| drop(parts.remove(name)));
    assert!(matches!(result, Err(Error::MissingTensor { tensor, .. }) if tensor.starts_with(name)));
    let result = changed_vae(|parts| drop(parts.remove("decoder.mid_block.attentions.0.to_q.bias")));
    match result.err() {
        Some(Error::MissingTensor { tensor, .. }) => {
            assert_eq!(tensor, "decoder.mid.attn_1.q.bias or decoder.mid_block.attentions.0.to_q.bias");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn unexpected_tensor() {
    for name in [
        "layers.3.input_layernorm.weight",
        "layers.0.self_attn.o_proj.bias",
        "before_lm_head.weight",
        "x\u{1b}",
    ] {
        let result = changed_model(&tiny_config(), |parts| {
            let norm = parts["norm.weight"].clone();
            parts.insert(name.to_owned(), norm);
        });
        let expected = name.replace('\u{1b}', "\\u{1b}");
        assert!(
            matches!(&result, Err(Error::UnexpectedTensor { tensor, .. }) if *tensor == expected),
            "{name}"
        );
    }
    for name in
        ["quant_conv.weight", "post_quant_conv.weight", "decoder.up_blocks.3.upsamplers.0.conv.weight"]
    {
        let result = changed_vae(|parts| {
            let conv = parts["decoder.conv_in.weight"].clone();
            parts.insert(name.to_owned(), conv);
        });
        assert!(matches!(&result, Err(Error::UnexpectedTensor { tensor, .. }) if tensor == name), "{name}");
    }
}

#[test]
fn transposed_weights() {
    for name in
        ["layers.0.mlp.gate_proj.weight", "image_head.net.time_embed.mlp.0.weight", "embed_tokens.weight"]
    {
        let result = changed_model(&tiny_config(), |parts| parts.get_mut(name).unwrap().1.reverse());
        match result.err() {
            Some(Error::ShapeMismatch { tensor, mut expected, found, .. }) => {
                expected.reverse();
                assert_eq!((&*tensor, expected), (name, found));
            }
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn flat_tensor_where_a_matrix_belongs() {
    for name in ["image_head.net.res_blocks.0.mlp.0.weight", "lm_head.weight"] {
        let result = changed_model(&tiny_config(), |parts| {
            let shape = &mut parts.get_mut(name).unwrap().1;
            *shape = vec![shape.iter().product()];
        });
        assert!(matches!(&result, Err(Error::ShapeMismatch { tensor, .. }) if tensor == name), "{name}");
    }
}

#[test]
fn a_leading_model_is_ignored() {
    let prefixed = changed_model(&tiny_config(), |parts| {
        // As Qwen files have it: everything but the LM head.
        let names: Vec<_> = parts.keys().filter(|name| *name != "lm_head.weight").cloned().collect();
        names.iter().for_each(|name| rename(parts, name, &format!("model.{name}")));
    });
    let (prefixed, plain) = (prefixed.unwrap(), open_model(&golden("tiny-a"), true).unwrap());
    assert_eq!(prefixed.specs(), plain.specs());
    let name = "layers.1.mlp.up_proj.weight";
    assert_eq!(prefixed.get(name).unwrap().bytes().unwrap(), plain.get(name).unwrap().bytes().unwrap());

    let both = changed_model(&tiny_config(), |parts| {
        let norm = parts["norm.weight"].clone();
        parts.insert("model.norm.weight".to_owned(), norm);
    });
    assert!(matches!(both, Err(Error::DuplicateTensor { .. })));
}

#[test]
fn optional_parts_of_the_model() {
    // The position table is a formula: it need not be stored.
    let without_table = changed_model(&tiny_config(), |parts| drop(parts.remove("gen_pos_embed"))).unwrap();
    assert!(without_table.find("gen_pos_embed").is_none());

    let tied = ModelConfig { tie_word_embeddings: true, ..tiny_config() };
    let weights = changed_model(&tied, |parts| drop(parts.remove("lm_head.weight"))).unwrap();
    let [head, table] = ["lm_head.weight", "embed_tokens.weight"].map(|name| weights.get(name).unwrap());
    assert_eq!(head.bytes().unwrap(), table.bytes().unwrap());

    let with_mlp = ModelConfig { use_mlp_before_lm_head: true, ..tiny_config() };
    let weights = changed_model(&with_mlp, |parts| {
        let (weight, bias) =
            (parts["image_out_projector.weight"].clone(), parts["image_out_projector.bias"].clone());
        parts.insert("before_lm_head.weight".to_owned(), weight);
        parts.insert("before_lm_head.bias".to_owned(), bias);
    });
    assert_eq!(weights.unwrap().get("before_lm_head.weight").unwrap().shape(), [64, 64]);
    assert!(changed_model(&with_mlp, |_| {}).is_err());
}

#[test]
fn mlp_ratio_of_the_flow_head_comes_from_the_tensors() {
    let wide = changed_model(&tiny_config(), |parts| {
        for block in 0..3 {
            let at = |what: &str| format!("image_head.net.res_blocks.{block}.mlp.{what}");
            parts.insert(at("0.weight"), ("F32", vec![384, 96], vec![0; 384 * 96 * 4]));
            parts.insert(at("0.bias"), ("F32", vec![384], vec![0; 384 * 4]));
            parts.insert(at("2.weight"), ("F32", vec![96, 384], vec![0; 384 * 96 * 4]));
        }
    });
    assert_eq!(wide.unwrap().flow_mlp_dim(), 384);
}

#[test]
fn official_and_diffusers_names_may_not_both_stand_there() {
    let result = changed_vae(|parts| {
        let norm = parts["encoder.conv_norm_out.bias"].clone();
        parts.insert("encoder.norm_out.bias".to_owned(), norm);
    });
    assert!(matches!(result, Err(Error::DuplicateTensor { .. })));
}

#[test]
fn attention_as_one_by_one_convolutions() {
    let vae = changed_vae(|parts| {
        let shape = &mut parts.get_mut("decoder.mid_block.attentions.0.to_k.weight").unwrap().1;
        shape.extend([1, 1]);
    });
    assert_eq!(vae.unwrap().get("decoder.mid.attn_1.k.weight").unwrap().shape(), [64, 64]);
    // Only there: a convolution is no linear layer.
    let result = changed_vae(|parts| {
        let shape = &mut parts.get_mut("decoder.mid_block.attentions.0.to_k.bias").unwrap().1;
        shape.extend([1, 1]);
    });
    assert!(matches!(result, Err(Error::ShapeMismatch { .. })));
}

#[test]
fn vae_without_encoder() {
    let decoder = changed_vae(|parts| parts.retain(|name, _| name.starts_with("decoder."))).unwrap();
    assert!(!decoder.has_encoder());
    assert!(decoder.get("encoder.conv_in.weight").is_err());
    let half = changed_vae(|parts| parts.retain(|name, _| !name.starts_with("encoder.mid_block.")));
    assert!(matches!(half, Err(Error::MissingTensor { .. })));
    let no_decoder = changed_vae(|parts| parts.retain(|name, _| name.starts_with("encoder.")));
    assert!(matches!(no_decoder, Err(Error::MissingTensor { .. })));
}

/// tiny-a with its VAE in `vae/`, after `change`.
fn model_dir(change: impl Fn(&mut Parts)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut parts = take_apart(&Checkpoint::open(golden("tiny-a"), OpenOptions::default()).unwrap());
    change(&mut parts);
    std::fs::write(dir.path().join("model.safetensors"), put_together(&parts)).unwrap();
    std::fs::copy(golden("tiny-a/config.json"), dir.path().join("config.json")).unwrap();
    std::fs::create_dir(dir.path().join("vae")).unwrap();
    for name in ["config.json", "checkpoint.pt"] {
        std::fs::copy(golden("vae-psz2").join(name), dir.path().join("vae").join(name)).unwrap();
    }
    dir
}

#[test]
fn summary_of_a_model_with_its_vae() {
    let dir = model_dir(|_| {});
    let summary = describe(dir.path(), OpenOptions::default(), false).unwrap();
    let (model, vae) = (summary.model.unwrap(), summary.vae.unwrap());
    assert_eq!(model.tensors, 80);
    assert_eq!(model.bytes_by_dtype, BTreeMap::from([(Dtype::F32, 4 * model.parameter_count())]));
    assert_eq!(model.parameters[&Part::Embedding], 528 * 64);
    assert_eq!(model.parameters[&Part::Projectors], 2 * (64 * 64 + 64));
    assert_eq!(vae.bytes_by_dtype, BTreeMap::from([(Dtype::Bf16, 2 * vae.parameter_count())]));
    assert_eq!(vae.path, dir.path().join("vae/"));
    assert!(summary.warnings.iter().any(|warning| warning.contains("gen_pos_embed")));

    let alone = describe(&golden("vae-psz2"), OpenOptions::default(), true).unwrap();
    assert!(alone.model.is_none() && alone.warnings.is_empty());
    assert_eq!(alone.vae.unwrap().parameters, vae.parameters);
}

// Item 9 of the bad inputs: legal files whose values no training gives.
#[test]
fn summary_names_values_that_are_not_finite() {
    let fill = |name: &'static str, value: f32| {
        move |parts: &mut Parts| {
            let bytes = &mut parts.get_mut(name).unwrap().2;
            bytes.chunks_exact_mut(4).for_each(|x| x.copy_from_slice(&value.to_le_bytes()));
        }
    };
    for (value, expected) in [
        (f32::NAN, Some("norm.weight: 64 NaN and 0 infinite of 64 values")),
        (f32::NEG_INFINITY, Some("norm.weight: 0 NaN and 64 infinite of 64 values")),
        (0.0, Some("norm.weight: all 64 values are zero")),
        (1e-40, None),
    ] {
        let dir = model_dir(fill("norm.weight", value));
        let warnings = describe(dir.path(), OpenOptions::default(), true).unwrap().warnings;
        let found = warnings.iter().find(|warning| warning.starts_with("norm.weight"));
        assert_eq!(found.map(String::as_str), expected);
        // Unasked, nothing is read.
        assert_eq!(describe(dir.path(), OpenOptions::default(), false).unwrap().warnings.len(), 1);
    }
}

#[test]
fn summary_of_a_vae_that_does_not_fit() {
    let dir = model_dir(|_| {});
    let path = dir.path().join("config.json");
    let text =
        std::fs::read_to_string(&path).unwrap().replace("\"latent_channels\": 16", "\"latent_channels\": 8");
    std::fs::write(&path, text).unwrap();
    let error = describe(dir.path(), OpenOptions::default(), false).unwrap_err();
    assert!(matches!(&error, Error::InvalidConfig { field, .. } if field == "z_channels"), "{error}");
}
