//! A device, a stream and the buffers that the kernels of `kernels/emulator/bugs` take.

use crate::streams::TestStream;
use bytemuck::{Pod, Zeroable};
use warpstep::device::emulated::{AsyncCopies, EmulatedDevice, EmulatedOptions, Order, build_kind};
use warpstep::device::{Buffer, Device, Geometry, KernelId, Node, ParamBytes, Stream};

/// Mirrors `kernels/emulator/bugs/bugs.h`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct BugParams {
    input: u64,
    out: u64,
    counters: u64,
    barrier: u64,
    n: u32,
    pad: u32,
}

pub struct Rig {
    pub device: EmulatedDevice,
    pub stream: Box<dyn Stream>,
    pub counters: Buffer,
}

impl Rig {
    pub fn new(options: EmulatedOptions) -> Rig {
        let device = EmulatedDevice::new(options).unwrap();
        let mut stream = device.stream().unwrap();
        let counters = device.alloc(512, "counters").unwrap();
        stream.set(counters.span(), 0).unwrap();
        Rig { device, stream, counters }
    }

    pub fn node(
        &self,
        symbol: &'static str,
        geometry: Geometry,
        input: &Buffer,
        out: &Buffer,
        n: u32,
    ) -> Node {
        let params = BugParams {
            input: input.ptr().0,
            out: out.ptr().0,
            counters: self.counters.ptr().0,
            barrier: self.counters.ptr().0 + 256,
            n,
            pad: 0,
        };
        Node {
            label: format!("test.{symbol}"),
            kernel: KernelId { module: "bugs", symbol },
            geometry,
            params: ParamBytes::of(&params),
            reads: vec![input.span()],
            writes: vec![out.span(), self.counters.span()],
        }
    }

    pub fn upload<T: Pod>(&mut self, label: &str, values: &[T]) -> Buffer {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let buffer = self.device.alloc(bytes.len(), label).unwrap();
        self.stream.put(buffer.ptr(), bytes).unwrap();
        buffer
    }

    pub fn download<T: Pod>(&mut self, buffer: &Buffer) -> Vec<T> {
        let mut values = vec![T::zeroed(); buffer.bytes() / size_of::<T>()];
        self.stream.get(buffer.ptr(), bytemuck::cast_slice_mut(&mut values)).unwrap();
        values
    }

    /// Launches over `input` and gives back the `out_len` elements of the output, which start as NaN.
    pub fn run<I: Pod, O: Pod>(
        &mut self,
        symbol: &'static str,
        geometry: Geometry,
        input: &[I],
        out_len: usize,
        n: u32,
    ) -> Vec<O> {
        let input = self.upload("in", input);
        let out = self.device.alloc(out_len * size_of::<O>(), "out").unwrap();
        let node = self.node(symbol, geometry, &input, &out, n);
        self.stream.start(&node).unwrap();
        self.stream.synchronize().unwrap();
        self.download(&out)
    }
}

/// Every order of threads with every landing of copies; fewer where a run is slow.
pub fn schedules() -> impl Iterator<Item = EmulatedOptions> {
    let seeds = if build_kind() == "opt" { 1..=4 } else { 1..=1 };
    let random = seeds.map(|seed| (Order::Random, seed));
    let orders = [(Order::InOrder, 1), (Order::Reverse, 1)].into_iter().chain(random);
    orders.flat_map(|(order, seed)| {
        [AsyncCopies::Late, AsyncCopies::AtOnce, AsyncCopies::Random].map(|async_copies| EmulatedOptions {
            order,
            async_copies,
            seed,
            ..EmulatedOptions::default()
        })
    })
}

/// Small integers, so that float sums are exact in any order.
pub fn ramp(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i * 7 % 23) as f32 - 5.0).collect()
}

pub fn cooperative(blocks: u32, threads: u32) -> Geometry {
    Geometry { cooperative: true, ..Geometry::linear(blocks, threads) }
}

pub fn clusters(blocks: u32, cluster: u32, threads: u32) -> Geometry {
    Geometry { cluster: [cluster, 1, 1], ..Geometry::linear(blocks, threads) }
}
