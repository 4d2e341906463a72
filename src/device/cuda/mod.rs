//! The CUDA device: the driver's C interface over the kernels' sm_90a images, with no CUDA runtime library.
//!
//! The driver is opened at run time, so that one binary runs with and without a GPU. Node lists become graphs with
//! explicit edges; uploads go through a pinned ring; every code that the driver returns becomes an error value, and
//! one after which the context is dead makes every later call fail with [`Error::DeviceLost`]. **None of this has
//! run on a GPU yet**: `tests/cuda_stub` drives it against a stub of the driver's library that records, and runs what it
//! is given in the emulator.
//!
//! The calling thread's own current context is put back after every call, since the host program may use the
//! driver too. Dropping the last handle frees everything and never fails.

mod graph;
mod modules;
mod shared;
mod staging;
mod stream;
mod sys;
mod turns;

use super::{Buffer, Copies, Device, DeviceInfo, DevicePtr, Span, Stream, cubins};
use crate::error::{Error, Result};
use shared::{Shared, explain};
use std::ffi::{c_char, c_int};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use sys::{Driver, LoadError, SUCCESS, Status};

/// The oldest driver that loads images of CUDA 13.0, as `cuDriverGetVersion` counts: 580 and newer.
const MINIMUM_DRIVER: c_int = 13_000;

/// The only compute capability that runs sm_90a images: H100, H200.
const CAPABILITY: (u32, u32) = (9, 0);

/// How a [`CudaDevice`] is opened.
#[derive(Clone, Debug)]
pub struct CudaOptions {
    /// Number of the device among those that the driver shows (`CUDA_VISIBLE_DEVICES`).
    pub ordinal: u32,
    /// The driver's library; default: the installed `libcuda.so.1`. Tests put a stub here.
    pub library: Option<PathBuf>,
    /// Folder of `MODULE.cubin` files to use instead of the embedded images of the same names: kernels can be changed on
    /// a machine without Rust (kernels/README.md). They must be compiled with this program's `params.h`.
    pub cubins: Option<PathBuf>,
    /// Let kernels that are built for it start before their predecessors end. Off, every edge waits for the end.
    pub dependent_launch: bool,
    /// Per cent of an SM's shared memory and L1 together that every kernel prefers as shared memory, at most 100; `None`
    /// leaves it to the driver. Where it differs from kernel to kernel, an SM must be idle to change it.
    pub shared_carveout: Option<u8>,
    /// Fill every allocation with NaN before it is handed out: for tests of isolation, at the cost of writing all
    /// memory once.
    pub poison: bool,
}

impl Default for CudaOptions {
    fn default() -> CudaOptions {
        CudaOptions {
            ordinal: 0,
            library: None,
            cubins: None,
            dependent_launch: true,
            shared_carveout: None,
            poison: false,
        }
    }
}

/// What the driver says of itself and of one device.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct DeviceFacts {
    /// Newest CUDA release that the driver supports, e.g. (13, 0).
    pub driver_cuda: (u32, u32),
    /// Devices that the driver shows.
    pub devices: u32,
    /// The device's marketing name.
    pub name: String,
    /// Compute capability, e.g. (9, 0).
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// Device memory in bytes.
    pub memory_bytes: u64,
    /// L2 cache in bytes.
    pub l2_bytes: u64,
}

/// A GPU. Clones share everything; the last one to go, buffers and streams included, frees it.
#[derive(Clone)]
pub struct CudaDevice {
    shared: Arc<Shared>,
}

/// What a device is, without taking a context on it: also of devices that cannot run the kernels.
///
/// [`Error::NoDevice`] where there is no driver, no such device, or the driver is too old to ask.
pub fn probe(options: &CudaOptions) -> Result<DeviceFacts> {
    find(options).map(|(_, facts, _)| facts)
}

