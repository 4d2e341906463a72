//! What became of every kernel that was written for speed, as far as that shows without a GPU: resources from ptxas's
//! report, blocks per SM computed from them, and instructions from the disassembled image. One row per kernel; a
//! kernel of the registry that is not called `plain` and has no row fails, and the message has the row to start from.
//!
//! The disassembler comes with `tools/setup.sh`. Without it, or without an nvcc, the tests say so and pass, except
//! under CI.

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use warpstep::device::cubins::{self, KernelResources};
use warpstep::ops::registry;

/// How a kernel is meant to fetch what there is most of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loads {
    /// 16 bytes per thread: `LDG.E.128`.
    Wide,
    /// 16 bytes per thread past the registers: `LDGSTS.E.128`.
    Async,
    /// Bulk copies by one thread: `UBLKCP`.
    Bulk,
}

/// What a kernel was designed to be.
struct Fast {
    symbol: &'static str,
    /// Threads per block as launched.
    threads: u32,
    /// Dynamic shared memory at the 14B's shapes, in bytes.
    dynamic_shared: u32,
    /// Blocks that an SM must be able to hold.
    blocks_per_sm: u32,
    loads: Loads,
    /// Whether it multiplies on tensor cores; where it does not, it must not either.
    tensor_cores: bool,
    /// Whether it asks for weights before it waits for the launches before it.
    early: bool,
    /// Instructions before that wait among which the last fetch must be.
    window: usize,
}

impl Fast {
    /// Of a kernel that has nothing to ask for before its predecessors have ended, or has full edges to them.
    const fn late(self) -> Fast {
        Fast { early: false, ..self }
    }

    /// Of a kernel with more than [`EARLY`] instructions between its last fetch and the wait.
    const fn within(self, window: usize) -> Fast {
        Fast { window, ..self }
    }
}

const fn fast(
    symbol: &'static str,
    threads: u32,
    dynamic_shared: u32,
    blocks_per_sm: u32,
    loads: Loads,
    tensor_cores: bool,
) -> Fast {
    Fast { symbol, threads, dynamic_shared, blocks_per_sm, loads, tensor_cores, early: true, window: EARLY }
}

/// Symbol, threads, dynamic shared bytes, blocks per SM, loads, tensor cores.
const TABLE: &[Fast] = &[
    fast("qkv_tile_f32", 256, 0, 2, Loads::Wide, false).late(),
    fast("qkv_tile_bf16", 256, 0, 2, Loads::Wide, false).late(),
    fast("attention_splitkv_f32", 256, 0, 2, Loads::Wide, false).late(),
    fast("attention_splitkv_bf16", 256, 0, 2, Loads::Wide, false).late(),
    fast("o_proj_tile_f32", 256, 0, 2, Loads::Wide, false).late(),
    fast("o_proj_tile_bf16", 256, 0, 2, Loads::Wide, false).late(),
    fast("gate_up_tile_f32", 256, 0, 2, Loads::Wide, false).late(),
    fast("gate_up_tile_bf16", 256, 0, 2, Loads::Wide, false).late(),
    fast("down_tile_f32", 256, 0, 2, Loads::Wide, false).late(),
    fast("down_tile_bf16", 256, 0, 2, Loads::Wide, false).late(),
    fast("linear_tile_f32", 256, 0, 2, Loads::Wide, false).late(),
    fast("linear_tile_bf16", 256, 0, 2, Loads::Wide, false).late(),
    fast("qkv_stream_bf16", 256, 20608, 2, Loads::Wide, true),
    fast("qkv_ring_bf16", 256, 102528, 2, Loads::Bulk, true),
    fast("qkv_mma_bf16", 384, 196_608, 1, Loads::Bulk, true),
    fast("o_proj_stream_bf16", 256, 20608, 2, Loads::Wide, true),
    fast("o_proj_ring_bf16", 256, 102528, 2, Loads::Bulk, true),
    fast("o_proj_mma_bf16", 384, 196_608, 1, Loads::Bulk, true),
    fast("gate_up_stream_bf16", 256, 20608, 2, Loads::Wide, true),
    fast("gate_up_ring_bf16", 256, 102528, 2, Loads::Bulk, true),
    fast("gate_up_mma_bf16", 384, 196_608, 1, Loads::Bulk, true),
    fast("down_stream_bf16", 256, 55424, 2, Loads::Wide, true),
    fast("down_ring_bf16", 256, 186496, 1, Loads::Bulk, true),
    fast("down_mma_bf16", 384, 196_608, 1, Loads::Bulk, true),
    fast("out_proj_stream_bf16", 256, 20608, 2, Loads::Wide, true),
    fast("out_proj_ring_bf16", 256, 102528, 2, Loads::Bulk, true),
    fast("linear_stream_bf16", 256, 20608, 2, Loads::Wide, true),
    fast("linear_ring_bf16", 256, 102528, 2, Loads::Bulk, true),
    fast("linear_mma_bf16", 384, 196_608, 1, Loads::Bulk, true),
    fast("lm_head_stream_bf16", 256, 20608, 2, Loads::Wide, true),
    fast("lm_head_ring_bf16", 256, 102528, 2, Loads::Bulk, true),
    fast("flow_modulation_mma_bf16", 256, 175_616, 1, Loads::Wide, true),
    fast("flow_ring_bf16", 320, 223_664, 1, Loads::Bulk, true).late(),
    fast("attention_mma_flash_bf16", 128, 87_040, 2, Loads::Async, true).late(),
    // What it asks for ahead, qkv's weights would push out of L2 before the wait.
    fast("attention_mma_splitkv_bf16", 128, 73_984, 2, Loads::Async, true).late(),
    // The addresses of the whole patch lie between.
    fast("conv2d_mma_bf16", 128, 76_288, 2, Loads::Async, true).within(128),
    fast("vae_attention_mma_bf16", 256, 166_400, 1, Loads::Async, true).late(),
];

