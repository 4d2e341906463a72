//! A crate of somebody else's that depends on this one by path, builds and draws. It takes the dependencies that are
//! locked and compiled here; this crate itself is compiled once more, for the emulated device alone.

use std::path::Path;
use std::process::Command;

const MAIN: &str = r#"
use std::sync::Arc;
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions};
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::event::{CancelToken, Control};

fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let device = Arc::new(EmulatedDevice::new(EmulatedOptions::default())?);
    let engine = Arc::new(Engine::load(&ModelSource::Demo, device, EngineOptions::default())?);
    let mut request = engine.request("a red circle on a blue background")?;
    (request.width, request.height, request.sampler.steps) = (32, 16, 2);
    let mut session = engine.session();
    let images = std::thread::spawn(move || {
        session.generate(&request, &CancelToken::new(), &mut |_| Control::Continue)
    });
    let images = images.join().expect("the library does not panic")?;
    print!("{} x {}", images.images[0].width(), images.images[0].height());
    Ok(())
}
"#;

#[test]
#[ignore = "builds all kernels once more, as a dependency: cargo test --release --test outside_crate -- --ignored"]
fn an_outside_crate_builds_and_draws() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    let manifest = format!(
        "[package]\nname = \"outside\"\nversion = \"0.0.0\"\nedition = \"2021\"\n\n\
         [dependencies]\nwarpstep = {{ path = {here:?} }}\n\n\
         [profile.release]\ndebug = \"line-tables-only\"\n\n[workspace]\n"
    );
    write("Cargo.toml", &manifest);
    // Cargo drops from it what only our tests need, and adds the crate itself; nothing is looked up.
    write("Cargo.lock", &std::fs::read_to_string(here.join("Cargo.lock")).unwrap());
    std::fs::create_dir(folder.path().join("src")).unwrap();
    write("src/main.rs", MAIN);
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| here.join("target"), Into::into);
    let output = Command::new(env!("CARGO"))
        .args(["run", "--release", "--offline", "--quiet"])
        .current_dir(folder.path())
        .env("CARGO_TARGET_DIR", target)
        .env("NVCC", "none")
        .env("WARPSTEP_REQUIRE_CUBINS", "0")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "32 x 16", "the library prints nothing");
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}