/// Opens the driver and looks at the device.
fn find(options: &CudaOptions) -> Result<(Driver, DeviceFacts, c_int)> {
    let driver = Driver::load(options.library.as_deref()).map_err(|error| {
        Error::NoDevice(match error {
            LoadError::Missing(reason) => format!("no NVIDIA driver ({reason})"),
            LoadError::Symbol(name) => {
                format!("the NVIDIA driver is too old: it has no {name}; CUDA 13.0 (driver 580) or newer is needed")
            }
        })
    })?;
    let check = |status: Status| match status.code {
        SUCCESS => Ok(()),
        _ => Err(Error::NoDevice(explain(&driver, status))),
    };
    let mut version = 0;
    // SAFETY: a place for the answer; this call needs no initialisation.
    check(unsafe { driver.cuDriverGetVersion(&mut version) })?;
    let release = (version.unsigned_abs() / 1000, version.unsigned_abs() % 1000 / 10);
    if version < MINIMUM_DRIVER {
        return Err(Error::NoDevice(format!(
            "the NVIDIA driver is too old: it supports CUDA {}.{}; CUDA 13.0 (driver 580) or newer is needed",
            release.0, release.1
        )));
    }
    // SAFETY: takes no pointers.
    check(unsafe { driver.cuInit(0) })?;
    let mut devices = 0;
    // SAFETY: a place for the answer.
    check(unsafe { driver.cuDeviceGetCount(&mut devices) })?;
    let ordinal = c_int::try_from(options.ordinal).unwrap_or(c_int::MAX);
    if devices <= 0 {
        return Err(Error::NoDevice("the driver sees no CUDA device".into()));
    }
    if ordinal >= devices {
        return Err(Error::NoDevice(format!(
            "device {} was asked for, and the driver shows {devices}, counted from 0",
            options.ordinal
        )));
    }
    let mut device = 0;
    // SAFETY: a place for the answer.
    check(unsafe { driver.cuDeviceGet(&mut device, ordinal) })?;
    let mut name = [0 as c_char; 128];
    // SAFETY: room for 128 bytes, of which the last stays zero.
    check(unsafe { driver.cuDeviceGetName(name.as_mut_ptr(), 127, device) })?;
    let bytes: Vec<u8> = name.iter().take_while(|&&byte| byte != 0).map(|&byte| byte as u8).collect();
    let attribute = |which: c_int| {
        let mut value = 0;
        // SAFETY: a place for the answer.
        check(unsafe { driver.cuDeviceGetAttribute(&mut value, which, device) })?;
        Ok(u32::try_from(value).unwrap_or(0))
    };
    let capability =
        (attribute(sys::ATTRIBUTE_CAPABILITY_MAJOR)?, attribute(sys::ATTRIBUTE_CAPABILITY_MINOR)?);
    let sm_count = attribute(sys::ATTRIBUTE_SM_COUNT)?;
    let l2_bytes = attribute(sys::ATTRIBUTE_L2_BYTES)?.into();
    let mut memory = 0;
    // SAFETY: a place for the answer.
    check(unsafe { driver.cuDeviceTotalMem_v2(&mut memory, device) })?;
    let facts = DeviceFacts {
        driver_cuda: release,
        devices: devices.unsigned_abs(),
        name: String::from_utf8_lossy(&bytes).into_owned(),
        capability,
        sm_count,
        memory_bytes: memory as u64,
        l2_bytes,
    };
    Ok((driver, facts, device))
}

impl CudaDevice {
    /// Opens a device. [`Error::NoDevice`] says in one sentence why this machine or this build has none.
    pub fn open(options: CudaOptions) -> Result<CudaDevice> {
        let (driver, facts, device) = find(&options)?;
        let (major, minor) = facts.capability;
        if facts.capability != CAPABILITY {
            return Err(Error::NoDevice(format!(
                "{} has compute capability {major}.{minor}; the kernels run on 9.0 only (H100, H200)",
                facts.name
            )));
        }
        if options.cubins.is_none() && cubins::CUBINS.is_empty() {
            return Err(Error::NoDevice(
                "this build embeds no GPU kernels: no nvcc was found when it was built (tools/setup.sh installs one)"
                    .into(),
            ));
        }
        options.cubins.as_deref().map_or(Ok(()), modules::check_folder)?;
        Ok(CudaDevice { shared: Arc::new(Shared::new(driver, options, facts, device)?) })
    }

    /// What the driver says of the device.
    pub fn facts(&self) -> &DeviceFacts {
        &self.shared.facts
    }

    /// Bytes in buffers that are alive now. What the driver takes for itself is not in it.
    pub fn live_bytes(&self) -> u64 {
        self.shared.live_bytes.load(Ordering::Relaxed)
    }
}

impl std::fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CudaDevice({}, {})", self.shared.facts.name, self.shared.driver.path.display())
    }
}

// SAFETY: memory and streams are the driver's.
unsafe impl Device for CudaDevice {
    fn info(&self) -> DeviceInfo {
        let facts = &self.shared.facts;
        let free = self.shared.enter().ok().and_then(|_entered| self.shared.free_bytes());
        DeviceInfo {
            kind: "cuda",
            name: facts.name.clone(),
            sm_count: facts.sm_count,
            memory_bytes: free.map(|free| (facts.memory_bytes, free)),
            l2_bytes: Some(facts.l2_bytes).filter(|&bytes| bytes > 0),
        }
    }

    fn alloc(&self, bytes: usize, label: &str) -> Result<Buffer> {
        let shared = &self.shared;
        let _entered = shared.enter()?;
        let mut ptr = 0;
        // SAFETY: a place for the answer. The driver refuses 0 bytes.
        let status = unsafe { shared.driver.cuMemAlloc_v2(&mut ptr, bytes.max(1)) };
        shared.check_memory(status, label, bytes)?;
        shared.count_allocated(bytes);
        let memory = Memory { ptr, bytes, shared: shared.clone() };
        if shared.options.poison {
            let mut stream = self.stream()?;
            stream.set(Span { ptr: DevicePtr(ptr), bytes }, 0xff)?;
            stream.synchronize()?;
        }
        // SAFETY: just allocated, and freed by `memory`.
        Ok(unsafe { Buffer::new(DevicePtr(ptr), bytes, Arc::new(memory)) })
    }

    fn name_span(&self, _span: Span, _label: &str) {}

    fn stream(&self) -> Result<Box<dyn Stream>> {
        Ok(Box::new(stream::CudaStream::new(self.shared.clone())?))
    }
}

/// One allocation.
struct Memory {
    ptr: u64,
    bytes: usize,
    shared: Arc<Shared>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _entered = self.shared.enter_anyway();
        // SAFETY: allocated in `alloc` and freed once; the driver waits for work that was enqueued before.
        let _ = unsafe { self.shared.driver.cuMemFree_v2(self.ptr) };
        self.shared.count_freed(self.bytes);
    }
}
