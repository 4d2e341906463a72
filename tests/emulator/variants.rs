//! Kernel variants that are wrong, in a whole generation: item 28 of the list of bad inputs that the engine promises
//! to survive. Each stands in for `gather_rows`; afterwards the same engine draws the right picture.

use std::sync::{Arc, Mutex};
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions, build_kind};
use warpstep::device::{Buffer, Device, DeviceInfo, Executable, KernelId, NodeList, Span, Stream};
use warpstep::device::{DevicePtr, Event, Node};
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::event::{CancelToken, Control};
use warpstep::{Error, Result};

/// Launches another kernel wherever a node asks for `gather_rows`.
struct Swapping {
    inner: EmulatedDevice,
    kernel: Arc<Mutex<Option<&'static str>>>,
}

struct SwappingStream {
    inner: Box<dyn Stream>,
    kernel: Arc<Mutex<Option<&'static str>>>,
}

// SAFETY: the inner device does everything. The kernels that are swapped in take the struct of `gather_rows`; they keep
// to its addresses, or run in a build only that reports every access outside.
unsafe impl Device for Swapping {
    fn info(&self) -> DeviceInfo {
        self.inner.info()
    }

    fn alloc(&self, bytes: usize, label: &str) -> Result<Buffer> {
        self.inner.alloc(bytes, label)
    }

    fn name_span(&self, span: Span, label: &str) {
        self.inner.name_span(span, label);
    }

    fn stream(&self) -> Result<Box<dyn Stream>> {
        Ok(Box::new(SwappingStream { inner: self.inner.stream()?, kernel: self.kernel.clone() }))
    }
}

impl Stream for SwappingStream {
    unsafe fn upload_with(
        &mut self,
        dst: DevicePtr,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        // SAFETY: promised by the caller.
        unsafe { self.inner.upload_with(dst, bytes, fill) }
    }

    unsafe fn download(&mut self, src: DevicePtr, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: promised by the caller.
        unsafe { self.inner.download(src, bytes) }
    }

    unsafe fn fill(&mut self, span: Span, byte: u8) -> Result<()> {
        // SAFETY: promised by the caller.
        unsafe { self.inner.fill(span, byte) }
    }

    unsafe fn launch(&mut self, node: &Node) -> Result<()> {
        // SAFETY: promised by the caller.
        unsafe { self.inner.launch(node) }
    }

    unsafe fn instantiate(&mut self, list: Arc<NodeList>) -> Result<Box<dyn Executable>> {
        let mut changed = NodeList::new();
        for node in list.nodes() {
            let mut node = node.clone();
            if let (Some(symbol), "gather_rows") = (*self.kernel.lock().unwrap(), node.kernel.module) {
                node.kernel = KernelId { module: "bugs", symbol };
            }
            changed.push(node);
        }
        // SAFETY: promised by the caller, but for the kernel: see `Swapping`.
        unsafe { self.inner.instantiate(Arc::new(changed)) }
    }

    fn replay(&mut self, executable: &dyn Executable) -> Result<()> {
        self.inner.replay(executable)
    }

    fn record(&mut self) -> Result<Box<dyn Event>> {
        self.inner.record()
    }

    fn record_timed(&mut self) -> Result<Box<dyn Event>> {
        self.inner.record_timed()
    }

    fn synchronize(&mut self) -> Result<()> {
        self.inner.synchronize()
    }
}

/// Draws with the bug, hands the result to `check`, and draws rightly with the same engine.
fn with_variant(symbol: &'static str, check: impl FnOnce(Result<Vec<u8>>, &EmulatedDevice)) {
    let inner = EmulatedDevice::new(EmulatedOptions::default()).unwrap();
    let kernel = Arc::new(Mutex::new(None));
    let device = Arc::new(Swapping { inner: inner.clone(), kernel: kernel.clone() });
    let engine = Arc::new(Engine::load(&ModelSource::Demo, device, EngineOptions::default()).unwrap());
    let mut request = engine.request("a red circle on a blue background").unwrap();
    (request.width, request.height, request.seed) = (32, 16, 3);
    request.sampler.steps = 2;
    let draw = || {
        let images = engine.session().generate(&request, &CancelToken::new(), &mut |_| Control::Continue)?;
        Ok(images.images[0].data().to_vec())
    };
    let loaded = inner.live_bytes();
    let right = draw().unwrap();
    *kernel.lock().unwrap() = Some(symbol);
    inner.take_audit();
    check(draw(), &inner);
    assert_eq!(inner.live_bytes(), loaded);
    *kernel.lock().unwrap() = None;
    // A device stays in error after a failed launch, as a CUDA context does.
    inner.reset();
    assert!(draw().unwrap() == right);
}

#[test]
fn a_variant_that_writes_nan() {
    with_variant("bug_variant_nan", |result, _| match result {
        Err(Error::NonFinite { stage: "flow head", token: 0 }) => {}
        other => panic!("{other:?}"),
    });
}

/// Loads from nowhere kill the process, as on a GPU they kill the context, in the builds that do not look at addresses;
/// those that do report them, which is what they are for.
#[test]
fn a_variant_that_reads_out_of_bounds() {
    match build_kind() {
        "race" => with_variant("bug_variant_out_of_bounds", |result, _| match result {
            Err(Error::Launch { kernel, reason }) => {
                assert_eq!(kernel, "bug_variant_out_of_bounds");
                assert!(reason.contains("out of bounds") && reason.contains("variants.cu:"), "{reason}");
            }
            other => panic!("{other:?}"),
        }),
        build => assert!(["opt", "asan", "count"].contains(&build), "what does {build} say of it?"),
    }
}

/// The watchdog: when nothing has happened in many rounds of all waiting threads, nothing ever will.
#[test]
fn a_variant_that_never_ends() {
    with_variant("bug_variant_endless", |result, device| {
        match result {
            Err(Error::Launch { kernel, reason }) => {
                assert_eq!(kernel, "bug_variant_endless");
                let parts =
                    ["gather_rows", "deadlock, no thread can go on", "polling in ld_acquire at variants.cu:"];
                assert!(parts.iter().all(|part| reason.contains(part)), "{reason}");
            }
            other => panic!("{other:?}"),
        }
        let error = device.stream().map(drop).unwrap_err();
        assert!(error.to_string().contains("unusable since a launch failed"), "{error}");
    });
}
