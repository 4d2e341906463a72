//! Counts what the decode kernels read at the shapes of the 14B model on 132 SMs: every weight once.
//!
//! Runs in the `count` build of the emulated device only (`tools/emulator-test.sh count --test byte_audit`); other
//! builds observe no memory access and have nothing to count.

#[path = "support/streams.rs"]
mod streams;

use std::sync::Arc;
use streams::TestStream;
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions, LaunchAudit, build_kind};
use warpstep::device::{Buffer, Device, Node, Span, Stream};
use warpstep::ops::product::{Layout, Next, ProductScratch, Weight};
use warpstep::ops::{self, DType, Launch, Selection, params::SolverStep};

const HIDDEN: usize = 5120;
const INTERMEDIATE: usize = 13824;
const HEADS_Q: usize = 40;
const HEADS_KV: usize = 8;
const HEAD_DIM: usize = 128;
const CAPACITY: usize = 64;
const WIDTH: usize = 1536;
const BLOCKS: usize = 12;
const TOKEN_DIM: usize = 64;
const E: usize = 2;

struct Bench {
    device: Arc<EmulatedDevice>,
    stream: Box<dyn Stream>,
    buffers: Vec<Buffer>,
}

impl Bench {
    fn new() -> Option<Bench> {
        if build_kind() != "count" {
            println!("nothing to count in the {} build", build_kind());
            return None;
        }
        let options = EmulatedOptions { sm_count: 132, ..EmulatedOptions::default() };
        let device = Arc::new(EmulatedDevice::new(options).unwrap());
        let stream = device.stream().unwrap();
        Some(Bench { device, stream, buffers: Vec::new() })
    }

    /// Memory whose contents do not matter: the kernels' addresses follow from shapes and indices alone.
    fn zeros(&mut self, name: &str, bytes: usize) -> Span {
        let buffer = self.device.alloc(bytes, name).unwrap();
        self.stream.set(buffer.span(), 0).unwrap();
        let span = buffer.span();
        self.buffers.push(buffer);
        span
    }

    fn indices(&mut self, name: &str, values: &[u32]) -> Span {
        let span = self.zeros(name, values.len() * 4);
        self.stream.put(span.ptr, bytemuck::cast_slice(values)).unwrap();
        span
    }

    fn scratch(&mut self, rows: usize) -> Option<ProductScratch> {
        let (floats, counters) = ProductScratch::sizes(132, rows);
        let (partial, arrivals) = (self.zeros("partial", floats * 4), self.zeros("arrivals", counters * 4));
        Some(ProductScratch { partial, arrivals, next: None })
    }

    fn count(&mut self, node: &Node) -> LaunchAudit {
        self.device.take_audit();
        self.stream.start(node).unwrap();
        self.stream.synchronize().unwrap();
        self.device.take_audit().pop().expect("one launch was counted")
    }

    fn run(&mut self, node: &Node) -> LaunchAudit {
        let audit = self.count(node);
        assert!(audit.undeclared.is_empty(), "{}: {:?}", node.label, audit.undeclared);
        audit
    }

    /// Asserts that the launch read buffer `name` of `bytes` between 1.00 and `most` times over, all of it.
    fn expect(&self, audit: &LaunchAudit, name: &str, bytes: usize, most: f64) {
        let traffic = audit
            .buffers
            .iter()
            .find(|b| b.name == name)
            .unwrap_or_else(|| panic!("{} does not touch {name}", audit.label));
        let ratio = traffic.read_bytes as f64 / bytes as f64;
        println!("{} {name}: {} bytes of {bytes}, ratio {ratio:.4}", audit.label, traffic.read_bytes);
        assert_eq!(traffic.read_unique_bytes, bytes as u64, "{name}: not all of it was read");
        assert!((1.0..=most).contains(&ratio), "{name}: read {ratio:.4} times, at most {most} allowed");
    }
}

/// At most this much may be read beyond one pass.
const ONCE: f64 = 1.02;

/// The shares of 132 SMs start and end within tiles; both ways of loading them.
#[test]
fn one_decoder_layer_reads_every_weight_once() {
    let Some(mut bench) = Bench::new() else { return };
    decoder_layer(&mut bench, "stream", &[1, 2, 3]);
    decoder_layer(&mut bench, "ring", &[2]);
}

