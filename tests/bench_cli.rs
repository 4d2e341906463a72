//! `warpstep bench` as a user runs it: where its reports go, and what it refuses before it works.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_warpstep"));
    command.args(arguments);
    command
}

fn run(arguments: &[&str]) -> (Output, String) {
    let output = command(arguments).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    (output, message)
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_report_that_cannot_be_written_fails_before_the_work() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("missing/report.json");
    let file = file.to_str().unwrap();
    for arguments in [
        &["bench", "--device", "emulated", "-o", file][..],
        &["bench", "--derive", "-o", file],
        &["kernels", "bench", "--device", "emulated", "-o", file],
        &["kernels", "conformance", "--device", "emulated", "--out", file],
    ] {
        let (output, message) = run(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {message}");
        assert!(message.contains("missing") && message.lines().count() == 1, "{arguments:?}: {message}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn derive_refuses_what_it_would_pass_over() {
    for (argument, value) in [
        ("--device", "emulated"),
        ("--sm-count", "4"),
        ("--positions", "256"),
        ("--repeat", "3"),
        ("--seconds", "1"),
        ("--pictures", "2"),
        ("--seed", "2"),
        ("--format", "csv"),
        ("--sizes", "256x256,512x512"),
        ("--sizes", ""),
    ] {
        let (output, message) = run(&["bench", "--derive", argument, value]);
        assert_eq!(output.status.code(), Some(2), "{argument} {value}: {message}");
        assert!(message.contains(argument.trim_start_matches('-')), "{argument} {value}: {message}");
    }
}

#[test]
fn derive_writes_what_it_counted_as_it_is_asked_to() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("derived.json");
    let tiny = ["bench", "--derive", "--synthetic", "tiny", "--sizes", "64x64"];
    let (output, message) = run(&[&tiny[..], &["--format", "json", "-o", file.to_str().unwrap()]].concat());
    assert!(output.status.success() && output.stdout.is_empty(), "{message}");
    let derived = json(&file);
    assert_eq!(derived["derived"]["size"], serde_json::json!([64, 64]));
    assert!(derived["token_ms"].as_f64().unwrap() > 0.0);
    let (output, _) = run(&tiny);
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("derived, not measured"));
}

#[test]
fn a_report_is_whole_at_any_moment() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("report.json");
    let output = file.to_str().unwrap();
    let mut child = command(&["bench", "--device", "emulated", "--synthetic", "tiny", "--sizes", ""])
        .args(["--repeat", "1000", "--seconds", "0.2", "--format", "json", "--output", output])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut counts = BTreeSet::new();
    let status = loop {
        let status = child.try_wait().unwrap();
        if file.exists() {
            // Half a report would be no JSON.
            let report = json(&file);
            assert!(report["ceilings"][0]["median_ms"].as_f64().unwrap() > 0.0);
            counts.insert(report["rows"].as_array().unwrap().len());
        }
        if let Some(status) = status {
            break status;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success());
    assert!(counts.len() > 3, "only {counts:?} rows were seen");
    let names: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["report.json"]);
}
