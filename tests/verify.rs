//! The recorded cases that are kept here, of the official code and of our own on the demo model, and that a wrong
//! engine would not pass them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use warpstep::Error;
use warpstep::device::Device;
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions};
use warpstep::verify::{CaseFile, Models, Outcome, VerifyOptions, run_case};

fn cases() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cases")
}

fn device() -> Arc<dyn Device> {
    Arc::new(EmulatedDevice::new(EmulatedOptions::default()).unwrap())
}

fn options() -> VerifyOptions {
    VerifyOptions::default()
}

/// Cases whose model is too large to keep here: other tests use their tensors, and the whole of them runs where all
/// fixtures are at hand.
const WITHOUT_MODEL: [&str; 2] = ["fmnet_gqa5-b_float32", "fmnet_gqa5-b_bfloat16"];

/// The kept files, those of the demo model or the others, in order.
fn kept(of_demo: bool) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(cases()).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|path| path.file_name().unwrap().to_str().unwrap().starts_with("demo_") == of_demo);
    paths.sort();
    paths
}

/// How many files of the demo model `tools/demo/record.py` writes, by kind: one teacher-forced case per sampler and an
/// edit; twelve pictures, a large one, a high and a wide one.
const DEMO_CASES: [(&str, usize); 2] = [("pipeline", 6), ("picture", 15)];

#[test]
fn the_demo_model_draws_what_pytorch_drew() {
    let paths = kept(true);
    if !cases().with_file_name("demo128").exists() {
        assert!(paths.is_empty(), "cases of the demo model, but no tests/golden/demo128 to run them on");
        return;
    }
    let (device, mut models) = (device(), Models::default());
    for (kind, count) in DEMO_CASES {
        let of_kind = paths.iter().filter(|path| CaseFile::open(path).unwrap().kind == kind).count();
        assert_eq!(of_kind, count, "cases of kind {kind}");
    }
    for path in paths {
        match run_case(&path, &device, &options(), &mut models).unwrap() {
            Some(Outcome::Ran(lines)) => {
                let wrong: Vec<_> = lines.iter().filter(|line| !line.ok).collect();
                assert!(!lines.is_empty() && wrong.is_empty(), "{wrong:#?}");
            }
            other => panic!("{}: {other:?}", path.display()),
        }
    }
}

#[test]
fn every_kept_case_passes() {
    let (device, mut models) = (device(), Models::default());
    let mut ran = 0;
    for path in kept(false) {
        if WITHOUT_MODEL.iter().any(|name| path.file_stem().is_some_and(|stem| stem == *name)) {
            assert!(
                !cases().with_file_name("gqa5-b/config.json").exists(),
                "the model is here: run its cases"
            );
            continue;
        }
        match run_case(&path, &device, &options(), &mut models).unwrap() {
            None => {}
            Some(Outcome::Skipped(reason)) => panic!("{} was skipped: {reason}", path.display()),
            Some(Outcome::Ran(lines)) => {
                assert!(!lines.is_empty());
                for line in lines {
                    assert!(line.ok, "{line:?}");
                }
                ran += 1;
            }
        }
    }
    assert!(ran >= 12, "only {ran} cases ran");
}

/// Copies a kept case with `edit` applied to its bytes into a folder that has the models beside it.
fn altered(name: &str, edit: impl FnOnce(&mut Vec<u8>)) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = std::fs::read(cases().join(name)).unwrap();
    edit(&mut bytes);
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    (dir, path)
}

fn run_altered(path: &Path) -> warpstep::Result<Option<Outcome>> {
    let options = VerifyOptions { model_root: Some(cases().parent().unwrap().into()), ..options() };
    run_case(path, &device(), &options, &mut Models::default())
}

fn failures(outcome: Option<Outcome>) -> Vec<String> {
    let Some(Outcome::Ran(lines)) = outcome else { panic!("the case did not run") };
    lines.into_iter().filter(|l| !l.ok).map(|l| l.tensor).collect()
}

/// Where a tensor's data starts in a safetensors file.
fn data_offset(bytes: &[u8], tensor: &str) -> usize {
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    8 + header + json[tensor]["data_offsets"][0].as_u64().unwrap() as usize
}

#[test]
fn a_wrong_value_in_any_recorded_tensor_is_noticed() {
    for tensor in ["cond", "decode.norm", "fm.v", "fm.out", "tokens", "latents", "image", "prefill.layer1"] {
        let (_dir, path) = altered("t2i_feb_nocfg_batch3.safetensors", |bytes| {
            // The last real row of the first sequence: padding rows are not compared.
            let at = data_offset(bytes, tensor) + if tensor == "prefill.layer1" { 38 * 64 * 4 } else { 0 };
            let value = f32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) + 1e-3;
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        });
        let failed = failures(run_altered(&path).unwrap());
        assert!(failed.contains(&tensor.to_string()), "{tensor}: only {failed:?} failed");
    }
}

/// Adds a field to the description, which is JSON inside the JSON of the header.
fn describe(bytes: &mut Vec<u8>, field: &str) {
    let kind = r#"\"kind\":"#;
    let at = bytes.windows(kind.len()).position(|w| w == kind.as_bytes()).expect(kind);
    let field = field.replace('"', "\\\"");
    bytes.splice(at..at, field.bytes());
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) + field.len() as u64;
    bytes[..8].copy_from_slice(&header.to_le_bytes());
}

