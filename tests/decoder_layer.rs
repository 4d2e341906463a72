//! One decoder layer of the 14B model on 132 SMs, whole: a ragged prefill of 37 rows, then a decode step of three
//! rows on the cache that it left, in bf16 against the f64 reference.
//!
//! The ops have cases of their own at these shapes; this is about what they make together. The tolerance is the
//! house's: at most twice the error of the plain bf16 evaluation of the same chain, plus one unit.

use std::sync::Arc;
use warpstep::device::emulated::{EmulatedDevice, EmulatedOptions};
use warpstep::device::{Node, Span};
use warpstep::model::backbone::{attention_scale, rope_frequencies, rope_table};
use warpstep::ops::harness::{Rig, Tensor, compare, encode};
use warpstep::ops::product::{Layout, ProductScratch, Weight};
use warpstep::ops::{self, DType, Form, Launch, Selection};
use warpstep::reference::{Exact, PlainBf16, Precision, attention, gate_up, project, qkv};
use warpstep::weights::pack::{Pairing, Tiles};

const HIDDEN: usize = 5120;
const INTERMEDIATE: usize = 13824;
const HEADS_Q: usize = 40;
const HEADS_KV: usize = 8;
const HEAD_DIM: usize = 128;
const CAPACITY: usize = 48;
const EPS: f32 = 1e-5;
/// Prompt tokens of the three sequences.
const LENGTHS: [usize; 3] = [20, 10, 7];
const DTYPE: DType = DType::Bf16;

/// Values for the reference; the device has the matrices packed.
struct Weights {
    norms: [Tensor; 2],
    qkv: Vec<f32>,
    qkv_bias: Tensor,
    o: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
    packed: Packed,
}

struct Packed {
    qkv: Span,
    o: Span,
    gate_up: Span,
    down: Span,
}

/// Uploads the matrix of `parts`, one over another, packed; gives back what they hold in bf16.
fn pack<const N: usize>(
    rig: &mut Rig,
    name: &str,
    inner: usize,
    pairing: Pairing,
    parts: [Vec<f32>; N],
) -> ([Vec<f32>; N], Span) {
    let rounded = parts.map(|part| encode(DTYPE, part));
    let bytes: Vec<u8> = rounded.iter().flat_map(|(bytes, _)| bytes.iter().copied()).collect();
    let tiles = Tiles::new(bytes.len() / (2 * inner), inner, pairing).unwrap();
    let span = rig.bytes(name, &tiles.pack(&bytes).unwrap()).unwrap();
    (rounded.map(|(_, values)| values), span)
}

/// Keys and values of every sequence as the reference keeps them: `[S, G, capacity, d]`.
struct ReferenceCache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&v| v as f32).collect()
}

/// The layer in precision `P`: the residual stream after it.
fn reference<P: Precision>(
    w: &Weights,
    rope: &[f32],
    cache: &mut ReferenceCache,
    x: &[f32],
    row_seq: &[u32],
    row_pos: &[u32],
) -> Vec<f32> {
    let projected = qkv::qkv::<P>(&qkv::Qkv {
        x,
        norm_weight: &w.norms[0].values,
        weight: &w.qkv,
        bias: Some(&w.qkv_bias.values),
        rope,
        positions: row_pos,
        hidden_size: HIDDEN,
        num_attention_heads: HEADS_Q,
        num_key_value_heads: HEADS_KV,
        head_dim: HEAD_DIM,
        eps: EPS,
    });
    for (row, (&seq, &pos)) in row_seq.iter().zip(row_pos).enumerate() {
        for head in 0..HEADS_KV {
            let from = (row * HEADS_KV + head) * HEAD_DIM;
            let to = ((seq as usize * HEADS_KV + head) * CAPACITY + pos as usize) * HEAD_DIM;
            for d in 0..HEAD_DIM {
                cache.keys[to + d] = projected.k[from + d] as f32;
                cache.values[to + d] = projected.v[from + d] as f32;
            }
        }
    }
    let context = attention::attention::<P>(&attention::Attention {
        q: &narrow(&projected.q),
        k_cache: &cache.keys,
        v_cache: &cache.values,
        row_seq,
        row_pos,
        num_attention_heads: HEADS_Q,
        num_key_value_heads: HEADS_KV,
        head_dim: HEAD_DIM,
        capacity: CAPACITY,
        scale: attention_scale(HEAD_DIM),
    });
    let x = narrow(&project::project::<P>(&project::Project {
        input: &narrow(&context),
        weight: &w.o,
        bias: None,
        x,
        inner: HEADS_Q * HEAD_DIM,
        hidden_size: HIDDEN,
    }));
    let act = gate_up::gate_up::<P>(&gate_up::GateUp {
        x: &x,
        norm_weight: &w.norms[1].values,
        gate: &w.gate,
        up: &w.up,
        gate_bias: None,
        up_bias: None,
        hidden_size: HIDDEN,
        eps: EPS,
    });
    narrow(&project::project::<P>(&project::Project {
        input: &narrow(&act),
        weight: &w.down,
        bias: None,
        x: &x,
        inner: INTERMEDIATE,
        hidden_size: HIDDEN,
    }))
}

