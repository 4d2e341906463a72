//! Compiles every kernel twice: with the host's C++ compiler for the emulated device, always, and with nvcc to one
//! sm_90a cubin per file, where there is an nvcc. Both go through the same cache, one entry per file, because cargo
//! runs this script as a whole whenever anything under `kernels/` changes. All feature sets of a profile share it.
//!
//! Environment:
//! - `WARPSTEP_EMULATOR=opt|asan|race|count`: what the emulated kernels are instrumented for (default `opt`);
//! - `NVCC`: path of nvcc, or `none` to build without GPU kernels. Otherwise `CUDA_HOME`, `CUDA_PATH`, `.cuda/`
//!   (tools/setup.sh), `PATH` and `/usr/local/cuda` are tried in this order;
//! - `WARPSTEP_REQUIRE_CUBINS=1`: a missing nvcc, a register spill, a stack frame or a slow-code message of ptxas is
//!   an error. CI sets it.

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

type Result<T, E = String> = std::result::Result<T, E>;

/// The release of tools/requirements-cuda.txt; its cubins load on every driver from 580 on.
const PINNED_NVCC: &str = "release 13.0";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // A folder stands for all files in it, new and removed ones included.
    println!("cargo::rerun-if-changed=kernels");
    let names = ["WARPSTEP_EMULATOR", "WARPSTEP_REQUIRE_CUBINS", "NVCC", "CUDA_HOME", "CUDA_PATH"];
    names.iter().for_each(|name| println!("cargo::rerun-if-env-changed={name}"));

    if let Err(error) = build() {
        error.lines().for_each(|line| println!("cargo::error={line}"));
    }
}

fn build() -> Result<()> {
    if (cargo_env("CARGO_CFG_TARGET_ARCH")?, cargo_env("CARGO_CFG_TARGET_OS")?)
        != ("x86_64".into(), "linux".into())
    {
        return Err(
            "warpstep builds for x86_64 Linux only: the emulated device switches fibers in assembly".into()
        );
    }
    let tree = Tree::new(cargo_env("CARGO_MANIFEST_DIR")?.into(), cargo_env("OUT_DIR")?.into())?;
    let emulated = Emulated::new(&tree)?;
    let nvcc = Nvcc::find(&tree)?;

    let mut jobs = emulated.jobs(&tree)?;
    let objects = jobs.len();
    if let Some(nvcc) = &nvcc {
        jobs.extend(tree.sources("kernels", "cu")?.into_iter().map(|source| nvcc.job(&tree, source)));
    }
    let mut built = compile_all(&tree, &jobs)?;
    let cubins = built.split_off(objects);
    emulated.link(&built)?;
    write_cubins(&tree, nvcc.as_ref(), &cubins)
}

/// A variable that cargo sets for every build script.
fn cargo_env(name: &str) -> Result<String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}

fn at(path: &Path) -> impl Fn(std::io::Error) -> String {
    move |error| format!("{}: {error}", path.display())
}

/// Where the sources are and where everything goes.
struct Tree {
    root: PathBuf,
    out: PathBuf,
    /// Compiled kernels. They take minutes and do not depend on features, but cargo has an OUT_DIR for each feature
    /// set; so they are beside those, in the profile's `build` folder. Another version of this package that is built
    /// into the same folder has other kernels, and a cache of its own.
    cache: PathBuf,
}

impl Tree {
    fn new(root: PathBuf, out: PathBuf) -> Result<Tree> {
        let beside = out.ancestors().find(|folder| folder.file_name() == Some(OsStr::new("build")));
        let mut hasher = DefaultHasher::new();
        root.hash(&mut hasher);
        let cache = beside.unwrap_or(&out).join(format!("warpstep-kernels-{:016x}", hasher.finish()));
        fs::create_dir_all(&cache).map_err(at(&cache))?;
        Ok(Tree { root, out, cache })
    }

