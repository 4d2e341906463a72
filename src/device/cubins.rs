//! The GPU images that the build embedded, and what ptxas said of each kernel. Empty in a build without nvcc.

use std::sync::LazyLock;

include!(concat!(env!("OUT_DIR"), "/cubins.rs"));

/// What the assembler gave one kernel: a budget that needs no GPU to check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelResources {
    /// Stem of the `.cu` file.
    pub module: String,
    /// Symbol of the kernel.
    pub symbol: String,
    /// Registers per thread.
    pub registers: u32,
    /// Static shared memory per block; dynamic memory comes on top.
    pub shared_bytes: u32,
    /// Local-memory frame per thread: what could not stay in registers.
    pub stack_bytes: u32,
    /// Register spills per thread.
    pub spill_store_bytes: u32,
    /// Register reloads per thread.
    pub spill_load_bytes: u32,
}

/// The image of the kernels of one `.cu` file.
pub fn cubin(module: &str) -> Option<&'static [u8]> {
    CUBINS.iter().find(|(name, _)| *name == module).map(|(_, image)| *image)
}

/// What every image of this program's parameter structs holds somewhere: see the end of `kernels/params.h`.
pub fn params_tag() -> String {
    format!("{PARAMS_TAG}{}", params_hash(include_str!("../../kernels/params.h")).unwrap_or_default())
}

/// What stands before the hash in an image (`kernels/dev.cuh`).
pub(super) const PARAMS_TAG: &str = "warpstep params.h ";

/// The hash that a `params.h` gives itself.
fn params_hash(header: &str) -> Option<&str> {
    let line = header.lines().find_map(|line| line.strip_prefix("#define WARPSTEP_PARAMS_HASH \""));
    line?.strip_suffix('"')
}

/// What ptxas gave every kernel, by file and then in the file's order; empty without nvcc.
pub fn resources() -> &'static [KernelResources] {
    static RESOURCES: LazyLock<Vec<KernelResources>> =
        LazyLock::new(|| parse_report(include_str!(concat!(env!("OUT_DIR"), "/ptxas-report.txt"))));
    &RESOURCES
}

/// Reads the output of `ptxas -v`, one file after another under `== file` lines. Of every kernel it names the entry,
/// then stack and spills, then registers and shared memory; a number it leaves out is 0.
fn parse_report(report: &str) -> Vec<KernelResources> {
    let mut module = "";
    let mut kernels: Vec<KernelResources> = Vec::new();
    for line in report.lines() {
        if let Some(name) = line.strip_prefix("== ") {
            module = name;
        } else if let Some((_, entry)) = line.split_once("Compiling entry function '") {
            let symbol = entry.split('\'').next().unwrap_or_default().to_owned();
            kernels.push(KernelResources { module: module.into(), symbol, ..KernelResources::default() });
        } else if let Some(kernel) = kernels.last_mut() {
            read_line(kernel, line);
        }
    }
    kernels
}

/// `0 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads` or
/// `ptxas info    : Used 40 registers, used 1 barriers, 48 bytes smem`.
fn read_line(kernel: &mut KernelResources, line: &str) {
    for part in line.trim_start_matches("ptxas info    : ").split(',') {
        let words: Vec<&str> = part.split_whitespace().collect();
        let (count, slot) = match words[..] {
            ["Used", count, "registers"] => (count, &mut kernel.registers),
            [count, "bytes", "smem"] => (count, &mut kernel.shared_bytes),
            [count, "bytes", "stack", "frame"] => (count, &mut kernel.stack_bytes),
            [count, "bytes", "spill", "stores"] => (count, &mut kernel.spill_store_bytes),
            [count, "bytes", "spill", "loads"] => (count, &mut kernel.spill_load_bytes),
            _ => continue,
        };
        // A number that does not parse must not look like a good one.
        *slot = count.parse().unwrap_or(u32::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_images_were_compiled_with_this_params_h() {
        let tag = params_tag();
        let hash = tag.strip_prefix(PARAMS_TAG).unwrap();
        assert!(hash.len() == 16 && hash.bytes().all(|b| b.is_ascii_hexdigit()), "{tag}");
        for (module, image) in CUBINS {
            assert!(image.windows(tag.len()).any(|bytes| bytes == tag.as_bytes()), "{module}");
        }
    }

    const REPORT: &str = "\
== gemv
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'gemv_bf16' for 'sm_90a'
ptxas info    : Function properties for gemv_bf16
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 48 bytes smem
ptxas info    : Compile time = 12.3 ms
ptxas info    : Compiling entry function 'gemv_f32' for 'sm_90a'
ptxas info    : Function properties for gemv_f32
    16 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
== embed
ptxas info    : Compiling entry function 'embed_f32' for 'sm_90a'
ptxas info    : Used 9 registers, used 0 barriers
";

    #[test]
    fn a_report_names_registers_memory_and_spills() {
        let kernels = parse_report(REPORT);
        let figures: Vec<_> = kernels
            .iter()
            .map(|k| {
                let spills = [k.stack_bytes, k.spill_store_bytes, k.spill_load_bytes];
                (k.module.as_str(), k.symbol.as_str(), k.registers, k.shared_bytes, spills)
            })
            .collect();
        assert_eq!(
            figures,
            [
                ("gemv", "gemv_bf16", 40, 48, [0; 3]),
                ("gemv", "gemv_f32", 255, 0, [16, 24, 32]),
                ("embed", "embed_f32", 9, 0, [0; 3]),
            ]
        );
    }

    #[test]
    fn an_unreadable_number_is_not_a_small_one() {
        let kernels = parse_report(&REPORT.replace("Used 9 registers", "Used many registers"));
        assert_eq!(kernels[2].registers, u32::MAX);
    }

    #[test]
    fn images_are_elf_and_every_one_has_kernels() {
        for (module, image) in CUBINS {
            assert!(image.starts_with(b"\x7fELF"), "{module} is not an ELF image");
            assert_eq!(image.as_ptr().align_offset(64), 0, "{module} is not aligned");
            assert!(
                resources().iter().any(|kernel| kernel.module == *module),
                "ptxas named no kernel of {module}"
            );
        }
        assert_eq!(CUBINS.is_empty(), NVCC_VERSION == "none");
    }
}
