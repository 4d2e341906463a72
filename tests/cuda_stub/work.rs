//! A little work that uses every function of the driver.

use crate::streams::TestStream;
use crate::stub::{Stub, field};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::LazyLock;
use warpstep::device::cuda::{CudaDevice, CudaOptions};
use warpstep::device::{
    Buffer, Device, Executable, Geometry, KernelId, Node, NodeList, ParamBytes, STAGING_BYTES,
};
use warpstep::ops::DType;
use warpstep::ops::bench::{self, Random};
use warpstep::{Error, Result};

const ADD_ONE: KernelId = KernelId { module: "bugs", symbol: "emu_add_one" };

/// More than the ring holds, so that a slot is used again.
static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| (0..25 << 20).map(|i| (i % 251) as u8).collect());

/// A node from one buffer to another.
pub fn node(label: &str, geometry: Geometry, from: &Buffer, to: &Buffer) -> Node {
    let params = ParamBytes::of(&[from.ptr().0, to.ptr().0, 0, 0, 0]);
    let (reads, writes) = (vec![from.span()], vec![to.span()]);
    Node { label: label.into(), kernel: ADD_ONE, geometry, params, reads, writes }
}

fn change(executable: &mut dyn Executable, index: usize, node: &Node) -> Result<()> {
    // SAFETY: the same buffers and other numbers that the stub does nothing with, or an error.
    unsafe { executable.set_params(index, node) }
}

/// Copies, fills, launches, a graph and events on `device`, and whether the bytes are the right ones.
pub fn work(device: &CudaDevice) -> Result<()> {
    let mut stream = device.stream()?;
    let bytes = LazyLock::force(&BYTES);
    let a = device.alloc(bytes.len(), "a")?;
    let b = device.alloc(1024, "b")?;
    stream.put(a.ptr(), bytes)?;
    stream.set(b.span(), 7)?;
    let wide = Geometry {
        grid: [16, 1, 1],
        cluster: [16, 1, 1],
        cooperative: true,
        dependent: true,
        ..Geometry::linear(1, 32).with_shared(64 << 10)
    };
    stream.start(&node("wide", wide, &a, &b))?;
    let mut other = device.stream()?;
    other.start(&node("wide", wide, &a, &b))?;
    drop(other);
    let mut list = NodeList::new();
    list.push(node("first", Geometry::linear(4, 32), &a, &b));
    list.push(node("second", Geometry { dependent: true, ..Geometry::linear(4, 32) }, &b, &a));
    list.push(node("third", wide, &a, &b));
    list.push(node("fourth", Geometry { dependent: true, ..Geometry::linear(4, 32) }, &b, &a));
    let mut executable = stream.prepare(list)?;
    stream.replay(executable.as_ref())?;
    let mut changed = node("third", wide, &a, &b);
    changed.params = ParamBytes::of(&[a.ptr().0, b.ptr().0, 1, 2, 3]);
    change(executable.as_mut(), 2, &changed)?;
    stream.replay(executable.as_ref())?;
    // Three rows of 5 bytes, 100 apart.
    stream.set_rows(b.span().slice(10, 5), 100, 3, 9)?;
    let before = stream.record_timed()?;
    let event = stream.record()?;
    let mut polls = 0;
    while !event.is_done()? && polls < 100 {
        polls += 1;
    }
    event.wait()?;
    let after = stream.record_timed()?;
    after.wait()?;
    // The stub counts a millisecond per event of a stream.
    let elapsed = after.milliseconds_since(before.as_ref())?;
    stream.synchronize()?;
    let mut back = vec![0; bytes.len()];
    stream.get(a.ptr(), &mut back)?;
    let mut filled = [0; 1024];
    stream.get(b.ptr(), &mut filled)?;
    let mut expected = [7; 1024];
    [10, 110, 210].into_iter().for_each(|at| expected[at..at + 5].fill(9));
    let right = back == *bytes && filled == expected && (1..100).contains(&polls) && elapsed == 2.0;
    if right { Ok(()) } else { Err(Error::Internal(format!("wrong bytes, {polls} polls, {elapsed} ms"))) }
}

