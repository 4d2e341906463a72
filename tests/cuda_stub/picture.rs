//! A whole picture of the demo model: the driver receives what the emulated device receives.

use crate::recorder::{Record, Recorder, Work};
use crate::stub::{Stub, field};
use std::sync::Arc;
use warpstep::device::cuda::{CudaDevice, CudaOptions};
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions};
use warpstep::device::{Device, Node, NodeList, Span};
use warpstep::engine::{Engine, EngineOptions, ModelSource};
use warpstep::event::{CancelToken, Control};
use warpstep::session::Images;

const COLUMNS: usize = 4;
const ROWS: usize = 2;

/// A small picture on `device`.
fn draw(device: Arc<dyn Device>) -> Images {
    let engine = Arc::new(Engine::load(&ModelSource::Demo, device, EngineOptions::default()).unwrap());
    let mut request = engine.request("a red circle on a blue background").unwrap();
    (request.width, request.height) = (16 * COLUMNS as u32, 16 * ROWS as u32);
    (request.sampler.steps, request.seed) = (2, 5);
    engine.session().generate(&request, &CancelToken::new(), &mut |_| Control::Continue).unwrap()
}

fn recorded(device: Arc<dyn Device>) -> Record {
    let recorder = Recorder::new(device);
    let record = recorder.record.clone();
    draw(Arc::new(recorder));
    std::mem::take(&mut record.lock().unwrap())
}

/// The bytes of `node`'s parameters with every address in one of `ours` moved to the same place in the allocation
/// of the same number among `theirs`, in hexadecimal.
fn moved_params(node: &Node, ours: &[Span], theirs: &[Span]) -> String {
    let mut text = String::new();
    for chunk in node.params.as_slice().chunks(8) {
        let mut bytes = chunk.to_vec();
        if let Ok(word) = chunk.try_into() {
            let word = u64::from_le_bytes(word);
            let holds = |span: &Span| (span.ptr.0..span.ptr.0 + span.bytes as u64).contains(&word);
            if let Some(index) = ours.iter().position(holds) {
                bytes = (word - ours[index].ptr.0 + theirs[index].ptr.0).to_le_bytes().to_vec();
            }
        }
        text.extend(bytes.iter().map(|byte| format!("{byte:02x}")));
    }
    text
}

fn check_kernel(line: &str, node: &Node, ours: &[Span], theirs: &[Span]) {
    let g = &node.geometry;
    let axes = |axes: [u32; 3]| axes.map(|n| n.to_string()).join(",");
    for (key, expected) in [
        ("symbol", node.kernel.symbol.to_owned()),
        ("grid", axes(g.grid)),
        ("block", axes(g.block)),
        ("shared", g.shared_bytes.to_string()),
        ("params", moved_params(node, ours, theirs)),
    ] {
        assert_eq!(field(line, key), Some(expected.as_str()), "{} of {}", key, node.label);
    }
}

/// The lines that one list should have left: its nodes, each with its edges and attributes.
fn check_graph<'a>(
    lines: &mut impl Iterator<Item = &'a String>,
    list: &NodeList,
    ours: &[Span],
    theirs: &[Span],
) {
    for (index, node) in list.nodes().iter().enumerate() {
        let line = lines.next().unwrap();
        assert!(line.starts_with("cuGraphAddNode_v2 "), "{line}");
        check_kernel(line, node, ours, theirs);
        let edge = |dep: &usize| match node.geometry.dependent && !list.nodes()[*dep].geometry.cooperative {
            true => format!("{dep}p"),
            false => format!("{dep}f"),
        };
        let edges: Vec<String> = list.deps(index).iter().map(edge).collect();
        assert_eq!(field(line, "edges"), Some(edges.join(",").as_str()), "{}", node.label);
        // No node has edges of both kinds, which nothing says that a driver takes.
        assert!(edges.windows(2).all(|two| two[0].ends_with('p') == two[1].ends_with('p')), "{edges:?}");
        if node.geometry.cooperative {
            let line = lines.next().unwrap();
            assert!(line.starts_with("cuGraphKernelNodeSetAttribute "), "{line}");
            assert_eq!(field(line, "index"), Some(index.to_string().as_str()));
            assert_eq!(field(line, "attribute"), Some("2:1,0,0"));
        }
    }
    let line = lines.next().unwrap();
    assert!(line.starts_with("cuGraphInstantiateWithParams "), "{line}");
    assert_eq!(field(line, "nodes"), Some(list.len().to_string().as_str()));
}

