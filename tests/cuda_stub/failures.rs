//! Every call of the driver fails in turn: the error says what it is, and everything is freed.

use crate::streams::TestStream;
use crate::stub::Stub;
use crate::work::work;
use std::path::Path;
use std::sync::Arc;
use warpstep::device::cuda::{CudaDevice, CudaOptions};
use warpstep::device::{Device, cubins};
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::event::{CancelToken, Control};
use warpstep::{Error, Result};

const INVALID_VALUE: i32 = 1;
const OUT_OF_MEMORY: i32 = 2;
const ILLEGAL_ADDRESS: i32 = 700;

/// What a failure of `call` with `code` must look like, given the two calls after it. `None`: the call only frees, leads
/// to one that does, or fills in a figure, and its failure goes unnoticed.
fn expected(call: &str, [next, later]: [&str; 2], code: i32) -> Option<&'static str> {
    let asks = ["cuDriverGetVersion", "cuInit", "cuDeviceGet", "cuDeviceTotalMem"];
    let frees = ["Destroy", "Free", "Unload", "Release", "Pop"];
    if asks.iter().any(|ask| call.starts_with(ask)) {
        return Some("no device");
    }
    let frees = |call: &str| frees.iter().any(|free| call.contains(free));
    // After a failure in earnest the context is put back first.
    // A stream marks its end before it goes. Who cannot do that waits for it.
    let marks = |call: &str| ["cuEventCreate", "cuEventRecord"].contains(&call);
    let parts = marks(call) && next == "cuStreamSynchronize" && later == "cuStreamDestroy_v2";
    let leads = ["cuCtxPushCurrent_v2", "cuEventSynchronize"].contains(&call);
    let cleaning =
        leads && !next.contains("Pop") && (frees(next) || marks(next) || next == "cuEventSynchronize");
    if frees(call) || cleaning || parts || call == "cuMemGetInfo_v2" {
        return None;
    }
    let launches = [
        "cuModule",
        "cuFunc",
        "cuLaunch",
        "cuGraphAdd",
        "cuGraphKernel",
        "cuGraphInst",
        "cuGraphExecNode",
        "cuGraphLaunch",
    ];
    Some(match code {
        OUT_OF_MEMORY => "memory",
        ILLEGAL_ADDRESS => "lost",
        _ if call == "cuDevicePrimaryCtxRetain" => "no device",
        _ if launches.iter().any(|launch| call.starts_with(launch)) => "launch",
        _ => "driver",
    })
}

/// The kind of an error, whose message must name the number where the driver gave one.
fn kind(error: &Error, code: i32) -> &'static str {
    let text = error.to_string();
    let kind = match error {
        Error::NoDevice(_) => "no device",
        Error::OutOfMemory { .. } => return "memory",
        Error::DeviceLost { code: found, .. } if *found == code => "lost",
        Error::Launch { .. } => "launch",
        Error::Driver { code: found, .. } if *found == code => "driver",
        _ => "other",
    };
    assert!(text.contains(&format!("CUDA error {code}")), "{text}");
    kind
}

/// The call that the stub was told to fail, and the two after it, from its log; an error asks what memory is free.
fn failed_call(log: &[String]) -> (String, [String; 2]) {
    let name = |line: &String| line.split(' ').next().unwrap().to_owned();
    let index = log.iter().position(|line| line.contains(" -> ")).expect("a call failed");
    let mut later = log[index + 1..].iter().map(name).filter(|call| call != "cuMemGetInfo_v2");
    (name(&log[index]), [(); 2].map(|()| later.next().unwrap_or_default()))
}

fn open_and_work(stub: &Stub) -> Result<()> {
    work(&stub.open()?)
}

