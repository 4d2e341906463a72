//! What a CUDA device, its buffers, streams and graphs have in common: the driver, the context, the kernels, and
//! what the driver's error codes mean.

use super::modules::Modules;
use super::staging::Ring;
use super::sys::{Context, Driver, NO_DEVICE, OUT_OF_MEMORY, STICKY, SUCCESS, Status};
use super::turns::Turns;
use super::{CudaOptions, DeviceFacts};
use crate::error::{Error, Result};
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Everything that lives as long as the last handle on the device.
pub(super) struct Shared {
    pub driver: Driver,
    pub options: CudaOptions,
    pub facts: DeviceFacts,
    /// The driver's number of the device.
    device: i32,
    context: Context,
    /// The first error after which the context can do nothing more.
    lost: OnceLock<(i32, String)>,
    pub modules: Mutex<Modules>,
    pub ring: Mutex<Ring>,
    pub turns: Mutex<Turns>,
    pub live_bytes: AtomicU64,
}

/// A poisoned lock means that a thread panicked while holding it; what these locks guard is valid at any time.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Takes the device's primary context, which other users of the device in this process share.
    pub fn new(driver: Driver, options: CudaOptions, facts: DeviceFacts, device: i32) -> Result<Shared> {
        let mut context = Context::NULL;
        // SAFETY: `device` came from cuDeviceGet, and `context` is a place for the answer.
        let status = unsafe { driver.cuDevicePrimaryCtxRetain(&mut context, device) };
        if status.code != SUCCESS {
            return Err(match (STICKY.contains(&status.code), status.code) {
                (true, code) => Error::DeviceLost { code, reason: explain(&driver, status) },
                (false, OUT_OF_MEMORY) => {
                    Error::OutOfMemory { what: "the CUDA context".into(), requested_bytes: 0, free_bytes: 0 }
                }
                (false, _) => Error::NoDevice(explain(&driver, status)),
            });
        }
        Ok(Shared {
            driver,
            options,
            facts,
            device,
            context,
            lost: OnceLock::new(),
            modules: Mutex::default(),
            ring: Mutex::default(),
            turns: Mutex::default(),
            live_bytes: AtomicU64::new(0),
        })
    }

    /// Makes the context current on this thread until the guard is dropped. An error once the device is lost.
    pub fn enter(&self) -> Result<Entered<'_>> {
        if let Some((code, reason)) = self.lost.get() {
            return Err(Error::DeviceLost { code: *code, reason: format!("unusable since {reason}") });
        }
        // SAFETY: the context is retained until `self` is dropped.
        let status = unsafe { self.driver.cuCtxPushCurrent_v2(self.context) };
        self.check(status)?;
        Ok(Entered { shared: self, pushed: true, _thread: PhantomData })
    }

    /// The same for clean-up, which goes on whatever fails: freeing must be tried on a lost device too.
    pub fn enter_anyway(&self) -> Entered<'_> {
        // SAFETY: as in `enter`.
        let status = unsafe { self.driver.cuCtxPushCurrent_v2(self.context) };
        Entered { shared: self, pushed: status.code == SUCCESS, _thread: PhantomData }
    }

    /// The error value of a call that failed; remembers one that lost the device.
    pub fn check(&self, status: Status) -> Result<()> {
        self.check_as(status, |code, reason| Error::Driver { call: status.call, code, reason })
    }

    /// The same for a call that launches `kernel`, or prepares it.
    pub fn check_launch(&self, status: Status, kernel: &str) -> Result<()> {
        let kernel = kernel.to_owned();
        self.check_as(status, |code, reason| Error::Launch {
            kernel,
            reason: format!("{}: CUDA error {code} ({reason})", status.call),
        })
    }

    /// The same for a call that takes `bytes` bytes for `what`.
    pub fn check_memory(&self, status: Status, what: &str, bytes: usize) -> Result<()> {
        match status.code {
            OUT_OF_MEMORY => Err(Error::OutOfMemory {
                what: what.into(),
                requested_bytes: bytes as u64,
                free_bytes: self.free_bytes().unwrap_or(0),
            }),
            _ => self.check(status),
        }
    }

    fn check_as(&self, status: Status, other: impl FnOnce(i32, String) -> Error) -> Result<()> {
        let code = status.code;
        if code == SUCCESS {
            return Ok(());
        }
        if code == OUT_OF_MEMORY {
            let free_bytes = self.free_bytes().unwrap_or(0);
            // The driver does not say how much it wanted for a stream, a module or a graph.
            let what = format!("the driver's own use ({})", status.call);
            return Err(Error::OutOfMemory { what, requested_bytes: 0, free_bytes });
        }
        if STICKY.contains(&code) {
            let reason = explain(&self.driver, status);
            self.lost.get_or_init(|| (code, reason.clone()));
            return Err(Error::DeviceLost { code, reason });
        }
        Err(other(code, self.driver.describe(code)))
    }

    /// Free device memory; `None` where the driver does not say. The context must be current.
    pub fn free_bytes(&self) -> Option<u64> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: two places for the answers.
        let status = unsafe { self.driver.cuMemGetInfo_v2(&mut free, &mut total) };
        (status.code == SUCCESS).then_some(free as u64)
    }

    pub fn count_allocated(&self, bytes: usize) {
        self.live_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub fn count_freed(&self, bytes: usize) {
        self.live_bytes.fetch_sub(bytes as u64, Ordering::Relaxed);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let entered = self.enter_anyway();
        lock(&self.ring).free(&self.driver);
        lock(&self.turns).free(self);
        lock(&self.modules).unload(&self.driver);
        drop(entered);
        // Nothing can be done about a context that does not let go.
        // SAFETY: retained once in `new`; every stream, event, graph and buffer held an Arc of `self` and is gone.
        let _ = unsafe { self.driver.cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// The context is current on this thread. The thread's former one is current again when this is dropped: the
/// host program may use the driver too.
pub(super) struct Entered<'a> {
    shared: &'a Shared,
    pushed: bool,
    /// Stays on its thread: what is current is a matter of the thread.
    _thread: PhantomData<*const ()>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = Context::NULL;
            // An error of earlier asynchronous work shows in the next call that can return it.
            // SAFETY: pushed by this thread, which the guard cannot leave.
            let _ = unsafe { self.shared.driver.cuCtxPopCurrent_v2(&mut popped) };
        }
    }
}

/// `cuInit: CUDA error 100 (CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected)`.
pub(super) fn explain(driver: &Driver, status: Status) -> String {
    let Status { call, code } = status;
    match code {
        NO_DEVICE => format!("the driver sees no CUDA device ({call}: CUDA error {code})"),
        _ => format!("{call}: CUDA error {code} ({})", driver.describe(code)),
    }
}
