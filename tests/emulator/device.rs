//! The device: independence of devices, determinism, errors, launch checks, replay.

use crate::rig::{Rig, cooperative, ramp};
use crate::streams::TestStream;
use std::collections::HashSet;
use std::sync::{Arc, Barrier};
use warpstep::Error;
use warpstep::device::emulated::{
    AsyncCopies, EmulatedDevice, EmulatedOptions, Order, ReplayOrder, build_kind,
};
use warpstep::device::{Device, DevicePtr, Geometry, KernelId, Node, NodeList, ParamBytes, Span};

fn options() -> EmulatedOptions {
    EmulatedOptions::default()
}

#[test]
fn the_build_is_the_one_asked_for() {
    assert_eq!(build_kind(), option_env!("WARPSTEP_EMULATOR").unwrap_or("opt"));
}

#[test]
fn independent_blocks_run_on_several_workers() {
    let mut rig = Rig::new(EmulatedOptions { workers: 3, ..options() });
    let input = ramp(1000);
    let out: Vec<f32> = rig.run("emu_add_one", Geometry::linear(32, 32), &input, 1000, 1000);
    assert!(out.iter().zip(&input).all(|(o, i)| *o == i + 1.0));
}

#[test]
fn memory_starts_as_nan_and_is_aligned() {
    let mut rig = Rig::new(options());
    for bytes in [1, 4, 255, 256, 1000] {
        let buffer = rig.device.alloc(bytes, "b").unwrap();
        assert_eq!(buffer.ptr().0 % 256, 0);
        assert!(rig.download::<u8>(&buffer).iter().all(|&byte| byte == 0xff));
    }
}

#[test]
fn copies_outside_an_allocation_are_errors() {
    let mut rig = Rig::new(options());
    let buffer = rig.device.alloc(64, "b").unwrap();
    let mut bytes = [0; 65];
    for (result, what) in [
        (rig.stream.get(buffer.ptr(), &mut bytes), "download of 65 bytes"),
        (rig.stream.put(buffer.ptr().offset(1), &[0; 64]), "upload of 64 bytes"),
        (rig.stream.set(Span { ptr: DevicePtr(8), bytes: 1 }, 0), "fill of 1 bytes"),
    ] {
        assert!(result.unwrap_err().to_string().contains(what));
    }
    let ptr = buffer.ptr();
    drop(buffer);
    assert!(rig.stream.set(Span { ptr, bytes: 1 }, 0).is_err());
}

/// What a copy finds there stays there until it is done: memory that is freed on another thread is overwritten at once.
#[test]
fn nothing_is_freed_under_a_copy() {
    for _ in 0..20 {
        let mut rig = Rig::new(options());
        let buffer = rig.device.alloc(1 << 20, "b").unwrap();
        rig.stream.set(buffer.span(), 7).unwrap();
        let (ptr, begun) = (buffer.ptr(), Barrier::new(2));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                begun.wait();
                drop(buffer);
            });
            let mut bytes = vec![0; 1 << 20];
            begun.wait();
            while rig.stream.get(ptr, &mut bytes).is_ok() {
                assert!(bytes.iter().all(|&byte| byte == 7));
            }
        });
    }
}

/// Two threads, each with a device of its own and options that matter, neither disturbing the other.
#[test]
fn two_devices_at_once() {
    let good = |seed| {
        move || {
            for _ in 0..20 {
                let input = ramp(7);
                let mut rig = Rig::new(EmulatedOptions { order: Order::Random, seed, ..options() });
                let out: Vec<f32> = rig.run("emu_grid_rounds", cooperative(7, 64), &input, 14, 0);
                assert!((0..7).all(|b| out[7 + b] == input[(b + 3) % 7] + 3.0));
            }
        }
    };
    let bad = || {
        for _ in 0..20 {
            let mut rig = Rig::new(EmulatedOptions { async_copies: AsyncCopies::AtOnce, ..options() });
            let buffer = rig.device.alloc(2048, "b").unwrap();
            let node = rig.node("bug_barrier_count", Geometry::linear(1, 256), &buffer, &buffer, 256);
            assert!(rig.stream.start(&node).unwrap_err().to_string().contains("deadlock"));
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(good(1));
        scope.spawn(bad);
        scope.spawn(good(2));
    });
}

