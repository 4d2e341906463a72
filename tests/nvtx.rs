//! Profiler ranges against a stand-in for a profiler's library that writes down what it is told.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Attaches as NVTX 3 has it (NVIDIA/NVTX, `nvtxDetail/nvtxTypes.h`), after a look at everything that it is given.
/// `NVTX_STUB` names what it does not do.
const STUB: &str = r#"
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

using Function = void (*)();
struct Callbacks {
    size_t size;
    int (*table)(int module, Function*** table, unsigned* functions);
};
struct Version {
    size_t size;
    uint32_t version, reserved;
    void (*set)(uint32_t);
};

static FILE* log_file() {
    static FILE* file = fopen(getenv("NVTX_STUB_LOG"), "w");
    return file;
}
static int push(const char* name) { return fprintf(log_file(), "push %s\n", name), fflush(log_file()); }
static int pop() { return fprintf(log_file(), "pop\n"), fflush(log_file()); }
static bool lacks(const char* what) { return getenv("NVTX_STUB") && !strcmp(getenv("NVTX_STUB"), what); }

extern "C" int InitializeInjectionNvtx2(const void* (*get)(uint32_t)) {
    auto* callbacks = static_cast<const Callbacks*>(get(1));
    auto* version = static_cast<const Version*>(get(3));
    bool right = !get(0) && !get(2) && !get(4) && callbacks->size == 16 && version->size == 24 && version->version == 3;
    version->set(3);
    Function** core = nullptr;
    const unsigned counts[] = {16, 9, 15, 7, 16, 7};
    for (int module = 1; module <= 6; module++) {
        Function** table = nullptr;
        unsigned functions = 0;
        right = right && callbacks->table(module, &table, &functions) == 1 && functions == counts[module - 1];
        right = right && callbacks->table(module, nullptr, nullptr) == 1 && !table[0] && !table[functions];
        for (unsigned id = 1; right && id < functions; id++) {
            right = table[id] && !*table[id];
        }
        core = module == 1 ? table : core;
    }
    right = right && !callbacks->table(0, &core, nullptr) && !callbacks->table(7, &core, nullptr);
    if (!right) {
        fprintf(log_file(), "wrong tables\n"), fflush(log_file());
        return 0;
    }
    *core[9] = reinterpret_cast<Function>(push);
    if (!lacks("pop")) {
        *core[11] = reinterpret_cast<Function>(pop);
    }
    return !lacks("success");
}
"#;

/// The stand-in, compiled into `folder`.
fn build_stub(folder: &Path) -> PathBuf {
    let (source, library) = (folder.join("stub.cpp"), folder.join("profiler.so"));
    std::fs::write(&source, STUB).unwrap();
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
    let mut command = Command::new(compiler);
    let status = command.args(["-std=c++17", "-shared", "-fPIC", "-o"]).arg(&library).arg(source).status();
    assert!(status.unwrap().success());
    library
}

/// What `library` is told about a picture of two tokens that the program makes on the emulated device, if anything.
fn log(folder: &Path, library: &Path, lacks: &str) -> Option<String> {
    let log = folder.join(format!("log{lacks}"));
    let output = Command::new(env!("CARGO_BIN_EXE_warpstep"))
        .args(["generate", "a red circle", "--size", "32x16", "--steps", "2", "--device", "emulated"])
        .args(["--model", concat!(env!("CARGO_MANIFEST_DIR"), "/tools/demo/model"), "-o"])
        .arg(folder.join("x.png"))
        .env("NVTX_INJECTION64_PATH", library)
        .env("NVTX_STUB", lacks)
        .env("NVTX_STUB_LOG", &log)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::read_to_string(log).ok()
}

#[test]
fn ranges_nest_as_the_stages_do() {
    let folder = tempfile::tempdir().unwrap();
    let log = log(folder.path(), &build_stub(folder.path()), "").expect("the stand-in is told nothing");
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
fn without_a_profiler_that_takes_ranges_nothing_happens() {
    let folder = tempfile::tempdir().unwrap();
    let stub = build_stub(folder.path());
    // One of the two functions is not enough, and who fails to attach is asked for nothing.
    for lacks in ["pop", "success"] {
        assert_eq!(log(folder.path(), &stub, lacks), None, "{lacks}");
    }
    let other = folder.path().join("stub.cpp");
    for library in [Path::new(""), &folder.path().join("missing.so"), &other] {
        assert_eq!(log(folder.path(), library, "-"), None, "{}", library.display());
    }
}
