//! Ranges on a profiler's time line (feature `nvtx`, off by default): `request` around `prefill`, `token 7` and `vae`,
//! and in them the labels of the nodes that the host works on, `decode.layer3.qkv`.
//!
//! A list that a GPU replays is one launch to the host: there the labels stand around the calls that built the graph,
//! which is what profilers tie a graph's kernels to. The emulated device runs node by node, and so do its ranges.
//!
//! The library is looked for when the first range begins; where there is none, ranges cost a look at a static.

#[cfg(feature = "nvtx")]
pub(crate) use enabled::range;

/// Does nothing in this build.
#[cfg(not(feature = "nvtx"))]
pub(crate) struct Range;

/// A range called `name` until it is dropped, if the feature is on.
#[cfg(not(feature = "nvtx"))]
pub(crate) fn range<N: AsRef<str>>(_name: impl FnOnce() -> N) -> Range {
    Range
}

#[cfg(feature = "nvtx")]
mod enabled {
    use std::ffi::{CString, c_char, c_int};
    use std::marker::PhantomData;
    use std::sync::OnceLock;

    struct Library {
        push: unsafe extern "C" fn(*const c_char) -> c_int,
        pop: unsafe extern "C" fn() -> c_int,
        _library: libloading::Library,
    }

    fn library() -> Option<&'static Library> {
        static LIBRARY: OnceLock<Option<Library>> = OnceLock::new();
        LIBRARY.get_or_init(load).as_ref()
    }

    fn load() -> Option<Library> {
        // SAFETY: NVIDIA's library, whose initialisers start whatever profiler asked for it.
        let library = unsafe { libloading::Library::new("libnvToolsExt.so.1") }.ok()?;
        // SAFETY: int nvtxRangePushA(const char*), as nvToolsExt.h declares it.
        let push =
            *unsafe { library.get::<unsafe extern "C" fn(*const c_char) -> c_int>(b"nvtxRangePushA\0") }
                .ok()?;
        // SAFETY: int nvtxRangePop(void).
        let pop = *unsafe { library.get::<unsafe extern "C" fn() -> c_int>(b"nvtxRangePop\0") }.ok()?;
        Some(Library { push, pop, _library: library })
    }

    /// Ends when it is dropped, on the thread that began it: ranges are kept by thread.
    pub(crate) struct Range {
        library: Option<&'static Library>,
        _thread: PhantomData<*const ()>,
    }

    pub(crate) fn range<N: AsRef<str>>(name: impl FnOnce() -> N) -> Range {
        let begun = library().and_then(|library| {
            let name = CString::new(name().as_ref()).ok()?;
            // SAFETY: a terminated string, which the call copies.
            unsafe { (library.push)(name.as_ptr()) };
            Some(library)
        });
        Range { library: begun, _thread: PhantomData }
    }

    impl Drop for Range {
        fn drop(&mut self) {
            if let Some(library) = self.library {
                // SAFETY: takes nothing; a range was begun on this thread and ends once.
                unsafe { (library.pop)() };
            }
        }
    }
}
