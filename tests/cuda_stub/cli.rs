//! `--device` on the command line, with the driver's library named by the environment.

use crate::stub::{Stub, images};
use std::process::{Command, Output};

/// The program with the stub as driver, set up by `options`.
fn warpstep(library: &std::path::Path, options: &str, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_warpstep"))
        .args(arguments)
        .env("WARPSTEP_CUDA_LIBRARY", library)
        .env("WARPSTEP_STUB", options)
        .env_remove("CUDA_VISIBLE_DEVICES")
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_gpu_that_cannot_be_used_is_one_sentence_and_exit_code_1() {
    let stub = Stub::new();
    let nowhere = std::path::Path::new("/nonexistent/libcuda.so.1");
    for (library, options, device, part) in [
        (nowhere, "", "cuda", "no NVIDIA driver"),
        (&*stub.path, "count=0", "cuda", "the driver sees no CUDA device"),
        (&*stub.path, "version=12040", "cuda", "supports CUDA 12.4; CUDA 13.0 (driver 580) or newer"),
        (&*stub.path, "major=8", "cuda", "compute capability 8.0; the kernels run on 9.0 only"),
        (&*stub.path, "", "cuda:3", "device 3 was asked for, and the driver shows 1"),
    ] {
        let output = warpstep(library, options, &["generate", "x", "--device", device]);
        let message = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
        assert!(message.starts_with("error: no CUDA device: ") && message.contains(part), "{message}");
    }
    for wrong in ["gpu", "cuda:x", "cuda:-1"] {
        let output = warpstep(&stub.path, "", &["generate", "x", "--device", wrong]);
        assert_eq!(output.status.code(), Some(2), "{wrong}: {}", text(&output.stderr));
    }
    let output = warpstep(&stub.path, "", &["generate", "x", "--device", "cuda", "--sm-count", "4"]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output.stderr));
}

#[test]
fn auto_falls_back_to_the_emulated_device_with_one_line() {
    let stub = Stub::new();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.png");
    let small = ["generate", "a red circle", "--size", "32x16", "--steps", "2", "-o", file.to_str().unwrap()];
    let output = warpstep(&stub.path, "major=8", &small);
    let message = text(&output.stderr);
    assert!(output.status.success(), "{message}");
    let lines: Vec<&str> = message.lines().filter(|line| line.contains("CUDA")).collect();
    assert_eq!(lines.len(), 1, "{message}");
    assert!(lines[0].ends_with("using the emulated device"), "{message}");
    // Asked for by name, it says nothing of GPUs.
    let output = warpstep(&stub.path, "", &[&small[..], &["--device", "emulated"]].concat());
    assert!(output.status.success() && !text(&output.stderr).contains("CUDA"));
}

#[test]
fn a_picture_is_drawn_by_the_driver() {
    let stub = Stub::new();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.png");
    let arguments = ["generate", "a red circle", "--size", "32x16", "--device", "cuda", "--json", "-o"];
    let cubins = ["--cubins", images().to_str().unwrap()];
    let output = warpstep(&stub.path, "", &[&arguments[..], &[file.to_str().unwrap()], &cubins[..]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("Stub GPU") && file.is_file());
}

#[test]
fn doctor_tells_driver_and_gpu() {
    let stub = Stub::new();
    let shown = text(&warpstep(&stub.path, "version=13010,sms=132", &["doctor"]).stdout);
    assert!(shown.contains("NVIDIA driver: for CUDA 13.1, shows 1 device(s)"), "{shown}");
    assert!(shown.contains("GPU 0: Stub GPU, compute capability 9.0, 132 SMs, 17.2 GB"), "{shown}");
    let shown = text(&warpstep("/nonexistent.so".as_ref(), "", &["doctor"]).stdout);
    assert!(shown.contains("no CUDA device: no NVIDIA driver"), "{shown}");
    assert!(shown.contains("commands use the emulated device"), "{shown}");
    // A GPU that is there and fails is no reason to do without: no command does.
    let broken = "fail_name=cuDevicePrimaryCtxRetain,code=2";
    let shown = text(&warpstep(&stub.path, broken, &["doctor"]).stdout);
    assert!(shown.contains("commands fail but for --device emulated"), "{shown}");
    assert_eq!(warpstep(&stub.path, broken, &["generate", "x"]).status.code(), Some(1));
    let json = warpstep(&stub.path, "major=8", &["doctor", "--json"]).stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["cuda"]["capability"], serde_json::json!([8, 0]));
    assert!(json["cuda_unusable"].as_str().unwrap().contains("compute capability 8.0"));
}

/// The stub's images hold none of these kernels, so that no unit can be launched.
#[test]
fn a_unit_of_conformance_that_cannot_be_launched_does_not_hide_the_next() {
    let stub = Stub::new();
    let listed = warpstep(&stub.path, "", &["kernels", "conformance", "--list"]);
    let units = text(&listed.stdout).lines().map(str::to_owned).collect::<Vec<_>>();
    assert!(listed.status.success() && units.len() > 10, "{units:?}");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("conformance.safetensors");
    let arguments =
        ["kernels", "conformance", "--device", "cuda", "--out", file.to_str().unwrap(), "--cubins"];
    let output = warpstep(&stub.path, "", &[&arguments[..], &[images().to_str().unwrap()]].concat());
    let shown = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{shown}");
    for unit in &units {
        assert!(
            shown.lines().any(|l| l.starts_with(&format!("{unit}: ")) && l.contains(": FAIL")),
            "{shown}"
        );
    }
    assert!(shown.ends_with(&format!("\n0 passed, {} failed\n", units.len())), "{shown}");
    assert!(!file.exists() && text(&output.stderr).contains("is not written"));
}

#[test]
fn a_kernel_that_the_driver_refuses_does_not_end_the_bench() {
    let stub = Stub::new();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("kernels.json");
    let run = |options: &str| {
        let arguments =
            ["kernels", "bench", "--device", "cuda", "--op", "embed", "--scale", "small", "--repeat", "1"];
        let report = ["--format", "json", "--output", file.to_str().unwrap()];
        let cubins = ["--cubins", images().to_str().unwrap()];
        let options = format!("total=600000000{options}");
        let output = warpstep(&stub.path, &options, &[&arguments[..], &report, &cubins].concat());
        let report: serde_json::Value = serde_json::from_slice(
            &std::fs::read(&file).unwrap_or_else(|error| panic!("{error}: {}", text(&output.stderr))),
        )
        .unwrap();
        (output.status.code(), text(&output.stderr), report["rows"].as_array().unwrap().len())
    };
    let (code, message, all) = run("");
    assert!(code == Some(0) && all > 4, "{all} rows: {message}");
    // Of the graphs, one of a cold and one of a hot cache for each case, the first.
    let (code, message, rows) = run(",fail_name=cuGraphInstantiateWithParams,code=1");
    assert_eq!((code, rows), (Some(1), all - 2), "{message}");
    assert_eq!(message.lines().filter(|line| line.contains("FAIL: ")).count(), 1, "{message}");
    assert_eq!(message.lines().filter(|line| line.contains(": cold ")).count(), rows / 2, "{message}");
    // After a kernel that went wrong there is nothing to be had, but the report is written.
    let (code, message, rows) = run(",fail_name=cuGraphInstantiateWithParams,code=700");
    assert_eq!((code, rows), (Some(1), 0), "{message}");
}
