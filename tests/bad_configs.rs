//! `config.json` of models and VAEs: every field that a computation depends on, missing, of the wrong kind and out
//! of range, each with the error that names it.

use serde_json::{Value, json};
use std::path::Path;
use warpstep::model::config::{EncoderNorm, ModelConfig, VaeConfig, check_vae_match, resolve_vae_dir};
use warpstep::{Error, Result};

fn model() -> Value {
    json!({
        "model_type": "nextstep", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 528,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "rope_scaling": null, "boi": 501, "eoi": 502,
        "image_placeholder_id": 503, "fm_head_dim": 96, "fm_head_layers": 3
    })
}

fn with(mut config: Value, key: &str, value: Value) -> Value {
    config[key] = value;
    config
}

fn without(mut config: Value, key: &str) -> Value {
    config.as_object_mut().unwrap().remove(key);
    config
}

fn parse(config: &Value) -> Result<ModelConfig> {
    ModelConfig::parse(Path::new("config.json"), &config.to_string())
}

/// The reason of the error, which must be about `field`.
#[track_caller]
fn about<T: std::fmt::Debug>(result: Result<T>, field: &str) -> String {
    match result {
        Err(Error::InvalidConfig { path, field: found, reason }) if found == field => {
            assert_eq!(path, Path::new("config.json"));
            assert!(!reason.contains(char::is_control) && reason.len() < 500, "{reason:?}");
            reason
        }
        other => panic!("expected an error about {field}, got {other:?}"),
    }
}

const REQUIRED: [&str; 9] = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "boi",
    "eoi",
    "image_placeholder_id",
];
const SIZES: [&str; 10] = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "fm_head_dim",
    "fm_head_layers",
    "latent_channels",
];

// Item 13: config.json.

#[test]
fn missing_field() {
    for field in REQUIRED {
        assert!(about(parse(&without(model(), field)), field).contains("missing"));
    }
}

#[test]
fn null_field() {
    for field in REQUIRED {
        assert!(about(parse(&with(model(), field, Value::Null)), field).contains("null"));
    }
}

#[test]
fn string_for_a_number() {
    for field in SIZES.iter().chain(&["rms_norm_eps", "rope_theta", "boi"]) {
        assert!(about(parse(&with(model(), field, json!("64"))), field).contains("\"64\""));
    }
}

#[test]
fn number_for_a_boolean() {
    for field in
        ["attention_bias", "o_attention_bias", "mlp_bias", "tie_word_embeddings", "use_gen_pos_embed"]
    {
        assert!(about(parse(&with(model(), field, json!(1))), field).contains("true or false"));
    }
}

#[test]
fn fraction_for_a_size() {
    for field in SIZES {
        about(parse(&with(model(), field, json!(16.5))), field);
        about(parse(&with(model(), field, json!([16]))), field);
    }
}

#[test]
fn zero_and_negative_sizes() {
    for field in SIZES {
        about(parse(&with(model(), field, json!(0))), field);
        about(parse(&with(model(), field, json!(-16))), field);
    }
}

#[test]
fn absurd_sizes() {
    for field in SIZES {
        for huge in [1u64 << 31, 1_000_000_000, u64::MAX] {
            about(parse(&with(model(), field, json!(huge))), field);
        }
    }
    assert!(
        about(parse(&with(model(), "num_hidden_layers", json!(4097))), "num_hidden_layers")
            .contains("1 to 4096")
    );
}

#[test]
fn numbers_that_are_none() {
    for number in ["1e999", "-1e999", "NaN", "Infinity", "-Infinity", "0x10"] {
        let text = model().to_string().replace("\"hidden_size\":64", &format!("\"hidden_size\":{number}"));
        assert!(text.contains(number));
        let reason = about(ModelConfig::parse(Path::new("config.json"), &text), "(file)");
        assert!(reason.contains("line 1 column"), "{reason}");
    }
}

#[test]
fn not_an_object() {
    for text in ["", "[]", "3", "{", "{}x", "\u{feff}{}"] {
        about(ModelConfig::parse(Path::new("config.json"), text), "(file)");
    }
    let deep = "[".repeat(100_000);
    about(ModelConfig::parse(Path::new("config.json"), &deep), "(file)");
}

#[test]
fn heads_do_not_divide_the_hidden_size() {
    let config = with(without(model(), "head_dim"), "num_attention_heads", json!(6));
    assert!(about(parse(&config), "num_attention_heads").contains("does not divide hidden_size 64"));
    // With head_dim there is nothing to divide.
    assert_eq!(parse(&with(config, "head_dim", json!(32))).unwrap().q_size(), 192);
}

#[test]
fn kv_heads_do_not_divide_heads() {
    let config = with(model(), "num_key_value_heads", json!(3));
    assert!(about(parse(&config), "num_key_value_heads").contains("3 does not divide the 4 query heads"));
    about(parse(&with(model(), "num_key_value_heads", json!(8))), "num_key_value_heads");
}

