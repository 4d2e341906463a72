//! Kernels whose blocks wait for each other take turns when several streams launch them.

use crate::streams::TestStream;
use crate::stub::Stub;
use crate::work::node;
use warpstep::device::{Buffer, Device, Executable, Geometry, NodeList, Stream};

const TOGETHER: Geometry = Geometry {
    grid: [4, 1, 1],
    block: [32, 1, 1],
    shared_bytes: 0,
    cluster: [1; 3],
    cooperative: true,
    dependent: false,
};

/// A graph of one kernel between the two buffers.
fn graph(stream: &mut dyn Stream, geometry: Geometry, [from, to]: [&Buffer; 2]) -> Box<dyn Executable> {
    let mut list = NodeList::new();
    list.push(node("together", geometry, from, to));
    stream.prepare(list).unwrap()
}

/// What the streams were told of launches and events, without the addresses.
fn told(stub: &Stub) -> Vec<String> {
    let name = |line: &String| line.split(' ').next().unwrap().to_owned();
    let calls = stub.take_log().iter().map(name).collect::<Vec<_>>();
    let kept =
        ["cuGraphLaunch", "cuLaunchKernelEx", "cuEventRecord", "cuStreamWaitEvent", "cuStreamDestroy_v2"];
    calls.into_iter().filter(|call| kept.contains(&call.as_str())).collect()
}

#[test]
fn one_stream_waits_for_nobody() {
    let stub = Stub::new();
    let device = stub.open().unwrap();
    let (a, b) = (device.alloc(1024, "a").unwrap(), device.alloc(1024, "b").unwrap());
    let mut stream = device.stream().unwrap();
    let graph = graph(stream.as_mut(), TOGETHER, [&a, &b]);
    for _ in 0..2 {
        stream.replay(graph.as_ref()).unwrap();
        stream.start(&node("together", TOGETHER, &a, &b)).unwrap();
    }
    assert_eq!(told(&stub), ["cuGraphLaunch", "cuLaunchKernelEx", "cuGraphLaunch", "cuLaunchKernelEx"]);
}

#[test]
fn streams_wait_for_what_another_has_enqueued() {
    let stub = Stub::new();
    let device = stub.open().unwrap();
    let (a, b) = (device.alloc(1024, "a").unwrap(), device.alloc(1024, "b").unwrap());
    let (mut one, mut other) = (device.stream().unwrap(), device.stream().unwrap());
    let ours = graph(one.as_mut(), TOGETHER, [&a, &b]);
    let theirs = graph(other.as_mut(), TOGETHER, [&a, &b]);
    let alone = graph(other.as_mut(), Geometry::linear(4, 32), [&a, &b]);
    told(&stub);
    // The stub copies when something waits for the copy: here only the other stream does.
    one.put(a.ptr(), &[7; 1024]).unwrap();
    one.replay(ours.as_ref()).unwrap();
    other.replay(alone.as_ref()).unwrap();
    let mut bytes = [0; 1024];
    other.get(a.ptr(), &mut bytes).unwrap();
    assert_eq!(bytes, [0; 1024], "nothing to wait for");
    other.replay(theirs.as_ref()).unwrap();
    other.get(a.ptr(), &mut bytes).unwrap();
    assert_eq!(bytes, [7; 1024]);
    one.start(&node("together", TOGETHER, &a, &b)).unwrap();
    one.replay(ours.as_ref()).unwrap();
    let turn = ["cuEventRecord", "cuStreamWaitEvent"];
    let expected = [
        ["cuGraphLaunch", "cuGraphLaunch"].as_slice(),
        &turn,
        &["cuGraphLaunch"],
        &turn,
        &["cuLaunchKernelEx", "cuGraphLaunch"],
    ]
    .concat();
    // The first event is of the staging memory that the upload went through.
    let told: Vec<String> = told(&stub);
    assert_eq!(told[0], "cuEventRecord");
    assert_eq!(told[1..], expected);
}

#[test]
fn a_stream_that_is_gone_is_waited_for() {
    let stub = Stub::new();
    let device = stub.open().unwrap();
    let (a, b) = (device.alloc(1024, "a").unwrap(), device.alloc(1024, "b").unwrap());
    let together = node("together", TOGETHER, &a, &b);
    let (mut one, mut other) = (device.stream().unwrap(), device.stream().unwrap());
    one.start(&together).unwrap();
    drop(one);
    other.start(&together).unwrap();
    other.start(&together).unwrap();
    assert_eq!(
        told(&stub),
        [
            "cuLaunchKernelEx",
            "cuEventRecord",
            "cuStreamDestroy_v2",
            "cuStreamWaitEvent",
            "cuLaunchKernelEx",
            "cuLaunchKernelEx"
        ]
    );
    drop((a, b, other, device));
    assert_eq!(stub.live(), "");
}
