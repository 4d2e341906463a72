//! Planted bugs, one kernel each, and what every build must say of them: a row per bug, a column per build.
//! AddressSanitizer aborts the process, so in that build each bug runs in a child.

use crate::rig::{Rig, clusters, cooperative};
use crate::streams::TestStream;
use std::process::Command;
use warpstep::device::emulated::{EmulatedOptions, build_kind};
use warpstep::device::{Buffer, Geometry, NodeList, Span};

/// Name of the child's environment variable.
const CHILD: &str = "WARPSTEP_EMULATOR_TEST_BUG";

#[derive(Clone, Copy, Debug)]
enum Expected {
    /// The launch fails and the report contains this.
    Report(&'static str),
    /// The launch succeeds and the output is not what the kernel was meant to compute.
    Wrong,
    /// Nothing is noticed.
    Silent,
    /// AddressSanitizer aborts with this.
    Abort(&'static str),
    /// Undefined in this build: not run.
    Skip,
}
use Expected::{Abort, Report, Silent, Skip, Wrong};

struct Bug {
    symbol: &'static str,
    launch: Launch,
    /// The value meant for `out[i]`, from `in`.
    meant: fn(&[f32], usize) -> f32,
    opt: Expected,
    asan: Expected,
    race: Expected,
}

#[derive(Clone, Copy, PartialEq)]
enum Launch {
    /// One block.
    Plain,
    /// One block with 1 KiB of dynamic shared memory.
    Dynamic,
    /// One block whose output has no slack behind it.
    Tight,
    /// Four blocks.
    Blocks,
    /// Four resident blocks.
    Cooperative,
    /// One cluster of four blocks.
    Cluster,
    /// A dependent launch after one that writes its input.
    Dependent,
}

const fn bug(symbol: &'static str, launch: Launch, opt: Expected, asan: Expected, race: Expected) -> Bug {
    Bug { symbol, launch, meant: |input, i| input[i], opt, asan, race }
}

impl Bug {
    const fn meaning(mut self, meant: fn(&[f32], usize) -> f32) -> Bug {
        self.meant = meant;
        self
    }
}

const SHARED_RACE: Expected = Report("shared-memory race");
const GLOBAL_RACE: Expected = Report("global-memory race");
const UNWRITTEN: Expected = Report("uninitialised shared memory");
const PAST_END: Expected = Report("wrote past the end of");
const OVERFLOW: Expected = Abort("AddressSanitizer");

/// A report that every build makes.
const fn always(symbol: &'static str, launch: Launch, report: &'static str) -> Bug {
    bug(symbol, launch, Report(report), Report(report), Report(report))
}

const fn rotated(input: &[f32], i: usize) -> f32 {
    input[(i + 33) % 256]
}

#[rustfmt::skip]
const BUGS: &[Bug] = &[
    //  kernel                              launch               opt     asan      race
    bug("bug_missing_sync",                 Launch::Plain,       Wrong,  Wrong,    UNWRITTEN).meaning(rotated),
    bug("bug_missing_sync_in_loop",         Launch::Plain,       Wrong,  Wrong,    SHARED_RACE).meaning(rotated),
    bug("bug_static_shared_overrun",        Launch::Plain,       PAST_END, OVERFLOW, Report("out of bounds")),
    bug("bug_dynamic_shared_overrun",       Launch::Dynamic,     PAST_END, OVERFLOW, Report("out of bounds")),
    bug("bug_global_overrun",               Launch::Tight,       Skip,   OVERFLOW, Report("out of bounds")),
    bug("bug_bulk_overrun",                 Launch::Plain,       Silent, OVERFLOW, Report("out of bounds")),
    bug("bug_local_overrun",                Launch::Plain,       Skip,   OVERFLOW, Skip),
    bug("bug_shared_uninitialised",         Launch::Plain,       Silent, Silent,   UNWRITTEN),
    bug("bug_shuffle_as_fence",             Launch::Plain,       Silent, Silent,   SHARED_RACE).meaning(|input, i| input[i ^ 1]),
    bug("bug_cp_async_no_wait",             Launch::Plain,       Wrong,  Wrong,    Report("in flight")),
    bug("bug_ring_early_release",           Launch::Plain,       Silent, Silent,   SHARED_RACE),
    bug("bug_grid_sync_missing",            Launch::Cooperative, Wrong,  Wrong,    GLOBAL_RACE),
    bug("bug_split_relaxed",                Launch::Blocks,      Silent, Silent,   GLOBAL_RACE),
    bug("bug_split_release_early",          Launch::Blocks,      Silent, Silent,   GLOBAL_RACE),
    bug("bug_global_race",                  Launch::Plain,       Wrong,  Wrong,    GLOBAL_RACE).meaning(rotated),
    bug("bug_nc_of_fresh_data",             Launch::Cooperative, Silent, Silent,   Report("ld.global.nc")),
    bug("bug_cluster_sync_missing",         Launch::Cluster,     Wrong,  Wrong,    UNWRITTEN),
    bug("bug_dependent_early_access",       Launch::Dependent,   Silent, Silent,   Report("before griddep_wait")),
    bug("bug_dependent_no_barrier",         Launch::Dependent,   Silent, Silent,   Report("before griddep_wait")),
    bug("bug_dependent_nc",                 Launch::Dependent,   Silent, Silent,   Report("ld.global.nc")),
    bug("bug_undeclared",                   Launch::Plain,       Silent, Silent,   Silent),
    always("bug_dependent_no_wait",         Launch::Dependent,   "ended without griddep_wait"),
    always("bug_shuffle_divergent",         Launch::Plain,       "threads 0-15: in warp operation shfl_xor"),
    always("bug_shuffle_two_sites",         Launch::Plain,       "divergent warp operation"),
    always("bug_shuffle_outside_mask",      Launch::Plain,       "which is not in mask 0x0000ffff"),
    always("bug_barrier_divergent",         Launch::Plain,       "divergent block barrier"),
    always("bug_barrier_early_exit",        Launch::Plain,       "threads 192-255: exited"),
    always("bug_barrier_count",             Launch::Plain,       "224 of 256 arrived"),
    always("bug_grid_early_exit",           Launch::Cooperative, "polling in ld_acquire"),
    always("bug_misaligned",                Launch::Plain,       "misaligned 16-byte access"),
    always("bug_cp_async_at_exit",          Launch::Plain,       "cp.async copies not waited for"),
    always("bug_mbar_bytes",                Launch::Plain,       "waiting on an mbarrier"),
    always("bug_mbar_uninitialised",        Launch::Plain,       "before mbar_init"),
    always("bug_mbar_arrivals",             Launch::Plain,       "more arrivals in a phase than its count of 2"),
    always("bug_bulk_overlap",              Launch::Plain,       "target of one still in flight"),
    always("bug_static_shared_size",        Launch::Plain,       "65536 bytes of static shared memory"),
    bug("bug_mbar_parity",                  Launch::Plain,       Report("bulk copy in flight"), Report("bulk copy in flight"), UNWRITTEN),
];

impl Bug {
    /// What the current build is to say; the `count` build checks what `opt` checks.
    fn expected(&self) -> Expected {
        match build_kind() {
            "asan" => self.asan,
            "race" => self.race,
            _ => self.opt,
        }
    }

    fn geometry(&self) -> Geometry {
        match self.launch {
            Launch::Plain | Launch::Tight => Geometry::linear(1, 256),
            Launch::Dynamic => Geometry::linear(1, 256).with_shared(1024),
            Launch::Blocks => Geometry::linear(4, 256),
            Launch::Cooperative => cooperative(4, 256),
            Launch::Cluster => clusters(4, 4, 256),
            Launch::Dependent => Geometry { dependent: true, ..Geometry::linear(1, 256) },
        }
    }

    /// Launches the bug; `Ok` holds the output, `Err` the report.
    fn run(&self) -> Result<Vec<f32>, String> {
        // One worker, so that the blocks run one after another in every build.
        let mut rig = Rig::new(EmulatedOptions { workers: 1, ..EmulatedOptions::default() });
        let input = rig.upload("in", &input());
        let out_floats = if self.launch == Launch::Tight { 256 } else { 256 * 6 };
        let out = rig.upload("out", &vec![0.0f32; out_floats]);
        let outcome = if self.launch == Launch::Dependent {
            self.replay_after_a_writer(&mut rig, &input, &out)
        } else {
            let node = rig.node(self.symbol, self.geometry(), &input, &out, 256);
            rig.stream.start(&node)
        };
        outcome.map_err(|error| error.to_string())?;
        Ok(rig.download(&out))
    }

    fn replay_after_a_writer(&self, rig: &mut Rig, input: &Buffer, out: &Buffer) -> warpstep::Result<()> {
        let mut list = NodeList::new();
        let zeros = rig.upload("zeros", &input_minus_one());
        let mut writer = rig.node("emu_add_one", Geometry::linear(8, 32), &zeros, input, 256);
        writer.writes = vec![input.span()];
        list.push(writer);
        let mut node = rig.node(self.symbol, self.geometry(), input, out, 256);
        node.writes = vec![out.span()];
        list.push(node);
        let executable = rig.stream.prepare(list)?;
        rig.stream.replay(&*executable)
    }

    /// Compares with what is expected of the current build, in words.
    fn check(&self) -> Result<(), String> {
        let expected = self.expected();
        let found = match expected {
            Skip => return Ok(()),
            Abort(_) => return Err("did not abort".into()),
            _ => self.run(),
        };
        let right = |out: &[f32]| (0..256).all(|i| out[i] == (self.meant)(&input(), i));
        match (expected, &found) {
            (Report(part), Err(report)) if report.contains(part) => Ok(()),
            (Silent, Ok(out)) if right(out) => Ok(()),
            (Wrong, Ok(out)) if !right(out) => Ok(()),
            (_, Ok(out)) => Err(format!("launched, result {}", if right(out) { "right" } else { "wrong" })),
            (_, Err(report)) => Err(format!("reported: {report}")),
        }
    }
}

fn input() -> Vec<f32> {
    (0..257).map(|i| i as f32 + 1.0).collect()
}

fn input_minus_one() -> Vec<f32> {
    (0..257).map(|i| i as f32).collect()
}

/// Runs one bug when started by `planted_bugs`; as a test of its own it does nothing.
#[test]
fn child() {
    let Ok(name) = std::env::var(CHILD) else { return };
    let bug = BUGS.iter().find(|bug| bug.symbol == name).unwrap();
    if let Abort(_) = bug.asan {
        bug.run().unwrap();
    } else {
        bug.check().unwrap();
    }
}

#[test]
fn planted_bugs() {
    let mut failures = String::new();
    for bug in BUGS {
        let outcome = if build_kind() == "asan" { in_child(bug) } else { bug.check() };
        if let Err(found) = outcome {
            failures += &format!("{}: expected {:?}, {found}\n", bug.symbol, bug.expected());
        }
    }
    assert!(failures.is_empty(), "{failures}");
}

fn in_child(bug: &Bug) -> Result<(), String> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "bugs::child", "--nocapture"]).env(CHILD, bug.symbol);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    match bug.asan {
        Abort(part) if !output.status.success() && text.contains(part) && text.contains(".cu:") => Ok(()),
        Abort(_) => Err(format!("found: {text}")),
        _ if output.status.success() => Ok(()),
        _ => Err(text),
    }
}

