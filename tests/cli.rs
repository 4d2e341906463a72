//! The program as a user runs it.

use std::path::Path;
use std::process::{Command, Output};
use warpstep::image::{Metadata, RgbImage, write_png};

fn warpstep(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_warpstep")).args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Few steps and a small picture: quick, and no test here looks at what it shows.
const QUICK: [&str; 6] = ["--size", "32x32", "--steps", "3", "--seed", "5"];

fn generate(prompt: &str, more: &[&str], output: &Path) -> Output {
    let path = output.to_str().unwrap();
    warpstep(&[&["generate", prompt][..], &QUICK, more, &["-o", path]].concat())
}

#[test]
fn the_same_command_writes_the_same_png_and_inspect_tells_how() {
    let dir = tempfile::tempdir().unwrap();
    let files = [dir.path().join("a.png"), dir.path().join("b.png")];
    for file in &files {
        let output = generate("a red circle on a blue background", &[], file);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(output.stdout.is_empty(), "stdout is for machines");
        assert!(text(&output.stderr).contains("tokens/s"));
    }
    assert_eq!(std::fs::read(&files[0]).unwrap(), std::fs::read(&files[1]).unwrap());
    let output = warpstep(&["inspect", files[0].to_str().unwrap()]);
    let shown = text(&output.stdout);
    assert!(shown.contains("a red circle on a blue background") && shown.contains("Seed: 5"), "{shown}");
    let output = warpstep(&["inspect", "--json", files[0].to_str().unwrap()]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["request"]["seed"], 5);
    assert_eq!(json["model"], "demo");
    // It decides how sums are split, and with that the last bits.
    assert!(json["sm_count"].as_u64() > Some(0), "{json}");
}

#[test]
fn text_in_a_png_moves_no_cursor_and_stays_json() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.png");
    let inspect = |json: &str, more: &[&str]| {
        let notes = Metadata { parameters: "a\u{1b}[2Jb\nSteps: 2".into(), json: json.into() };
        write_png(&file, &RgbImage::new(16, 16, vec![9; 16 * 16 * 3]).unwrap(), Some(&notes)).unwrap();
        warpstep(&[&["inspect", file.to_str().unwrap()][..], more].concat())
    };
    let json = "{\"seed\":\n18446744073709551615,\"t\":0.1,\"text\":\"\u{9b}2J\"}";
    let shown = text(&inspect(json, &[]).stdout);
    assert!(shown.contains("a\\u{1b}[2Jb\nSteps: 2") && shown.contains("\\u{9b}2J"), "{shown}");
    let shown = text(&inspect(json, &["--json"]).stdout);
    assert_eq!(shown, "{\"seed\": 18446744073709551615,\"t\":0.1,\"text\":\"\\u009b2J\"}\n");
    for bad in ["", "no JSON", "{\"a\":1}{", "{\"a\":\"\u{1b}\"}"] {
        let output = inspect(bad, &["--json"]);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{bad:?}");
        assert!(text(&output.stderr).contains("not JSON"), "{}", text(&output.stderr));
    }
}

