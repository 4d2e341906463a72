//! The part of the CUDA driver's C interface that this device uses, as `cuda.h` of CUDA 13.0 declares it, and the
//! table of its functions in a library that is opened at run time.
//!
//! A table of our own rather than cudarc's bindings: tests put a recording stub in the driver's place by its path,
//! several in one process, and a symbol that an older driver lacks must be an error. cudarc opens one library per
//! process, found by name only, and panics on a missing symbol. `tests/cuda_abi.rs` holds every declaration here
//! against the header.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};

/// A `CUresult` and the function that returned it.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub(super) struct Status {
    pub call: &'static str,
    pub code: c_int,
}

pub(super) const SUCCESS: c_int = 0;
pub(super) const OUT_OF_MEMORY: c_int = 2;
pub(super) const NO_DEVICE: c_int = 100;
pub(super) const NOT_READY: c_int = 600;

/// Codes after which the context can do nothing more, in any thread: the header says of each that the process must
/// be ended, or the device restarted, to go on.
pub(super) const STICKY: [c_int; 18] = [
    4,   // deinitialized: the process is ending
    214, // uncorrectable ECC error
    220, // uncorrectable NVLink error
    226, // contained error
    700, // illegal address
    702, // launch timeout
    709, // context is destroyed
    710, // device-side assert
    714, // hardware stack error
    715, // illegal instruction
    716, // misaligned address
    717, // invalid address space
    718, // invalid program counter
    719, // launch failed
    721, // tensor memory leak
    810, // MPS client terminated
    911, // external device
    999, // unknown
];

macro_rules! handles {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(transparent)]
        pub(super) struct $name(*mut c_void);

        impl $name {
            pub const NULL: $name = $name(std::ptr::null_mut());
        }

        // SAFETY: a token that only the driver looks behind, and the driver may be called from any thread.
        unsafe impl Send for $name {}
        // SAFETY: as above.
        unsafe impl Sync for $name {}
    )*};
}

handles! {
    /// `CUcontext`.
    Context;
    /// `CUmodule`.
    Module;
    /// `CUfunction`.
    Function;
    /// `CUstream`.
    StreamHandle;
    /// `CUevent`.
    EventHandle;
    /// `CUgraph`.
    Graph;
    /// `CUgraphNode`.
    GraphNode;
    /// `CUgraphExec`.
    GraphExec;
}

pub(super) const ATTRIBUTE_SM_COUNT: c_int = 16;
pub(super) const ATTRIBUTE_L2_BYTES: c_int = 38;
pub(super) const ATTRIBUTE_CAPABILITY_MAJOR: c_int = 75;
pub(super) const ATTRIBUTE_CAPABILITY_MINOR: c_int = 76;

pub(super) const FUNCTION_MAX_DYNAMIC_SHARED_BYTES: c_int = 8;
pub(super) const FUNCTION_SHARED_CARVEOUT_PERCENT: c_int = 9;
pub(super) const FUNCTION_NON_PORTABLE_CLUSTER: c_int = 14;

pub(super) const STREAM_NON_BLOCKING: c_uint = 1;
pub(super) const EVENT_DEFAULT: c_uint = 0;
pub(super) const EVENT_DISABLE_TIMING: c_uint = 2;

pub(super) const LAUNCH_COOPERATIVE: c_uint = 2;
pub(super) const LAUNCH_CLUSTER_DIMENSION: c_uint = 4;
pub(super) const LAUNCH_PROGRAMMATIC_SERIALIZATION: c_uint = 6;

/// `CUlaunchAttributeValue`: 64 bytes, of which the first words hold whatever the attribute is.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(8))]
pub(super) struct LaunchAttributeValue(pub [c_uint; 16]);

/// `CUlaunchAttribute`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct LaunchAttribute {
    pub id: c_uint,
    pub pad: [u8; 4],
    pub value: LaunchAttributeValue,
}