#[test]
fn a_failed_launch_leaves_the_device_in_error_until_reset() {
    let mut rig = Rig::new(options());
    let buffer = rig.device.alloc(2048, "b").unwrap();
    let node = rig.node("bug_barrier_count", Geometry::linear(1, 256), &buffer, &buffer, 256);
    let error = rig.stream.start(&node).unwrap_err();
    let Error::Launch { kernel, reason } = &error else { panic!("{error}") };
    assert_eq!(kernel, "bug_barrier_count");
    assert!(reason.contains("test.bug_barrier_count"), "{reason}");

    let other = Rig::new(options()).device;
    assert!(other.alloc(1, "unaffected").is_ok());
    let good = rig.node("emu_add_one", Geometry::linear(1, 32), &buffer, &buffer, 32);
    for result in [
        rig.stream.start(&good),
        rig.stream.synchronize(),
        rig.stream.put(buffer.ptr(), &[0]),
        rig.device.alloc(1, "x").map(drop),
        rig.stream.record().map(drop),
    ] {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("deadlock") && error.contains("bug_barrier_count"), "{error}");
    }
    rig.device.reset();
    rig.stream.start(&good).unwrap();
}

/// The report names every group of threads, where it waits, and on what.
#[test]
fn a_deadlock_report_says_who_waits_where() {
    let mut rig = Rig::new(options());
    let buffer = rig.upload("b", &[0.0f32; 512]);
    let node = rig.node("bug_barrier_count", Geometry::linear(1, 256), &buffer, &buffer, 256);
    let report = rig.stream.start(&node).unwrap_err().to_string();
    for part in [
        "block 0 threads 0-95: at barrier bar_sync at synchronisation.cu:",
        "block 0 threads 96-127: exited",
        "block 0 threads 128-255: at barrier bar_sync at synchronisation.cu:",
        "(barrier 1: 224 of 256 arrived)",
    ] {
        assert!(report.contains(part), "no '{part}' in:\n{report}");
    }
}