    /// The files of `folder` with `extension`, sorted; none where the folder is missing.
    fn sources(&self, folder: &str, extension: &str) -> Result<Vec<PathBuf>> {
        let folder = self.root.join(folder);
        if !folder.is_dir() {
            return Ok(Vec::new());
        }
        let mut sources = Vec::new();
        for entry in fs::read_dir(&folder).map_err(at(&folder))? {
            let path = entry.map_err(at(&folder))?.path();
            if path.extension() == Some(OsStr::new(extension)) {
                sources.push(path);
            }
        }
        sources.sort();
        Ok(sources)
    }

    /// Whether `path` is ours: compilers' own headers are covered by the compiler's version.
    fn owns(&self, path: &Path) -> bool {
        path.starts_with(&self.root) && !path.starts_with(self.root.join(".cuda"))
    }
}

/// One source file to compile to one object or cubin.
struct Job {
    source: PathBuf,
    output: PathBuf,
    program: PathBuf,
    args: Vec<OsString>,
    /// Release of the compiler: part of the cache key.
    version: String,
}

/// A compiled file and what the compiler said about it.
struct Built {
    source: PathBuf,
    output: PathBuf,
    log: String,
}

impl Job {
    /// Compiles, unless the output of the same compiler, arguments and file contents is still there.
    fn run(&self, tree: &Tree) -> Result<Built> {
        let [depfile, keyfile, logfile] =
            ["d", "key", "log"].map(|ending| self.output.with_extension(ending));
        let built = |log| Built { source: self.source.clone(), output: self.output.clone(), log };
        if let (Ok(key), Ok(log), true) =
            (fs::read_to_string(&keyfile), fs::read_to_string(&logfile), self.output.is_file())
            && self.key(tree, &depfile).is_ok_and(|now| now == key)
        {
            return Ok(built(log));
        }
        // An interrupted compile must not leave a key that vouches for its output.
        let _ = fs::remove_file(&keyfile);
        // Renamed when whole: with another feature set this script may be compiling the same file at the same time.
        let part = self.output.with_extension(format!("part{}", std::process::id()));
        let mut command = Command::new(&self.program);
        command.args(&self.args).arg("-MMD").arg("-MF").arg(&depfile).arg("-o").arg(&part);
        let output = command.arg(&self.source).output().map_err(at(&self.program))?;
        let log =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        if !output.status.success() {
            return Err(format!("{} does not compile:\n{log}\n", self.source.display()));
        }
        fs::rename(&part, &self.output).map_err(at(&part))?;
        fs::write(&logfile, &log).map_err(at(&logfile))?;
        fs::write(&keyfile, self.key(tree, &depfile)?).map_err(at(&keyfile))?;
        Ok(built(log))
    }

    /// A hash of everything that decides the output; an error while the depfile or a file it names is missing.
    fn key(&self, tree: &Tree, depfile: &Path) -> Result<String> {
        let mut hasher = DefaultHasher::new();
        (&self.program, &self.args, &self.version).hash(&mut hasher);
        let rule = fs::read_to_string(depfile).map_err(at(depfile))?.replace("\\\n", " ");
        let (_, files) = rule.split_once(": ").ok_or_else(|| format!("{}: not a rule", depfile.display()))?;
        for file in files.split_whitespace().map(Path::new).filter(|file| tree.owns(file)) {
            (file, fs::read(file).map_err(at(file))?).hash(&mut hasher);
        }
        Ok(format!("{:016x}", hasher.finish()))
    }
}

