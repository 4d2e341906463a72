//! `repeat_prompts`: keys, values and last rows of prompts that several sequences have, from the one of them that has
//! been through the transformer. The images of a batch have one prompt per guidance branch.

use super::harness::{Case, Check, Rig, Scale};
use super::params::RepeatPromptsParams;
use super::shared::{self, Checks};
use super::{DType, Launch, Op, Variant};
use crate::device::{Geometry, Node, ParamBytes, Span};
use crate::error::{Error, Result};
use crate::kernels;
use crate::reference::repeat_prompts::repeat_slots;

/// The registry row.
pub static OP: Op = Op {
    name: "repeat_prompts",
    summary: "keys, values and last row of a prompt for every sequence that has it",
    bound: "bytes: 197 KB written per token of a repeated prompt at 14B",
    variants: &[Variant {
        name: "plain",
        // A copy has no element type.
        kernels: kernels!("repeat_prompts", f32: "repeat_prompts_plain", bf16: "repeat_prompts_plain"),
        summary: "a block per layer, head and sequence; any shape",
    }],
    cases,
};

/// Threads of a block (`kThreads`).
const THREADS: u32 = 256;

/// Tensors and dimensions; shapes in `kernels/params.h` (`RepeatPromptsParams`).
#[derive(Clone, Copy, Debug)]
pub struct Args {
    /// `[layers, sequences, heads_kv, capacity, head_dim]`, written.
    pub keys: Span,
    /// `[layers, sequences, heads_kv, capacity, head_dim]`, written.
    pub values: Span,
    /// `[sequences, hidden_size]` f32, written.
    pub prompt_x: Span,
    /// `[sequences]` u32: what [`check_tables`] finds right.
    pub origin: Span,
    /// `[sequences]` u32, likewise.
    pub length: Span,
    /// Decoder layers.
    pub layers: usize,
    /// Sequences.
    pub sequences: usize,
    /// `num_key_value_heads`.
    pub heads_kv: usize,
    /// `head_dim`.
    pub head_dim: usize,
    /// Slots per sequence.
    pub capacity: usize,
    /// `hidden_size`.
    pub hidden: usize,
}

/// Fails unless every origin is a sequence that is its own, with a prompt of as many slots, for which there is room:
/// the kernel takes the tables as they are, and reads an origin while others are written.
pub fn check_tables(origin: &[u32], length: &[u32], capacity: usize) -> Result<()> {
    let fail = |reason: String| Err(Error::Internal(format!("op {}: {reason}", OP.name)));
    if origin.len() != length.len() {
        return fail(format!("{} origins of {} prompts", origin.len(), length.len()));
    }
    for (sequence, (&from, &slots)) in origin.iter().zip(length).enumerate() {
        let there = origin.get(from as usize).zip(length.get(from as usize));
        if there != Some((&from, &slots)) {
            return fail(format!(
                "sequence {sequence} of {slots} slots comes from {from}, where origin and slots are {there:?}"
            ));
        }
        if slots as usize > capacity {
            return fail(format!("sequence {sequence} has {slots} slots of {capacity}"));
        }
    }
    Ok(())
}

/// The node that computes `args`.
pub fn node(launch: &Launch, label: &str, args: &Args) -> Result<Node> {
    let a = args;
    let variant = launch.selection.variant(&OP, "plain")?;
    let checks = Checks::new(OP.name, variant.name);
    let e = launch.dtype.bytes();
    let cache = [a.layers, a.sequences, a.heads_kv, a.capacity, a.head_dim];
    let keys = checks.span("keys", a.keys, e, &cache)?;
    let values = checks.span("values", a.values, e, &cache)?;
    let prompt_x = checks.span("prompt_x", a.prompt_x, 4, &[a.sequences, a.hidden])?;
    let origin = checks.span("origin", a.origin, 4, &[a.sequences])?;
    let length = checks.span("length", a.length, 4, &[a.sequences])?;
    let layers = checks.dim("layers", a.layers)?;
    let sequences = checks.dim("sequences", a.sequences)?;
    let heads_kv = checks.dim("heads_kv", a.heads_kv)?;
    let slot_bytes = checks.product("bytes of a slot", &[a.head_dim, e])?;
    // The bytes of a prompt's piece and of a row are 32 bits in the kernel.
    checks.product("bytes of a head's slots", &[a.capacity, slot_bytes])?;
    checks.product("bytes of a row", &[a.hidden, 4])?;
    let pieces = checks.product("pieces of keys and values", &[2, a.layers, a.heads_kv])?;
    if !slot_bytes.is_multiple_of(4) {
        return Err(
            checks.refuse(format!("head_dim is {}, a slot must be a multiple of 4 bytes", a.head_dim))
        );
    }
    if a.sequences > 65_535 {
        return Err(checks.refuse(format!("sequences: {}, must be at most 65535", a.sequences)));
    }
    let params = RepeatPromptsParams {
        keys: keys.ptr.0,
        values: values.ptr.0,
        prompt_x: prompt_x.ptr.0,
        origin: origin.ptr.0,
        length: length.ptr.0,
        layers,
        sequences,
        heads_kv,
        capacity: checks.dim("capacity", a.capacity)?,
        hidden: checks.dim("hidden", a.hidden)?,
        slot_bytes: checks.dim("bytes of a slot", slot_bytes)?,
    };
    let mut geometry = Geometry::linear(checks.dim("blocks", pieces + 1)?, THREADS);
    geometry.grid[1] = params.sequences;
    geometry.dependent = launch.dependent;
    Ok(Node {
        label: label.into(),
        kernel: variant.kernel(OP.name, launch.dtype)?,
        geometry,
        params: ParamBytes::of(&params),
        reads: vec![origin, length, keys, values, prompt_x],
        writes: vec![keys, values, prompt_x],
    })
}

