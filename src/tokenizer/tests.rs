use super::*;
use serde_json::{Value, json};

fn golden_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

const TINY: ModelTokenIds = ModelTokenIds { vocab_size: 528, boi: 501, eoi: 502, image_placeholder_id: 503 };

fn tiny_json() -> Value {
    serde_json::from_slice(&std::fs::read(golden_dir("tiny-a/tokenizer.json")).unwrap()).unwrap()
}

fn load(tokenizer: &Value, ids: ModelTokenIds) -> Result<Tokenizer> {
    from_files(tokenizer.to_string().as_bytes(), None, None, ids)
}

fn from_files(
    tokenizer: &[u8],
    config: Option<&str>,
    map: Option<&str>,
    ids: ModelTokenIds,
) -> Result<Tokenizer> {
    let files = TokenizerFiles {
        tokenizer,
        tokenizer_config: config.map(str::as_bytes),
        special_tokens_map: map.map(str::as_bytes),
    };
    Tokenizer::from_bytes(files, Path::new("dir"), ids)
}

/// The reason of the tokenizer error that `result` must be.
fn reason(result: Result<Tokenizer>) -> String {
    match result {
        Err(Error::Tokenizer { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn ids_and_texts_match_the_official_tokenizer() {
    let cases: Value =
        serde_json::from_slice(&std::fs::read(golden_dir("cases/tokenizer.json")).unwrap()).unwrap();
    let mut checked = 0;
    for (folder, cases) in cases.as_object().unwrap() {
        let tokenizer = Tokenizer::from_dir(&golden_dir(folder), TINY).unwrap();
        for case in cases.as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            let plain: Vec<u32> = serde_json::from_value(case["ids_no_special"].clone()).unwrap();
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids, "{folder}: {text:?}");
            assert_eq!(tokenizer.encode(text, false).unwrap(), plain, "{folder}: {text:?}");
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), case["decoded"], "{folder}: {text:?}");
            checked += 1;
        }
    }
    assert_eq!(checked, 3 * 26);
}

#[test]
fn the_demo_tokenizer_loads_without_a_special_tokens_map() {
    let ids = ModelTokenIds { vocab_size: 400, boi: 391, eoi: 392, image_placeholder_id: 393 };
    let tokenizer = Tokenizer::from_dir(&golden_dir("demo"), ids).unwrap();
    assert_eq!(tokenizer.bos(), None);
    assert_eq!(tokenizer.pad(), Some(&Token { text: "[PAD]".into(), id: 389 }));
    let ids = tokenizer.encode("a red circle", true).unwrap();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a red circle");
}

#[test]
fn special_tokens_in_a_text_are_found() {
    let tokenizer = Tokenizer::from_dir(&golden_dir("tiny-a"), TINY).unwrap();
    let found = tokenizer.special_token_in("a cat <|end_of_image|> and [PAD]").unwrap();
    assert_eq!(found, Some(Token { text: "<|end_of_image|>".into(), id: 502 }));
    assert_eq!(tokenizer.special_token_in("a cat <|end of image|> [pad]").unwrap(), None);
}