/// Runs all jobs on as many threads as cargo allows; the results are in the order of `jobs`.
fn compile_all(tree: &Tree, jobs: &[Job]) -> Result<Vec<Built>> {
    let threads: usize = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(job) = jobs.get(index) else { return done };
            done.push((index, job.run(tree)));
        }
    };
    let mut results = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads.min(jobs.len())).map(|_| scope.spawn(work)).collect();
        let joined: std::thread::Result<Vec<_>> = workers.into_iter().map(|worker| worker.join()).collect();
        joined.map(|results| results.into_iter().flatten().collect::<Vec<_>>())
    })
    .map_err(|_| "a compile thread panicked")?;
    results.sort_by_key(|(index, _)| *index);
    // A mistake in a shared header fails everywhere, and a mistake in a kernel fails in both compilers: tell it once.
    let failed: Vec<&str> =
        results.iter().filter_map(|(_, result)| result.as_ref().err()).map(String::as_str).collect();
    match failed.as_slice() {
        [] => results.into_iter().map(|(_, result)| result).collect(),
        [first] => Err((*first).to_owned()),
        [first, others @ ..] => Err(format!("{first}{} more compilations failed", others.len())),
    }
}

/// The first line of `program --version` that `accept`s; an error names what to do.
fn release(program: &Path, accept: fn(&str) -> bool, advice: &str) -> Result<String> {
    let output = Command::new(program).arg("--version").output();
    let text = output.map_err(|error| format!("cannot run {}: {error}\n{advice}", program.display()))?.stdout;
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().find(|line| accept(line)).map(str::to_owned);
    line.ok_or_else(|| format!("{} --version says nothing of a release\n{advice}", program.display()))
}

/// The host's compiler and what the emulated kernels are instrumented for.
struct Emulated {
    compiler: cc::Tool,
    version: String,
    build: String,
}

impl Emulated {
    fn new(tree: &Tree) -> Result<Emulated> {
        let build = env::var("WARPSTEP_EMULATOR").unwrap_or_else(|_| "opt".into());
        if !["opt", "asan", "race", "count"].contains(&build.as_str()) {
            return Err(format!("WARPSTEP_EMULATOR={build} is not one of opt, asan, race, count"));
        }
        let mut config = Emulated::archiver();
        config.std("c++20").opt_level(2).include(tree.root.join("kernels"));
        // Lines, as in the Rust profile. With all that -g describes, qkv.cu has four times the object, which every test
        // links, and takes a quarter longer.
        config.debug(false).flag("-g1");
        // Not -ffast-math: NaN poison has to live. Kernels reinterpret buffers as freely as nvcc lets them.
        for flag in ["-march=x86-64-v3", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas"] {
            config.flag(flag);
        }
        config.define(&format!("WARPSTEP_EMULATOR_{}", build.to_uppercase()), None);
        let compiler = config.try_get_compiler().map_err(|error| format!("no C++ compiler: {error}"))?;
        let advice = "the emulated device needs a C++20 compiler: install g++ 12 or newer, or set CXX";
        let version = release(compiler.path(), |line| !line.is_empty(), advice)?;
        println!("cargo::rustc-env=WARPSTEP_EMULATOR_BUILD={build}");
        Ok(Emulated { compiler, version, build })
    }

    fn archiver() -> cc::Build {
        let mut config = cc::Build::new();
        config.cpp(true).cpp_link_stdlib(None).warnings(false);
        config
    }

    /// Compiler arguments that check or report every memory access of a kernel. The runtime never gets them.
    fn instrumentation(&self) -> Vec<String> {
        // Large kernels take minutes with their checks inline; calls compile three times as fast.
        let asan = "-fsanitize=address -fno-omit-frame-pointer -g1";
        let asan_calls = "asan-instrumentation-with-call-threshold=300";
        // ThreadSanitizer's hooks without its library: the runtime defines them, to look for races or to count.
        let tsan = "-fsanitize=thread -g1";
        let tsan_calls = "tsan-instrument-func-entry-exit=0";
        let (flags, parameter) = match self.build.as_str() {
            "asan" => (asan, asan_calls),
            "race" | "count" => (tsan, tsan_calls),
            _ => return Vec::new(),
        };
        let clang = self.compiler.is_like_clang();
        let parameter = if clang { format!("-mllvm -{parameter}") } else { format!("--param {parameter}") };
        flags.split(' ').chain(parameter.split(' ')).map(str::to_owned).collect()
    }