/// Of one SM of a Hopper GPU (compute capability 9.0).
const REGISTERS: u32 = 65_536;
const WARPS: u32 = 64;
const BLOCKS: u32 = 32;
const SHARED_BYTES: u32 = 228 * 1024;
/// Most that one block may have, and what the system takes of every block.
const BLOCK_SHARED_BYTES: u32 = 227 * 1024;
const RESERVED_SHARED_BYTES: u32 = 1024;

/// Blocks that fit an SM; 0 if not even one does. Registers come in units of 256 per warp, a quarter of the file to
/// each of four schedulers, among which a block's warps are dealt.
fn blocks_per_sm(registers: u32, threads: u32, shared: u32) -> u32 {
    if shared > BLOCK_SHARED_BYTES || threads > 1024 || threads == 0 {
        return 0;
    }
    let warps = threads.div_ceil(32);
    let per_warp = (registers.max(1) * 32).next_multiple_of(256);
    let by_registers = REGISTERS / 4 / per_warp * 4 / warps;
    let by_shared = SHARED_BYTES / (shared + RESERVED_SHARED_BYTES);
    by_registers.min(WARPS / warps).min(by_shared).min(BLOCKS)
}

fn skipped(reason: &str) -> bool {
    assert!(env::var_os("CI").is_none(), "{reason} under CI: did tools/setup.sh run?");
    println!("skipped: {reason} (tools/setup.sh installs one)");
    true
}

fn resources(symbol: &str) -> Option<&'static KernelResources> {
    cubins::resources().iter().find(|kernel| kernel.symbol == symbol)
}

/// Symbols of the registry's variants that are not plain.
fn fast_symbols() -> Vec<&'static str> {
    let variants = registry().iter().flat_map(|op| op.variants).filter(|variant| variant.name != "plain");
    variants.flat_map(|variant| variant.kernels).map(|(_, kernel)| kernel.symbol).collect()
}

/// What is wrong with the resources of one row.
fn complaint(row: &Fast, found: &KernelResources) -> Option<String> {
    let shared = found.shared_bytes.saturating_add(row.dynamic_shared);
    let blocks = blocks_per_sm(found.registers, row.threads, shared);
    let local = [found.stack_bytes, found.spill_store_bytes, found.spill_load_bytes];
    let what = if local != [0; 3] {
        format!("stack, spill stores and loads are {local:?} bytes")
    } else if blocks < row.blocks_per_sm {
        format!(
            "{} registers x {} threads and {shared} bytes of shared memory: {blocks} blocks per SM, designed for {}",
            found.registers, row.threads, row.blocks_per_sm
        )
    } else {
        return None;
    };
    Some(format!("{}: {what}", row.symbol))
}