#[test]
fn head_dim_that_no_kernel_has() {
    for head_dim in [8, 24, 272] {
        about(parse(&with(model(), "head_dim", json!(head_dim))), "head_dim");
    }
    // Derived: 640 / 2.
    let config =
        with(with(without(model(), "head_dim"), "hidden_size", json!(640)), "num_attention_heads", json!(2));
    assert!(about(parse(&config), "head_dim").contains("320"));
    assert_eq!(parse(&without(model(), "head_dim")).unwrap().head_dim, 16);
}

#[test]
fn eps_and_theta_must_be_positive() {
    for field in ["rms_norm_eps", "rope_theta"] {
        for wrong in [json!(0), json!(-1e-5), json!(1e-60), json!(1e300)] {
            about(parse(&with(model(), field, wrong)), field);
        }
    }
    let config = parse(&without(without(model(), "rms_norm_eps"), "rope_theta")).unwrap();
    assert_eq!((config.rms_norm_eps, config.rope_theta), (1e-6, 10_000.0));
}

#[test]
fn rope_scaling() {
    for kind in ["linear", "yarn", "dynamic"] {
        for key in ["type", "rope_type"] {
            let config = with(model(), "rope_scaling", json!({key: kind, "factor": 2.0}));
            assert!(about(parse(&config), "rope_scaling").contains("the official code ignores it"));
        }
    }
    about(parse(&with(model(), "rope_scaling", json!("linear"))), "rope_scaling");
    assert!(parse(&with(model(), "rope_scaling", json!({"rope_type": "default"}))).is_ok());
    // transformers 5 keeps theta inside.
    let nested = json!({"rope_type": "default", "rope_theta": 5e5});
    let config = with(without(model(), "rope_theta"), "rope_parameters", nested);
    assert_eq!(parse(&config).unwrap().rope_theta, 5e5);
    about(parse(&with(config, "rope_theta", json!(1e6))), "rope_theta");
}

#[test]
fn auto_map_and_unknown_keys_are_ignored() {
    let config = with(model(), "auto_map", json!({"AutoModel": "evil--code.Model"}));
    let config = with(config, "anything", json!({"at": ["all"]}));
    assert_eq!(parse(&config).unwrap(), parse(&model()).unwrap());
}

#[test]
fn parts_that_nobody_implements() {
    about(parse(&with(model(), "hidden_act", json!("gelu"))), "hidden_act");
    about(parse(&with(model(), "attention_use_qk_norm", json!(true))), "attention_use_qk_norm");
    about(parse(&with(model(), "use_sliding_window", json!(true))), "use_sliding_window");
}

#[test]
fn special_ids_out_of_range() {
    for field in ["boi", "eoi", "image_placeholder_id", "eos_token_id"] {
        assert!(about(parse(&with(model(), field, json!(528))), field).contains("0 to 527"));
        about(parse(&with(model(), field, json!(-1))), field);
    }
    about(parse(&with(model(), "eoi", json!(501))), "image_placeholder_id");
    assert_eq!(parse(&with(model(), "eos_token_id", json!([1, 2]))).unwrap().eos_token_ids, [1, 2]);
}

#[test]
fn attention_biases_follow_the_class() {
    let biases = |config: Value| {
        let config = parse(&config).unwrap();
        (config.attention_bias, config.o_attention_bias)
    };
    assert_eq!(biases(model()), (false, false));
    assert_eq!(biases(with(model(), "attention_bias", json!(true))), (true, true));
    let stated = with(with(model(), "attention_bias", json!(true)), "o_attention_bias", json!(false));
    assert_eq!(biases(stated), (true, false));
    for (key, value) in
        [("model_type", json!("qwen2")), ("max_window_layers", json!(48)), ("num_channels", json!(16))]
    {
        assert_eq!(biases(with(model(), key, value.clone())), (true, false), "{key}");
    }
}

#[test]
fn both_families_of_latent_keys() {
    let latent = |config: Value| {
        let config = parse(&config).unwrap();
        (config.latent_patch_size, config.latent_channels, config.token_dim())
    };
    assert_eq!(latent(model()), (2, 16, 64));
    let training = with(with(model(), "patch_size", json!(2)), "num_channels", json!(4));
    assert_eq!(latent(training.clone()), (2, 4, 16));
    assert_eq!(latent(without(training.clone(), "patch_size")).0, 1, "the training class's own default");
    assert_eq!(latent(with(training.clone(), "latent_channels", json!(4))).1, 4);
    about(parse(&with(training, "latent_channels", json!(16))), "latent_channels");
}

#[test]
fn config_file_missing_or_odd() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(ModelConfig::load(dir.path()), Err(Error::Io { .. })));
    assert!(matches!(VaeConfig::load(dir.path()), Err(Error::Io { .. })));
    let path = dir.path().join("config.json");
    std::fs::write(&path, b"{}").unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(ModelConfig::load(dir.path()), Err(Error::InvalidConfig { .. })));
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    assert!(matches!(ModelConfig::load(dir.path()), Err(Error::InvalidConfig { .. })));
}