/// Buffers of a pass.
struct Pass {
    rows: usize,
    x: Tensor,
    /// Where the products of many rows find their rows normed.
    normed: Option<Span>,
    row_seq: Span,
    row_pos: Span,
    q: Span,
    context: Span,
    act: Span,
    split: Option<ops::attention::SplitScratch>,
    scratch: ProductScratch,
}

fn nodes(
    w: &Weights,
    rope: &Tensor,
    rope_offset: Span,
    (k_cache, v_cache): (Span, Span),
    pass: &Pass,
    selection: &Selection,
) -> Vec<Node> {
    let launch = Launch { selection, dtype: DTYPE, sm_count: 132, dependent: false };
    let (x, rows) = (pass.x.span, pass.rows);
    let tiles = |span| Weight { span, layout: Layout::Tiles };
    let project = |input, weight: Span, inner| ops::project::Args {
        input,
        w: tiles(weight),
        bias: None,
        x,
        rows,
        hidden: HIDDEN,
        inner,
        scratch: Some(pass.scratch),
    };
    let qkv = ops::qkv::Args {
        x,
        norm_w: w.norms[0].span,
        normed: pass.normed,
        w: tiles(w.packed.qkv),
        bias: Some(w.qkv_bias.span),
        rope: rope.span,
        row_seq: pass.row_seq,
        row_pos: pass.row_pos,
        rope_offset,
        q: pass.q,
        k_cache,
        v_cache,
        rows,
        sequences: LENGTHS.len(),
        hidden: HIDDEN,
        heads_q: HEADS_Q,
        heads_kv: HEADS_KV,
        head_dim: HEAD_DIM,
        capacity: CAPACITY,
        positions: CAPACITY,
        eps: EPS,
        scratch: Some(pass.scratch),
    };
    let attention = ops::attention::Args {
        q: pass.q,
        k_cache,
        v_cache,
        row_seq: pass.row_seq,
        row_pos: pass.row_pos,
        out: pass.context,
        split: pass.split,
        prefetch: None,
        rows,
        sequences: LENGTHS.len(),
        heads_q: HEADS_Q,
        heads_kv: HEADS_KV,
        head_dim: HEAD_DIM,
        capacity: CAPACITY,
        scale: attention_scale(HEAD_DIM),
    };
    let gate_up = ops::gate_up::Args {
        x,
        norm_w: w.norms[1].span,
        normed: pass.normed,
        w: ops::gate_up::Weights::Tiles(w.packed.gate_up),
        gate_bias: None,
        up_bias: None,
        act: pass.act,
        rows,
        hidden: HIDDEN,
        intermediate: INTERMEDIATE,
        eps: EPS,
        scratch: Some(pass.scratch),
    };
    let o = project(pass.context, w.packed.o, HEADS_Q * HEAD_DIM);
    let down = project(pass.act, w.packed.down, INTERMEDIATE);
    let norm = |i: usize| {
        let norm_w = w.norms[i].span;
        let args = |h| ops::norm_rows::Args { x, norm_w, h, rows, hidden: HIDDEN, eps: EPS };
        pass.normed.map(|h| ops::norm_rows::node(&launch, "norm_rows", &args(h)).unwrap())
    };
    let [first, second] = [norm(0), norm(1)];
    let to_attention = [
        ops::qkv::node(&launch, "qkv", &qkv).unwrap(),
        ops::attention::node(&launch, "attention", &attention).unwrap(),
        ops::o_proj::node(&launch, "o_proj", &o).unwrap(),
    ];
    let mlp = [
        ops::gate_up::node(&launch, "gate_up", &gate_up).unwrap(),
        ops::down::node(&launch, "down", &down).unwrap(),
    ];
    first.into_iter().chain(to_attention).chain(second).chain(mlp).collect()
}

