//! An engine on the emulated device when memory runs out and calls fail: every request fails as it should, and the
//! next one is right. No allocation goes beyond the plan, and no request sees what another left behind.

use std::num::NonZeroUsize;
use std::sync::Arc;
use warpstep::Error;
use warpstep::device::Device;
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions, Fault};
use warpstep::device::planning::{HOPPER_SMS, PlanningDevice};
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::event::{CancelToken, Control};
use warpstep::request::GenerateRequest;

struct Rig {
    device: EmulatedDevice,
    engine: Arc<Engine>,
    request: GenerateRequest,
}

impl Rig {
    fn new() -> Rig {
        let device = EmulatedDevice::new(EmulatedOptions::default()).unwrap();
        let engine = load(&device).unwrap();
        let mut request = engine.request("a red circle on a blue background").unwrap();
        (request.width, request.height, request.seed) = (32, 16, 3);
        request.sampler.steps = 2;
        Rig { device, engine, request }
    }

    fn draw(&self) -> warpstep::Result<Vec<u8>> {
        let mut session = self.engine.session();
        let images = session.generate(&self.request, &CancelToken::new(), &mut |_| Control::Continue)?;
        Ok(images.images[0].data().to_vec())
    }
}

fn load(device: &EmulatedDevice) -> warpstep::Result<Arc<Engine>> {
    let device: Arc<dyn Device> = Arc::new(device.clone());
    Engine::load(&ModelSource::Demo, device, EngineOptions::default()).map(Arc::new)
}

#[test]
fn out_of_memory_at_every_allocation_in_turn_then_a_good_request_on_the_same_engine() {
    let rig = Rig::new();
    let loaded = rig.device.live_bytes();
    rig.device.set_fault(None);
    let picture = rig.draw().unwrap();
    let (_, allocations) = rig.device.requests();
    assert!(allocations >= 3, "cache and arena: {allocations} allocations");
    for n in 1..=allocations {
        rig.device.set_fault(Some(Fault::Allocation(n)));
        let error = rig.draw().unwrap_err();
        let Error::OutOfMemory { what, requested_bytes, .. } = &error else { panic!("{error}") };
        assert!(what.contains("on purpose") && *requested_bytes > 0, "{error}");
        assert_eq!(rig.device.live_bytes(), loaded, "after allocation {n}");
        assert!(rig.draw().unwrap() == picture, "after allocation {n}");
    }
}

#[test]
fn every_device_call_fails_in_turn_then_a_good_request_on_the_same_engine() {
    let rig = Rig::new();
    let loaded = rig.device.live_bytes();
    rig.device.set_fault(None);
    let picture = rig.draw().unwrap();
    let (calls, _) = rig.device.requests();
    assert!(calls > 25, "{calls} calls");
    let mut unnoticed = 0;
    for n in 1..=calls {
        rig.device.set_fault(Some(Fault::Call(n)));
        match rig.draw() {
            Err(Error::Device(reason)) => {
                assert!(reason.contains(&format!("on purpose (call {n})")), "{reason}")
            }
            Err(other) => panic!("call {n}: {other}"),
            // Once the pictures are there, what is left is overwritten to be kept, or freed, with nobody to tell.
            Ok(_) => unnoticed += 1,
        }
        assert_eq!(rig.device.live_bytes(), loaded, "after call {n}");
        assert!(rig.draw().unwrap() == picture, "after call {n}");
    }
    // Two pieces of the arena or three, keys and values of two rows of four layers, the last wait.
    assert!((19..=20).contains(&unnoticed), "{unnoticed} of {calls}");
}

#[test]
fn loading_that_fails_anywhere_frees_everything() {
    let device = EmulatedDevice::new(EmulatedOptions::default()).unwrap();
    drop(load(&device).unwrap());
    let (calls, allocations) = device.requests();
    for n in 1..=allocations {
        device.set_fault(Some(Fault::Allocation(n)));
        assert!(matches!(load(&device), Err(Error::OutOfMemory { .. })), "allocation {n}");
        assert_eq!(device.live_bytes(), 0, "after allocation {n}");
    }
    for n in 1..=calls {
        device.set_fault(Some(Fault::Call(n)));
        assert!(matches!(load(&device), Err(Error::Device(_))), "call {n}");
        assert_eq!(device.live_bytes(), 0, "after call {n}");
    }
    let fault = Some(Fault::Allocation(1));
    let broken = EmulatedDevice::new(EmulatedOptions { fault, ..EmulatedOptions::default() }).unwrap();
    assert!(matches!(load(&broken), Err(Error::OutOfMemory { .. })));
    assert!(load(&broken).is_ok(), "a fault strikes once");
}

