//! Ranges on a profiler's time line: `request` around `prefill`, `token 7` and `vae`, and in them the labels of the
//! nodes that the host works on, `decode.layer3.qkv`.
//!
//! A list that a GPU replays is one launch to the host: there the labels stand around the calls that built the graph,
//! which is what profilers tie a graph's kernels to. The emulated device runs node by node, and so do its ranges.
//!
//! This is the application's half of NVTX 3, which is a header and no library: a profiler that starts a program names
//! its own library in `NVTX_INJECTION64_PATH`, and that library, given tables of the functions which an application may
//! call, puts its own into those that it wants (NVIDIA/NVTX, `nvtxDetail/nvtxTypes.h` and `nvtxInit.h`). So any build
//! can be profiled, and without a profiler a range costs a look at a static.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

/// `nvtxRangePushA`: copies the name.
type Push = unsafe extern "C" fn(*const c_char) -> c_int;
/// `nvtxRangePop`.
type Pop = unsafe extern "C" fn() -> c_int;

/// Functions of each module, with the one of id 0 that no module has: core, CUDA, OpenCL, CUDA runtime, core 2, sync.
/// A tool may fill in any of them and checks the numbers; we call two.
const FUNCTIONS: [usize; MODULES] = [0, 16, 9, 15, 7, 16, 7];
const MODULES: usize = 7;
const MOST_FUNCTIONS: usize = 16;
const CORE: usize = 1;
const CORE_RANGE_PUSH_A: usize = 9;
const CORE_RANGE_POP: usize = 11;

/// Where tools put their functions.
static SLOTS: [[AtomicPtr<c_void>; MOST_FUNCTIONS]; MODULES] =
    [const { [const { AtomicPtr::new(null_mut()) }; MOST_FUNCTIONS] }; MODULES];

/// What a tool is given: the address of a slot per function, none for id 0 and behind the last.
type Table = [Option<&'static AtomicPtr<c_void>>; MOST_FUNCTIONS + 1];

fn tables() -> &'static [Table; MODULES] {
    static TABLES: OnceLock<[Table; MODULES]> = OnceLock::new();
    TABLES.get_or_init(|| {
        std::array::from_fn(|module| {
            std::array::from_fn(|id| (1..FUNCTIONS[module]).contains(&id).then(|| &SLOTS[module][id]))
        })
    })
}

/// `NvtxExportTableCallbacks`.
#[repr(C)]
struct Callbacks {
    struct_size: usize,
    get_module_function_table: unsafe extern "C" fn(c_uint, *mut *const Table, *mut c_uint) -> c_int,
}

/// `NvtxExportTableVersionInfo`.
#[repr(C)]
struct VersionInfo {
    struct_size: usize,
    version: u32,
    reserved: u32,
    set_injection_version: unsafe extern "C" fn(u32),
}

/// Writes the table of `module` and its length to where the arguments point, unless they are null.
unsafe extern "C" fn get_module_function_table(
    module: c_uint,
    table: *mut *const Table,
    functions: *mut c_uint,
) -> c_int {
    let Some(found) = tables().get(module as usize).filter(|_| module != 0) else { return 0 };
    // SAFETY: null, or the tool's variable for the answer.
    if let Some(table) = unsafe { table.as_mut() } {
        *table = found;
    }
    // SAFETY: as above.
    if let Some(functions) = unsafe { functions.as_mut() } {
        *functions = FUNCTIONS[module as usize] as c_uint;
    }
    1
}

unsafe extern "C" fn set_injection_version(_version: u32) {}

/// `NvtxGetExportTableFunc_t`.
unsafe extern "C" fn get_export_table(id: u32) -> *const c_void {
    static CALLBACKS: Callbacks =
        Callbacks { struct_size: size_of::<Callbacks>(), get_module_function_table };
    static VERSION_INFO: VersionInfo =
        VersionInfo { struct_size: size_of::<VersionInfo>(), version: 3, reserved: 0, set_injection_version };
    match id {
        1 => (&raw const CALLBACKS).cast(),
        3 => (&raw const VERSION_INFO).cast(),
        _ => null(),
    }
}

/// What a profiler wants to be told.
struct Tool {
    push: Push,
    pop: Pop,
}

fn tool() -> Option<&'static Tool> {
    static TOOL: OnceLock<Option<Tool>> = OnceLock::new();
    TOOL.get_or_init(attach).as_ref()
}

/// None where no profiler asks for ranges, or its library cannot be used: as in NVTX, that is no error.
fn attach() -> Option<Tool> {
    type Initialize = unsafe extern "C" fn(unsafe extern "C" fn(u32) -> *const c_void) -> c_int;
    let path = std::env::var_os("NVTX_INJECTION64_PATH").filter(|path| !path.is_empty())?;
    // SAFETY: a library that whoever started this process wants in it; its initialisers are NVIDIA's affair.
    let library = unsafe { libloading::Library::new(path) }.ok()?;
    // SAFETY: int InitializeInjectionNvtx2(NvtxGetExportTableFunc_t), as nvtxTypes.h declares it.
    let initialize = unsafe { library.get::<Initialize>(b"InitializeInjectionNvtx2\0") }.ok()?;
    // SAFETY: what it is given answers as nvtxTypes.h says, for as long as the process lives.
    if unsafe { initialize(get_export_table) } == 0 {
        return None;
    }
    // Its functions are called until the process ends.
    std::mem::forget(library);
    let slot = |id: usize| SLOTS[CORE][id].load(Ordering::Relaxed);
    let (push, pop) = (slot(CORE_RANGE_PUSH_A), slot(CORE_RANGE_POP));
    if push.is_null() || pop.is_null() {
        return None;
    }
    // SAFETY: the tool put functions of these types there, or left null.
    Some(unsafe {
        Tool {
            push: std::mem::transmute::<*mut c_void, Push>(push),
            pop: std::mem::transmute::<*mut c_void, Pop>(pop),
        }
    })
}

/// Ends when it is dropped, on the thread that began it: ranges are kept by thread.
pub(crate) struct Range {
    tool: Option<&'static Tool>,
    _thread: PhantomData<*const ()>,
}

/// A range called `name` until it is dropped, if a profiler listens.
pub(crate) fn range<N: AsRef<str>>(name: impl FnOnce() -> N) -> Range {
    let begun = tool().and_then(|tool| {
        let name = CString::new(name().as_ref()).ok()?;
        // SAFETY: a terminated string, which the call copies.
        unsafe { (tool.push)(name.as_ptr()) };
        Some(tool)
    });
    Range { tool: begun, _thread: PhantomData }
}

impl Drop for Range {
    fn drop(&mut self) {
        if let Some(tool) = self.tool {
            // SAFETY: takes nothing; a range was begun on this thread and ends once.
            unsafe { (tool.pop)() };
        }
    }
}