#[test]
fn every_driver_call_fails_in_turn() {
    let stub = Stub::new();
    stub.configure("");
    open_and_work(&stub).unwrap();
    let calls = stub.calls();
    assert!(calls > 100, "{calls} calls");
    for code in [INVALID_VALUE, OUT_OF_MEMORY, ILLEGAL_ADDRESS] {
        for n in 1..=calls {
            stub.take_log();
            stub.configure(&format!("fail={n},code={code}"));
            let result = open_and_work(&stub);
            let (call, next) = failed_call(&stub.take_log());
            match (result, expected(&call, next.each_ref().map(String::as_str), code)) {
                (Ok(()), None) => {}
                (Err(error), Some(wanted)) => assert_eq!(kind(&error, code), wanted, "{call}: {error}"),
                // A lost device shows in the next call that can say so.
                (Err(error), None) if code == ILLEGAL_ADDRESS => {
                    assert_eq!(kind(&error, code), "lost", "{call}")
                }
                (result, wanted) => panic!("call {n}, {call} = {code}: {result:?}, not {wanted:?}"),
            }
            assert_eq!(stub.live(), "", "after call {n}, {call} = {code}");
        }
    }
}

#[test]
fn a_failed_call_leaves_the_device_usable() {
    let stub = Stub::new();
    let device = stub.open().unwrap();
    stub.configure("");
    work(&device).unwrap();
    // Only what is left after the first round loaded the kernels and pinned the ring.
    stub.configure("");
    work(&device).unwrap();
    for n in 1..=stub.calls() {
        stub.configure(&format!("fail={n},code={INVALID_VALUE}"));
        let first = work(&device);
        stub.configure("");
        work(&device).unwrap_or_else(|error| panic!("after call {n} failed ({first:?}): {error}"));
        assert_eq!(device.live_bytes(), 0);
    }
    stub.take_log();
}