/// `CUlaunchConfig`.
#[derive(Debug)]
#[repr(C)]
pub(super) struct LaunchConfig {
    pub grid: [c_uint; 3],
    pub block: [c_uint; 3],
    pub shared_bytes: c_uint,
    pub stream: StreamHandle,
    pub attributes: *mut LaunchAttribute,
    pub attribute_count: c_uint,
}

const EDGE_PROGRAMMATIC: u8 = 1;
const PORT_PROGRAMMATIC: u8 = 1;

/// `CUgraphEdgeData`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(super) struct EdgeData {
    pub from_port: u8,
    pub to_port: u8,
    pub kind: u8,
    pub reserved: [u8; 5],
}

impl EdgeData {
    /// The later node starts when the earlier one has ended.
    pub const FULL: EdgeData = EdgeData { from_port: 0, to_port: 0, kind: 0, reserved: [0; 5] };

    /// The later kernel may start when every block of the earlier one has triggered or ended, and waits itself.
    pub const PROGRAMMATIC: EdgeData =
        EdgeData { from_port: PORT_PROGRAMMATIC, to_port: 0, kind: EDGE_PROGRAMMATIC, reserved: [0; 5] };
}

/// `CUgraphNodeParams` with a `CUDA_KERNEL_NODE_PARAMS_v3` in its union.
#[derive(Debug)]
#[repr(C)]
pub(super) struct KernelNodeParams {
    /// `CU_GRAPH_NODE_TYPE_KERNEL`, 0.
    pub kind: c_int,
    pub reserved0: [c_int; 3],
    pub function: Function,
    pub grid: [c_uint; 3],
    pub block: [c_uint; 3],
    pub shared_bytes: c_uint,
    pub arguments: *mut *mut c_void,
    pub extra: *mut *mut c_void,
    /// `CUkernel`, looked at only without a function.
    pub kernel: *mut c_void,
    pub context: Context,
    pub rest: [u64; 20],
    pub reserved2: i64,
}

/// `CUDA_GRAPH_INSTANTIATE_PARAMS`.
#[derive(Debug)]
#[repr(C)]
pub(super) struct InstantiateParams {
    pub flags: u64,
    pub upload_stream: StreamHandle,
    pub error_node: GraphNode,
    pub result: c_int,
}

/// Copies the graph to the device at once, on `upload_stream`: the first launch need not.
pub(super) const INSTANTIATE_UPLOAD: u64 = 2;

/// The layout of every struct; `tests/cuda_abi.rs` reads these lines and holds them against the header.
const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<LaunchAttribute>() == 72);
    assert!(offset_of!(LaunchAttribute, value) == 8);
    assert!(size_of::<LaunchConfig>() == 56);
    assert!(offset_of!(LaunchConfig, block) == 12);
    assert!(offset_of!(LaunchConfig, shared_bytes) == 24);
    assert!(offset_of!(LaunchConfig, stream) == 32);
    assert!(offset_of!(LaunchConfig, attributes) == 40);
    assert!(offset_of!(LaunchConfig, attribute_count) == 48);
    assert!(size_of::<EdgeData>() == 8);
    assert!(offset_of!(EdgeData, to_port) == 1);
    assert!(offset_of!(EdgeData, kind) == 2);
    assert!(size_of::<KernelNodeParams>() == 256);
    assert!(offset_of!(KernelNodeParams, function) == 16);
    assert!(offset_of!(KernelNodeParams, grid) == 24);
    assert!(offset_of!(KernelNodeParams, block) == 36);
    assert!(offset_of!(KernelNodeParams, shared_bytes) == 48);
    assert!(offset_of!(KernelNodeParams, arguments) == 56);
    assert!(offset_of!(KernelNodeParams, extra) == 64);
    assert!(offset_of!(KernelNodeParams, kernel) == 72);
    assert!(offset_of!(KernelNodeParams, context) == 80);
    assert!(offset_of!(KernelNodeParams, reserved2) == 248);
    assert!(size_of::<InstantiateParams>() == 32);
    assert!(offset_of!(InstantiateParams, upload_stream) == 8);
    assert!(offset_of!(InstantiateParams, error_node) == 16);
    assert!(offset_of!(InstantiateParams, result) == 24);
};

