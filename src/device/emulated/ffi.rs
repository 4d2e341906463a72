//! The C interface of the emulator, mirrored from `kernels/emulator/abi.h`, and the only calls into it.

use super::{AsyncCopies, EmulatedOptions, Order};
use crate::device::{Geometry, Span};
use std::ffi::{CStr, CString, c_char, c_void};

#[repr(C)]
struct RawGeometry {
    grid: [u32; 3],
    block: [u32; 3],
    cluster: [u32; 3],
    shared_bytes: u32,
    cooperative: u32,
    dependent: u32,
}

#[repr(C)]
struct RawOptions {
    seed: u64,
    order: u32,
    async_copies: u32,
    workers: u32,
    poison: u32,
    strict: u32,
    sm_count: u32,
}

/// `start..end` of device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(super) struct RawSpan {
    pub start: u64,
    pub end: u64,
}

impl From<Span> for RawSpan {
    fn from(span: Span) -> RawSpan {
        RawSpan { start: span.ptr.0, end: span.ptr.0 + span.bytes as u64 }
    }
}

/// A piece of device memory: an allocation for the `race` build; for `count`, which fills the counters in, what has
/// one name and one set of declarations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Piece {
    pub start: u64,
    pub end: u64,
    pub may_read: u32,
    pub may_write: u32,
    pub read_bytes: u64,
    pub read_unique_bytes: u64,
    pub written_bytes: u64,
    pub written_unique_bytes: u64,
    pub undeclared_bytes: u64,
}

#[repr(C)]
struct RawLaunch {
    kernel: *const c_void,
    params: *const u8,
    params_bytes: u64,
    geometry: RawGeometry,
    options: RawOptions,
    foreign: *const RawSpan,
    foreign_count: u64,
    pieces: *mut Piece,
    piece_count: u64,
}

#[repr(C)]
#[derive(Default)]
struct RawKernelInfo {
    params_bytes: u64,
    max_threads: u32,
}

unsafe extern "C" {
    fn warpstep_emu_find(symbol: *const c_char, info: *mut RawKernelInfo) -> *const c_void;
    fn warpstep_emu_launch(launch: *const RawLaunch, report: *mut c_char, report_bytes: u64) -> i32;
    fn warpstep_emu_build_kind() -> *const c_char;
}

/// A kernel that was compiled in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    entry: *const c_void,
    /// Size of its parameter struct.
    pub params_bytes: usize,
}

// SAFETY: `entry` points to a static that never changes.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// The kernel of this symbol, if one was compiled in.
pub(super) fn find(symbol: &str) -> Option<Kernel> {
    let symbol = CString::new(symbol).ok()?;
    let mut info = RawKernelInfo::default();
    // SAFETY: a terminated string and a place for the answer.
    let entry = unsafe { warpstep_emu_find(symbol.as_ptr(), &mut info) };
    (!entry.is_null()).then_some(Kernel { entry, params_bytes: info.params_bytes as usize })
}

/// One launch.
pub(super) struct Launch<'a> {
    pub kernel: Kernel,
    pub geometry: &'a Geometry,
    pub params: &'a [u8],
    pub options: &'a EmulatedOptions,
    /// What other nodes of the list write, sorted and disjoint.
    pub foreign: &'a [RawSpan],
    /// Sorted and disjoint.
    pub pieces: &'a mut [Piece],
}

/// Runs the launch to its end; the error is the emulator's report.
///
/// # Safety
/// The addresses in `params` must be those of live allocations that the kernel may read and write so, and nothing
/// else may access them meanwhile. A kernel that leaves them corrupts the process, as on a GPU.
pub(super) unsafe fn launch(launch: Launch<'_>) -> Result<(), String> {
    let Launch { kernel, geometry, params, options, foreign, pieces } = launch;
    let raw = RawLaunch {
        kernel: kernel.entry,
        params: params.as_ptr(),
        params_bytes: params.len() as u64,
        geometry: RawGeometry {
            grid: geometry.grid,
            block: geometry.block,
            cluster: geometry.cluster,
            shared_bytes: geometry.shared_bytes,
            cooperative: geometry.cooperative.into(),
            dependent: geometry.dependent.into(),
        },
        options: RawOptions {
            seed: options.seed,
            order: match options.order {
                Order::InOrder => 0,
                Order::Reverse => 1,
                Order::Random => 2,
            },
            async_copies: match options.async_copies {
                AsyncCopies::Late => 0,
                AsyncCopies::AtOnce => 1,
                AsyncCopies::Random => 2,
            },
            workers: options.workers,
            poison: options.poison.into(),
            strict: options.strict.into(),
            sm_count: options.sm_count,
        },
        foreign: foreign.as_ptr(),
        foreign_count: foreign.len() as u64,
        pieces: pieces.as_mut_ptr(),
        piece_count: pieces.len() as u64,
    };
    let mut report = vec![0u8; 8192];
    // SAFETY: every pointer comes with its length and outlives the call; the rest is the caller's promise.
    let failed = unsafe { warpstep_emu_launch(&raw, report.as_mut_ptr().cast(), report.len() as u64) } != 0;
    if !failed {
        return Ok(());
    }
    let end = report.iter().position(|&byte| byte == 0).unwrap_or(report.len());
    Err(String::from_utf8_lossy(&report[..end]).into_owned())
}

/// What the kernels were instrumented for.
pub(super) fn build_kind() -> &'static str {
    // SAFETY: returns a static, terminated string.
    unsafe { CStr::from_ptr(warpstep_emu_build_kind()) }.to_str().unwrap_or("opt")
}