#[test]
fn launches_that_a_gpu_would_refuse_are_refused() {
    let base = Geometry::linear(2, 32);
    let cases = [
        (Geometry { grid: [0, 1, 1], ..base }, "grid 0x1x1"),
        (Geometry { grid: [1, 65536, 1], ..base }, "grid 1x65536x1"),
        (Geometry { block: [2048, 1, 1], ..base }, "block 2048x1x1"),
        (Geometry { block: [33, 1, 1], ..base }, "whole warps"),
        (Geometry { block: [1, 1, 96], ..base }, "block 1x1x96"),
        (Geometry { shared_bytes: 227 * 1024 + 1, ..base }, "232449 bytes of dynamic shared memory"),
        (Geometry { cluster: [3, 1, 1], ..base }, "not a whole number of clusters"),
        (Geometry { grid: [32, 1, 1], cluster: [32, 1, 1], ..base }, "1 to 16 blocks"),
        (Geometry { cluster: [0, 1, 1], ..base }, "1 to 16 blocks"),
        (cooperative(129, 64), "129 blocks, but only 32 fit on each of 4 SMs"),
        (cooperative(5, 64).with_shared(200 << 10), "5 blocks, but only 1 fit on each of 4 SMs"),
    ];
    for (geometry, part) in cases {
        let mut rig = Rig::new(options());
        let buffer = rig.device.alloc(64, "b").unwrap();
        let node = rig.node("emu_add_one", geometry, &buffer, &buffer, 0);
        let error = rig.stream.start(&node).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let mut rig = Rig::new(options());
    let buffer = rig.device.alloc(64, "b").unwrap();
    let node = rig.node("emu_exchange", Geometry::linear(1, 64), &buffer, &buffer, 0);
    let error = rig.stream.start(&node).unwrap_err().to_string();
    assert!(error.contains("block of 64 threads, the kernel is built for 32"), "{error}");
}

#[test]
fn unknown_kernels_and_wrong_parameters_are_named() {
    let mut rig = Rig::new(options());
    let buffer = rig.device.alloc(64, "b").unwrap();
    let mut node = rig.node("emu_add_one", Geometry::linear(1, 32), &buffer, &buffer, 0);
    node.params = ParamBytes::of(&[0u64; 3]);
    let error = rig.stream.start(&node).unwrap_err().to_string();
    assert!(error.contains("parameter struct of 24 bytes, the kernel takes 40"), "{error}");
    node.kernel = KernelId { module: "nowhere", symbol: "no_such_kernel" };
    let error = rig.stream.start(&node).unwrap_err().to_string();
    assert!(error.contains("no_such_kernel") && error.contains("kernels/nowhere.cu"), "{error}");
}

/// A node keeps addresses, not buffers; that it outlived them is noticed before the kernel runs.
#[test]
fn a_node_whose_buffers_are_gone_does_not_run() {
    let mut rig = Rig::new(options());
    let (x, y) = (rig.upload("x", &ramp(256)), rig.upload("y", &ramp(256)));
    let node = rig.node("emu_add_one", Geometry::linear(4, 64), &x, &y, 256);
    rig.stream.start(&node).unwrap();
    drop(x);
    let error = rig.stream.start(&node).unwrap_err().to_string();
    assert!(
        error.contains("declares 1024 bytes at") && error.contains("not inside one allocation"),
        "{error}"
    );
}

#[test]
fn impossible_options_are_refused() {
    assert!(EmulatedDevice::new(EmulatedOptions { sm_count: 0, ..options() }).is_err());
    assert!(EmulatedDevice::new(EmulatedOptions { workers: 0, ..options() }).is_err());
}

/// A chain x -> y -> z and a branch x -> w; the bits do not depend on the run.
fn chain(rig: &mut Rig) -> (Arc<NodeList>, [warpstep::device::Buffer; 4]) {
    let x = rig.upload("x", &ramp(256));
    let [y, z, w] = ["y", "z", "w"].map(|label| rig.device.alloc(1024, label).unwrap());
    let mut list = NodeList::new();
    for (from, to) in [(&x, &y), (&y, &z), (&x, &w)] {
        let mut node = rig.node("emu_add_one", Geometry::linear(4, 64), from, to, 256);
        node.writes = vec![to.span()];
        list.push(node);
    }
    (Arc::new(list), [x, y, z, w])
}

#[test]
fn replay_runs_the_list_again() {
    let mut rig = Rig::new(options());
    let (list, [x, _y, z, w]) = chain(&mut rig);
    let executable = rig.stream.prepare(list).unwrap();
    for round in 0..3 {
        let input: Vec<f32> = ramp(256).iter().map(|v| v + round as f32).collect();
        rig.stream.put(x.ptr(), bytemuck::cast_slice(&input)).unwrap();
        rig.stream.replay(&*executable).unwrap();
        let event = rig.stream.record().unwrap();
        event.wait().unwrap();
        assert!(event.is_done().unwrap());
        assert!(rig.download::<f32>(&z).iter().zip(&input).all(|(z, x)| *z == x + 2.0));
        assert!(rig.download::<f32>(&w).iter().zip(&input).all(|(w, x)| *w == x + 1.0));
    }
}

/// Legal orders give the right result; without an edge some of them do not.
#[test]
fn legal_orders_find_a_missing_edge() {
    let wrong_replays = |drop_edge: bool| {
        let mut wrong = 0;
        for seed in 0..8 {
            let mut rig = Rig::new(EmulatedOptions { replay_order: ReplayOrder::Legal(seed), ..options() });
            let (list, [_x, y, z, _w]) = chain(&mut rig);
            let mut list = (*list).clone();
            if drop_edge {
                list.remove_edge(0, 1).unwrap();
            }
            let executable = rig.stream.prepare(list).unwrap();
            for _ in 0..4 {
                rig.stream.set(y.span(), 0xff).unwrap();
                rig.stream.replay(&*executable).unwrap();
                let z = rig.download::<f32>(&z);
                wrong += usize::from(z.iter().zip(ramp(256)).any(|(z, x)| *z != x + 2.0));
            }
        }
        wrong
    };
    assert_eq!(wrong_replays(false), 0);
    assert!(wrong_replays(true) > 0);
}

#[test]
fn in_order_runs_are_reproducible_and_random_ones_by_seed() {
    // Float sums over blocks in the order in which the blocks run.
    let run = |order, seed| {
        let mut rig = Rig::new(EmulatedOptions { order, seed, workers: 1, ..options() });
        let input = rig.upload("in", &[0.0f32]);
        let out = rig.upload("out", &[0.1f32, 1e8, 0.0]);
        let node = rig.node("emu_flags", cooperative(2, 32), &input, &out, 0);
        rig.stream.start(&node).unwrap();
        rig.download::<f32>(&out)[1].to_bits()
    };
    assert_eq!(run(Order::InOrder, 1), run(Order::InOrder, 2));
    let sums: HashSet<u32> = (0..12).map(|seed| run(Order::Random, seed)).collect();
    assert!(sums.len() > 1, "random orders all alike");
    assert!((0..12).all(|seed| run(Order::Random, seed) == run(Order::Random, seed)));
}

#[test]
fn dependent_launches_may_read_after_the_wait() {
    let mut rig = Rig::new(options());
    let (x, y, z) =
        (rig.upload("x", &ramp(256)), rig.upload("y", &[0f32; 256]), rig.upload("z", &[0f32; 32]));
    let mut list = NodeList::new();
    let mut first = rig.node("emu_add_one", Geometry::linear(4, 64), &x, &y, 256);
    first.writes = vec![y.span()];
    list.push(first);
    let dependent = Geometry { dependent: true, ..Geometry::linear(1, 32) };
    let mut second: Node = rig.node("emu_dependent", dependent, &y, &z, 0);
    second.writes = vec![z.span()];
    list.push(second);
    let executable = rig.stream.prepare(list).unwrap();
    rig.stream.replay(&*executable).unwrap();
    let expected: Vec<f32> = ramp(32).iter().enumerate().map(|(i, x)| x + 1.0 + i as f32).collect();
    assert_eq!(rig.download::<f32>(&z), expected);
}
