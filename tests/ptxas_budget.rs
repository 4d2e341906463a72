//! What nvcc made of the kernels, judged without a GPU: nothing in local memory, and no more static shared memory
//! than a launch may have without asking. Registers are bounded by each kernel's launch bounds: too many show up here
//! as spills.

use std::collections::BTreeSet;
use std::path::Path;
use warpstep::device::cubins::{self, KernelResources};

const MAX_STATIC_SHARED_BYTES: u32 = 48 * 1024;

/// Whether there is nothing to judge, as in a build without nvcc; CI builds with one.
fn no_cubins() -> bool {
    let none = cubins::CUBINS.is_empty();
    assert!(!none || std::env::var_os("CI").is_none(), "CI has no cubins: did tools/setup.sh run?");
    if none {
        println!("skipped: built without nvcc (tools/setup.sh installs one)");
    }
    none
}

/// What is wrong with one kernel.
fn complaint(kernel: &KernelResources) -> Option<String> {
    let local = [kernel.stack_bytes, kernel.spill_store_bytes, kernel.spill_load_bytes];
    let what = if local != [0; 3] {
        format!("stack frame, spill stores and spill loads are {local:?} bytes")
    } else if kernel.registers == 0 {
        "ptxas reported no registers".to_owned()
    } else if kernel.shared_bytes > MAX_STATIC_SHARED_BYTES {
        format!("{} bytes of static shared memory", kernel.shared_bytes)
    } else {
        return None;
    };
    Some(format!("{}.cu: {}: {what}", kernel.module, kernel.symbol))
}

#[test]
fn every_kernel_keeps_to_registers() {
    if no_cubins() {
        return;
    }
    let found: Vec<String> = cubins::resources().iter().filter_map(complaint).collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

/// The images hold what the sources define: a kernel that only one of the two compilers saw would be a hole.
#[test]
fn every_kernel_of_the_sources_is_in_a_cubin() {
    if no_cubins() {
        return;
    }
    let mut expected = BTreeSet::new();
    for entry in std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "cu") {
            let module = path.file_stem().unwrap().to_str().unwrap();
            let source = std::fs::read_to_string(&path).unwrap();
            let defined = source.lines().filter_map(|line| line.strip_prefix("KERNEL(")?.split_once(','));
            expected.extend(defined.map(|(symbol, _)| format!("{module}: {symbol}")));
        }
    }
    let found: BTreeSet<String> =
        cubins::resources().iter().map(|kernel| format!("{}: {}", kernel.module, kernel.symbol)).collect();
    assert_eq!(found, expected);
}

/// The products over packed weights: two blocks of 256 threads per SM in registers, so that a launch's first loads are
/// under way while its predecessor ends, and no more static shared memory than the 2 KB that geometry leaves of an SM's
/// 227 (`kSharedBytes` in stream.cuh is 225); tensor-core tiles one block.
#[test]
fn packed_products_fit_an_sm_as_designed() {
    if no_cubins() {
        return;
    }
    let resources = cubins::resources();
    for op in ["qkv", "o_proj", "gate_up", "down", "out_proj", "linear", "lm_head"] {
        // 12 warps of mma begin with 168 registers per thread, and share them out.
        for (variant, registers, shared) in [("stream", 128, 2048), ("ring", 128, 2048), ("mma", 168, 1024)] {
            if variant == "mma" && ["out_proj", "lm_head"].contains(&op) {
                continue;
            }
            let symbol = format!("{op}_{variant}_bf16");
            let kernel =
                resources.iter().find(|k| k.symbol == symbol).unwrap_or_else(|| panic!("no {symbol}"));
            println!("{symbol}: {} registers, {} bytes", kernel.registers, kernel.shared_bytes);
            assert!(kernel.registers <= registers, "{symbol}: {} registers", kernel.registers);
            assert!(
                kernel.shared_bytes <= shared,
                "{symbol}: {} bytes of shared memory",
                kernel.shared_bytes
            );
        }
    }
}

#[test]
fn a_wasteful_kernel_is_found() {
    let good = KernelResources { registers: 128, shared_bytes: 1024, ..KernelResources::default() };
    assert_eq!(complaint(&good), None);
    for bad in [
        KernelResources { stack_bytes: 8, ..good.clone() },
        KernelResources { spill_store_bytes: 4, ..good.clone() },
        KernelResources { spill_load_bytes: 4, ..good.clone() },
        KernelResources { shared_bytes: MAX_STATIC_SHARED_BYTES + 1, ..good.clone() },
        KernelResources { registers: 0, ..good.clone() },
    ] {
        assert!(complaint(&bad).is_some(), "{bad:?}");
    }
}