    /// The runtime, all kernels, and the kernels with planted bugs that the emulator's own tests run.
    fn jobs(&self, tree: &Tree) -> Result<Vec<Job>> {
        let folder = tree.cache.join(&self.build);
        fs::create_dir_all(&folder).map_err(at(&folder))?;
        let mut jobs = Vec::new();
        for (sources, extension, flags) in [
            ("kernels/emulator", "cpp", Vec::new()),
            ("kernels", "cu", self.instrumentation()),
            ("kernels/emulator/bugs", "cu", self.instrumentation()),
        ] {
            for source in tree.sources(sources, extension)? {
                let output = folder.join(format!("{}-{}.o", sources.replace('/', "-"), stem(&source)));
                let mut args = self.compiler.args().to_vec();
                args.extend(flags.iter().map(OsString::from).chain(["-xc++", "-c"].map(OsString::from)));
                let program = self.compiler.path().to_owned();
                jobs.push(Job { source, output, program, args, version: self.version.clone() });
            }
        }
        Ok(jobs)
    }

    /// Archives the objects and tells cargo how to link them.
    fn link(&self, objects: &[Built]) -> Result<()> {
        for unit in objects {
            unit.log.lines().for_each(|line| println!("cargo::warning={line}"));
        }
        if objects.is_empty() {
            return Ok(());
        }
        // Kernels register themselves in static initialisers, which nothing refers to.
        let mut archive = Emulated::archiver();
        archive.objects(objects.iter().map(|unit| &unit.output)).link_lib_modifier("+whole-archive");
        archive.try_compile("emulated").map_err(|error| error.to_string())?;

        // Static where possible: the binary is carried to machines with another libstdc++.
        match self.library("libstdc++.a") {
            Some(library) => {
                let folder = library.parent().unwrap_or(Path::new("/"));
                println!("cargo::rustc-link-search=native={}", folder.display());
                println!("cargo::rustc-link-lib=static:-bundle=stdc++");
            }
            None => println!("cargo::rustc-link-lib=stdc++"),
        }
        if self.build == "asan" {
            // As part of the executable, AddressSanitizer comes before libc in the search for malloc, and nothing
            // has to be preloaded; rustc's own `-nodefaultlibs` rules out `-fsanitize=address`.
            let library = self.library("libasan.a").ok_or("the asan build needs g++ with its libasan.a")?;
            println!("cargo::rustc-link-arg=-Wl,--whole-archive,{},--no-whole-archive", library.display());
            println!("cargo::rustc-link-arg=-lm");
        }
        Ok(())
    }

    /// A library of the compiler's own; it echoes the bare name when it has none.
    fn library(&self, name: &str) -> Option<PathBuf> {
        let output = self.compiler.to_command().arg(format!("-print-file-name={name}")).output().ok()?;
        let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
        path.is_absolute().then_some(path)
    }
}

/// NVIDIA's compiler, for the GPU's cubins.
struct Nvcc {
    program: PathBuf,
    version: String,
}