/// One test shape.
#[derive(Clone, Copy, Debug)]
struct Shape {
    layers: usize,
    heads_kv: usize,
    head_dim: usize,
    capacity: usize,
    hidden: usize,
    origin: &'static [u32],
    length: &'static [u32],
}

fn cases() -> Vec<Case> {
    let small = [
        // Two images of two branches, with capacities as a run has them.
        (2, 2, 16, 32, 96, &[0, 0, 2, 2][..], &[13, 13, 7, 7][..]),
        // Nothing to do.
        (1, 1, 64, 20, 64, &[0, 1, 2], &[1, 20, 9]),
        // One prompt for all, from the last sequence, up to the last slot.
        (1, 3, 8, 11, 75, &[3, 3, 3, 3], &[11, 11, 11, 11]),
        // Slots and pieces of 4, 20 and 12 bytes in bf16: tails, and sequences that no vector load reads.
        (2, 1, 2, 19, 33, &[0, 1, 1, 0], &[3, 17, 17, 3]),
        (3, 2, 10, 7, 50, &[2, 2, 2], &[5, 5, 5]),
        (1, 2, 6, 8, 4, &[0, 0], &[0, 0]),
        // More than a turn of the loop, with a tail.
        (1, 1, 128, 80, 1300, &[1, 1], &[67, 67]),
    ];
    let shape = |(layers, heads_kv, head_dim, capacity, hidden, origin, length)| Shape {
        layers,
        heads_kv,
        head_dim,
        capacity,
        hidden,
        origin,
        length,
    };
    let mut cases = Vec::new();
    for &dtype in DType::ALL {
        cases.extend(small.map(|s| case(shape(s), dtype, Scale::Small)));
        let long = (2, 8, 128, 1104, 5120, &[0, 0, 2, 0, 2][..], &[77, 77, 1003, 77, 1003][..]);
        cases.push(case(shape(long), dtype, Scale::Medium));
    }
    // Four images of two branches; a real cache has 1024 slots more, which nobody touches here.
    let real =
        (48, 8, 128, 192, 5120, &[0, 0, 0, 0, 4, 4, 4, 4][..], &[128, 128, 128, 128, 97, 97, 97, 97][..]);
    cases.push(case(shape(real), DType::Bf16, Scale::Real));
    cases
}

fn case(s: Shape, dtype: DType, scale: Scale) -> Case {
    let slot_bytes = s.head_dim * dtype.bytes();
    let prompt = |slots: u32| 2 * s.layers * s.heads_kv * slots as usize * slot_bytes + 4 * s.hidden;
    // Every copy is written, and every origin that has one is read once.
    let of = |counts: &dyn Fn(u32) -> bool| -> usize {
        (0..).zip(s.length).filter(|&(sequence, _)| counts(sequence)).map(|(_, &slots)| prompt(slots)).sum()
    };
    let is_copy = |sequence: u32| s.origin[sequence as usize] != sequence;
    let is_read = |sequence: u32| (0..).zip(s.origin).any(|(to, &from)| from == sequence && to != from);
    let bytes = of(&is_copy) + of(&is_read);
    let label = format!(
        "layers={},heads={},head_dim={},capacity={},hidden={},origins={:?},lengths={:?}",
        s.layers, s.heads_kv, s.head_dim, s.capacity, s.hidden, s.origin, s.length
    )
    .replace(' ', "");
    let run = move |rig: &mut Rig, launch: &Launch| run(rig, launch, s);
    shared::case(&OP, "plain", dtype, scale, (bytes as u64, 0), label, run)
}