#[test]
fn a_lost_device_says_so_from_then_on() {
    let stub = Stub::new();
    let device = stub.open().unwrap();
    let mut stream = device.stream().unwrap();
    let buffer = device.alloc(64, "b").unwrap();
    let event = stream.record().unwrap();
    stub.configure(&format!("fail_name=cuStreamSynchronize,code={ILLEGAL_ADDRESS}"));
    let error = stream.synchronize().unwrap_err();
    assert_eq!(kind(&error, ILLEGAL_ADDRESS), "lost");
    assert!(error.to_string().contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{error}");
    let calls = stub.calls();
    for error in [
        stream.put(buffer.ptr(), &[0]).unwrap_err(),
        stream.get(buffer.ptr(), &mut [0]).unwrap_err(),
        stream.set(buffer.span(), 0).unwrap_err(),
        stream.synchronize().unwrap_err(),
        stream.record().map(drop).unwrap_err(),
        event.wait().unwrap_err(),
        event.is_done().unwrap_err(),
        device.alloc(1, "x").unwrap_err(),
        device.clone().stream().map(drop).unwrap_err(),
    ] {
        assert_eq!(kind(&error, ILLEGAL_ADDRESS), "lost");
        assert!(error.to_string().contains("unusable since cuStreamSynchronize"), "{error}");
    }
    assert_eq!(stub.calls(), calls, "the driver is left alone");
    assert_eq!(device.info().memory_bytes, None);
    drop((event, stream, buffer, device));
    assert_eq!(stub.live(), "");
}

#[test]
fn out_of_memory_says_how_much_was_asked_for_and_how_much_is_free() {
    let stub = Stub::new();
    stub.configure("total=1000000");
    let device = stub.open().unwrap();
    let kept = device.alloc(400_000, "kept").unwrap();
    match device.alloc(700_000, "weights").unwrap_err() {
        Error::OutOfMemory { what, requested_bytes, free_bytes } => {
            assert_eq!((what.as_str(), requested_bytes, free_bytes), ("weights", 700_000, 600_000));
        }
        other => panic!("{other}"),
    }
    drop(kept);
    device.alloc(700_000, "weights").unwrap();
}

#[test]
fn what_is_missing_is_said_in_one_sentence() {
    let stub = Stub::new();
    for (options, part) in [
        ("version=12090", "the NVIDIA driver is too old: it supports CUDA 12.9; CUDA 13.0 (driver 580)"),
        ("count=0", "the driver sees no CUDA device"),
        ("major=8,minor=6", "Stub GPU has compute capability 8.6; the kernels run on 9.0 only"),
        ("major=10", "compute capability 10.0"),
    ] {
        stub.configure(&format!("version=13000,count=1,major=9,minor=0,{options}"));
        let error = stub.open().unwrap_err();
        assert!(matches!(error, Error::NoDevice(_)) && error.to_string().contains(part), "{error}");
        assert_eq!(stub.live(), "");
    }
    stub.configure("version=13000,count=2,major=9,minor=0");
    let embedded = CudaDevice::open(CudaOptions { cubins: None, ..stub.options() });
    match (cubins::CUBINS.is_empty(), embedded) {
        (true, Err(error)) => assert!(error.to_string().contains("embeds no GPU kernels"), "{error}"),
        (empty, result) => assert!(!empty && result.is_ok(), "{result:?}"),
    }
    let other = |ordinal| CudaOptions { ordinal, ..stub.options() };
    assert!(CudaDevice::open(other(1)).is_ok());
    let error = CudaDevice::open(other(99)).unwrap_err().to_string();
    assert!(error.contains("device 99 was asked for, and the driver shows 2"), "{error}");

    let folder = tempfile::tempdir().unwrap();
    let of = |folder: &Path| CudaDevice::open(CudaOptions { cubins: Some(folder.into()), ..stub.options() });
    let error = of(folder.path()).unwrap_err().to_string();
    assert!(error.contains("holds no MODULE.cubin"), "{error}");
    let error = of(&folder.path().join("none")).unwrap_err().to_string();
    assert!(error.contains("none"), "{error}");

    let missing = CudaOptions { library: Some("/nonexistent.so".into()), ..stub.options() };
    let error = CudaDevice::open(missing).unwrap_err().to_string();
    assert!(error.contains("no NVIDIA driver") && error.contains("/nonexistent.so"), "{error}");
    // A library that opens and is no driver lacks the first function that is looked up.
    let other = CudaOptions { library: Some("libc.so.6".into()), ..stub.options() };
    let error = CudaDevice::open(other).unwrap_err().to_string();
    assert!(error.contains("too old: it has no cuDriverGetVersion"), "{error}");
}

/// An engine on the stub: loading and drawing with calls that fail here and there.
#[test]
fn an_engine_survives_failed_calls() {
    let stub = Stub::new();
    let load = || -> Result<Arc<Engine>> {
        let device = Arc::new(stub.open()?);
        Ok(Arc::new(Engine::load(&ModelSource::Demo, device, EngineOptions::default())?))
    };
    stub.configure("");
    let engine = load().unwrap();
    let calls = stub.calls();
    for n in (1..calls).step_by(97) {
        stub.configure(&format!("fail={n},code={OUT_OF_MEMORY}"));
        let before = stub.live();
        if let Err(error) = load() {
            assert!(matches!(error, Error::OutOfMemory { .. } | Error::NoDevice(_)), "{error}");
        }
        assert_eq!(stub.live(), before);
    }
    let mut request = engine.request("a red circle on a blue background").unwrap();
    (request.width, request.height, request.sampler.steps) = (32, 32, 2);
    let draw = || engine.session().generate(&request, &CancelToken::new(), &mut |_| Control::Continue);
    draw().unwrap();
    let before = stub.live();
    stub.configure("");
    draw().unwrap();
    let mut failed = 0;
    for n in (1..=stub.calls()).step_by(7) {
        stub.configure(&format!("fail={n},code={INVALID_VALUE}"));
        failed += usize::from(draw().is_err());
        stub.configure("");
        draw().unwrap();
        assert_eq!(stub.live(), before, "after call {n}");
    }
    assert!(failed > 10, "{failed} failures");
    stub.take_log();
    drop(engine);
    assert_eq!(stub.live(), "");
}