/// Why a library cannot be used.
pub(super) enum LoadError {
    /// No library of this name, or it does not open.
    Missing(String),
    /// The library lacks a function.
    Symbol(&'static str),
}

macro_rules! functions {
    ($($name:ident($($arg:ident: $type:ty),* $(,)?);)*) => {
        /// The functions of one driver library. Each method calls the C function of its name.
        #[allow(non_snake_case, reason = "the names of the C interface")]
        pub(super) struct Driver {
            /// What was opened.
            pub path: PathBuf,
            $($name: unsafe extern "C" fn($($type),*) -> c_int,)*
        }

        #[allow(non_snake_case, reason = "the names of the C interface")]
        #[allow(clippy::too_many_arguments, reason = "the C interface has as many")]
        impl Driver {
            /// Looks every function up.
            fn bind(path: PathBuf, library: &libloading::Library) -> Result<Driver, LoadError> {
                $(
                    // SAFETY: the type is the one that cuda.h declares for this name; a library that exports
                    // another function by it is not a driver. The library is never closed.
                    let $name = *unsafe {
                        library.get::<unsafe extern "C" fn($($type),*) -> c_int>(
                            concat!(stringify!($name), "\0").as_bytes(),
                        )
                    }
                    .map_err(|_| LoadError::Symbol(stringify!($name)))?;
                )*
                Ok(Driver { path, $($name),* })
            }

            $(
                /// # Safety
                /// As cuda.h says of this function: handles are live ones of this library, pointers are valid for
                /// what it reads and writes, and asynchronous work may still use what it was given.
                pub unsafe fn $name(&self, $($arg: $type),*) -> Status {
                    // SAFETY: the caller's promise.
                    let code = unsafe { (self.$name)($($arg),*) };
                    Status { call: stringify!($name), code }
                }
            )*
        }
    };
}

functions! {
    cuDriverGetVersion(version: *mut c_int);
    cuGetErrorName(code: c_int, text: *mut *const c_char);
    cuGetErrorString(code: c_int, text: *mut *const c_char);
    cuInit(flags: c_uint);
    cuDeviceGetCount(count: *mut c_int);
    cuDeviceGet(device: *mut c_int, ordinal: c_int);
    cuDeviceGetName(name: *mut c_char, bytes: c_int, device: c_int);
    cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int);
    cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int);
    cuDevicePrimaryCtxRetain(context: *mut Context, device: c_int);
    cuDevicePrimaryCtxRelease_v2(device: c_int);
    cuCtxPushCurrent_v2(context: Context);
    cuCtxPopCurrent_v2(context: *mut Context);
    cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    cuMemAlloc_v2(ptr: *mut u64, bytes: usize);
    cuMemFree_v2(ptr: u64);
    cuMemHostAlloc(ptr: *mut *mut c_void, bytes: usize, flags: c_uint);
    cuMemFreeHost(ptr: *mut c_void);
    cuMemcpyHtoDAsync_v2(dst: u64, src: *const c_void, bytes: usize, stream: StreamHandle);
    cuMemcpyDtoHAsync_v2(dst: *mut c_void, src: u64, bytes: usize, stream: StreamHandle);
    cuMemsetD8Async(dst: u64, value: u8, bytes: usize, stream: StreamHandle);
    cuMemsetD2D8Async(
        dst: u64,
        pitch: usize,
        value: u8,
        bytes: usize,
        rows: usize,
        stream: StreamHandle,
    );
    cuStreamCreate(stream: *mut StreamHandle, flags: c_uint);
    cuStreamDestroy_v2(stream: StreamHandle);
    cuStreamSynchronize(stream: StreamHandle);
    cuStreamWaitEvent(stream: StreamHandle, event: EventHandle, flags: c_uint);
    cuEventCreate(event: *mut EventHandle, flags: c_uint);
    cuEventDestroy_v2(event: EventHandle);
    cuEventRecord(event: EventHandle, stream: StreamHandle);
    cuEventQuery(event: EventHandle);
    cuEventSynchronize(event: EventHandle);
    cuEventElapsedTime_v2(milliseconds: *mut f32, start: EventHandle, end: EventHandle);
    cuModuleLoadData(module: *mut Module, image: *const c_void);
    cuModuleUnload(module: Module);
    cuModuleGetFunction(function: *mut Function, module: Module, name: *const c_char);
    cuFuncGetParamInfo(function: Function, index: usize, offset: *mut usize, bytes: *mut usize);
    cuFuncSetAttribute(function: Function, attribute: c_int, value: c_int);
    cuLaunchKernelEx(
        config: *const LaunchConfig,
        function: Function,
        arguments: *mut *mut c_void,
        extra: *mut *mut c_void,
    );
    cuGraphCreate(graph: *mut Graph, flags: c_uint);
    cuGraphDestroy(graph: Graph);
    cuGraphAddNode_v2(
        node: *mut GraphNode,
        graph: Graph,
        dependencies: *const GraphNode,
        edges: *const EdgeData,
        count: usize,
        params: *mut KernelNodeParams,
    );
    cuGraphKernelNodeSetAttribute(node: GraphNode, attribute: c_uint, value: *const LaunchAttributeValue);
    cuGraphInstantiateWithParams(exec: *mut GraphExec, graph: Graph, params: *mut InstantiateParams);
    cuGraphExecNodeSetParams(exec: GraphExec, node: GraphNode, params: *mut KernelNodeParams);
    cuGraphExecDestroy(exec: GraphExec);
    cuGraphLaunch(exec: GraphExec, stream: StreamHandle);
}