#[test]
fn a_decoder_layer_of_the_14b_model_agrees_with_the_reference() {
    let options = EmulatedOptions { sm_count: 132, ..EmulatedOptions::default() };
    let mut rig = Rig::new(Arc::new(EmulatedDevice::new(options).unwrap()), 7).unwrap();
    let q_width = HEADS_Q * HEAD_DIM;
    let kv_rows = (HEADS_Q + 2 * HEADS_KV) * HEAD_DIM;
    let small = |inner: usize| 1.0 / (inner as f32).sqrt();
    let matrix = |rig: &mut Rig, rows: usize, inner: usize| rig.normal(rows * inner, small(inner));
    let values = matrix(&mut rig, kv_rows, HIDDEN);
    let rotary = Pairing::Rotary { head_dim: HEAD_DIM };
    let ([qkv], packed_qkv) = pack(&mut rig, "qkv", HIDDEN, rotary, [values]);
    let values = matrix(&mut rig, HIDDEN, q_width);
    let ([o], packed_o) = pack(&mut rig, "o", q_width, Pairing::Neighbours, [values]);
    let values = [matrix(&mut rig, INTERMEDIATE, HIDDEN), matrix(&mut rig, INTERMEDIATE, HIDDEN)];
    let ([gate, up], gate_up) = pack(&mut rig, "gate_up", HIDDEN, Pairing::Stacked, values);
    let values = matrix(&mut rig, HIDDEN, INTERMEDIATE);
    let ([down], packed_down) = pack(&mut rig, "down", INTERMEDIATE, Pairing::Neighbours, [values]);
    let w = Weights {
        norms: ["norm0", "norm1"].map(|name| rig.random(name, DTYPE, HIDDEN, 1.0).unwrap()),
        qkv,
        qkv_bias: rig.random("qkv_bias", DTYPE, kv_rows, 0.1).unwrap(),
        o,
        gate,
        up,
        down,
        packed: Packed { qkv: packed_qkv, o: packed_o, gate_up, down: packed_down },
    };
    let table = rope_table(&rope_frequencies(1e6, HEAD_DIM), CAPACITY, DTYPE);
    let rope = rig.input("rope", DType::F32, table).unwrap();
    let sequences = LENGTHS.len();
    let rope_offset = rig.indices("rope_offset", &vec![0; sequences]).unwrap();
    let cache_len = sequences * HEADS_KV * CAPACITY * HEAD_DIM;
    // Slots that nobody has written are NaN.
    let caches =
        (rig.output("keys", DTYPE, cache_len).unwrap(), rig.output("values", DTYPE, cache_len).unwrap());
    let empty = || ReferenceCache { keys: vec![f32::NAN; cache_len], values: vec![f32::NAN; cache_len] };
    let (mut exact_cache, mut plain_cache) = (empty(), empty());

    let prompt: (Vec<u32>, Vec<u32>) =
        (0..sequences).flat_map(|s| (0..LENGTHS[s]).map(move |pos| (s as u32, pos as u32))).unzip();
    let step: (Vec<u32>, Vec<u32>) = (0..sequences).map(|s| (s as u32, LENGTHS[s] as u32)).unzip();
    for (name, (row_seq, row_pos), prefill) in [("prefill", prompt, true), ("decode", step, false)] {
        let rows = row_seq.len();
        let splits = 3;
        let split = match prefill {
            true => None,
            false => {
                let (partial, arrivals) =
                    ops::attention::scratch_bytes(rows, HEADS_Q, HEADS_KV, HEAD_DIM, splits);
                let partial = rig.output("partial", DType::F32, partial / 4).unwrap();
                let arrivals = rig.indices("arrivals", &vec![0; arrivals / 4]).unwrap();
                Some(ops::attention::SplitScratch { partial, arrivals, splits })
            }
        };
        let pass = Pass {
            rows,
            x: rig.random("x", DType::F32, rows * HIDDEN, 1.0).unwrap(),
            normed: prefill.then(|| rig.output("normed", DTYPE, rows * HIDDEN).unwrap()),
            row_seq: rig.indices("row_seq", &row_seq).unwrap(),
            row_pos: rig.indices("row_pos", &row_pos).unwrap(),
            q: rig.output("q", DTYPE, rows * q_width).unwrap(),
            context: rig.output("context", DTYPE, rows * q_width).unwrap(),
            act: rig.output("act", DTYPE, rows * INTERMEDIATE).unwrap(),
            split,
            scratch: {
                let (floats, counters) = ProductScratch::sizes(132, rows);
                let partial = rig.output("product.partial", DType::F32, floats).unwrap();
                let arrivals = rig.indices("product.arrivals", &vec![0; counters]).unwrap();
                ProductScratch { partial, arrivals, next: None }
            },
        };
        let form = if prefill { Form::Many } else { Form::Few };
        let selection = Selection::default().for_products(form);
        for node in nodes(&w, &rope, rope_offset, caches, &pass, &selection) {
            // SAFETY: over buffers of the rig, with positions below the capacity.
            unsafe { rig.launch(&node) }.unwrap();
        }
        rig.check_guards().unwrap();
        let got = rig.read(pass.x.span, DType::F32).unwrap();
        let (exact, plain) = std::thread::scope(|scope| {
            let x = &pass.x.values;
            let (seq, pos, rope, w) = (&row_seq, &row_pos, &rope.values, &w);
            let exact = scope.spawn(|| reference::<Exact>(w, rope, &mut exact_cache, x, seq, pos));
            let plain = reference::<PlainBf16>(w, rope, &mut plain_cache, x, seq, pos);
            (exact.join().unwrap(), plain)
        });
        let widen = |v: &[f32]| -> Vec<f64> { v.iter().map(|&v| f64::from(v)).collect() };
        let check = compare(name, DTYPE, &got, &widen(&exact), &widen(&plain));
        println!("{name}, {rows} rows: {:.3e} of {:.3e} allowed", check.max_error, check.allowed);
        assert!(check.ok, "{check:?}");
    }
}
