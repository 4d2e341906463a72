//! Heads of other layouts: tied embeddings, `before_lm_head`, a tokenizer without the tokens around thoughts.

use crate::{complete, golden, load, recorded_prompt, with_text};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use warpstep::Error;
use warpstep::engine::{EngineOptions, ModelSource};
use warpstep::ops::{DType, Selection};
use warpstep::text::{Opening, TextRequest};
use warpstep::weights::{Checkpoint, OpenOptions};

type Parts = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

/// A copy of tiny-a after `change` to its config, tensors (all f32) and tokenizer.
fn changed(change: impl Fn(&mut Value, &mut Parts, &mut Value)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let tiny = golden("tiny-a");
    let read =
        |name: &str| -> Value { serde_json::from_slice(&std::fs::read(tiny.join(name)).unwrap()).unwrap() };
    let (mut config, mut tokenizer) = (read("config.json"), read("tokenizer.json"));
    let checkpoint = Checkpoint::open(&tiny, OpenOptions::default()).unwrap();
    let part = |t: warpstep::weights::TensorView<'_>| {
        (t.name().to_owned(), (t.shape().to_vec(), t.bytes().unwrap().into_owned()))
    };
    let mut parts: Parts = checkpoint.tensors().map(part).collect();
    config["vae_name_or_path"] = json!(tiny.join("vae").to_str().unwrap());
    change(&mut config, &mut parts, &mut tokenizer);
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, (shape, bytes)) in &parts {
        let start = data.len();
        data.extend_from_slice(bytes);
        header.insert(
            name.clone(),
            json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}),
        );
    }
    let header = Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
    write("model.safetensors", &file);
    write("config.json", config.to_string().as_bytes());
    write("tokenizer.json", tokenizer.to_string().as_bytes());
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        std::fs::copy(tiny.join(name), dir.path().join(name)).unwrap();
    }
    dir
}

fn engine(dir: &Path) -> std::sync::Arc<warpstep::engine::Engine> {
    engine_with(dir, DType::F32, &[])
}

fn engine_with(dir: &Path, dtype: DType, kernels: &[&str]) -> std::sync::Arc<warpstep::engine::Engine> {
    let kernels = Selection::parse(kernels).unwrap();
    let options = EngineOptions { dtype, kernels, vae: Some(golden("tiny-a/vae")), ..with_text() };
    load(&ModelSource::Dir(dir.into()), options).unwrap()
}

/// tiny-a with its embedding table as a head of its own, and the same with tied embeddings.
fn own_and_tied() -> [tempfile::TempDir; 2] {
    let own = changed(|_, parts, _| {
        let table = parts["embed_tokens.weight"].clone();
        parts.insert("lm_head.weight".into(), table);
    });
    let tied = changed(|config, parts, _| {
        config["tie_word_embeddings"] = json!(true);
        parts.remove("lm_head.weight").unwrap();
    });
    [own, tied]
}

fn text(dir: &Path) -> Vec<u32> {
    let request = TextRequest { max_tokens: 10, ..TextRequest::new(recorded_prompt()) };
    complete(&engine(dir), &request).unwrap().ids
}

fn weight_bytes(dir: &Path) -> u64 {
    engine(dir).plan_text(&TextRequest::new("a")).unwrap().weight_bytes
}

#[test]
fn tied_embeddings_are_the_head_and_take_no_memory_twice() {
    let [own, tied] = own_and_tied();
    let written = text(tied.path());
    assert_eq!(written, text(own.path()));
    assert_ne!(written, text(changed(|_, _, _| {}).path()), "the head has no effect");
    assert_eq!(weight_bytes(own.path()) - weight_bytes(tied.path()), 528 * 64 * 4);
}