#[test]
fn a_condition_may_be_off_by_four_times_the_rounding_that_its_case_states() {
    for (rounding, passes) in [(None, Some(false)), (Some("2e-5"), Some(false)), (Some("3e-5"), Some(true))]
        .into_iter()
        .chain([(Some("2e-4"), None), (Some("-1e-5"), None), (Some("null"), None)])
    {
        let (_dir, path) = altered("t2i_feb_nocfg_batch3.safetensors", |bytes| {
            let at = data_offset(bytes, "cond");
            let value = f32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) + 1e-4;
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            if let Some(rounding) = rounding {
                describe(bytes, &format!(r#""rounding": {{"cond": {rounding}}}, "#));
            }
        });
        let got = run_altered(&path);
        match passes {
            Some(passes) => {
                // Sampling is given the altered condition, so that what follows from it differs as well.
                let failed = failures(got.unwrap());
                assert_eq!(!failed.contains(&"cond".to_string()), passes, "{rounding:?}: {failed:?}");
            }
            None => assert!(matches!(got, Err(Error::InvalidCase { .. })), "{rounding:?} was accepted"),
        }
    }
}

/// A kept case made into one of kind `picture`, without the guidance table that such cases do not record.
fn as_picture(bytes: &mut [u8]) {
    // The description is JSON inside JSON; a blank keeps its length.
    for (from, to) in [
        (r#"\"kind\": \"pipeline\""#, r#"\"kind\": \"picture\" "#),
        ("\"cfg_schedule\":", "\"cfg_schedulX\":"),
    ] {
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).expect(from);
        bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
    }
}

#[test]
fn a_picture_passes_until_more_than_half_a_percent_of_its_values_are_off() {
    for (corrupted, passes) in [(0, true), (49, true), (74, false)] {
        let (_dir, path) = altered("t2i_feb_cps_norm.safetensors", |bytes| {
            as_picture(bytes);
            let at = data_offset(bytes, "image_u8");
            // 64 x 64 x 3 values: 0.4 and 0.6 per cent of them, four levels off.
            bytes[at..at + corrupted].iter_mut().for_each(|value| *value ^= 4);
        });
        let Some(Outcome::Ran(lines)) = run_altered(&path).unwrap() else { panic!("the case did not run") };
        let line = lines.iter().find(|line| line.tensor == "image_u8").unwrap();
        assert_eq!(line.off_share, Some(corrupted as f64 / 12288.0), "{line:?}");
        assert_eq!(lines.iter().all(|line| line.ok), passes, "{corrupted} values corrupted: {lines:?}");
    }
}

#[test]
fn a_picture_fails_when_a_draw_is_another() {
    let (_dir, path) = altered("t2i_feb_cps_norm.safetensors", |bytes| {
        as_picture(bytes);
        let at = data_offset(bytes, "draw.noise");
        bytes[at..at + 4].copy_from_slice(&3.0f32.to_le_bytes());
    });
    assert_eq!(failures(run_altered(&path).unwrap()), ["tokens", "image", "image_u8"]);
}

#[test]
fn a_tensor_that_must_be_compared_and_is_missing_is_an_error() {
    let (_dir, path) = altered("t2i_feb_nocfg_batch3.safetensors", |bytes| {
        let text = b"\"fm.v\":";
        let at = bytes.windows(text.len()).position(|w| w == text).unwrap();
        bytes[at + 4] = b'w';
    });
    let result = run_altered(&path);
    assert!(matches!(result, Err(Error::InvalidCase { .. })), "it passed by not being looked at");
}

#[test]
fn a_wrong_logit_or_id_is_noticed() {
    // The second byte of an id moves it by 256; the third of a float by about one per cent.
    for (tensor, byte) in [
        ("logits_all", 2),
        ("greedy_logits", 2),
        ("norm", 2),
        ("greedy_margin", 2),
        ("greedy_ids", 15 * 8),
        ("official_generate_ids", 49 * 8),
        // Padding of the second row.
        ("input_ids", 34 * 8),
    ] {
        let (_dir, path) = altered("text_tiny-a.safetensors", |bytes| {
            let at = data_offset(bytes, tensor) + byte;
            bytes[at] ^= 0x20;
        });
        let failed = failures(run_altered(&path).unwrap());
        assert!(failed.contains(&tensor.to_string()), "{tensor}: only {failed:?} failed");
    }
}

#[test]
fn a_case_may_not_name_folders_outside_the_model_root() {
    let (_dir, path) = altered("t2i_feb_nocfg_batch3.safetensors", |bytes| {
        // The description is JSON inside JSON; both names are six characters.
        let text = br#"\"model\": \"tiny-a\""#;
        let at = bytes.windows(text.len()).position(|w| w == text).expect("the model's name");
        bytes[at..at + text.len()].copy_from_slice(br#"\"model\": \"../../\""#);
    });
    assert!(matches!(run_altered(&path), Err(Error::InvalidCase { .. })));
}

#[test]
fn a_kind_that_is_not_built_is_skipped_with_its_reason() {
    let (_dir, path) = altered("t2i_feb_nocfg_batch3.safetensors", |bytes| {
        let text = br#"\"kind\": \"pipeline\""#;
        let at = bytes.windows(text.len()).position(|w| w == text).expect("the kind");
        bytes[at..at + text.len()].copy_from_slice(br#"\"kind\": \"pipelime\""#);
    });
    assert!(matches!(run_altered(&path).unwrap(), Some(Outcome::Skipped(_))));
}