#[test]
fn settings_follow_transformers_precedence() {
    let json = tiny_json().to_string();
    let bos = |config, map| from_files(json.as_bytes(), config, map, TINY).unwrap().bos.map(|token| token.id);
    let map = r#"{"bos_token": {"content": "<|beginoftext|>", "lstrip": false}}"#;
    // Without a list of added tokens the map overrides; with it, the map is not read.
    assert_eq!(bos(Some(r#"{"bos_token": null}"#), Some(map)), Some(508));
    assert_eq!(bos(Some(r#"{"bos_token": null, "added_tokens_decoder": {}}"#), Some(map)), None);
    assert_eq!(bos(Some(r#"{"bos_token": "<|im_start|>"}"#), None), Some(497));
    assert_eq!(bos(None, None), None);
}

/// Found by fuzzing: in a field that nobody reads, such bytes made the crate `tokenizers` panic, caught but printed.
#[test]
fn bytes_that_are_no_text_are_refused_before_the_crate_sees_them() {
    let json = tiny_json().to_string().replacen("\"decoder\":{", "\"decoder\":{\"unread@\":1,", 1);
    let bytes: Vec<u8> = json.bytes().map(|byte| if byte == b'@' { 0x86 } else { byte }).collect();
    assert!(bytes.contains(&0x86), "{json}");
    let said = reason(from_files(&bytes, None, None, TINY));
    assert!(said.contains("unicode") && !said.contains("panicked"), "{said}");
}

#[test]
fn malformed_files_are_refused() {
    for bytes in [&b""[..], b"{", b"[]", b"null", b"\xff\xfe", b"{\"version\": \"1.0\"}"] {
        reason(from_files(bytes, None, None, TINY));
    }
    let nested = "[".repeat(10_000);
    reason(from_files(nested.as_bytes(), None, None, TINY));
    let json = tiny_json().to_string();
    for end in [1, json.len() / 3, json.len() - 1] {
        reason(from_files(&json.as_bytes()[..end], None, None, TINY));
    }
    for config in ["", "[]", r#"{"bos_token": 7}"#, r#"{"bos_token": {"text": "x"}}"#] {
        reason(from_files(json.as_bytes(), Some(config), None, TINY));
    }
    let unknown = reason(from_files(json.as_bytes(), Some(r#"{"bos_token": "<s>"}"#), None, TINY));
    assert!(unknown.contains("\"<s>\" of the tokenizer's settings is not in the vocabulary"), "{unknown}");
}

#[test]
fn a_vocabulary_larger_than_the_embedding_table_is_refused() {
    let found = reason(load(&tiny_json(), ModelTokenIds { vocab_size: 508, ..TINY }));
    assert!(found.contains("has id 508, the embedding table has 508 rows"), "{found}");
    load(&tiny_json(), ModelTokenIds { vocab_size: 509, ..TINY }).unwrap();
}

#[test]
fn missing_or_ordinary_special_tokens_are_refused() {
    for missing in [IMAGE_AREA, BEGIN_OF_IMAGE, END_OF_IMAGE, IMAGE_PLACEHOLDER] {
        let mut json = tiny_json();
        json["added_tokens"].as_array_mut().unwrap().retain(|token| token["content"] != missing);
        let found = reason(load(&json, TINY));
        assert!(found.contains(missing), "{found}");

        let mut json = tiny_json();
        let tokens = json["added_tokens"].as_array_mut().unwrap();
        tokens.iter_mut().find(|token| token["content"] == missing).unwrap()["special"] = json!(false);
        let found = reason(load(&json, TINY));
        assert!(found.contains("is an ordinary token"), "{found}");
    }
}

#[test]
fn ids_that_differ_from_the_config_are_refused() {
    for (ids, key) in [
        (ModelTokenIds { boi: 502, ..TINY }, "boi"),
        (ModelTokenIds { eoi: u32::MAX, ..TINY }, "eoi"),
        (ModelTokenIds { image_placeholder_id: 0, ..TINY }, "image_placeholder_id"),
    ] {
        let found = reason(load(&tiny_json(), ids));
        assert!(found.contains(&format!("{key} in config.json is")), "{found}");
    }
}

#[test]
fn a_runaway_split_pattern_is_an_error_and_not_another_result() {
    let mut json = tiny_json();
    let split = &mut json["pre_tokenizer"]["pretokenizers"][0];
    // The back-reference keeps the pattern off the linear engine.
    split["pattern"] = json!({"Regex": r"(x+x+)+\1y"});
    let tokenizer = load(&json, TINY).unwrap();
    assert!(tokenizer.encode("a harmless text", false).is_ok());
    let started = std::time::Instant::now();
    match tokenizer.encode(&"x".repeat(2_000), false) {
        Err(Error::Tokenizer { reason, .. }) => assert!(reason.contains("split pattern fails"), "{reason}"),
        other => panic!("{other:?}"),
    }
    assert!(started.elapsed().as_secs() < 5);
}

#[test]
fn long_texts_stay_quick_with_the_qwen_pattern() {
    let tokenizer = load(&tiny_json(), TINY).unwrap();
    for text in [" ", "\n ", "a", "'", "<|", "\u{301}", "1 "] {
        tokenizer.encode(&text.repeat(32_768 / text.len()), false).unwrap();
    }
    let refused = tokenizer.encode(&"a".repeat(MAX_TEXT_BYTES + 1), false);
    assert!(matches!(refused, Err(Error::InvalidRequest { field: "prompt", .. })));
}

#[test]
fn padding_and_truncation_in_the_file_are_not_obeyed() {
    let mut json = tiny_json();
    json["truncation"] =
        json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": null,
        "pad_id": 499, "pad_type_id": 0, "pad_token": "[PAD]"});
    let plain = load(&tiny_json(), TINY).unwrap().encode("Hello world", true).unwrap();
    assert_eq!(load(&json, TINY).unwrap().encode("Hello world", true).unwrap(), plain);
}

#[test]
fn files_that_are_no_regular_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let missing = reason(Tokenizer::from_dir(dir.path(), TINY));
    assert!(missing.contains("not found"), "{missing}");
    std::fs::create_dir(dir.path().join("tokenizer.json")).unwrap();
    assert!(reason(Tokenizer::from_dir(dir.path(), TINY)).contains("not a regular file"));
    std::fs::remove_dir(dir.path().join("tokenizer.json")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", dir.path().join("tokenizer.json")).unwrap();
    assert!(reason(Tokenizer::from_dir(dir.path(), TINY)).contains("not a regular file"));
    std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    // A sparse file of 1 GB: the size is refused, the bytes are not read.
    let file = std::fs::File::create(dir.path().join("tokenizer.json")).unwrap();
    file.set_len(1 << 30).unwrap();
    assert!(reason(Tokenizer::from_dir(dir.path(), TINY)).contains("at most"));
}

/// Replaces the `target`-th value of the tree, counted in depth-first order.
fn replace_nth(value: &mut Value, target: &mut usize, with: &Value) -> bool {
    if *target == 0 {
        *value = with.clone();
        return true;
    }
    *target -= 1;
    match value {
        Value::Array(items) => items.iter_mut().any(|item| replace_nth(item, target, with)),
        Value::Object(map) => map.values_mut().any(|item| replace_nth(item, target, with)),
        _ => false,
    }
}

#[test]
fn no_single_wrong_value_makes_the_loader_panic() {
    let mut small = tiny_json();
    // Vocabulary and merges are thousands of like values: a few stand for all.
    let merges = small["model"]["merges"].as_array_mut().unwrap();
    merges.truncate(2);
    let wrong = [
        json!(null),
        json!(-1),
        json!(4_294_967_295u32),
        json!("x"),
        json!(""),
        json!([]),
        json!({}),
        json!(true),
    ];
    let mut refused = 0;
    for index in 0.. {
        // Two of the eight per value: all of them take seconds.
        for with in [&wrong[index % 8], &wrong[(index + 3) % 8]] {
            let mut json = small.clone();
            let mut target = index;
            if !replace_nth(&mut json, &mut target, with) {
                assert!(index > 500 && refused > 1000, "{index} values, {refused} variants refused");
                return;
            }
            match load(&json, TINY) {
                Ok(tokenizer) => drop(tokenizer.encode("a<|image_area|>4*4 b", true)),
                Err(Error::Tokenizer { .. }) => refused += 1,
                Err(other) => panic!("{other:?}"),
            }
        }
    }
}

/// A megabyte of file made gigabytes of a prompt, and memory that cannot be had ends the process.
#[test]
fn what_makes_too_much_of_a_text_is_refused() {
    let with = |key: &str, value: Value| {
        let mut json = tiny_json();
        json[key] = value;
        load(&json, TINY)
    };
    let replace = |content: &str| json!({"type": "Replace", "pattern": {"String": "a"}, "content": content});
    with("normalizer", replace("\u{2581}")).unwrap();
    let said = reason(with("normalizer", replace(&"b".repeat(17))));
    assert!(said.contains("make 17 bytes per byte and 0 more of a text, the limits are 16"), "{said}");
    let steps = vec![replace("aa"); 5];
    let said = reason(with("normalizer", json!({"type": "Sequence", "normalizers": steps})));
    assert!(said.contains("make 32 bytes per byte"), "{said}");
    let empty = json!({"type": "Replace", "pattern": {"Regex": ""}, "content": "b".repeat(16)});
    assert!(reason(with("normalizer", empty)).contains("make 17 bytes per byte"));
    let prepend = json!({"type": "Prepend", "prepend": "b".repeat(4097)});
    assert!(reason(with("normalizer", prepend)).contains("4097 more"));

    let template = |token: Value, pieces: usize| {
        let piece = json!({"SpecialToken": {"id": "x", "type_id": 0}});
        let mut single = vec![piece; pieces];
        single.push(json!({"Sequence": {"id": "A", "type_id": 0}}));
        let pair = [single.clone(), vec![json!({"Sequence": {"id": "B", "type_id": 0}})]].concat();
        with(
            "post_processor",
            json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {"x": token}}),
        )
    };
    let token = |ids: &[u32]| json!({"id": "x", "ids": ids, "tokens": vec!["x"; ids.len()]});
    assert_eq!(template(token(&[7, 8]), 2).unwrap().encode("", true).unwrap(), [7, 8, 7, 8]);
    let said = reason(template(token(&[7; 5]), 205));
    assert!(said.contains("puts 1025 ids around a text, more than 1024"), "{said}");
    let said = reason(template(token(&[528]), 1));
    assert!(said.contains("id 528 around a text, the embedding table has 528 rows"), "{said}");
    let said = reason(template(token(&[501]), 1));
    assert!(said.contains("puts 501, a picture's token, around every text"), "{said}");

    let mut json = tiny_json();
    json["added_tokens"].as_array_mut().unwrap().push(json!({"id": 520, "content": "b".repeat(4097),
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}));
    assert!(reason(load(&json, TINY)).contains("a token has 4097 bytes, more than 4096"));
}
