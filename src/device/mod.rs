//! What the executor asks of a device: memory, node lists, replay, events.
//!
//! Two devices implement this: `emulated` (the same `.cu` files on host fibers) and `cuda`. Two more only hand out
//! addresses: `paper`, so that node lists can be counted, and `planning`, so that a model can be planned. The executor
//! never captures streams: it records [`Node`]s with explicit dependencies, and a device turns the [`NodeList`]
//! into whatever it can replay cheaply. Nothing in a node changes between replays: position, token index and
//! lengths live in device memory.
//!
//! This module knows nothing of models or ops.
//!
//! # What is unsafe
//!
//! A kernel does what its parameters and the tables in device memory tell it to, with addresses that are plain numbers,
//! and no device can check that: on the emulated one a wrong number is an access to any memory of the process. Nodes
//! are data, which anybody may make; to run one is unsafe ([`Stream::launch`], [`Stream::instantiate`],
//! [`Executable::set_params`]). So are copies: whoever knows, or guesses, the address of a table could send the next
//! replay anywhere. What devices check all the same (ranges and declared spans in live memory, parameter structs of the
//! right size) finds mistakes and replaces no promise. Handing out memory that is not there, or twice, would break all
//! of them: a [`Device`] is unsafe to implement, and a [`Buffer`] unsafe to make.
//!
//! An engine and its sessions keep these promises for their callers, who need no unsafe code.

pub mod cubins;
pub mod cuda;
pub mod emulated;
mod node;
pub(crate) mod nvtx;
pub mod paper;
pub mod planning;

pub use node::{Geometry, KernelId, MAX_PARAMS_BYTES, Node, NodeList, ParamBytes, Span};

use crate::error::{Error, Result};
use std::any::Any;
use std::sync::Arc;

/// An address in device memory, opaque to the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct DevicePtr(pub u64);

// SAFETY: a transparent u64; every bit pattern is valid and there is no padding.
unsafe impl bytemuck::Pod for DevicePtr {}
// SAFETY: all-zero is the null address.
unsafe impl bytemuck::Zeroable for DevicePtr {}

impl DevicePtr {
    /// "No buffer": kernels test optional pointers against it.
    pub const NULL: DevicePtr = DevicePtr(0);

    /// The address `bytes` further on.
    pub fn offset(self, bytes: usize) -> DevicePtr {
        DevicePtr(self.0 + bytes as u64)
    }
}

/// A device allocation; freed when the last clone is dropped.
#[derive(Clone)]
pub struct Buffer {
    ptr: DevicePtr,
    bytes: usize,
    // The device's own owner of the memory; dropping it frees.
    _owner: Arc<dyn Any + Send + Sync>,
}

impl Buffer {
    /// Wraps memory that `owner` frees on drop. For device implementations.
    ///
    /// # Safety
    /// The range is memory of the device, 256-byte aligned, that nobody else has and that stays until `owner` is
    /// dropped; of a device that runs no kernel it may be addresses alone.
    pub unsafe fn new(ptr: DevicePtr, bytes: usize, owner: Arc<dyn Any + Send + Sync>) -> Buffer {
        Buffer { ptr, bytes, _owner: owner }
    }