#[test]
fn the_driver_receives_what_the_emulated_device_receives() {
    let expected = recorded(Arc::new(EmulatedDevice::new(EmulatedOptions::default()).unwrap()));
    let stub = Stub::new();
    let found = recorded(Arc::new(stub.open().unwrap()));
    let log = stub.take_log();
    let sizes = |record: &Record| record.allocations.iter().map(|span| span.bytes).collect::<Vec<_>>();
    assert_eq!(sizes(&expected), sizes(&found));
    let (ours, theirs) = (&expected.allocations, &found.allocations);

    let calls = [
        "cuLaunchKernelEx ",
        "cuGraphAddNode_v2 ",
        "cuGraphKernelNodeSetAttribute ",
        "cuGraphInstantiateWithParams ",
        "cuGraphLaunch ",
    ];
    let mut lines = log.iter().filter(|line| calls.iter().any(|call| line.starts_with(call)));
    let mut nodes = Vec::new();
    let mut replays = Vec::new();
    for work in &expected.work {
        match work {
            Work::Launch(node) => {
                let line = lines.next().unwrap();
                assert!(line.starts_with("cuLaunchKernelEx "), "{line}");
                check_kernel(line, node, ours, theirs);
                let serialised = node.geometry.dependent.then_some("6:1,0,0");
                assert_eq!(field(line, "attribute"), serialised, "{}", node.label);
            }
            Work::Instantiate(list) => {
                check_graph(&mut lines, list, ours, theirs);
                nodes.push(list.len());
            }
            Work::SetParams => panic!("the first request changes no parameters"),
            Work::Replay(number) => {
                let line = lines.next().unwrap();
                assert!(line.starts_with("cuGraphLaunch "), "{line}");
                assert_eq!(field(line, "exec"), Some(number.to_string().as_str()));
                replays.push(*number);
            }
        }
    }
    assert_eq!(lines.next(), None);
    // Made in the order token, last token, image, prefill.
    let tokens = COLUMNS * ROWS;
    assert_eq!(replays, [vec![3], vec![0; tokens - 1], vec![1, 2]].concat());
    assert!(nodes[0] > nodes[1] && nodes[1] > 4, "nodes per list: {nodes:?}");
    assert_eq!(stub.live(), "");
}