impl Nvcc {
    /// `None` where there is no nvcc or none is wanted; both leave a binary without GPU kernels.
    fn find(tree: &Tree) -> Result<Option<Nvcc>> {
        let explicit = env::var_os("NVCC").map(PathBuf::from);
        if explicit.as_deref() == Some(Path::new("none")) {
            return if strict() {
                Err("NVCC=none contradicts WARPSTEP_REQUIRE_CUBINS".into())
            } else {
                Ok(None)
            };
        }
        let toolkits =
            ["CUDA_HOME", "CUDA_PATH"].map(|name| env::var_os(name).map(|path| Path::new(&path).join("bin")));
        let path = env::var_os("PATH").unwrap_or_default();
        let folders = toolkits.into_iter().flatten();
        let folders = folders.chain([tree.root.join(".cuda/nvidia/cu13/bin")]).chain(env::split_paths(&path));
        let found = folders.chain(["/usr/local/cuda/bin".into()]).map(|folder| folder.join("nvcc"));
        let Some(program) = explicit.or_else(|| found.into_iter().find(|program| program.is_file())) else {
            complain(
                "no nvcc: this build has no GPU kernels, it runs on the emulated device. tools/setup.sh installs one \
                 into .cuda/; CUDA_HOME names a toolkit",
            );
            return Ok(None);
        };
        println!("cargo::rerun-if-changed={}", program.display());
        let version = release(&program, |line| line.contains("release"), "is NVCC or CUDA_HOME right?")?;
        if !version.contains(PINNED_NVCC) {
            println!(
                "cargo::warning=kernels are built by '{version}': cubins newer than the driver may not load"
            );
        }
        Ok(Some(Nvcc { program, version }))
    }

    fn job(&self, tree: &Tree, source: PathBuf) -> Job {
        let output = tree.cache.join(stem(&source)).with_extension("cubin");
        let mut args: Vec<OsString> =
            ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-cubin"].map(Into::into).into();
        // Plain sm_90 refuses wgmma and setmaxnreg.
        args.extend(
            ["-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v,-warn-spills", "-I"].map(Into::into),
        );
        args.push(tree.root.join("kernels").into());
        Job { source, output, program: self.program.clone(), args, version: self.version.clone() }
    }
}

fn stem(source: &Path) -> &str {
    source.file_stem().and_then(OsStr::to_str).unwrap_or_default()
}

/// Whether a build without perfect GPU kernels is a failure.
fn strict() -> bool {
    env::var_os("WARPSTEP_REQUIRE_CUBINS").is_some_and(|value| value != "0")
}

fn complain(message: &str) {
    println!("cargo::{}={message}", if strict() { "error" } else { "warning" });
}

/// Writes `cubins.rs`, which `src/device/cubins.rs` includes together with ptxas's own words.
fn write_cubins(tree: &Tree, nvcc: Option<&Nvcc>, cubins: &[Built]) -> Result<()> {
    let version = nvcc.map_or("none", |nvcc| nvcc.version.as_str());
    let (mut images, mut report) = (String::new(), String::new());
    for unit in cubins {
        let module = stem(&unit.source);
        // include_bytes! alone promises no alignment, and an ELF image is read in words.
        let image = format!("&Aligned(*include_bytes!({:?})).0", unit.output.display().to_string());
        let _ = writeln!(images, "    ({module:?}, {{ #[repr(align(64))] struct Aligned<T>(T); {image} }}),");
        let _ = writeln!(report, "== {module}\n{}", unit.log);
        unit.log
            .lines()
            .filter(|line| is_slow(line))
            .for_each(|line| complain(&format!("{module}.cu: {line}")));
    }
    let source = format!(
        "/// The release line of the nvcc that built the cubins, or `none`.\n\
         pub static NVCC_VERSION: &str = {version:?};\n\
         /// File stem and sm_90a image of every kernel file; empty without nvcc.\n\
         pub static CUBINS: &[(&str, &[u8])] = &[\n{images}];\n"
    );
    for (name, text) in [("cubins.rs", source), ("ptxas-report.txt", report)] {
        fs::write(tree.out.join(name), text).map_err(at(&tree.out.join(name)))?;
    }
    Ok(())
}

/// Whether a line of ptxas's report says that a kernel works, but slowly. The (C75nn) messages are mere "info" to
/// ptxas, and -Werror does not cover them: setmaxnreg ignored, wgmma serialised, waits injected.
fn is_slow(line: &str) -> bool {
    let frame = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
    line.contains("(C75") || line.contains("warning") || line.contains("stack frame") && line.trim() != frame
}