#[test]
fn the_plan_is_what_is_allocated() {
    let mut rig = Rig::new();
    for (size, n, steps) in [((32, 16), 1, 2), ((48, 32), 2, 3), ((16, 16), 3, 9)] {
        (rig.request.width, rig.request.height) = size;
        (rig.request.n, rig.request.sampler.steps) = (n, steps);
        // With previews the decoder's memory is needed while tokens are made.
        rig.request.preview_every_rows = std::num::NonZeroU32::new(n - 1);
        let plan = rig.engine.plan(&rig.request).unwrap();
        assert_eq!(plan.weight_bytes, rig.device.live_bytes());
        let planned = plan.weight_bytes + plan.request_bytes();
        rig.device.set_planned_bytes(Some(planned));
        rig.draw().unwrap();
        rig.device.set_planned_bytes(Some(planned - 1));
        let error = rig.draw().unwrap_err();
        assert!(matches!(&error, Error::Internal(reason) if reason.contains("the plan to")), "{error}");
        rig.device.set_planned_bytes(None);
        assert_eq!(rig.device.live_bytes(), plan.weight_bytes);
    }
    let device = EmulatedDevice::new(EmulatedOptions::default()).unwrap();
    let engine = load(&device).unwrap();
    let mut request = rig.request.clone();
    request.n = 2;
    let plan = engine.plan(&request).unwrap();
    engine.session().generate(&request, &CancelToken::new(), &mut |_| Control::Continue).unwrap();
    assert_eq!(device.peak_bytes(), plan.weight_bytes + plan.request_bytes());
}

/// Memory is NaN when it is freed, and NaN when it is allocated: a picture after another request is the picture of
/// a fresh engine, bit for bit.
#[test]
fn a_request_sees_nothing_of_the_one_before() {
    let fresh = Rig::new().draw().unwrap();
    let mut rig = Rig::new();
    let request = rig.request.clone();
    rig.request = rig.engine.request("a large yellow triangle on a black background").unwrap();
    (rig.request.width, rig.request.height, rig.request.seed) = (48, 48, 99);
    rig.request.sampler.steps = 3;
    rig.draw().unwrap();
    rig.request = request;
    assert!(rig.draw().unwrap() == fresh);
}

/// Loading with a callback whose answer to call number `calls` is `end`'s; and what it was told.
fn load_until(
    device: &EmulatedDevice,
    threads: usize,
    calls: usize,
    end: impl Fn() -> Control,
) -> (warpstep::Result<Engine>, Vec<(u64, u64)>) {
    let mut told = Vec::new();
    let options = EngineOptions { load_threads: NonZeroUsize::new(threads), ..EngineOptions::default() };
    let result = Engine::load_with(&ModelSource::Demo, Arc::new(device.clone()), options, &mut |progress| {
        told.push((progress.done_bytes, progress.of_bytes));
        if told.len() == calls { end() } else { Control::Continue }
    });
    (result, told)
}

#[test]
fn loading_tells_how_far_it_is_and_stops_when_told() {
    let device = EmulatedDevice::new(EmulatedOptions::default()).unwrap();
    let (engine, told) = load_until(&device, 2, usize::MAX, || Control::Continue);
    let loading = engine.unwrap().loading();
    assert_eq!(loading.threads, 2);
    assert!(loading.read_bytes > loading.weight_bytes / 2 && loading.weights_ms > 0.0, "{loading:?}");
    let all = loading.weight_bytes;
    assert_eq!((told[0], *told.last().unwrap()), ((0, all), (all, all)));
    assert!(told.is_sorted() && told.iter().all(|&(_, of)| of == all), "{told:?}");
    assert_eq!(device.live_bytes(), 0);
    for calls in [1, 2, told.len() / 2, told.len()] {
        for threads in [1, 3] {
            let (result, seen) = load_until(&device, threads, calls, || Control::Stop);
            match result {
                Err(Error::LoadCancelled { done_bytes, of_bytes }) => {
                    assert_eq!((done_bytes, of_bytes), told[calls - 1], "call {calls}");
                }
                other => panic!("call {calls}: {other:?}"),
            }
            assert_eq!((seen.len(), device.live_bytes()), (calls, 0));
            let (result, _) = load_until(&device, threads, calls, || panic!("call {calls}"));
            let Err(Error::CallbackPanicked { message }) = result else { panic!("call {calls}: {result:?}") };
            assert_eq!((message, device.live_bytes()), (format!("call {calls}"), 0));
        }
    }
    drop(load(&device).unwrap());
}

#[test]
fn a_plan_has_nothing_to_load_and_tells_nothing() {
    let planning = Arc::new(PlanningDevice::new(HOPPER_SMS));
    let options = EngineOptions::default();
    let engine = Engine::load_with(&ModelSource::Demo, planning, options, &mut |_| panic!("told")).unwrap();
    let device = EmulatedDevice::new(EmulatedOptions::default()).unwrap();
    assert_eq!(engine.loading().weight_bytes, load(&device).unwrap().loading().weight_bytes);
    let options = EngineOptions { load_threads: NonZeroUsize::new(1000), ..EngineOptions::default() };
    let error = Engine::load(&ModelSource::Demo, Arc::new(device), options).unwrap_err();
    assert!(matches!(error, Error::InvalidRequest { field: "load_threads", .. }), "{error}");
}
