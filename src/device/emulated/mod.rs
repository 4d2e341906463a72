//! The emulated device: the same `.cu` files as on a GPU, compiled for the host and run on fibers
//! (`kernels/emulator`). It owns host memory that stands for device memory, runs every launch where it is
//! enqueued, and turns what the emulator reports into errors. It knows nothing of how kernels are checked.
//!
//! Like a CUDA context, a device stays in error once a launch has failed, until [`EmulatedDevice::reset`].

mod audit;
mod faults;
mod ffi;
mod stream;

pub use audit::{BufferTraffic, LaunchAudit, Undeclared};
pub use faults::Fault;

use super::{Buffer, Device, DeviceInfo, DevicePtr, Span, Stream};
use crate::error::{Error, Result};
use audit::Names;
use faults::Faults;
use std::alloc::Layout;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!(
    "warpstep's emulated device switches fibers in x86-64 Linux assembly; other hosts are not supported"
);

/// Alignment of allocations, as `cuMemAlloc` gives.
const ALIGN: usize = 256;

/// What memory that nothing has written holds: NaN in every element type.
const POISON: u8 = 0xff;

/// In which order ready threads, and blocks, run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// By index: the default, and reproducible bit for bit.
    #[default]
    InOrder,
    /// From the last to the first.
    Reverse,
    /// At random, decided by the seed.
    Random,
}

/// When asynchronous copies into shared memory land.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AsyncCopies {
    /// As late as allowed, so that a missing wait shows as NaN.
    #[default]
    Late,
    /// At once, so that a copy into a buffer still in use shows.
    AtOnce,
    /// Each one way or the other, decided by the seed.
    Random,
}

/// In which order the nodes of a list run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReplayOrder {
    /// As recorded.
    #[default]
    Recorded,
    /// In a random order that keeps every dependency; another one at every replay, decided by this seed.
    Legal(u64),
}

/// How an [`EmulatedDevice`] runs its kernels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmulatedOptions {
    /// Order of threads and blocks.
    pub order: Order,
    /// When asynchronous copies land.
    pub async_copies: AsyncCopies,
    /// Order of the nodes of a list.
    pub replay_order: ReplayOrder,
    /// Decides everything random.
    pub seed: u64,
    /// OS threads for launches whose blocks are independent. Two where there are two cores; one where the order
    /// of floating-point atomics between blocks must be reproducible. The `race` and `count` builds use one.
    pub workers: u32,
    /// Shared memory starts as NaN.
    pub poison: bool,
    /// Block barriers that threads reach from different lines, or after some have exited, are errors.
    pub strict: bool,
    /// SMs that the device reports, and that bound cooperative launches.
    pub sm_count: u32,
    /// What fails on purpose, once; see [`EmulatedDevice::set_fault`]. For tests.
    pub fault: Option<Fault>,
}

impl Default for EmulatedOptions {
    fn default() -> EmulatedOptions {
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32);
        EmulatedOptions {
            order: Order::InOrder,
            async_copies: AsyncCopies::Late,
            replay_order: ReplayOrder::Recorded,
            seed: 1,
            workers: cores.min(2),
            poison: true,
            strict: true,
            sm_count: 4,
            fault: None,
        }
    }
}

/// What this binary's kernels are instrumented for: `"opt"`, `"asan"`, `"race"` or `"count"`. Chosen when building,
/// by `WARPSTEP_EMULATOR`.
pub fn build_kind() -> &'static str {
    ffi::build_kind()
}

/// Bytes of the parameter struct of the kernel `symbol`; `None` if no such kernel was compiled in.
pub fn kernel_params_bytes(symbol: &str) -> Option<usize> {
    ffi::find(symbol).map(|kernel| kernel.params_bytes)
}

/// The emulated device. Clones share everything.
#[derive(Clone)]
pub struct EmulatedDevice {
    shared: Arc<Shared>,
}

/// What the device, its buffers and its streams have in common.
struct Shared {
    options: EmulatedOptions,
    names: Mutex<Names>,
    /// The report of the first failed launch.
    error: Mutex<Option<String>>,
    audits: Mutex<Vec<LaunchAudit>>,
    faults: Mutex<Faults>,
}

