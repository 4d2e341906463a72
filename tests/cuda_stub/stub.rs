//! Builds the stub, opens it, and reads what it recorded.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use warpstep::conformance;
use warpstep::device::cubins;
use warpstep::device::cuda::{CudaDevice, CudaOptions};
use warpstep::device::emulated::kernel_params_bytes;
use warpstep::ops;

/// The stub in a file of its own, so that what it records is this test's; removed when dropped.
pub struct Stub {
    pub path: PathBuf,
    library: libloading::Library,
    _folder: tempfile::TempDir,
}

/// Compiles the stub, once per process.
fn compiled() -> &'static Path {
    static LIBRARY: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = LIBRARY.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libcuda_stub.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_stub/driver.cpp");
        let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".into());
        let arguments = ["-std=c++17", "-O1", "-Wall", "-shared", "-fPIC", "-o"];
        let output = Command::new(compiler).args(arguments).arg(&path).arg(source).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        (folder, path)
    });
    path
}

/// A folder of images for the stub: of every kernel but the units of conformance, its name and the size of its
/// parameters.
pub fn images() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    FOLDER.get_or_init(|| write_images(&[])).path()
}

/// The same with the units of conformance.
pub fn all_images() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let steps = || conformance::UNITS.iter().flat_map(|unit| unit.symbols());
    FOLDER
        .get_or_init(|| write_images(&steps().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>()))
        .path()
}

fn write_images(conformance: &[&'static str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut modules: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    modules.insert("bugs", vec!["emu_add_one"]);
    modules.insert("bench", vec!["bench_copy", "bench_sum", "bench_fill_bf16", "bench_fill_f32"]);
    for variant in ops::registry().iter().flat_map(|op| op.variants) {
        for (_, kernel) in variant.kernels {
            modules.entry(kernel.module).or_default().push(kernel.symbol);
        }
    }
    modules.insert("conformance", conformance.to_vec());
    for (module, symbols) in modules {
        let mut image = vec![0u8; 64];
        image[..6].copy_from_slice(b"\x7fELF\x02\x01");
        for symbol in symbols {
            let bytes = kernel_params_bytes(symbol).unwrap();
            image.extend(format!("{symbol} {bytes}\n").bytes());
        }
        image.push(0);
        image.extend(cubins::params_tag().bytes());
        std::fs::write(folder.path().join(module).with_extension("cubin"), image).unwrap();
    }
    folder
}

unsafe extern "C" {
    // kernels/emulator/abi.h; only their addresses are taken.
    fn warpstep_emu_find();
    fn warpstep_emu_launch();
}

impl Stub {
    pub fn new() -> Stub {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let folder = tempfile::tempdir().unwrap();
        // A copy is another library to the loader, with state of its own.
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = folder.path().join(format!("libcuda_stub_{number}.so"));
        std::fs::copy(compiled(), &path).unwrap();
        // SAFETY: our own library, whose initialisers do nothing.
        let library = unsafe { libloading::Library::new(&path) }.unwrap();
        Stub { path, library, _folder: folder }
    }

    pub fn options(&self) -> CudaOptions {
        CudaOptions {
            library: Some(self.path.clone()),
            cubins: Some(images().into()),
            ..CudaOptions::default()
        }
    }

    pub fn open(&self) -> warpstep::Result<CudaDevice> {
        CudaDevice::open(self.options())
    }

    /// `key=value,...`: `version`, `count`, `major`, `minor`, `sms`, `l2` and `total` (bytes), `foreign` (bytes of
    /// them that others hold); `fail=N` or `fail_name=NAME`
    /// with `code=C` fails the N-th call from now, or the next of that name.
    pub fn configure(&self, options: &str) {
        let text = CString::new(options).unwrap();
        // SAFETY: the stub's own declaration of this name.
        unsafe {
            self.library.get::<unsafe extern "C" fn(*const c_char)>(b"stub_configure\0").unwrap()(
                text.as_ptr(),
            );
        }
    }

    /// From now on launches run in the emulator that is linked into this process.
    pub fn execute(&self) {
        // SAFETY: the stub's own declaration of this name; both functions live as long as the process.
        unsafe {
            self.library
                .get::<unsafe extern "C" fn(*const c_void, *const c_void)>(b"stub_execute\0")
                .unwrap()(
                warpstep_emu_find as *const c_void, warpstep_emu_launch as *const c_void
            );
        }
    }

    /// Calls since the stub was configured.
    pub fn calls(&self) -> u64 {
        // SAFETY: as above.
        unsafe { self.library.get::<unsafe extern "C" fn() -> u64>(b"stub_calls\0").unwrap()() }
    }

    fn text(&self, symbol: &[u8]) -> String {
        // SAFETY: as above; the text is valid until the stub is called again, and no other thread calls it.
        unsafe {
            let get = self.library.get::<unsafe extern "C" fn() -> *const c_char>(symbol).unwrap();
            CStr::from_ptr(get()).to_str().unwrap().to_owned()
        }
    }

    /// Everything alive, in words.
    pub fn live(&self) -> String {
        self.text(b"stub_live\0")
    }

    /// What was recorded since the last call, one line per driver call; no line may complain.
    pub fn take_log(&self) -> Vec<String> {
        let lines: Vec<String> = self.text(b"stub_log\0").lines().map(str::to_owned).collect();
        // SAFETY: as above.
        unsafe { self.library.get::<unsafe extern "C" fn()>(b"stub_clear\0").unwrap()() };
        if let Some(line) = lines.iter().find(|line| line.contains(" BAD ")) {
            panic!("the stub complains: {line}");
        }
        lines
    }
}

/// The value of `key=value` in a line of the log.
pub fn field<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}