/// The products of one layer and the projector after the last, each for every count of rows.
fn decoder_layer(bench: &mut Bench, variant: &str, row_counts: &[usize]) {
    let chosen = ["qkv", "o_proj", "gate_up", "down", "out_proj"].map(|op| format!("{op}={variant}"));
    let selection = Selection::parse(&chosen).unwrap();
    let launch = Launch { selection: &selection, dtype: DType::Bf16, sm_count: 132, dependent: false };
    let tiles = |span: Span| Weight { span, layout: Layout::Tiles };
    let qkv_rows = (HEADS_Q + 2 * HEADS_KV) * HEAD_DIM;
    let w_qkv = bench.zeros("w_qkv", qkv_rows * HIDDEN * E);
    let bias = bench.zeros("bias", qkv_rows * E);
    let w_o = bench.zeros("w_o", HIDDEN * HEADS_Q * HEAD_DIM * E);
    let w_gate_up = bench.zeros("w_gate_up", 2 * INTERMEDIATE * HIDDEN * E);
    let w_down = bench.zeros("w_down", INTERMEDIATE * HIDDEN * E);
    let w_out = bench.zeros("w_out", HIDDEN * HIDDEN * E);
    let norm_w = bench.zeros("norm_w", HIDDEN * E);
    let rope = bench.zeros("rope", CAPACITY * HEAD_DIM * 4);
    for &rows in row_counts {
        let scratch = bench.scratch(rows);
        let x = bench.zeros("x", rows * HIDDEN * 4);
        let row_seq = bench.indices("row_seq", &(0..rows as u32).collect::<Vec<_>>());
        let row_pos = bench.indices("row_pos", &vec![17; rows]);
        let rope_offset = bench.indices("rope_offset", &vec![0; rows]);
        let q = bench.zeros("q", rows * HEADS_Q * HEAD_DIM * E);
        let cache_bytes = rows * HEADS_KV * CAPACITY * HEAD_DIM * E;
        let (k_cache, v_cache) = (bench.zeros("k_cache", cache_bytes), bench.zeros("v_cache", cache_bytes));
        let act = bench.zeros("act", rows * INTERMEDIATE * E);
        let c = bench.zeros("c", rows * HIDDEN * E);
        let qkv = ops::qkv::Args {
            x,
            norm_w,
            normed: None,
            w: tiles(w_qkv),
            bias: Some(bias),
            rope,
            row_seq,
            row_pos,
            rope_offset,
            q,
            k_cache,
            v_cache,
            rows,
            sequences: rows,
            hidden: HIDDEN,
            heads_q: HEADS_Q,
            heads_kv: HEADS_KV,
            head_dim: HEAD_DIM,
            capacity: CAPACITY,
            positions: CAPACITY,
            eps: 1e-5,
            scratch,
        };
        let audit = bench.run(&ops::qkv::node(&launch, "qkv", &qkv).unwrap());
        bench.expect(&audit, "w_qkv", w_qkv.bytes, ONCE);
        let o = ops::project::Args {
            input: q,
            w: tiles(w_o),
            bias: None,
            x,
            rows,
            hidden: HIDDEN,
            inner: HEADS_Q * HEAD_DIM,
            scratch,
        };
        let audit = bench.run(&ops::o_proj::node(&launch, "o_proj", &o).unwrap());
        bench.expect(&audit, "w_o", w_o.bytes, ONCE);
        let gate_up = ops::gate_up::Args {
            x,
            norm_w,
            normed: None,
            w: ops::gate_up::Weights::Tiles(w_gate_up),
            gate_bias: None,
            up_bias: None,
            act,
            rows,
            hidden: HIDDEN,
            intermediate: INTERMEDIATE,
            eps: 1e-5,
            scratch,
        };
        let audit = bench.run(&ops::gate_up::node(&launch, "gate_up", &gate_up).unwrap());
        bench.expect(&audit, "w_gate_up", w_gate_up.bytes, ONCE);
        let down = ops::project::Args {
            input: act,
            w: tiles(w_down),
            bias: None,
            x,
            rows,
            hidden: HIDDEN,
            inner: INTERMEDIATE,
            scratch,
        };
        let audit = bench.run(&ops::down::node(&launch, "down", &down).unwrap());
        bench.expect(&audit, "w_down", w_down.bytes, ONCE);
        let out = ops::out_proj::Args {
            x,
            norm_w,
            pos_embed: None,
            w: tiles(w_out),
            bias: norm_w,
            norm_out: None,
            c,
            rows,
            hidden: HIDDEN,
            eps: 1e-5,
            scratch,
        };
        let audit = bench.run(&ops::out_proj::node(&launch, "out_proj", &out).unwrap());
        bench.expect(&audit, "w_out", w_out.bytes, ONCE);
    }
}

