//! Machines on which nothing can be drawn, each with the one sentence that a user reads: item 27 of the list of bad
//! inputs that the engine promises to survive. The driver's stub plays the machine.

use crate::stub::Stub;
use std::process::Command;
use std::sync::Arc;
use warpstep::device::Device;
use warpstep::device::cuda::{CudaDevice, CudaOptions};
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::event::{CancelToken, Control};
use warpstep::{Error, Result};

#[track_caller]
fn no_device(result: Result<CudaDevice>, part: &str) {
    match result {
        Err(Error::NoDevice(reason)) => assert!(reason.contains(part), "{reason}"),
        other => panic!("{other:?}"),
    }
}

/// The driver shows no device then; the stub reads the variable as the driver does.
#[test]
fn cuda_visible_devices_empty() {
    let stub = Stub::new();
    let output = Command::new(env!("CARGO_BIN_EXE_warpstep"))
        .args(["generate", "x", "--device", "cuda"])
        .env("WARPSTEP_CUDA_LIBRARY", &stub.path)
        .env("WARPSTEP_STUB", "")
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert_eq!(
        message.trim_end(),
        "error: no CUDA device: the driver sees no CUDA device (cuInit: CUDA error 100)"
    );
}

#[test]
fn no_driver() {
    let options = CudaOptions { library: Some("/nonexistent/libcuda.so.1".into()), ..CudaOptions::default() };
    no_device(CudaDevice::open(options), "no NVIDIA driver");
}

#[test]
fn old_driver() {
    let stub = Stub::new();
    stub.configure("version=12080");
    no_device(stub.open(), "supports CUDA 12.8; CUDA 13.0 (driver 580) or newer is needed");
    assert_eq!(stub.live(), "");
}

#[test]
fn device_index_99() {
    let stub = Stub::new();
    let options = CudaOptions { ordinal: 99, ..stub.options() };
    no_device(CudaDevice::open(options), "device 99 was asked for, and the driver shows 1, counted from 0");
    no_device(CudaDevice::open(CudaOptions { ordinal: u32::MAX, ..stub.options() }), "device 4294967295");
}

#[test]
fn wrong_architecture() {
    let stub = Stub::new();
    stub.configure("major=8,minor=9");
    no_device(stub.open(), "Stub GPU has compute capability 8.9; the kernels run on 9.0 only");
    assert_eq!(stub.live(), "");
}

/// The capability is right and the image is not (CUDA_ERROR_NO_BINARY_FOR_GPU): an error of the kernel, and the
/// device lives on.
#[test]
fn no_kernel_image() {
    let stub = Stub::new();
    let engine = load(&stub).unwrap();
    let before = stub.live();
    stub.configure("fail_name=cuModuleLoadData,code=209");
    match draw(&engine) {
        Err(Error::Launch { kernel, reason }) => {
            assert!(!kernel.is_empty() && reason.contains("cuModuleLoadData: CUDA error 209"), "{reason}");
        }
        other => panic!("{:?}", other.map(drop)),
    }
    assert_eq!(stub.live(), before);
    stub.configure("");
    draw(&engine).unwrap();
}

/// A slice of a GPU that the weights do not fit into.
#[test]
fn mig_slice_with_less_memory() {
    let stub = Stub::new();
    stub.configure("total=1000000");
    match load(&stub).map(drop) {
        Err(Error::OutOfMemory { what, requested_bytes, free_bytes }) => {
            assert!(!what.is_empty() && requested_bytes > free_bytes && free_bytes < 1_000_000);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(stub.live(), "");
}

/// The card is large enough, and somebody else has most of it.
#[test]
fn another_process_holding_the_memory() {
    let stub = Stub::new();
    let engine = load(&stub).unwrap();
    let Some((total, free)) = engine_memory(&stub) else { panic!("the stub says how much is free") };
    assert_eq!(total, 1 << 34);
    let before = stub.live();
    // Room for the weights that are there and for 1000 bytes more.
    stub.configure(&format!("foreign={}", free - 1000));
    match draw(&engine) {
        Err(Error::OutOfMemory { requested_bytes, free_bytes, .. }) => {
            assert!(requested_bytes > 1000 && free_bytes <= 1000, "{requested_bytes} of {free_bytes}");
        }
        other => panic!("{:?}", other.map(drop)),
    }
    assert_eq!(stub.live(), before, "what the engine held before");
    // The other process ends.
    stub.configure("foreign=0");
    draw(&engine).unwrap();
    drop(engine);
    assert_eq!(stub.live(), "");
}

fn engine_memory(stub: &Stub) -> Option<(u64, u64)> {
    stub.open().unwrap().info().memory_bytes
}

fn load(stub: &Stub) -> Result<Arc<Engine>> {
    let device = Arc::new(stub.open()?);
    Ok(Arc::new(Engine::load(&ModelSource::Demo, device, EngineOptions::default())?))
}

fn draw(engine: &Arc<Engine>) -> Result<()> {
    let mut request = engine.request("a red circle on a blue background")?;
    (request.width, request.height, request.sampler.steps) = (32, 32, 2);
    engine.session().generate(&request, &CancelToken::new(), &mut |_| Control::Continue).map(drop)
}