// Item 14: the VAE.

fn parse_vae(config: &Value) -> Result<VaeConfig> {
    VaeConfig::parse(Path::new("config.json"), &config.to_string())
}

fn diffusers() -> Value {
    json!({"block_out_channels": [32, 64], "layers_per_block": 2, "latent_channels": 16, "scaling_factor": 1.0})
}

#[test]
fn vae_defaults_are_those_of_the_august_class() {
    let config = parse_vae(&json!({})).unwrap();
    assert_eq!(config.block_out_channels, [128, 256, 512, 512]);
    assert_eq!((config.num_res_blocks, config.z_channels, config.downsample_factor()), (2, 16, 8));
    assert_eq!((config.scaling_factor, config.shift_factor), (0.3611, 0.1159));
    assert_eq!((config.deterministic, config.encoder_norm), (false, None));
    // A norm without a patch size is over the channels of each latent pixel.
    let config = parse_vae(&json!({"encoder_norm": true, "psz": null})).unwrap();
    assert_eq!(config.encoder_norm, Some(EncoderNorm { psz: 1 }));
}

#[test]
fn vae_in_diffusers_form() {
    let config = parse_vae(&diffusers()).unwrap();
    assert_eq!(
        (config.block_out_channels, config.shift_factor, config.encoder_norm),
        (vec![32, 64], 0.0, None)
    );
    for (key, value) in [
        ("use_quant_conv", json!(true)),
        ("use_post_quant_conv", json!(true)),
        ("mid_block_add_attention", json!(false)),
        ("norm_num_groups", json!(16)),
        ("act_fn", json!("relu")),
        ("out_channels", json!(4)),
    ] {
        about(parse_vae(&with(diffusers(), key, value)), key);
    }
    for key in ["scaling_factor", "layers_per_block", "latent_channels"] {
        about(parse_vae(&without(diffusers(), key)), key);
    }
}

#[test]
fn vae_scaling_factor_zero() {
    assert!(about(parse_vae(&json!({"scaling_factor": 0})), "scaling_factor").contains("divided by it"));
    about(parse_vae(&with(diffusers(), "scaling_factor", json!(0.0))), "scaling_factor");
    about(parse_vae(&json!({"scaling_factor": "1"})), "scaling_factor");
}

#[test]
fn vae_sizes_out_of_range() {
    for (key, value) in [
        ("ch", json!(0)),
        ("ch", json!(48)),
        ("ch_mult", json!([])),
        ("ch_mult", json!([1, 0])),
        ("ch_mult", json!(vec![1; 9])),
        ("ch_mult", json!("1,2")),
        ("num_res_blocks", json!(0)),
        ("z_channels", json!(1 << 20)),
        ("psz", json!(0)),
        ("in_channels", json!(4)),
        ("out_ch", json!(1)),
        ("shift_factor", json!([0.0])),
    ] {
        about(parse_vae(&json!({key: value})), key);
    }
}

#[test]
fn vae_of_another_model() {
    let model = parse(&model()).unwrap();
    assert!(check_vae_match(&model, &parse_vae(&json!({})).unwrap()).is_ok());
    let other = parse_vae(&json!({"z_channels": 4})).unwrap();
    assert!(about(check_vae_match(&model, &other), "z_channels").contains("latent_channels 16"));
}

#[test]
fn vae_directory_search() {
    let dir = tempfile::tempdir().unwrap();
    let named = |name: &str| parse(&with(model(), "vae_name_or_path", json!(name))).unwrap();
    let resolve = |config: &ModelConfig, chosen| resolve_vae_dir(dir.path(), config, chosen);

    // Nothing there: names on a hub and absolute paths are not followed anywhere else, and the error says so.
    for name in
        ["stepfun-ai/NextStep-1-f8ch16-Tokenizer", "/home/somebody/vae", "https://example.org/vae\u{1b}"]
    {
        let reason = about(resolve(&named(name), None), "vae_name_or_path");
        assert!(reason.contains(name.trim_end_matches('\u{1b}')) && reason.contains("/vae"), "{reason}");
    }
    about(resolve(&parse(&model()).unwrap(), None), "vae_name_or_path");
    let absent = dir.path().join("absent");
    assert!(about(resolve(&named("vae"), Some(&absent)), "vae_name_or_path").contains("absent"));

    // With `vae/` in the model directory, that is the fallback; a relative name that exists comes first.
    let (vae, other) = (dir.path().join("vae"), dir.path().join("other"));
    std::fs::create_dir(&vae).unwrap();
    std::fs::create_dir(&other).unwrap();
    assert_eq!(resolve(&named("stepfun-ai/Tokenizer"), None).unwrap(), vae);
    assert_eq!(resolve(&named("other"), None).unwrap(), other);
    assert_eq!(resolve(&named(""), None).unwrap(), vae);
    assert_eq!(resolve(&named("vae"), Some(&other)).unwrap(), other);
    assert!(resolve(&named("vae"), Some(&absent)).is_err(), "a wrong choice is not silently replaced");
}