/// Names under which the driver installs itself, the usual one first.
const LIBRARY_NAMES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

impl Driver {
    /// Opens `library`, or the installed driver.
    pub fn load(library: Option<&Path>) -> Result<Driver, LoadError> {
        let names = match library {
            Some(path) => vec![path.to_path_buf()],
            None => LIBRARY_NAMES.map(PathBuf::from).to_vec(),
        };
        let mut reasons = Vec::new();
        for name in names {
            // SAFETY: opening a library runs its initialisers; this one is the driver, or what the caller names as
            // such, and its caller vouches for it as for any library that it links.
            match unsafe { libloading::Library::new(&name) } {
                Ok(library) => {
                    // The driver has threads and state of its own that outlive its users: never closed.
                    let library = std::mem::ManuallyDrop::new(library);
                    return Driver::bind(name, &library);
                }
                Err(error) => reasons.push(error.to_string()),
            }
        }
        Err(LoadError::Missing(reasons.swap_remove(0)))
    }

    /// What the driver calls an error: `CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered`.
    pub fn describe(&self, code: c_int) -> String {
        let text = |get: &dyn Fn(*mut *const c_char) -> Status| {
            let mut text = std::ptr::null();
            if get(&mut text).code != SUCCESS || text.is_null() {
                return None;
            }
            // SAFETY: on success the driver gives a terminated string that lives as long as the library.
            Some(unsafe { std::ffi::CStr::from_ptr(text) }.to_string_lossy().into_owned())
        };
        // SAFETY: `text` is a place for a pointer.
        let name = text(&|text| unsafe { self.cuGetErrorName(code, text) });
        // SAFETY: as above.
        let meaning = text(&|text| unsafe { self.cuGetErrorString(code, text) });
        match (name, meaning) {
            (Some(name), Some(meaning)) => format!("{name}: {meaning}"),
            (Some(only), None) | (None, Some(only)) => only,
            (None, None) => "unknown to the driver".into(),
        }
    }
}