#[test]
fn every_fast_kernel_has_a_row_and_every_row_a_kernel() {
    let known = |symbol: &str| TABLE.iter().filter(|row| row.symbol == symbol).count();
    let mut wrong = Vec::new();
    for symbol in fast_symbols() {
        if known(symbol) != 1 {
            let registers = resources(symbol).map_or(0, |kernel| kernel.registers);
            wrong.push(format!(
                "{symbol} has {} rows in TABLE; one such as: fast({symbol:?}, THREADS, DYNAMIC_SHARED, BLOCKS, \
                 Loads::Wide, false), // {registers} registers",
                known(symbol)
            ));
        }
    }
    let symbols = fast_symbols();
    wrong.extend(
        TABLE
            .iter()
            .filter(|row| !symbols.contains(&row.symbol))
            .map(|row| format!("{} is in TABLE and no fast kernel of the registry", row.symbol)),
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_fast_kernel_fits_an_sm_as_designed() {
    if cubins::CUBINS.is_empty() && skipped("no cubins") {
        return;
    }
    let wrong: Vec<String> = TABLE
        .iter()
        .filter_map(|row| match resources(row.symbol) {
            Some(found) => complaint(row, found),
            None => Some(format!("{}: not in the report of ptxas", row.symbol)),
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Folder of cuobjdump and nvdisasm.
fn disassembler() -> Option<PathBuf> {
    let local = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cuda-tools/nvidia/cu13/bin");
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let toolkits = toolkits.map(|path| PathBuf::from(path).join("bin"));
    let search = env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> =
        std::iter::once(local).chain(toolkits).chain(env::split_paths(&search)).collect();
    folders.into_iter().find(|folder| folder.join("cuobjdump").is_file() && folder.join("nvdisasm").is_file())
}

/// An instruction, and what its encoding says of the six counters that stand for results on their way.
#[derive(Clone, Debug, Default, PartialEq)]
struct Instruction {
    mnemonic: String,
    /// Bit of the counter that its result counts down; 0 for none.
    counts: u64,
    /// Bits of the counters that must be zero before it begins.
    waits: u64,
}

/// Each kernel of an image's disassembly, in the order of addresses.
fn instructions(text: &str) -> BTreeMap<String, Vec<Instruction>> {
    let mut kernels: BTreeMap<String, Vec<Instruction>> = BTreeMap::new();
    let mut current = None;
    for line in text.lines().map(str::trim) {
        if let Some((_, symbol)) = line.split_once("Function : ") {
            current = Some(symbol.trim().to_owned());
        } else if let (Some(symbol), Some(rest)) = (&current, line.strip_prefix("/*"))
            && let Some((address, code)) = rest.split_once("*/")
        {
            let kernel = kernels.entry(symbol.clone()).or_default();
            let code = code.split(';').next().unwrap_or_default();
            let mnemonic = code.split_whitespace().find(|word| !word.starts_with('@'));
            // The second line of an instruction holds the upper half of its encoding only.
            if let Some(mnemonic) = mnemonic.filter(|word| word.starts_with(|c: char| c.is_ascii_uppercase()))
            {
                kernel.push(Instruction { mnemonic: mnemonic.into(), ..Instruction::default() });
            } else if let Some(last) = kernel.last_mut()
                && let Some(bits) = address.trim().strip_prefix("0x")
            {
                let bits = u64::from_str_radix(bits, 16).unwrap();
                let counter = bits >> 46 & 7;
                last.counts = if counter == 7 { 0 } else { 1 << counter };
                last.waits = bits >> 52 & 0x3f;
            }
        }
    }
    kernels
}

/// Whether it brings 16 bytes of weights to registers.
fn is_weights(instruction: &Instruction) -> bool {
    let name = &instruction.mnemonic;
    name.starts_with("LDG.") && name.contains(".NA.") && name.contains(".128")
}

/// Multiplications that wait for weights of which some were asked for since one did last. Loads of all branches count
/// on one counter, and who waits for it waits for all of them: a load behind each multiplication makes the next one
/// wait for memory, and a warp has one load on its way instead of a chunk of them.
fn waits_for_weights(code: &[Instruction]) -> usize {
    let counters = code.iter().filter(|i| is_weights(i)).fold(0, |all, i| all | i.counts);
    let (mut asked, mut count) = (false, 0);
    for instruction in code {
        asked |= is_weights(instruction);
        if asked && instruction.mnemonic.starts_with("HMMA") && instruction.waits & counters != 0 {
            (asked, count) = (false, count + 1);
        }
    }
    count
}

/// Most of them in a `stream` kernel: one for a chunk of long rows, and for short rows, which go step by step, as many as
/// that loop is unrolled.
const CHUNK_WAITS: usize = 4;

/// Instructions before a wait among which the last fetch must be: addresses and loops lie between.
const EARLY: usize = 32;

/// How many waits for the launches before (`ACQBULK`) there are, and before how many no weight was asked for. ptxas
/// moved loads of the read-only path below the wait, where the source has them above.
fn waits(code: &[Instruction], window: usize) -> (usize, usize) {
    let weights = |i: &Instruction| {
        let others = ["LDGSTS.", "UBLKCP.", "CCTL.E.PF2"];
        is_weights(i) || others.iter().any(|start| i.mnemonic.starts_with(start))
    };
    let at: Vec<usize> = (0..code.len()).filter(|&i| code[i].mnemonic == "ACQBULK").collect();
    let late = at.iter().filter(|&&i| !code[i.saturating_sub(window)..i].iter().any(weights)).count();
    (at.len(), late)
}

/// What is wrong with the instructions of one row.
fn wrong_instructions(row: &Fast, found: &[Instruction]) -> Vec<String> {
    let count = |wanted: &dyn Fn(&str) -> bool| found.iter().filter(|i| wanted(&i.mnemonic)).count();
    let is = |name: &str, op: &str| name == op || name.starts_with(&format!("{op}."));
    let mut wrong = Vec::new();
    let local = count(&|name| is(name, "LDL") || is(name, "STL"));
    if local > 0 {
        wrong.push(format!("{}: {local} accesses to local memory", row.symbol));
    }
    let fetches = match row.loads {
        Loads::Wide => count(&|name| is(name, "LDG") && name.contains(".128")),
        Loads::Async => count(&|name| is(name, "LDGSTS") && name.contains(".128")),
        Loads::Bulk => count(&|name| is(name, "UBLKCP")),
    };
    if fetches == 0 {
        wrong.push(format!("{}: no {:?} loads", row.symbol, row.loads));
    }
    let products = count(&|name| is(name, "HMMA") || is(name, "HGMMA"));
    if (products > 0) != row.tensor_cores {
        wrong.push(format!("{}: {products} tensor-core instructions", row.symbol));
    }
    let serial = waits_for_weights(found);
    if row.symbol.contains("_stream_") && !(1..=CHUNK_WAITS).contains(&serial) {
        wrong.push(format!("{}: {serial} multiplications wait for newly asked weights", row.symbol));
    }
    let (waits, late) = waits(found, row.window);
    if row.early && (waits == 0 || late > 0) {
        wrong.push(format!("{}: no weights are asked for before {late} of {waits} waits", row.symbol));
    }
    wrong
}

#[test]
fn every_fast_kernel_is_made_of_the_instructions_that_were_meant() {
    if cubins::CUBINS.is_empty() && skipped("no cubins") {
        return;
    }
    let Some(tools) = disassembler() else {
        skipped("no cuobjdump");
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    let mut modules: BTreeMap<&str, BTreeMap<String, Vec<Instruction>>> = BTreeMap::new();
    let mut wrong = Vec::new();
    for row in TABLE {
        let Some(found) = resources(row.symbol) else {
            wrong.push(format!("{}: not in the report of ptxas", row.symbol));
            continue;
        };
        let module = modules.entry(&found.module).or_insert_with(|| {
            let file = folder.path().join(&found.module).with_extension("cubin");
            std::fs::write(&file, cubins::cubin(&found.module).unwrap()).unwrap();
            let mut path = vec![tools.clone()];
            path.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
            let output = Command::new(tools.join("cuobjdump"))
                .arg("-sass")
                .arg(&file)
                .env("PATH", env::join_paths(path).unwrap())
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            instructions(&String::from_utf8_lossy(&output.stdout))
        });
        match module.get(row.symbol) {
            Some(found) => wrong.extend(wrong_instructions(row, found)),
            None => wrong.push(format!("{}: not in the image", row.symbol)),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn blocks_per_sm_are_those_of_the_occupancy_rules() {
    // Registers: 65 536 / (128 x 256) = 2; 255 count as 256, of which one block of 256 threads has a whole file.
    assert_eq!(blocks_per_sm(128, 256, 0), 2);
    assert_eq!(blocks_per_sm(255, 256, 0), 1);
    assert_eq!(blocks_per_sm(129, 256, 0), 1);
    assert_eq!(blocks_per_sm(32, 256, 0), 8);
    // Shared memory: 1 KiB of every block is the system's.
    assert_eq!(blocks_per_sm(32, 256, 113 * 1024), 2);
    assert_eq!(blocks_per_sm(32, 256, 114 * 1024), 1);
    assert_eq!(blocks_per_sm(32, 256, 228 * 1024), 0);
    // Warps, then blocks.
    assert_eq!(blocks_per_sm(16, 1024, 0), 2);
    assert_eq!(blocks_per_sm(16, 32, 0), 32);
}

#[test]
fn a_kernel_that_is_not_as_designed_is_found() {
    let row = fast("k", 256, 0, 2, Loads::Wide, false).late();
    let good = KernelResources { registers: 128, ..KernelResources::default() };
    assert_eq!(complaint(&row, &good), None);
    assert!(complaint(&row, &KernelResources { registers: 129, ..good.clone() }).is_some());
    assert!(complaint(&row, &KernelResources { spill_load_bytes: 4, ..good.clone() }).is_some());

    let text = "\t\tFunction : k\n\
                /*0000*/ @P0 LDG.E.NA.128.CONSTANT R4, [R2] ;  /* 0x1 */\n\
                /* 0x000fe20000000800 */\n\
                /*0010*/ HMMA.16816.F32.BF16 R4, R4, R6, R8 ; /* 0x2 */\n\
                Function : other\n\
                /*0000*/ LDG.E R4, [R2] ;\n\
                /*0010*/ STL.64 [R1], R4 ;\n";
    let kernels = instructions(text);
    assert_eq!(kernels["k"].len(), 2, "{kernels:?}");
    let meant = fast("k", 256, 0, 2, Loads::Wide, true).late();
    assert!(wrong_instructions(&meant, &kernels["k"]).is_empty());
    assert_eq!(wrong_instructions(&row, &kernels["k"]).len(), 1, "tensor cores that nobody meant");
    let other = wrong_instructions(&fast("other", 256, 0, 2, Loads::Bulk, true).late(), &kernels["other"]);
    assert_eq!(other.len(), 3, "local memory, no bulk loads, no tensor cores: {other:?}");

    let early = fast("k", 256, 0, 2, Loads::Wide, true);
    let text = |load: &str, between: usize| {
        let between = "/*0010*/ IADD3 R4, R4, R6 ;\n".repeat(between);
        format!(
            "Function : k\n/*0000*/ {load} R4, [R2] ;\n{between}/*0010*/ ACQBULK ;\n/*0020*/ HMMA R4, R4 ;\n"
        )
    };
    let wrong = |load, between| wrong_instructions(&early, &instructions(&text(load, between))["k"]);
    assert!(wrong("LDG.E.NA.128", 0).is_empty() && wrong("LDG.E.NA.128", EARLY - 1).is_empty());
    assert!(wrong("LDG.E.NA.128", EARLY)[0].contains("before 1 of 1 waits"));
    assert_eq!(wrong("LDG.E.128", 0).len(), 1, "not past L1: activations");
    assert!(wrong_instructions(&early, &kernels["k"])[0].contains("0 of 0"), "no wait at all");

    // Loads on counter 5, and a multiplication that waits for it, alone or with others.
    let [load, free, waiting] = [0x0005_6800_0c5e_1d00_u64, 0x000f_e200_0004_1850, 0x021f_e200_0004_1850];
    let line = |code: &str, bits: u64| format!("/*0000*/ {code} ; /* 0x1 */\n/* 0x{bits:016x} */\n");
    let (load, free, waiting) =
        (line("LDG.E.NA.128 R4, [R2]", load), line("HMMA R4", free), line("HMMA R4", waiting));
    let count = |code: &[&String]| {
        let code: String = code.iter().map(|line| line.as_str()).collect();
        waits_for_weights(&instructions(&format!("Function : k\n{code}"))["k"])
    };
    assert_eq!(count(&[&load, &load, &waiting, &waiting, &load, &free, &load, &free]), 1);
    assert_eq!(count(&[&load, &load, &waiting, &load, &waiting, &load, &waiting]), 3);
}