    /// Start address.
    pub fn ptr(&self) -> DevicePtr {
        self.ptr
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The whole buffer as a span.
    pub fn span(&self) -> Span {
        Span { ptr: self.ptr, bytes: self.bytes }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({:#x}, {} bytes)", self.ptr.0, self.bytes)
    }
}

/// What `doctor` prints and geometry is computed from.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// `"emulated"` or `"cuda"`.
    pub kind: &'static str,
    /// Human name.
    pub name: String,
    /// Streaming multiprocessors; grids of persistent kernels are sized by it.
    pub sm_count: u32,
    /// Total and free memory in bytes, where known.
    pub memory_bytes: Option<(u64, u64)>,
    /// Size of the L2 cache in bytes, where there is one and it is known.
    pub l2_bytes: Option<u64>,
}

/// A GPU, or something that behaves like one. Shared freely between threads.
///
/// # Safety
/// Buffers of [`alloc`](Self::alloc) are as [`Buffer::new`] wants them, for the streams of [`stream`](Self::stream),
/// and what is enqueued there does as asked: launches run in order, over what they were given. Memory is freed only
/// after what was enqueued over it has run.
pub unsafe trait Device: Send + Sync {
    /// Static facts.
    fn info(&self) -> DeviceInfo;

    /// Allocates `bytes` (256-byte aligned). `label` names the memory in reports and byte audits. Contents are
    /// undefined (tests fill them with NaN).
    fn alloc(&self, bytes: usize, label: &str) -> Result<Buffer>;

    /// Whether memory holds what is written to it. False only of a device that plans; nothing needs to be converted
    /// for one.
    fn holds_data(&self) -> bool {
        true
    }

    /// Gives part of an allocation a name of its own in reports and byte audits. No effect where the device
    /// keeps none.
    fn name_span(&self, span: Span, label: &str);

    /// A new in-order queue. One per session.
    fn stream(&self) -> Result<Box<dyn Stream>>;
}

/// Most bytes of one [`Stream::upload_with`]: 8 MiB. A copy of that size is long enough for a bus to reach its full
/// rate, and a few such pieces are little enough memory to be pinned.
pub const STAGING_BYTES: usize = 8 << 20;

/// The error of an [`Stream::upload_with`] of more than [`STAGING_BYTES`]. For device implementations.
pub fn check_staging(bytes: usize) -> Result<()> {
    match bytes <= STAGING_BYTES {
        true => Ok(()),
        false => Err(Error::Device(format!(
            "upload of {bytes} bytes through staging memory, which holds {STAGING_BYTES}"
        ))),
    }
}

/// An in-order queue of copies, launches and replays. Used by one thread at a time.
pub trait Stream: Send {
    /// Enqueues a host-to-device copy of `bytes` bytes, at most [`STAGING_BYTES`], that `fill` writes where the device
    /// copies them from: a GPU reads pinned memory while the host fills the next piece, and no byte is moved twice on
    /// the host.
    ///
    /// `fill` is called on this thread with as many bytes, of any content, and must write them all; a device that holds
    /// no data need not call it. Its error is returned, and nothing is copied then. It may use other streams of the
    /// device.
    ///
    /// # Safety
    /// Until the copy has run, its range is memory of this device that is not freed, and nothing on another stream
    /// touches what it writes. What it writes breaks no promise of a launch that comes to read it, nor of a replay: a
    /// table stays in range.
    unsafe fn upload_with(
        &mut self,
        dst: DevicePtr,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]) -> Result<()>,
    ) -> Result<()>;

    /// Enqueues a host-to-device copy of any size; `bytes` may be reused when the call returns.
    ///
    /// # Safety
    /// As for [`upload_with`](Self::upload_with).
    unsafe fn upload(&mut self, dst: DevicePtr, bytes: &[u8]) -> Result<()> {
        let mut dst = dst;
        for chunk in bytes.chunks(STAGING_BYTES) {
            let mut fill = |out: &mut [u8]| {
                out.copy_from_slice(chunk);
                Ok(())
            };
            // SAFETY: promised by the caller for all of it.
            unsafe { self.upload_with(dst, chunk.len(), &mut fill) }?;
            dst = dst.offset(chunk.len());
        }
        Ok(())
    }

    /// Copies device memory to the host after everything enqueued before it; blocks.
    ///
    /// # Safety
    /// The range is memory of this device that is not freed meanwhile, nor written by anything on another stream.
    unsafe fn download(&mut self, src: DevicePtr, bytes: &mut [u8]) -> Result<()>;

    /// Enqueues setting every byte of `span` to `byte`.
    ///
    /// # Safety
    /// As for [`upload_with`](Self::upload_with).
    unsafe fn fill(&mut self, span: Span, byte: u8) -> Result<()>;

    /// The same for `rows` ranges like `first`, each `pitch_bytes` after the one before.
    ///
    /// # Safety
    /// As for [`upload_with`](Self::upload_with), for every range.
    unsafe fn fill_rows(&mut self, first: Span, pitch_bytes: usize, rows: usize, byte: u8) -> Result<()> {
        (0..rows).try_for_each(|row| {
            let span = Span { ptr: first.ptr.offset(row * pitch_bytes), bytes: first.bytes };
            // SAFETY: promised by the caller.
            unsafe { self.fill(span, byte) }
        })
    }

    /// Enqueues one node.
    ///
    /// # Safety
    /// Until the launch has ended (the stream was waited for, or the device is in error):
    ///
    /// * Kernel, geometry and parameter struct belong together.
    /// * Every address in the parameters is one of memory of this device that is not freed, and large enough for all
    ///   that the kernel does there with these parameters and with the contents of the tables that it reads: positions,
    ///   sequences and indices lie in range.
    /// * `reads` and `writes` name all of that memory.
    /// * Nothing else, copies on other streams included, writes what the kernel reads or touches what it writes.
    unsafe fn launch(&mut self, node: &Node) -> Result<()>;

