//! Profiler ranges (feature `nvtx`) against a stand-in for NVIDIA's library that writes down what it is told.
#![cfg(feature = "nvtx")]

use std::path::Path;
use std::process::Command;

const STUB: &str = r#"
#include <stdio.h>
#include <stdlib.h>
static FILE* log_file() {
    static FILE* file = fopen(getenv("NVTX_STUB_LOG"), "w");
    return file;
}
extern "C" int nvtxRangePushA(const char* name) { return fprintf(log_file(), "push %s\n", name), fflush(log_file()); }
extern "C" int nvtxRangePop() { return fprintf(log_file(), "pop\n"), fflush(log_file()); }
"#;

/// A picture of two tokens on the emulated device, by the program, with `folder` on the loader's path.
fn draw(folder: &Path) {
    let output = Command::new(env!("CARGO_BIN_EXE_warpstep"))
        .args(["generate", "a red circle", "--size", "32x16", "--steps", "2", "--device", "emulated"])
        // By its path: the gate builds this feature together with the lack of the embedded model.
        .args(["--model", concat!(env!("CARGO_MANIFEST_DIR"), "/tools/demo/model"), "-o"])
        .arg(folder.join("x.png"))
        .env("LD_LIBRARY_PATH", folder)
        .env("NVTX_STUB_LOG", folder.join("log"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn ranges_nest_as_the_stages_do() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("stub.cpp");
    std::fs::write(&source, STUB).unwrap();
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let library = folder.path().join("libnvToolsExt.so.1");
    let status =
        Command::new(compiler).args(["-shared", "-fPIC", "-o"]).arg(library).arg(source).status().unwrap();
    assert!(status.success());
    draw(folder.path());

    let log = std::fs::read_to_string(folder.path().join("log")).unwrap();
    let (mut open, mut paths) = (Vec::new(), Vec::new());
    for line in log.lines() {
        match line.strip_prefix("push ") {
            Some(name) => {
                open.push(name);
                paths.push(open.join(" > "));
            }
            None => assert!(open.pop().is_some(), "more ends than beginnings"),
        }
    }
    assert!(open.is_empty(), "{open:?} never end");
    let all = |path: &str| paths.iter().filter(|p| *p == path).count();
    for (path, count) in [
        ("request", 1),
        ("request > prefill", 1),
        ("request > prefill > prefill.layer0.qkv", 1),
        ("request > token 0", 1),
        ("request > token 0 > decode.layer3.down", 1),
        ("request > token 1", 1),
        // Nobody would use what the layers make of the last token.
        ("request > token 1 > decode.layer3.down", 0),
        ("request > vae", 1),
        ("request > vae > vae.to_rgb8", 1),
    ] {
        assert_eq!(all(path), count, "{path} in {paths:?}");
    }
}

#[test]
fn without_the_library_nothing_happens() {
    let folder = tempfile::tempdir().unwrap();
    draw(folder.path());
    assert!(!folder.path().join("log").exists());
}