/// A second request with other words and another seed: no memory, no stream, no graph but the prompt's, and none at
/// all where the prompts are the same. What changes is uploaded, or the parameters of one node.
#[test]
fn a_second_request_makes_nothing_new() {
    let stub = Stub::new();
    let device = Arc::new(stub.open().unwrap());
    let engine = Arc::new(Engine::load(&ModelSource::Demo, device, EngineOptions::default()).unwrap());
    let mut session = engine.session();
    let mut request = engine.request("a red circle on a blue background").unwrap();
    (request.width, request.height) = (16 * COLUMNS as u32, 16 * ROWS as u32);
    (request.sampler.steps, request.seed) = (2, 5);
    let mut draw = |request: &_| {
        stub.take_log();
        session.generate(request, &CancelToken::new(), &mut |_| Control::Continue).unwrap();
        stub.take_log()
    };
    let count = |log: &[String], call: &str| log.iter().filter(|line| line.starts_with(call)).count();
    let first = draw(&request);
    assert_eq!((count(&first, "cuMemAlloc"), count(&first, "cuGraphInstantiate")), (3, 4));
    assert_eq!(count(&first, "cuGraphExecNodeSetParams "), 0);
    let makes =
        ["cuMemAlloc", "cuStreamCreate", "cuGraphCreate", "cuGraphAdd", "cuGraphInst", "cuModule", "cuFunc"];
    let frees = ["cuMemFree", "cuGraphDestroy", "cuGraphExecDestroy", "cuStreamDestroy"];
    let new = |line: &String| makes.iter().chain(&frees).any(|call| line.starts_with(call));
    // All is in the cache: what is left of prefill is one node.
    request.seed = 6;
    let second = draw(&request);
    let made: Vec<&String> = second.iter().filter(|line| new(line)).collect();
    let prefill =
        |line: &&String| line.contains("Graph") || line.contains("cuModule") || line.contains("cuFunc");
    assert!(made.iter().all(prefill), "{made:?}");
    assert_eq!((count(&second, "cuGraphAddNode"), count(&second, "cuGraphInstantiate")), (1, 1));
    for seed in [6, 7] {
        request.seed = seed;
        let third = draw(&request);
        let made: Vec<&String> = third.iter().filter(|line| new(line)).collect();
        assert!(made.is_empty(), "{made:?}");
        assert_eq!(count(&third, "cuGraphLaunch "), 1 + COLUMNS * ROWS + 1);
        let changed: Vec<&String> =
            third.iter().filter(|line| line.starts_with("cuGraphExecNodeSetParams ")).collect();
        assert_eq!(changed.len(), 2, "the draws of the token and of the last token");
        for (line, list) in changed.iter().zip(["0", "1"]) {
            assert_eq!(field(line, "exec"), Some(list));
            assert!(field(line, "symbol").unwrap().starts_with("randn"), "{line}");
            let params = field(line, "params").unwrap();
            // Two addresses, then the seed.
            assert_eq!(&params[32..48], format!("{:016x}", u64::swap_bytes(seed)), "{line}");
        }
    }
    // Another caption: its rows are prefilled, by a graph of their own.
    request.prompt = "two green squares".into();
    let other = draw(&request);
    assert_eq!((count(&other, "cuMemAlloc"), count(&other, "cuGraphInstantiate")), (0, 1));
    assert_eq!(count(&draw(&request), "cuGraphInstantiate"), 1);
    assert_eq!(count(&draw(&request), "cuGraphInstantiate"), 0);
    drop((session, engine));
    stub.take_log();
    assert_eq!(stub.live(), "");
}

/// Between two ends of rows the host neither copies nor waits for anything enqueued less than two tokens ago.
#[test]
fn the_host_does_not_wait_inside_a_row_of_tokens() {
    let stub = Stub::new();
    draw(Arc::new(stub.open().unwrap()));
    let log = stub.take_log();
    let launches: Vec<usize> = (0..log.len()).filter(|&i| log[i].starts_with("cuGraphLaunch ")).collect();
    // The first launch is prefill, the last the picture.
    let tokens = &launches[1..launches.len() - 1];
    assert_eq!(tokens.len(), COLUMNS * ROWS);
    let mut waits = 0;
    for row in tokens.chunks(COLUMNS) {
        let mut recorded = Vec::new();
        let mut launched = 0;
        for line in &log[row[0]..=row[COLUMNS - 1]] {
            let call = line.split(' ').next().unwrap();
            match call {
                "cuGraphLaunch" => launched += 1,
                "cuEventRecord" => recorded.push((field(line, "event").unwrap(), launched)),
                "cuEventSynchronize" => {
                    let event = field(line, "event").unwrap();
                    let (_, token) = recorded.iter().rev().find(|(e, _)| *e == event).unwrap();
                    assert!(launched - token >= 2, "waits for token {token} after launching {launched}");
                    waits += 1;
                }
                "cuCtxPushCurrent_v2" | "cuCtxPopCurrent_v2" | "cuEventCreate" | "cuEventDestroy_v2" => {}
                other => panic!("{other} inside a row"),
            }
        }
    }
    assert!(waits > 0, "rows of {COLUMNS} tokens are long enough to show a wait");
}

#[test]
fn without_dependent_launch_every_edge_is_full() {
    let stub = Stub::new();
    let options = CudaOptions { dependent_launch: false, ..stub.options() };
    draw(Arc::new(CudaDevice::open(options).unwrap()));
    let log = stub.take_log();
    let edges: Vec<&str> = log.iter().filter_map(|line| field(line, "edges")).collect();
    assert!(edges.len() > 20 && edges.iter().all(|edges| !edges.contains('p')));
    assert!(log.iter().all(|line| field(line, "attribute") != Some("6:1,0,0")));
}