/// Reports of races name both accesses with their lines in the kernel.
#[test]
fn race_reports_name_both_lines() {
    if build_kind() != "race" {
        return;
    }
    let source = include_str!("../../kernels/emulator/bugs/synchronisation.cu");
    let line = |text: &str| {
        let kernel = source.find("KERNEL(bug_missing_sync_in_loop,").unwrap();
        let at = kernel + source[kernel..].find(text).unwrap();
        format!("synchronisation.cu:{}", source[..at].lines().count())
    };
    let bug = BUGS.iter().find(|bug| bug.symbol == "bug_missing_sync_in_loop").unwrap();
    let report = bug.run().unwrap_err();
    for part in
        [line("s[t] ="), line("sum += s["), "write of 4 bytes".into(), "a read by block 0 thread".into()]
    {
        assert!(report.contains(&part), "no {part} in: {report}");
    }
}

/// Bytes per buffer and what was not declared, exactly.
#[test]
fn audits_count_bytes_by_name() {
    let mut rig = Rig::new(EmulatedOptions::default());
    let input = rig.upload("in", &input());
    let out = rig.upload("out", &vec![0.0f32; 512]);
    warpstep::device::Device::name_span(&rig.device, out.span().slice(0, 512), "head");
    // Two blocks that write the same: a race, but not to the build that counts.
    let blocks = if build_kind() == "count" { 2 } else { 1 };
    let mut node = rig.node("bug_undeclared", Geometry::linear(blocks, 256), &input, &out, 256);
    node.reads = vec![Span { ptr: input.ptr(), bytes: 1024 }];
    node.writes = vec![Span { ptr: out.ptr(), bytes: 1024 }];
    rig.stream.start(&node).unwrap();
    let audits = rig.device.take_audit();
    if build_kind() != "count" {
        assert!(audits.is_empty());
        return;
    }
    let [audit] = &audits[..] else { panic!("{audits:?}") };
    assert_eq!((audit.label.as_str(), audit.symbol.as_str()), ("test.bug_undeclared", "bug_undeclared"));
    let traffic = |name: &str| {
        let b = audit.buffers.iter().find(|buffer| buffer.name == name).unwrap();
        [b.read_bytes, b.read_unique_bytes, b.written_bytes, b.written_unique_bytes]
    };
    // Both blocks do the same; the 257th element is touched once by each.
    assert_eq!(traffic("in"), [2 * 1028, 1028, 0, 0]);
    assert_eq!(traffic("head"), [0, 0, 2 * 512, 512]);
    assert_eq!(traffic("out"), [0, 0, 2 * 516, 516]);
    let undeclared: Vec<_> = audit.undeclared.iter().map(|u| (u.name.as_str(), u.offset, u.bytes)).collect();
    assert_eq!(undeclared, [("in", 1024, 8), ("out", 1024, 8)]);
    assert!(rig.device.take_audit().is_empty());
}