#[test]
fn everything_is_freed() {
    let stub = Stub::new();
    let device = stub.open().unwrap();
    work(&device).unwrap();
    assert_eq!(device.live_bytes(), 0);
    let buffer = device.alloc(1000, "outlives the device").unwrap();
    assert_eq!(device.live_bytes(), 1000);
    drop(device);
    assert!(stub.live().contains("context: 1") && stub.live().contains("memory of 1000 bytes"));
    drop(buffer);
    assert_eq!(stub.live(), "");
    stub.take_log();
}

#[test]
fn every_function_is_told_the_preferred_carveout_once() {
    let stub = Stub::new();
    let told = |options: CudaOptions| {
        let device = CudaDevice::open(options).unwrap();
        let mut stream = device.stream().unwrap();
        let cells = device.alloc(256, "cells").unwrap();
        let fill =
            bench::fill(4, DType::F32, cells.span(), Random { seed: 1, mean: 0.0, deviation: 1.0 }).unwrap();
        for _ in 0..2 {
            stream.start(&fill).unwrap();
        }
        let log = stub.take_log();
        log.iter().filter(|line| line.contains("attribute=9:")).cloned().collect::<Vec<_>>()
    };
    assert!(told(stub.options()).is_empty());
    let lines = told(CudaOptions { shared_carveout: Some(100), ..stub.options() });
    assert!(lines.len() == 1 && lines[0].ends_with("symbol=bench_fill_f32 attribute=9:100"), "{lines:?}");
}

#[test]
fn attributes_are_given_to_launches_and_nodes() {
    let stub = Stub::new();
    work(&stub.open().unwrap()).unwrap();
    let log = stub.take_log();
    let lines = |call: &str| log.iter().filter(|line| line.starts_with(call)).cloned().collect::<Vec<_>>();
    let launch = &lines("cuLaunchKernelEx")[0];
    assert!(
        launch.contains("shared=65536 attribute=4:16,1,1 attribute=2:1,0,0 attribute=6:1,0,0"),
        "{launch}"
    );
    let consent: Vec<String> = lines("cuFuncSetAttribute");
    assert_eq!(consent.len(), 2, "shared memory and cluster, asked for once: {consent:?}");
    assert!(consent[0].ends_with("attribute=8:65536") && consent[1].ends_with("attribute=14:1"));
    let nodes = lines("cuGraphAddNode_v2");
    let edges: Vec<_> = nodes.iter().map(|line| crate::stub::field(line, "edges").unwrap()).collect();
    assert_eq!(edges, ["", "0p", "1p", "2f"]);
    let attributes = lines("cuGraphKernelNodeSetAttribute");
    assert_eq!(attributes.len(), 2);
    assert!(attributes[0].ends_with("index=2 attribute=4:16,1,1"), "{attributes:?}");
    assert!(attributes[1].ends_with("index=2 attribute=2:1,0,0"), "{attributes:?}");
}

#[test]
fn poisoned_memory_is_nan_and_empty_requests_are_nothing() {
    let stub = Stub::new();
    let options = CudaOptions { poison: true, ..stub.options() };
    let device = CudaDevice::open(options).unwrap();
    let buffer = device.alloc(100, "b").unwrap();
    let mut stream = device.stream().unwrap();
    let mut bytes = [0; 100];
    stream.get(buffer.ptr(), &mut bytes).unwrap();
    assert_eq!(bytes, [0xff; 100]);
    let empty = device.alloc(0, "empty").unwrap();
    stream.put(empty.ptr(), &[]).unwrap();
    stream.set(empty.span(), 1).unwrap();
    stream.get(empty.ptr(), &mut []).unwrap();
    let nothing = stream.prepare(NodeList::new()).unwrap();
    stream.replay(nothing.as_ref()).unwrap();
    stub.take_log();
}

/// Pinned slots that are alive.
fn slots(stub: &Stub) -> usize {
    stub.live().matches("pinned memory of").count()
}