#[test]
fn inspect_loads_the_tokenizer_too() {
    let dir = tempfile::tempdir().unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/demo/model");
    let shown = text(&warpstep(&["inspect", model.to_str().unwrap()]).stdout);
    assert!(shown.contains("tokenizer: ok, 398 tokens"), "{shown}");
    // The same folder, with another tokenizer.
    for entry in std::fs::read_dir(&model).unwrap().map(Result::unwrap) {
        std::os::unix::fs::symlink(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    std::fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let output = warpstep(&["inspect", dir.path().to_str().unwrap()]);
    let shown = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{shown}");
    assert!(shown.contains("transformer:") && shown.contains("tokenizer: invalid tokenizer"), "{shown}");
    let output = warpstep(&["inspect", "--json", dir.path().to_str().unwrap()]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{json}");
    assert!(json["tokenizer"]["error"].is_string() && json["model"]["tensors"].is_u64(), "{json}");
}

#[test]
fn an_error_says_its_cause_once() {
    for arguments in [
        &["generate", "x", "--sm-count", "4", "--model", "/nonexistent"][..],
        &["edit", "/nonexistent/x.png", "make it red"],
        &["complete", "x", "--image", "/nonexistent/x.png"],
        &["generate", "--prompts", "/nonexistent/p.txt"],
        &["inspect", "/nonexistent"],
    ] {
        let message = text(&warpstep(arguments).stderr);
        assert_eq!(message.matches("No such file").count(), 1, "{message}");
        assert_eq!(message.matches("/nonexistent").count(), 1, "{message}");
    }
}

#[test]
fn a_batch_writes_numbered_files_that_single_runs_reproduce() {
    let dir = tempfile::tempdir().unwrap();
    let output = generate("a green square on white", &["-n", "2", "--json"], &dir.path().join("s.png"));
    assert!(output.status.success(), "{}", text(&output.stderr));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["files"].as_array().unwrap().len(), 2);
    let alone = dir.path().join("alone.png");
    assert!(generate("a green square on white", &["--first-image", "1"], &alone).status.success());
    assert_eq!(std::fs::read(dir.path().join("s-1.png")).unwrap(), std::fs::read(alone).unwrap());
}

#[test]
fn usage_errors_exit_with_2_and_say_what_is_known() {
    for (arguments, expected) in [
        (&["generate"][..], "<PROMPT>"),
        (&["generate", "x", "--size", "64"], "WIDTHxHEIGHT"),
        (&["generate", "x", "--sampler", "euler"], "aug, hf11, sde, cps, ode"),
        (&["generate", "x", "--kernel", "qkv=magic"], "plain"),
        (&["generate", "x", "--kernel", "warp=plain"], "attention"),
        (&["generate", "x", "--size", "17x16"], "multiple of 16"),
        (&["generate", "x", "--cfg", "0.5"], "guidance"),
        (&["generate", "x", "--steps", "0"], "steps"),
        (&["draw", "x"], "unrecognized"),
        // What would have no effect is refused.
        (&["generate", "x", "--device", "emulated", "--cubins", "."], "cubins"),
        (&["generate", "x", "--sm-count", "4", "--no-dependent-launch"], "no-dependent-launch"),
        (&["kernels", "test", "--device", "emulated", "--shared-carveout", "50"], "shared-carveout"),
        (&["kernels", "conformance", "--device", "emulated", "--cubins", "/nonexistent"], "cubins"),
        (&["kernels", "test", "--kernel", "qkv=mma"], "every variant is tested"),
        (&["kernels", "conformance", "--kernel", "qkv=mma"], "no variant of an op"),
        (&["kernels", "test", "--variant", "nosuch"], "known: flash, mma, plain"),
        (&["kernels", "test", "--op", "qkv", "--variant", "flash"], "known: mma, plain"),
        (&["kernels", "test", "--op", "qkv", "--sm-count", "4", "--case", "nosuch"], "no case"),
        (&["reconstruct", "x.png", "--seed", "1"], "no effect without --noise"),
        (&["inspect", "x.png", "--check-values"], "folder"),
        (&["generate", "x", "--vae", "vae"], "--model"),
        (&["generate", "x", "--sm-count", "4", "-o", "x.JPG"], "as PNG"),
        (&["generate", "x", "--plan", "--device", "emulated", "--cubins", "."], "cubins"),
    ] {
        let output = warpstep(arguments);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        assert!(message.contains(expected), "{arguments:?}: {message}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn an_output_that_cannot_be_written_fails_before_the_work() {
    let dir = tempfile::tempdir().unwrap();
    for path in [dir.path().to_path_buf(), dir.path().join("missing/x.png")] {
        let start = std::time::Instant::now();
        let output = generate("a circle", &[], &path);
        assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
        assert!(start.elapsed().as_secs() < 5);
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing half-written is left");
}

#[test]
fn a_missing_model_is_an_error_that_names_it() {
    let output = warpstep(&["generate", "x", "--model", "/nonexistent/NextStep"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("/nonexistent/NextStep"));
}

#[test]
fn every_verb_teaches_with_help() {
    for verb in [
        &["--help"][..],
        &["generate", "--help"],
        &["complete", "--help"],
        &["verify", "--help"],
        &["kernels", "test", "--help"],
    ] {
        let output = warpstep(verb);
        assert!(output.status.success() && text(&output.stdout).len() > 300, "{verb:?}");
    }
}

#[test]
fn doctor_and_kernels_list_describe_this_build() {
    let output = warpstep(&["doctor", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(json["kernels"].as_u64().unwrap() > 30);
    let listed = text(&warpstep(&["kernels", "list"]).stdout);
    for op in ["embed", "qkv", "attention", "flow_chain", "randn", "conv2d", "to_rgb8"] {
        assert!(listed.lines().any(|line| line.starts_with(&format!("{op}:"))), "{op} is not listed");
    }
}

#[test]
fn kernels_test_runs_one_op() {
    let output = warpstep(&["kernels", "test", "--op", "to_rgb8", "--scale", "small"]);
    let shown = text(&output.stdout);
    assert!(output.status.success(), "{shown}");
    assert!(shown.lines().last().unwrap().ends_with(" 0 failed"), "{shown}");
    assert_eq!(warpstep(&["kernels", "test", "--op", "nothing"]).status.code(), Some(2));
}

#[test]
fn a_plan_is_printed_and_nothing_is_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.png");
    let output = generate("a red circle", &["--plan", "--json", "-n", "2"], &file);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let planned = &json["plan"];
    assert_eq!((&json["request"]["n"], &planned["images"]), (&2.into(), &2.into()));
    let shown = generate("a red circle", &["--plan"], &file);
    assert!(text(&shown.stdout).contains("MB of weights"), "{}", text(&shown.stdout));
    assert!(!file.exists(), "a plan draws nothing");
    // The same figures as when it is drawn on a device with that number of SMs.
    let drawn = generate("a red circle", &["--json", "-n", "2", "--sm-count", "132"], &file);
    let json: serde_json::Value = serde_json::from_slice(&drawn.stdout).unwrap();
    assert_eq!(&json["plan"], planned);
    let refused = generate("a red circle", &["--plan", "-n", "0"], &file);
    let message = text(&refused.stderr);
    assert!(
        refused.status.code() == Some(2) && message.contains("n: is 0"),
        "not a request to run: {message}"
    );
}
