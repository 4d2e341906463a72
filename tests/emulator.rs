//! The emulated device itself: every primitive of `dev.cuh` against values computed here, the device's own
//! behaviour, and (in `emulator_bugs.rs`) what each build says of planted bugs. Kernels: `kernels/emulator/bugs`.

use bytemuck::{Pod, Zeroable};
use warpstep::device::emulated::{AsyncCopies, EmulatedDevice, EmulatedOptions, Order};
use warpstep::device::{Buffer, Device, Geometry, KernelId, Node, ParamBytes, Stream};

/// Mirrors `PrimitiveParams` of `kernels/emulator/bugs/primitives.cu`.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct PrimitiveParams {
    input: u64,
    out: u64,
    counters: u64,
    barrier: u64,
    n: u32,
    pad: u32,
}

struct Rig {
    device: EmulatedDevice,
    stream: Box<dyn Stream>,
    counters: Buffer,
}

impl Rig {
    fn new(options: EmulatedOptions) -> Rig {
        let device = EmulatedDevice::new(options).unwrap();
        let mut stream = device.stream().unwrap();
        let counters = device.alloc(512, "counters").unwrap();
        stream.fill(counters.span(), 0).unwrap();
        Rig { device, stream, counters }
    }

    fn node(&self, symbol: &'static str, geometry: Geometry, input: &Buffer, out: &Buffer, n: u32) -> Node {
        let params = PrimitiveParams {
            input: input.ptr().0,
            out: out.ptr().0,
            counters: self.counters.ptr().0,
            barrier: self.counters.ptr().0 + 256,
            n,
            pad: 0,
        };
        Node {
            label: format!("test.{symbol}"),
            kernel: KernelId { module: "primitives", symbol },
            geometry,
            params: ParamBytes::of(&params),
            reads: vec![input.span()],
            writes: vec![out.span(), self.counters.span()],
        }
    }

    fn upload<T: Pod>(&mut self, values: &[T]) -> Buffer {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let buffer = self.device.alloc(bytes.len(), "input").unwrap();
        self.stream.upload(buffer.ptr(), bytes).unwrap();
        buffer
    }

    fn download<T: Pod>(&mut self, buffer: &Buffer) -> Vec<T> {
        let mut bytes = vec![T::zeroed(); buffer.bytes() / size_of::<T>()];
        self.stream.download(buffer.ptr(), bytemuck::cast_slice_mut(&mut bytes)).unwrap();
        bytes
    }

    /// Launches over `input` and gives back the `out_len` elements of the output, which start as NaN.
    fn run<I: Pod, O: Pod>(
        &mut self,
        symbol: &'static str,
        geometry: Geometry,
        input: &[I],
        out_len: usize,
        n: u32,
    ) -> Vec<O> {
        let input = self.upload(input);
        let out = self.device.alloc(out_len * size_of::<O>(), "out").unwrap();
        let node = self.node(symbol, geometry, &input, &out, n);
        self.stream.launch(&node).unwrap();
        self.stream.synchronize().unwrap();
        self.download(&out)
    }
}

/// Every order of threads with every landing of copies.
fn schedules() -> impl Iterator<Item = EmulatedOptions> {
    let orders = [(Order::InOrder, 1), (Order::Reverse, 1), (Order::Random, 1), (Order::Random, 2)];
    orders.into_iter().flat_map(|(order, seed)| {
        [AsyncCopies::Late, AsyncCopies::AtOnce, AsyncCopies::Random].map(|async_copies| EmulatedOptions {
            order,
            async_copies,
            seed,
            ..EmulatedOptions::default()
        })
    })
}

fn ramp(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i * 7 % 23) as f32 - 5.0).collect()
}

#[test]
fn independent_blocks_run_on_several_workers() {
    let mut rig = Rig::new(EmulatedOptions { workers: 3, ..EmulatedOptions::default() });
    let input = ramp(1000);
    let out: Vec<f32> = rig.run("emu_add_one", Geometry::linear(32, 32), &input, 1000, 1000);
    assert!(out.iter().zip(&input).all(|(o, i)| *o == i + 1.0));
}

#[test]
fn warp_exchanges() {
    for options in schedules() {
        let input = ramp(32);
        let out: Vec<f32> = Rig::new(options).run("emu_exchange", Geometry::linear(1, 32), &input, 320, 0);
        let row = |r: usize| &out[r * 32..r * 32 + 32];
        let votes = (0..32).fold(0u32, |bits, i| bits | ((input[i] as i32 & 1) as u32) << i);
        let group = |i: usize| &input[i / 8 * 8..i / 8 * 8 + 8];
        for i in 0..32 {
            assert_eq!(row(0)[i], input[i ^ 5]);
            assert_eq!(row(1)[i], input[if i + 3 < 32 { i + 3 } else { i }]);
            assert_eq!(row(2)[i], input[if i >= 3 { i - 3 } else { i }]);
            assert_eq!(row(3)[i], input[7]);
            assert_eq!(row(4)[i].to_bits(), votes);
            assert_eq!(row(5)[i], input.iter().sum::<f32>());
            assert_eq!(row(6)[i], group(i).iter().sum::<f32>());
            assert_eq!(row(7)[i], input.iter().copied().fold(f32::MIN, f32::max));
            assert_eq!(row(8)[i], group(i).iter().copied().fold(f32::MIN, f32::max));
            assert_eq!(row(9)[i], input[i ^ 2]);
        }
    }
}