    /// Prepares `list` for cheap replays on this stream.
    ///
    /// # Safety
    /// As for [`launch`](Self::launch), for every node and at every replay until the last has ended, and the list's
    /// edges order whatever may not run side by side. [`replay`](Self::replay) is safe because it is promised here:
    /// whoever prepares a list keeps its memory as long as the executable may be replayed, gives the executable and
    /// that memory only to code that keeps the promise too, and sees to it that between replays nothing but values in
    /// range gets into the tables.
    unsafe fn instantiate(&mut self, list: Arc<NodeList>) -> Result<Box<dyn Executable>>;

    /// Enqueues one replay of an executable made by this stream.
    fn replay(&mut self, executable: &dyn Executable) -> Result<()>;

    /// Marks the current end of the queue.
    fn record(&mut self) -> Result<Box<dyn Event>>;

    /// The same with the time at which the stream passes the point; see [`Event::milliseconds_since`].
    fn record_timed(&mut self) -> Result<Box<dyn Event>>;

    /// Waits until everything enqueued has run.
    fn synchronize(&mut self) -> Result<()>;
}

/// Copies of this crate. Safe only in here, where whoever holds a [`Span`] is or works for the owner of its buffer, of
/// the stream's device: a run, a rig, an uploader, a benchmark, a case of `verify`. None of them lets others have
/// streams and spans of its memory, each uses one stream at a time, and tables are written in range: see what says so
/// where each launches.
pub(crate) trait Copies {
    /// [`Stream::upload`] to the beginning of `span`, an error if it is shorter.
    fn put(&mut self, span: Span, bytes: &[u8]) -> Result<()>;

    /// [`Stream::upload_with`] to all of `span`.
    fn put_with(&mut self, span: Span, fill: &mut dyn FnMut(&mut [u8]) -> Result<()>) -> Result<()>;

    /// [`Stream::download`] of the beginning of `span`, an error if it is shorter.
    fn get(&mut self, span: Span, bytes: &mut [u8]) -> Result<()>;

    /// [`Stream::fill`].
    fn set(&mut self, span: Span, byte: u8) -> Result<()>;

    /// [`Stream::fill_rows`].
    fn set_rows(&mut self, first: Span, pitch_bytes: usize, rows: usize, byte: u8) -> Result<()>;
}

fn check_fits(span: Span, bytes: usize) -> Result<()> {
    match bytes <= span.bytes {
        true => Ok(()),
        false => Err(Error::Internal(format!("copy of {bytes} bytes and device memory of {}", span.bytes))),
    }
}

impl Copies for dyn Stream + '_ {
    fn put(&mut self, span: Span, bytes: &[u8]) -> Result<()> {
        check_fits(span, bytes.len())?;
        // SAFETY: see the trait.
        unsafe { self.upload(span.ptr, bytes) }
    }

    fn put_with(&mut self, span: Span, fill: &mut dyn FnMut(&mut [u8]) -> Result<()>) -> Result<()> {
        // SAFETY: see the trait.
        unsafe { self.upload_with(span.ptr, span.bytes, fill) }
    }

    fn get(&mut self, span: Span, bytes: &mut [u8]) -> Result<()> {
        check_fits(span, bytes.len())?;
        // SAFETY: see the trait.
        unsafe { self.download(span.ptr, bytes) }
    }

    fn set(&mut self, span: Span, byte: u8) -> Result<()> {
        // SAFETY: see the trait.
        unsafe { self.fill(span, byte) }
    }

    fn set_rows(&mut self, first: Span, pitch_bytes: usize, rows: usize, byte: u8) -> Result<()> {
        // SAFETY: see the trait.
        unsafe { self.fill_rows(first, pitch_bytes, rows, byte) }
    }
}

/// A prepared node list; what it holds is the device's business.
pub trait Executable: Send {
    /// Gives the node of this index the parameters of `node`, for replays enqueued from now on. An error if anything
    /// else of the node would change: its kernel, its geometry, what it reads and writes.
    ///
    /// # Safety
    /// As for [`Stream::instantiate`], with these parameters: other numbers in the same struct are other addresses.
    unsafe fn set_params(&mut self, index: usize, node: &Node) -> Result<()>;

    /// For the device's own downcast.
    fn as_any(&self) -> &dyn Any;
}

/// A point in a stream's queue.
pub trait Event: Send {
    /// Whether the stream has passed the point; never blocks.
    fn is_done(&self) -> Result<bool>;

    /// Blocks until the stream has passed the point.
    fn wait(&self) -> Result<()>;

    /// Milliseconds between two points made by [`Stream::record_timed`] that the stream has passed, by the device's
    /// own clock. An error if either has no time or belongs to another kind of device.
    fn milliseconds_since(&self, earlier: &dyn Event) -> Result<f64>;

    /// For the device's own downcast.
    fn as_any(&self) -> &dyn Any;
}