/// Bytes that primitives move: bulk copies, cp.async and the read-only path count like plain loads.
#[test]
fn audits_count_primitives() {
    if build_kind() != "count" {
        return;
    }
    let read = |symbol, geometry, floats: usize, n| {
        let mut rig = Rig::new(EmulatedOptions::default());
        let input = rig.upload("in", &vec![1.0f32; floats]);
        let out = rig.upload("out", &vec![0.0f32; 512]);
        let node = rig.node(symbol, geometry, &input, &out, n);
        rig.stream.start(&node).unwrap();
        let audit = rig.device.take_audit().remove(0);
        let buffer = audit.buffers.into_iter().find(|buffer| buffer.name == "in").unwrap();
        assert!(audit.undeclared.is_empty());
        (buffer.read_bytes, buffer.read_unique_bytes)
    };
    let ring = Geometry::linear(1, 96).with_shared(3 * 128 * 4);
    assert_eq!(read("emu_bulk_ring", ring, 11 * 128, 11), (11 * 512, 11 * 512));
    // The last of five tiles has 20 floats; the rest is filled, not read.
    assert_eq!(read("emu_cp_async", Geometry::linear(1, 64), 276, 5), (276 * 4, 276 * 4));
    assert_eq!(read("emu_copy_f32", Geometry::linear(3, 32), 128, 0), (3 * 512, 512));
}