/// Each warp asks for steps 8 to 15 of what the same warp reads in the next launch, and for nothing else of it; ring and
/// stream alike. Steps of an uneven share that are not there are nobody's.
#[test]
fn a_launch_asks_for_the_next_ones_weights() {
    const STEP: usize = 1024;
    const WARPS: usize = 132 * 8;
    let Some(mut bench) = Bench::new() else { return };
    let (hidden, inner) = (5120, 2560);
    let w = bench.zeros("w", hidden * inner * E);
    let later = bench.zeros("later", (WARPS * 20 + 700) * STEP);
    let short = bench.zeros("short", (WARPS * 9 + 500) * STEP);
    let scratch = bench.scratch(2).unwrap();
    let (input, x) = (bench.zeros("input", 2 * inner * E), bench.zeros("x", 2 * hidden * 4));
    for (variant, next, name, first, steps) in [
        ("stream", later, "later", 8, WARPS * 8),
        ("ring", later, "later", 0, WARPS * 8),
        // Of nine or ten steps of a share one or two are left.
        ("stream", short, "short", 8, WARPS + 500),
    ] {
        let selection = Selection::one(&ops::o_proj::OP, variant).unwrap();
        let launch = Launch { selection: &selection, dtype: DType::Bf16, sm_count: 132, dependent: false };
        let args = ops::project::Args {
            input,
            w: Weight { span: w, layout: Layout::Tiles },
            bias: None,
            x,
            rows: 2,
            hidden,
            inner,
            scratch: Some(scratch.ahead(Some(Next { weights: next, first }))),
        };
        let audit = bench.count(&ops::o_proj::node(&launch, "o_proj", &args).unwrap());
        assert!(audit.undeclared.iter().all(|piece| piece.name == name), "{:?}", audit.undeclared);
        let asked = audit.buffers.iter().find(|b| b.name == name).unwrap();
        let bytes = (steps * STEP) as u64;
        assert_eq!((asked.read_bytes, asked.read_unique_bytes), (bytes, bytes), "{variant} {name}");
    }
}

/// What a tied embedding table is read by.
#[test]
fn the_lm_head_reads_its_weights_once_as_stored() {
    lm_head("plain", 1);
}

// A test each: together they take the longest of all.
#[test]
fn the_lm_head_streams_its_weights_once() {
    lm_head("stream", 2);
}

#[test]
fn the_lm_head_reads_its_weights_once_through_the_ring() {
    lm_head("ring", 1);
}

fn lm_head(variant: &str, rows: usize) {
    const VOCAB: usize = 152_064;
    let Some(mut bench) = Bench::new() else { return };
    let norm_w = bench.zeros("norm_w", HIDDEN * E);
    // Of zeros, it is the same packed.
    let w = bench.zeros("w_lm_head", VOCAB * HIDDEN * E);
    let selection = Selection::one(&ops::lm_head::OP, variant).unwrap();
    let launch = Launch { selection: &selection, dtype: DType::Bf16, sm_count: 132, dependent: false };
    let lm_head = ops::lm_head::Args {
        x: bench.zeros("x", rows * HIDDEN * 4),
        norm_w,
        w: Weight { span: w, layout: Layout::of_variant(variant) },
        norm_out: None,
        logits: bench.zeros("logits", rows * VOCAB * 4),
        rows,
        hidden: HIDDEN,
        vocab: VOCAB,
        eps: 1e-5,
        scratch: bench.scratch(rows),
    };
    let label = format!("lm_head {variant}");
    let audit = bench.run(&ops::lm_head::node(&launch, &label, &lm_head).unwrap());
    bench.expect(&audit, "w_lm_head", w.bytes, ONCE);
}