/// A poisoned lock means that a thread panicked while holding it; what these locks guard is valid at any time.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EmulatedDevice {
    /// A device of its own: memory, errors and options are shared with no other.
    pub fn new(options: EmulatedOptions) -> Result<EmulatedDevice> {
        if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")) {
            return Err(Error::Device(
                "the emulated kernels need a CPU with AVX2 and FMA (x86-64-v3)".into(),
            ));
        }
        if options.sm_count == 0 || options.workers == 0 {
            return Err(Error::Device(format!(
                "an emulated device needs at least one SM and one worker, not {} and {}",
                options.sm_count, options.workers
            )));
        }
        let faults = Faults::armed(options.fault);
        let shared = Shared {
            options,
            names: Mutex::new(Names::default()),
            error: Mutex::new(None),
            audits: Mutex::new(Vec::new()),
            faults: Mutex::new(faults),
        };
        Ok(EmulatedDevice { shared: Arc::new(shared) })
    }

    /// The options it was made with.
    pub fn options(&self) -> &EmulatedOptions {
        &self.shared.options
    }

    /// Leaves the error state that a failed launch put the device in.
    pub fn reset(&self) {
        *lock(&self.shared.error) = None;
    }

    /// Makes one request to the device fail, counted from now; `None` takes that back. A failed call changes nothing
    /// and leaves the device usable. For tests.
    pub fn set_fault(&self, fault: Option<Fault>) {
        lock(&self.shared.faults).arm(fault);
    }

    /// Device calls since the last [`set_fault`](Self::set_fault), and allocations.
    pub fn requests(&self) -> (u64, u64) {
        lock(&self.shared.faults).requests()
    }

    /// Makes every allocation that would take [`live_bytes`](Self::live_bytes) above `bytes` an internal error: a
    /// memory plan was not kept. For tests.
    pub fn set_planned_bytes(&self, bytes: Option<u64>) {
        lock(&self.shared.faults).planned_bytes = bytes;
    }

    /// Bytes in buffers that are alive now.
    pub fn live_bytes(&self) -> u64 {
        lock(&self.shared.faults).live_bytes
    }

    /// The most that [`live_bytes`](Self::live_bytes) has been.
    pub fn peak_bytes(&self) -> u64 {
        lock(&self.shared.faults).peak_bytes
    }

    /// The traffic of every launch since the last call, in order. Empty except in the `count` build.
    pub fn take_audit(&self) -> Vec<LaunchAudit> {
        std::mem::take(&mut lock(&self.shared.audits))
    }
}

impl Shared {
    /// Fails once a launch has failed, as every call of a CUDA context does.
    fn check(&self) -> Result<()> {
        match &*lock(&self.error) {
            Some(report) => Err(Error::Device(format!("unusable since a launch failed: {report}"))),
            None => Ok(()),
        }
    }

    /// The same at the beginning of every call but an allocation, which may be one that is to fail.
    fn begin(&self, call: &str) -> Result<()> {
        self.check()?;
        lock(&self.faults).call(call)
    }
}

// SAFETY: memory is the host heap's, and what is enqueued runs at once.
unsafe impl Device for EmulatedDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            kind: "emulated",
            name: format!("emulated Hopper ({} build)", build_kind()),
            sm_count: self.shared.options.sm_count,
            memory_bytes: None,
            l2_bytes: None,
        }
    }

    fn alloc(&self, bytes: usize, label: &str) -> Result<Buffer> {
        self.shared.check()?;
        lock(&self.shared.faults).allocation(bytes, label)?;
        let memory = Memory::new(bytes, label, self.shared.clone())?;
        let ptr = memory.ptr;
        lock(&self.shared.names).add_allocation(Span { ptr, bytes }, label);
        // SAFETY: just allocated, and freed by `memory`.
        Ok(unsafe { Buffer::new(ptr, bytes, Arc::new(memory)) })
    }

    fn name_span(&self, span: Span, label: &str) {
        lock(&self.shared.names).name(span, label);
    }

    fn stream(&self) -> Result<Box<dyn Stream>> {
        self.shared.begin("stream")?;
        Ok(Box::new(stream::EmulatedStream::new(self.shared.clone())))
    }
}

/// One allocation. Its own block of the host's heap, so that AddressSanitizer guards both ends.
struct Memory {
    ptr: DevicePtr,
    bytes: usize,
    layout: Layout,
    shared: Arc<Shared>,
}

impl Memory {
    fn new(bytes: usize, label: &str, shared: Arc<Shared>) -> Result<Memory> {
        let out_of_memory = || Error::OutOfMemory {
            what: format!("emulated buffer {label}"),
            requested_bytes: bytes as u64,
            free_bytes: 0,
        };
        let layout = Layout::from_size_align(bytes.max(1), ALIGN).map_err(|_| out_of_memory())?;
        // SAFETY: the size is not zero.
        let start = unsafe { std::alloc::alloc(layout) };
        if start.is_null() {
            return Err(out_of_memory());
        }
        // SAFETY: `start` was just allocated with this size.
        unsafe { start.write_bytes(POISON, layout.size()) };
        lock(&shared.faults).allocated(bytes);
        Ok(Memory { ptr: DevicePtr(start.expose_provenance() as u64), bytes, layout, shared })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        lock(&self.shared.names).remove_allocation(self.ptr);
        lock(&self.shared.faults).freed(self.bytes);
        let start = host_pointer(self.ptr);
        // What one request leaves behind must be of no use to the next.
        // SAFETY: allocated with this layout in `new`, and freed only below.
        unsafe { start.write_bytes(POISON, self.layout.size()) };
        // SAFETY: as above.
        unsafe { std::alloc::dealloc(start, self.layout) };
    }
}

/// Emulated device addresses are host addresses.
fn host_pointer(ptr: DevicePtr) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(ptr.0 as usize)
}