/// In bf16 a head is packed, and the table that embeds is not.
#[test]
fn a_tied_head_is_read_as_stored_and_packed_only_where_a_variant_asks_for_it() {
    let [own, tied] = own_and_tied();
    let run = |dir: &tempfile::TempDir, kernels: &[&str]| {
        let engine = engine_with(dir.path(), DType::Bf16, kernels);
        let request = TextRequest { max_tokens: 10, ..TextRequest::new(recorded_prompt()) };
        let bytes = engine.plan_text(&request).unwrap().weight_bytes;
        (complete(&engine, &request).unwrap().ids, bytes)
    };
    let (stored, stored_bytes) = run(&tied, &[]);
    assert_eq!(stored, run(&own, &["lm_head=plain"]).0);
    for variant in ["stream", "ring"] {
        let chosen = format!("lm_head={variant}");
        let (packed, packed_bytes) = run(&tied, &[&chosen]);
        assert_eq!(packed, run(&own, &[&chosen]).0, "{variant}");
        assert_eq!(packed_bytes - stored_bytes, 528 * 64 * 2, "{variant}");
    }
    // Where weights cannot be packed the variant refuses, and nothing is copied for it.
    let engine = engine_with(tied.path(), DType::F32, &["lm_head=stream"]);
    assert_eq!(engine.plan_text(&TextRequest::new("a")).unwrap().weight_bytes, weight_bytes(tied.path()));
    let refused = complete(&engine, &TextRequest::new("a"));
    assert!(matches!(refused, Err(Error::Unsupported { op: "lm_head", .. })), "{refused:?}");
}

#[test]
fn a_layer_before_the_head_is_applied() {
    let square = |parts: &mut Parts, scale: &dyn Fn(usize) -> f32| {
        let values: Vec<f32> =
            (0..64 * 64).map(|i| if i % 64 == i / 64 { scale(i / 64) } else { 0.0 }).collect();
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
        parts.insert("before_lm_head.weight".into(), (vec![64, 64], bytes(&values)));
        parts.insert("before_lm_head.bias".into(), (vec![64], bytes(&[0.0; 64])));
    };
    let identity = changed(|config, parts, _| {
        config["use_mlp_before_lm_head"] = json!(true);
        square(parts, &|_| 1.0);
    });
    let plain = text(changed(|_, _, _| {}).path());
    assert_eq!(text(identity.path()), plain);
    // Half of the hidden state turned round in front of the head, and the head's columns with it.
    let turned = changed(|config, parts, _| {
        config["use_mlp_before_lm_head"] = json!(true);
        square(parts, &|i| if i < 32 { -1.0 } else { 1.0 });
        let (_, head) = parts.get_mut("lm_head.weight").unwrap();
        for (i, value) in head.chunks_exact_mut(4).enumerate() {
            // The sign bit of the first 32 columns.
            value[3] ^= if i % 64 < 32 { 0x80 } else { 0 };
        }
    });
    assert_eq!(text(turned.path()), plain);
    let wrong = changed(|config, parts, _| {
        config["use_mlp_before_lm_head"] = json!(true);
        square(parts, &|i| if i < 32 { -1.0 } else { 1.0 });
    });
    assert_ne!(text(wrong.path()), plain, "the layer has no effect");
}

#[test]
fn a_tokenizer_without_the_tokens_around_thoughts_refuses_them_alone() {
    let dir = changed(|_, _, tokenizer| {
        let added = tokenizer["added_tokens"].as_array_mut().unwrap();
        for token in added {
            let content = token["content"].as_str().unwrap();
            if content.contains("thinking") {
                token["content"] = json!(content.replace("thinking", "musing"));
            }
        }
    });
    let engine = engine(dir.path());
    let request = TextRequest::new("a cat");
    assert!(engine.plan_text(&request).is_ok());
    let refined = TextRequest { opening: Some(Opening::Refinement), ..request.clone() };
    assert!(engine.plan_text(&refined).is_ok());
    let result = engine.plan_text(&TextRequest { opening: Some(Opening::Thinking), ..request });
    match result {
        Err(Error::InvalidRequest { field: "opening", reason }) => {
            assert!(reason.contains("<|begin_of_thinking|>"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}