/// No byte is moved on the host after its caller wrote it, and nothing but the last copy out of the same slot is
/// waited for: those out of the others may be under way.
#[test]
fn uploads_are_written_where_the_driver_copies_them_from() {
    const PIECE: usize = 1000;
    let stub = Stub::new();
    let device = stub.open().unwrap();
    let buffer = device.alloc(5 * PIECE, "b").unwrap();
    let mut stream = device.stream().unwrap();
    stub.take_log();
    let mut places = Vec::new();
    for i in 0..5 {
        let dst = buffer.ptr().offset(i * PIECE);
        let mut fill = |out: &mut [u8]| {
            assert!(!stub.live().contains("pushed context"), "the caller's code has its own context");
            places.push(out.as_ptr() as usize);
            out.fill(i as u8 + 1);
            Ok(())
        };
        stream.put_with(dst, PIECE, &mut fill).unwrap();
    }
    let log = stub.take_log();
    let copies = log.iter().filter(|line| line.starts_with("cuMemcpyHtoDAsync_v2"));
    let sources: Vec<usize> = copies.map(|line| field(line, "src").unwrap().parse().unwrap()).collect();
    assert_eq!(sources, places);
    assert!(places[0] != places[1] && places[1] != places[2] && places[2] != places[0]);
    assert_eq!(places[3..], places[..2], "slots in turn");
    let waits: Vec<&String> = log.iter().filter(|line| line.contains("Synchronize")).collect();
    assert!(waits.len() == 5 && waits.iter().all(|line| line.starts_with("cuEventSynchronize")), "{waits:?}");
    let mut back = vec![0; 5 * PIECE];
    stream.get(buffer.ptr(), &mut back).unwrap();
    assert!(back.chunks(PIECE).enumerate().all(|(i, piece)| piece.iter().all(|&byte| byte == i as u8 + 1)));
}

#[test]
fn an_upload_that_is_not_filled_copies_nothing_and_leaves_its_slot() {
    let stub = Stub::new();
    let device = stub.open().unwrap();
    let buffer = device.alloc(100, "b").unwrap();
    let mut stream = device.stream().unwrap();
    stream.put(buffer.ptr(), &[7; 100]).unwrap();
    for _ in 0..5 {
        let broken = &mut |_: &mut [u8]| Err(Error::Internal("unreadable".into()));
        let error = stream.put_with(buffer.ptr(), 100, broken).unwrap_err();
        assert_eq!(error.to_string(), "internal error: unreadable");
        let panics = &mut |_: &mut [u8]| panic!("on purpose");
        assert!(catch_unwind(AssertUnwindSafe(|| stream.put_with(buffer.ptr(), 100, panics))).is_err());
    }
    let error = stream.put_with(buffer.ptr(), STAGING_BYTES + 1, &mut |_| Ok(())).unwrap_err();
    assert!(
        error.to_string().contains("8388609 bytes through staging memory, which holds 8388608"),
        "{error}"
    );
    let mut back = [0; 100];
    stream.get(buffer.ptr(), &mut back).unwrap();
    assert_eq!((back, slots(&stub)), ([7; 100], 3));
    drop((stream, buffer, device));
    assert_eq!(stub.live(), "");
    stub.take_log();
}

/// Whoever fills may upload: there is a slot for each, and three are kept.
#[test]
fn uploads_within_uploads_get_slots_of_their_own() {
    fn nest(device: &CudaDevice, stub: &Stub, buffer: &Buffer, depth: usize) -> Result<()> {
        if depth == 5 {
            assert_eq!(slots(stub), 5);
            return Ok(());
        }
        device.stream()?.put_with(buffer.ptr().offset(depth), 1, &mut |out| {
            out.fill(depth as u8);
            nest(device, stub, buffer, depth + 1)
        })
    }
    let stub = Stub::new();
    let device = stub.open().unwrap();
    let buffer = device.alloc(5, "b").unwrap();
    nest(&device, &stub, &buffer, 0).unwrap();
    assert_eq!(slots(&stub), 3);
    let mut back = [9; 5];
    device.stream().unwrap().get(buffer.ptr(), &mut back).unwrap();
    assert_eq!(back, [0, 1, 2, 3, 4]);
    drop((buffer, device));
    assert_eq!(stub.live(), "");
    stub.take_log();
}