#[test]
fn the_flow_head_reads_modulations_once_and_the_chain_once_per_evaluation() {
    let Some(mut bench) = Bench::new() else { return };
    let selection = Selection::default();
    let launch = Launch { selection: &selection, dtype: DType::Bf16, sm_count: 132, dependent: false };
    let (steps, images, branches) = (2, 1, 2);
    let rows = images * branches;
    let outputs = (3 * BLOCKS + 2) * WIDTH;
    let cond_in = bench.zeros("cond_in", rows * HIDDEN * E);
    let w_cond = bench.zeros("w_cond", WIDTH * HIDDEN * E);
    let cond = bench.zeros("cond", rows * WIDTH * E);
    let linear = ops::linear::Args {
        x: cond_in,
        w: Weight { span: w_cond, layout: Layout::Tiles },
        bias: None,
        y: cond,
        rows,
        outputs: WIDTH,
        inner: HIDDEN,
        silu: false,
        out_f32: false,
        scratch: bench.scratch(rows),
    };
    let audit = bench.run(&ops::linear::node(&launch, "cond_embed", &linear).unwrap());
    bench.expect(&audit, "w_cond", w_cond.bytes, ONCE);

    let time = bench.zeros("time", steps * WIDTH * E);
    let w_mod = bench.zeros("w_mod", outputs * WIDTH * E);
    let b_mod = bench.zeros("b_mod", outputs * E);
    let modulation = bench.zeros("modulation", steps * rows * outputs * E);
    let args = ops::flow_modulation::Args {
        time,
        cond,
        w: w_mod,
        bias: b_mod,
        modulation,
        steps,
        rows,
        width: WIDTH,
        outputs,
    };
    let audit = bench.run(&ops::flow_modulation::node(&launch, "flow_modulation", &args).unwrap());
    bench.expect(&audit, "w_mod", w_mod.bytes, ONCE);

    let w0 = bench.zeros("w0", BLOCKS * WIDTH * WIDTH * E);
    let w2 = bench.zeros("w2", BLOCKS * WIDTH * WIDTH * E);
    let vector = bench.zeros("vectors", BLOCKS * WIDTH * E);
    let w_in = bench.zeros("w_in", WIDTH * TOKEN_DIM * E);
    let w_out = bench.zeros("w_out", TOKEN_DIM * WIDTH * E);
    let w_next = bench.zeros("w_next", HIDDEN * TOKEN_DIM * E);
    let b_next = bench.zeros("b_next", HIDDEN * E);
    let table = vec![SolverStep { keep: 1.0, velocity: 0.5, noise: 0.0, pad: 0 }; steps];
    let steps_table = bench.zeros("steps", steps * size_of::<SolverStep>());
    bench.stream.put(steps_table.ptr, bytemuck::cast_slice(&table)).unwrap();
    let floats = |bench: &mut Bench, name: &str, n: usize| bench.zeros(name, n * 4);
    let chain = ops::flow_chain::Args {
        modulation,
        w_in,
        b_in: vector,
        ln_w: vector,
        ln_b: vector,
        w0,
        b0: vector,
        w2,
        b2: vector,
        w_out,
        b_out: vector,
        steps_table,
        guidance: floats(&mut bench, "guidance", 2),
        draws: floats(&mut bench, "draws", images * TOKEN_DIM),
        forced_x: None,
        state: bench.zeros("state", 128),
        barrier: bench.zeros("barrier", 128),
        exchange: bench
            .zeros("exchange", ops::flow_chain::exchange_bytes((WIDTH, WIDTH, TOKEN_DIM), images, branches)),
        h: floats(&mut bench, "h", rows * WIDTH),
        a: floats(&mut bench, "a", rows * WIDTH),
        v_raw: floats(&mut bench, "v_raw", rows * TOKEN_DIM),
        trace_v_raw: None,
        trace_v: None,
        trace_x: None,
        sampled: None,
        tokens: bench.zeros("tokens", images * TOKEN_DIM * E),
        w_next,
        b_next,
        x_next: floats(&mut bench, "x_next", rows * HIDDEN),
        steps,
        images,
        branches,
        width: WIDTH,
        mlp_width: WIDTH,
        blocks: BLOCKS,
        token_dim: TOKEN_DIM,
        hidden: HIDDEN,
        tokens_total: 1,
        draws_per_slot: 1,
        draw_slots: 1,
        use_norm: true,
        rescale: false,
    };
    // The base head's resident share: the first weights of every evaluation, read by the first one alone.
    let resident = |audit: &LaunchAudit| -> f64 {
        let read = |name: &str| audit.buffers.iter().find(|b| b.name == name).map_or(0, |b| b.read_bytes);
        let chain = w0.bytes + w2.bytes + w_out.bytes;
        let all = (steps * chain) as f64;
        let kept = (all - (read("w0") + read("w2") + read("w_out")) as f64) / (steps - 1) as f64;
        println!("{}: {kept} of {chain} bytes stay in shared memory", audit.label);
        kept
    };
    for variant in ["plain", "ring", "resident"] {
        let selection = Selection::one(&ops::flow_chain::OP, variant).unwrap();
        let launch = Launch { selection: &selection, ..launch };
        let label = format!("flow_chain {variant}");
        let audit = bench.run(&ops::flow_chain::node(&launch, &label, &chain).unwrap());
        for traffic in &audit.buffers {
            println!(
                "{label} {}: {} bytes read, {} written",
                traffic.name, traffic.read_bytes, traffic.written_bytes
            );
        }
        if variant == "resident" {
            // At least 12 MB, of a whole number of segments per block.
            assert!(resident(&audit) >= 12e6);
            let first = audit.buffers.iter().find(|b| b.name == "w0").unwrap();
            assert_eq!(first.read_unique_bytes, w0.bytes as u64);
        } else {
            for (name, span) in [("w0", w0), ("w2", w2), ("w_out", w_out)] {
                bench.expect(&audit, name, span.bytes, ONCE * steps as f64);
            }
            assert!(resident(&audit) <= 0.0);
        }
        bench.expect(&audit, "w_next", w_next.bytes, ONCE);
    }
}