fn run(rig: &mut Rig, launch: &Launch, s: Shape) -> Result<Vec<Check>> {
    check_tables(s.origin, s.length, s.capacity)?;
    let sequences = s.origin.len();
    let slot_words = s.head_dim * launch.dtype.bytes() / 4;
    let words = s.layers * sequences * s.heads_kv * s.capacity * slot_words;
    // Every word has a value of its own, slots beyond a prompt too: NaN would not show that NaN was copied over it.
    let keys = rig.random("keys", DType::F32, words, 1.0)?;
    let values = rig.random("values", DType::F32, words, 1.0)?;
    let prompt_x = rig.random("prompt_x", DType::F32, sequences * s.hidden, 1.0)?;
    let args = Args {
        keys: keys.span,
        values: values.span,
        prompt_x: prompt_x.span,
        origin: rig.indices("origin", s.origin)?,
        length: rig.indices("length", s.length)?,
        layers: s.layers,
        sequences,
        heads_kv: s.heads_kv,
        head_dim: s.head_dim,
        capacity: s.capacity,
        hidden: s.hidden,
    };
    rig.run(&node(launch, "test.repeat_prompts", &args)?)?;
    let cache = (s.layers, s.heads_kv, s.capacity, slot_words);
    let (row, rows) = ((1, 1, 1, s.hidden), vec![1; sequences]);
    [("keys", keys, cache, s.length), ("values", values, cache, s.length), ("prompt_x", prompt_x, row, &rows)]
        .into_iter()
        .map(|(output, tensor, shape, length)| {
            let mut expected = tensor.values;
            repeat_slots(&mut expected, shape, s.origin, length);
            let got = rig.read(tensor.span, DType::F32)?;
            Ok(same_bits(output, &got, &expected))
        })
        .collect()
}

/// A copy is exact, and what is not written stays as it was.
fn same_bits(output: &str, got: &[f32], expected: &[f32]) -> Check {
    let differ = got.iter().zip(expected).position(|(g, e)| g.to_bits() != e.to_bits());
    let worst: (usize, f64, f64) =
        differ.map_or((0, 0.0, 0.0), |at| (at, got[at].into(), expected[at].into()));
    let error = (worst.1 - worst.2).abs();
    let ok = differ.is_none() && got.len() == expected.len();
    Check { output: output.into(), max_error: error, mean_error: error, allowed: 0.0, worst, ok }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DevicePtr;
    use crate::ops::Selection;

    #[test]
    fn tables_that_the_kernel_must_not_get_are_refused() {
        assert!(check_tables(&[0, 0, 2, 2, 0], &[3, 3, 9, 9, 3], 9).is_ok());
        assert!(check_tables(&[], &[], 1).is_ok());
        let wrong: [(&[u32], &[u32]); 6] = [
            // No such sequence, one that is a copy itself, each other's.
            (&[0, 3, 2], &[3, 3, 3]),
            (&[0, 0, 1], &[3, 3, 3]),
            (&[1, 0], &[3, 3]),
            // Prompts of different lengths, longer than the cache, of another number of sequences.
            (&[0, 0], &[3, 2]),
            (&[0, 1], &[3, 10]),
            (&[0, 0], &[3]),
        ];
        for (origin, length) in wrong {
            assert!(check_tables(origin, length, 9).is_err(), "{origin:?} {length:?}");
        }
    }

    #[test]
    fn shapes_that_the_kernel_does_not_do_are_refused_with_their_numbers() {
        let span = |i: u64| Span { ptr: DevicePtr((i + 1) << 40), bytes: 1 << 36 };
        let args = Args {
            keys: span(0),
            values: span(1),
            prompt_x: span(2),
            origin: span(3),
            length: span(4),
            layers: 2,
            sequences: 3,
            heads_kv: 4,
            head_dim: 6,
            capacity: 20,
            hidden: 96,
        };
        let made = |dtype, args: Args| {
            let selection = Selection::default();
            node(&Launch { selection: &selection, dtype, sm_count: 4, dependent: true }, "t", &args)
        };
        let fine = made(DType::Bf16, args).unwrap();
        assert_eq!((fine.geometry.grid, fine.geometry.dependent), ([17, 3, 1], true));
        assert_eq!(fine.writes.iter().map(|span| span.bytes).collect::<Vec<_>>(), [5760, 5760, 1152]);
        assert!(fine.writes.iter().all(|span| fine.reads.contains(span)));
        let refused = |dtype, args| made(dtype, args).unwrap_err().to_string();
        let odd = Args { head_dim: 5, ..args };
        assert!(made(DType::F32, odd).is_ok() && refused(DType::Bf16, odd).contains("head_dim is 5"));
        let many = Args { sequences: 65_536, ..args };
        assert!(refused(DType::Bf16, many).contains("65536, must be at most 65535"));
        let long = Args { sequences: 1, layers: 1, heads_kv: 1, capacity: 1 << 28, ..args };
        assert!(refused(DType::Bf16, long).contains("a head's slots"));
        assert!(refused(DType::F32, Args { layers: 0, ..args }).contains("layers"));
        assert!(refused(DType::F32, Args { layers: usize::MAX, ..args }).contains("overflows"));
        let short = Args { values: Span { bytes: 100, ..span(1) }, ..args };
        assert!(refused(DType::F32, short).contains("values of shape [2, 3, 4, 20, 6]"));
    }
}