#[test]
fn only_parameters_of_a_graph_change() {
    let stub = Stub::new();
    let device = stub.open().unwrap();
    let a = device.alloc(1024, "a").unwrap();
    let mut stream = device.stream().unwrap();
    let mut list = NodeList::new();
    list.push(node("n", Geometry::linear(1, 32), &a, &a));
    let mut executable = stream.prepare(list).unwrap();
    let mut empty = stream.prepare(NodeList::new()).unwrap();
    stub.take_log();
    let mut changed = node("n", Geometry::linear(1, 32), &a, &a);
    changed.params = ParamBytes::of(&[a.ptr().0, a.ptr().0, 0, 0, 0xabcd]);
    change(executable.as_mut(), 0, &changed).unwrap();
    let log = stub.take_log();
    let calls: Vec<&String> = log.iter().filter(|line| !line.starts_with("cuCtx")).collect();
    let [line] = calls[..] else { panic!("{log:?}") };
    assert!(line.starts_with("cuGraphExecNodeSetParams exec=0 index=0 symbol=emu_add_one"), "{line}");
    assert!(line.ends_with("cdab000000000000"), "{line}");
    assert!(matches!(change(executable.as_mut(), 1, &changed), Err(Error::Internal(_))));
    let wider = node("n", Geometry::linear(2, 32), &a, &a);
    assert!(matches!(change(executable.as_mut(), 0, &wider), Err(Error::Internal(_))));
    assert!(matches!(change(empty.as_mut(), 0, &changed), Err(Error::Internal(_))));
    assert!(stub.take_log().is_empty(), "the driver was asked");
}

#[test]
fn executables_belong_to_their_stream() {
    let stub = Stub::new();
    let device = stub.open().unwrap();
    let a = device.alloc(1024, "a").unwrap();
    let (mut one, mut other) = (device.stream().unwrap(), device.stream().unwrap());
    let mut list = NodeList::new();
    list.push(node("n", Geometry::linear(1, 32), &a, &a));
    let executable = one.prepare(list).unwrap();
    one.replay(executable.as_ref()).unwrap();
    assert!(matches!(other.replay(executable.as_ref()), Err(Error::Device(_))));
    // Dropped in any order.
    drop(device);
    drop(one);
    drop(a);
    drop(executable);
    drop(other);
    assert_eq!(stub.live(), "");
    stub.take_log();
}

#[test]
fn threads_share_a_device() {
    let stub = Stub::new();
    let device = stub.open().unwrap();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..3).map(|_| scope.spawn(|| work(&device))).collect();
        workers.into_iter().for_each(|worker| worker.join().unwrap().unwrap());
    });
    drop(device);
    assert_eq!(stub.live(), "");
    stub.take_log();
}

#[test]
fn wrong_kernels_are_named() {
    let stub = Stub::new();
    let device = stub.open().unwrap();
    let a = device.alloc(1024, "a").unwrap();
    let mut stream = device.stream().unwrap();
    let good = node("n", Geometry::linear(1, 32), &a, &a);
    let mut wrong = good.clone();
    wrong.params = ParamBytes::of(&[0u64; 3]);
    let error = stream.start(&wrong).unwrap_err().to_string();
    assert!(error.contains("parameter struct of 24 bytes, the kernel takes 40"), "{error}");
    wrong.kernel = KernelId { module: "bugs", symbol: "nowhere" };
    let error = stream.start(&wrong).unwrap_err().to_string();
    assert!(error.contains("launch of nowhere failed: cuModuleGetFunction: CUDA error 500"), "{error}");
    wrong.kernel = KernelId { module: "nothing", symbol: "nowhere" };
    let error = stream.start(&wrong).unwrap_err().to_string();
    // Neither the folder nor the program has it.
    assert!(error.contains("kernels/nothing.cu"), "{error}");
    stream.start(&good).unwrap();
}