/// Each copied byte is read and written once, and of sequences that have their prompt, of slots after it and of what
/// nobody repeats none.
#[test]
fn repeated_prompts_are_copied_once_and_nothing_else_is() {
    const LAYERS: usize = 3;
    const LENGTH: [u32; 4] = [17, 17, 33, 17];
    let Some(mut bench) = Bench::new() else { return };
    let selection = Selection::default();
    let launch = Launch { selection: &selection, dtype: DType::Bf16, sm_count: 132, dependent: false };
    let slot_bytes = HEAD_DIM * E;
    let cache_bytes = LAYERS * LENGTH.len() * HEADS_KV * CAPACITY * slot_bytes;
    let args = ops::repeat_prompts::Args {
        keys: bench.zeros("keys", cache_bytes),
        values: bench.zeros("values", cache_bytes),
        prompt_x: bench.zeros("prompt_x", LENGTH.len() * HIDDEN * 4),
        origin: bench.indices("origin", &[0, 0, 2, 0]),
        length: bench.indices("length", &LENGTH),
        layers: LAYERS,
        sequences: LENGTH.len(),
        heads_kv: HEADS_KV,
        head_dim: HEAD_DIM,
        capacity: CAPACITY,
        hidden: HIDDEN,
    };
    let audit = bench.run(&ops::repeat_prompts::node(&launch, "repeat_prompts", &args).unwrap());
    let prompt = LAYERS * HEADS_KV * 17 * slot_bytes;
    for (name, bytes) in [("keys", prompt), ("values", prompt), ("prompt_x", HIDDEN * 4)] {
        let found = audit.buffers.iter().find(|b| b.name == name).unwrap();
        let counted =
            [found.read_bytes, found.read_unique_bytes, found.written_bytes, found.written_unique_bytes];
        let bytes = bytes as u64;
        assert_eq!(counted, [2 * bytes, bytes, 2 * bytes, 2 * bytes], "{name}");
    }
}
