//! Host-side costs of one image: what runs on the CPU while a GPU waits.
//!
//! `cargo bench --bench host` on the embedded demo model; no kernel is launched.

use criterion::{Criterion, criterion_group, criterion_main};
use std::hint::black_box;
use std::sync::Arc;
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions};
use warpstep::device::{Device, Geometry, KernelId, Node, NodeList, ParamBytes, Span};
use warpstep::engine::{Engine, EngineOptions, ModelSource};

fn engine() -> Arc<Engine> {
    let device = Arc::new(EmulatedDevice::new(EmulatedOptions::default()).expect("a device"));
    Arc::new(
        Engine::load(&ModelSource::Demo, device, EngineOptions::default()).expect("the demo model loads"),
    )
}

/// Reading, checking, converting and uploading a whole checkpoint.
fn packing(c: &mut Criterion) {
    let mut group = c.benchmark_group("packing");
    group.sample_size(10);
    group.bench_function("load demo model", |b| b.iter(engine));
    group.finish();
}

/// Prompt to token ids, schedules and the memory plan.
fn planning(c: &mut Criterion) {
    let engine = engine();
    let mut request = engine.request("a red circle on a blue background").expect("a request");
    request.seed = 1;
    c.bench_function("tokenize and plan", |b| b.iter(|| engine.plan(black_box(&request)).expect("plans")));
}

/// A list of the 14B model's length: 48 layers of five nodes in a chain, and eight around them.
fn recording(c: &mut Criterion) {
    let device = EmulatedDevice::new(EmulatedOptions::default()).expect("a device");
    let buffer = device.alloc(1 << 20, "bench").expect("a megabyte");
    let node = |i: usize| Node {
        label: format!("node{i}"),
        kernel: KernelId { module: "advance", symbol: "advance_plain" },
        geometry: Geometry::linear(1, 32),
        params: ParamBytes::of(&[0u64; 16]),
        reads: vec![Span { ptr: buffer.ptr().offset(i * 256), bytes: 256 }],
        writes: vec![Span { ptr: buffer.ptr().offset((i + 1) * 256), bytes: 256 }],
    };
    c.bench_function("record 248 nodes with edges", |b| {
        b.iter(|| {
            let mut list = NodeList::new();
            for i in 0..248 {
                list.push(node(i));
            }
            list
        });
    });
}

criterion_group!(benches, packing, planning, recording);
criterion_main!(benches);
