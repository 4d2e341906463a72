//! `tools/run-bundle.sh` on a GPU machine that does what these tests want: every program it calls is a few lines of
//! shell.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

/// Writes the report and the picture that it is asked for, and passes.
const PASSES: &str = r#"
case "$*" in
    --version) echo 'warpstep 0.0.0' ;;
    *"kernels list"*) printf 'embed: rows\n    bound: bytes\nqkv: products\ndown: products\n' ;;
    *"conformance --list"*) printf 'loads\nmma\n' ;;
    bench*) echo 'image: the same bits; bits 0123456789abcdef' ;;
    *) echo '3 passed, 0 failed' ;;
esac
while (($#)); do
    [[ $1 != -o && $1 != --output && $1 != --out ]] || echo "$last" >"$2"
    shift
done
"#;

struct Machine {
    dir: TempDir,
}

impl Machine {
    /// A machine whose `warpstep` first runs `before`, and whose other programs are `programs`.
    fn new(before: &str, programs: &[(&str, &str)]) -> Machine {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let bundle = root.join("stage/bundle");
        std::fs::create_dir_all(bundle.join("golden/cases")).unwrap();
        std::fs::create_dir_all(root.join("bin")).unwrap();
        std::fs::write(bundle.join("COMMIT"), "0123\n").unwrap();
        std::fs::write(bundle.join("golden/cases/one.safetensors"), "").unwrap();
        program(&bundle.join("warpstep"), &format!("last=same\n{before}\n{PASSES}"));
        // No torch and no matplotlib.
        program(&root.join("bin/python3"), "exit 1");
        program(
            &root.join("bin/nvidia-smi"),
            "[[ $1 != -l ]] || { echo $$ >held; exec sleep 100; }; echo 'NVIDIA H100'",
        );
        for (name, text) in programs {
            program(&root.join("bin").join(name), text);
        }
        let packed = Command::new("tar")
            .args(["-czf", "bundle.tar.gz", "-C", "stage", "bundle"])
            .current_dir(root)
            .status()
            .unwrap();
        assert!(packed.success());
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/run-bundle.sh");
        std::fs::copy(script, root.join("run.sh")).unwrap();
        Machine { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let bin = self.path("bin");
        Command::new("bash")
            .arg(self.path("run.sh"))
            .args(["--out", "out", "--results", "results"])
            .args(arguments)
            .current_dir(self.dir.path())
            .env("PATH", format!("{}:{}", bin.display(), std::env::var("PATH").unwrap()))
            .env_remove("PYTHON")
            .output()
            .unwrap()
    }

    /// Names and states of the steps, as they came home: out of the packed report.
    fn steps(&self) -> Vec<(String, String)> {
        let unpacked = Command::new("tar")
            .args(["-xzOf", "results/report.tar.gz", "./summary.json"])
            .current_dir(self.dir.path())
            .output()
            .unwrap();
        let summary: serde_json::Value = serde_json::from_slice(&unpacked.stdout).unwrap();
        let text = |step: &serde_json::Value, key: &str| step[key].as_str().unwrap().to_owned();
        let steps = summary["steps"].as_array().unwrap();
        steps.iter().map(|step| (text(step, "name"), text(step, "state"))).collect()
    }

    fn state(&self, name: &str) -> Option<String> {
        self.steps().into_iter().find(|(step, _)| step == name).map(|(_, state)| state)
    }

    fn names(&self) -> Vec<String> {
        self.steps().into_iter().map(|(name, _)| name).collect()
    }
}

fn program(path: &Path, text: &str) {
    std::fs::write(path, format!("#!/usr/bin/env bash\n{text}\n")).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

const SANITIZER: (&str, &str) = ("compute-sanitizer", "echo '========= ERROR SUMMARY: 0 errors'");

#[test]
fn a_machine_on_which_all_is_well_runs_every_step_once_and_in_order() {
    let machine = Machine::new("", &[SANITIZER]);
    let output = machine.run(&[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let steps = machine.steps();
    assert!(steps.iter().all(|(_, state)| state == "passed"), "{steps:?}");
    let expected = "gpu doctor conformance kernels cases picture picture-right picture-again picture-same-bytes \
                    picture-full-edges picture-same-full-edges graphs graphs-full-edges graphs-same-bits kernels-14b \
                    memcheck-embed memcheck-qkv memcheck-down bench soak try-carveout try-no-ahead try-attention-8 try-ring try-both bench-kernels \
                    racecheck-embed racecheck-qkv racecheck-down synccheck-embed synccheck-qkv synccheck-down \
                    initcheck-embed initcheck-qkv initcheck-down";
    assert_eq!(machine.names().join(" "), expected);
    // What holds the GPU open is gone with the script.
    let held = std::fs::read_to_string(machine.path("held")).unwrap();
    assert!(!Path::new("/proc").join(held.trim()).join("exe").exists(), "{held} still runs");
}

#[test]
fn only_the_steps_that_are_asked_for_are_run() {
    let machine = Machine::new("", &[SANITIZER]);
    assert!(machine.run(&["--steps", "^(kernels$|memcheck-q|soak)"]).status.success());
    assert_eq!(machine.names(), ["kernels", "memcheck-qkv", "soak"]);
    assert_eq!(machine.run(&["--steps", "("]).status.code(), Some(2));
}

#[test]
fn an_error_of_the_device_costs_the_ops_before_it_nothing() {
    let hangs = r#"case "$*" in
        "kernels test --device"*"medium") echo 'embed plain bf16 rows=1: y: max 0: ok (1 ms)'
            echo 'qkv plain bf16 rows=1: FAIL: launch failed'; echo 'error: the device is in error'; exit 1 ;;
        *"--op qkv"*) exit 1 ;;
    esac"#;
    let machine = Machine::new(hangs, &[]);
    assert_eq!(machine.run(&["--steps", "^kernels(-[a-z]|$)"]).status.code(), Some(1));
    assert_eq!(machine.names(), ["kernels", "kernels-qkv", "kernels-down"]);
    assert_eq!(machine.state("kernels-down").unwrap(), "passed");
    // What was counted to the end has told all it can.
    let wrong =
        r#"[[ $* != "kernels test"* ]] || { echo 'qkv plain: FAIL'; echo '2 passed, 1 failed'; exit 1; }"#;
    let machine = Machine::new(wrong, &[]);
    machine.run(&["--steps", "^kernels(-[a-z]|$)"]);
    assert_eq!(machine.names(), ["kernels"]);
}

#[test]
fn a_picture_that_is_right_without_dependent_launches_only_sets_them_aside() {
    let tells = r#"[[ $* != *"--pictures 10"* ]] || echo "arguments $*""#;
    for (verb, differs) in
        [("generate", "last=other"), ("generate", "exit 1"), ("bench", "echo 'bits ffffffffffffffff'; exit")]
    {
        let machine = Machine::new(
            &format!("{tells}\n[[ $* == *--no-dependent-launch* || $1 != {verb} ]] || {{ {differs}; }}"),
            &[],
        );
        assert_eq!(machine.run(&["--steps", "^(picture|graphs|no-dep|soak)"]).status.code(), Some(1));
        assert_eq!(machine.state("no-dependent-launch").unwrap(), "FAILED", "{verb}: {differs}");
        let soak = std::fs::read_to_string(machine.path("out/soak.txt")).unwrap();
        assert!(soak.contains("--no-dependent-launch"), "{verb}: {differs}: {soak}");
    }
    // Wrong with them or without, they are not at fault.
    let machine = Machine::new(&format!("{tells}\n[[ $1 != compare ]] || exit 1"), &[]);
    machine.run(&["--steps", "^(picture|graphs|no-dep|soak)"]);
    assert_eq!(machine.state("picture-full-edges-right").unwrap(), "FAILED");
    let soak = std::fs::read_to_string(machine.path("out/soak.txt")).unwrap();
    assert!(soak.contains("arguments") && !soak.contains("--no-dependent-launch"), "{soak}");
}

#[test]
fn a_sanitizer_that_the_machine_does_not_allow_is_no_failure() {
    let refused = ("compute-sanitizer", "echo '========= Error: Device not supported. Please refer'; exit 1");
    let machine = Machine::new("", &[refused]);
    assert!(machine.run(&["--steps", "check-"]).status.success());
    // One op of each tool tells.
    assert_eq!(machine.names(), ["memcheck-embed", "racecheck-embed", "synccheck-embed", "initcheck-embed"]);
    assert_eq!(machine.state("memcheck-embed").unwrap(), "unable");
    let finds = ("compute-sanitizer", "echo '========= Invalid __global__ read'; exit 99");
    let machine = Machine::new("", &[finds]);
    assert_eq!(machine.run(&["--steps", "memcheck-down"]).status.code(), Some(1));
    assert_eq!(machine.state("memcheck-down").unwrap(), "FAILED");
}
