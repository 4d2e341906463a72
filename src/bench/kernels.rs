//! Every op and variant on its own: the registry's cases, prepared and launched many times.
//!
//! *Hot*: the same launch again and again, whose inputs the L2 cache holds as far as they fit. *Cold*: launches that
//! take turns over copies of the case, all buffers included, so that between two uses of a copy at least twice the
//! cache has been read. Both run as one graph of dependent launches, as in a model, and count the time of one launch.
//! Small cases would need thousands of copies: they have few, and the rest of the distance is read from elsewhere
//! before the graph starts. A flush by writing would not do: kernels would be charged for its lines' way to memory.

use super::samples::{Effort, Floor, Row, time};
use super::{instantiate, launch};
use crate::device::{Buffer, Copies, Device, Node, NodeList, Span, Stream};
use crate::error::Result;
use crate::ops::bench;
use crate::ops::harness::{Case, Prepared, Scale, prepare};
use crate::ops::{self, DType, Op};
use std::sync::Arc;

/// L2 cache of a GPU that does not tell: an H100's.
const L2_BYTES: u64 = 50 << 20;
/// What stands for it on the emulated device, which has no cache: so much that small cases take every path.
const EMULATED_L2_BYTES: u64 = 32 << 10;
/// Memory that the copies of a case may take; two copies there are in any case.
const COPIES_BYTES: u64 = 2 << 30;

/// Which cases, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Only this op.
    pub op: Option<String>,
    /// Only this variant.
    pub variant: Option<String>,
    /// Only shapes that contain this.
    pub shape: Option<String>,
    /// Only this element type.
    pub dtype: Option<DType>,
    /// Cases of this scale; ops that have none are timed at their largest case below it.
    pub scale: Scale,
    /// How often.
    pub effort: Effort,
    /// Launches back to back in one graph, at least, and copies at most: one launch alone would measure the launch.
    pub chain: usize,
    /// Of the random inputs.
    pub seed: u64,
}

/// A case and the op that it is of.
pub struct Choice {
    /// The op.
    pub op: &'static Op,
    /// The case.
    pub case: Case,
}

/// The cases that `options` select, in the registry's order. Errors name unknown ops and variants.
pub fn choose(options: &Options) -> Result<Vec<Choice>> {
    let only = options.op.as_deref().map(ops::find).transpose()?;
    if let (Some(op), Some(variant)) = (only, &options.variant) {
        op.variant(variant)?;
    }
    let mut chosen = Vec::new();
    for op in ops::registry().iter().copied().filter(|op| only.is_none_or(|only| only.name == op.name)) {
        let mut cases = (op.cases)();
        cases.retain(|case| {
            options.variant.as_ref().is_none_or(|v| v == case.variant)
                && options.dtype.is_none_or(|d| d == case.dtype)
                && options.shape.as_ref().is_none_or(|text| case.label.contains(text.as_str()))
                && case.scale <= options.scale
        });
        for variant in op.variants {
            for (dtype, _) in variant.kernels {
                let mut mine = Vec::new();
                let mut rest = Vec::new();
                for case in cases {
                    match case.variant == variant.name && case.dtype == *dtype {
                        true => mine.push(case),
                        false => rest.push(case),
                    }
                }
                cases = rest;
                if mine.iter().any(|case| case.scale == options.scale) {
                    mine.retain(|case| case.scale == options.scale);
                } else {
                    let largest = mine.iter().map(|case| (case.bytes, case.flops)).max();
                    mine.retain(|case| Some((case.bytes, case.flops)) == largest);
                    mine.truncate(1);
                }
                chosen.extend(mine.into_iter().map(|case| Choice { op, case }));
            }
        }
    }
    Ok(chosen)
}

/// How a case is kept out of the L2 cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    /// Copies that take turns.
    copies: u64,
    /// Launches of one run: every copy as often.
    launches: u64,
    /// Bytes to be read before a run: what the other copies lack of twice the cache.
    between: u64,
}

impl Plan {
    /// For launches that read at least `touched` bytes, of cases that take `held`, and a cache of `l2`.
    fn new(touched: u64, held: u64, l2: u64, chain: u64) -> Plan {
        let distance = 2 * l2;
        let touched = touched.max(1);
        let most = chain.min(COPIES_BYTES / held.max(1)).max(2);
        let copies = (distance.div_ceil(touched) + 1).clamp(2, most);
        let between = distance.saturating_sub((copies - 1).saturating_mul(touched));
        // Only where the copies do without the reading in between may they come again within a run.
        let launches = if between == 0 { chain.next_multiple_of(copies) } else { copies };
        Plan { copies, launches, between }
    }
}

/// Bytes of `node`'s buffers, each counted once.
fn declared_bytes(node: &Node) -> u64 {
    let mut spans: Vec<Span> = Vec::new();
    for span in node.reads.iter().chain(&node.writes) {
        if !spans.contains(span) {
            spans.push(*span);
        }
    }
    spans.iter().map(|span| span.bytes as u64).sum()
}

/// A case laid out several times, and the launches over its copies.
struct Rotation {
    copies: Vec<Prepared>,
    launches: NodeList,
    plan: Plan,
}

/// A device, what it caches, and memory to read in its place.
pub struct Bench {
    device: Arc<dyn Device>,
    l2_bytes: u64,
    /// Twice the cache.
    elsewhere: Buffer,
    /// Where the sum of it goes; also what orders the launches of a rotation.
    total: Buffer,
}

impl Bench {
    /// On `device`, with the cache that it has.
    pub fn new(device: Arc<dyn Device>) -> Result<Bench> {
        let info = device.info();
        let l2_bytes = match info.kind {
            "cuda" => info.l2_bytes.unwrap_or(L2_BYTES),
            _ => EMULATED_L2_BYTES,
        };
        let elsewhere = device.alloc((2 * l2_bytes).next_multiple_of(16) as usize, "bench.elsewhere")?;
        let total = device.alloc(16, "bench.total")?;
        let mut stream = device.stream()?;
        stream.set(elsewhere.span(), 0x5a)?;
        stream.set(total.span(), 0)?;
        stream.synchronize()?;
        Ok(Bench { device, l2_bytes, elsewhere, total })
    }

    /// What the two figures of a row are, for the head of a report.
    pub fn note(&self) -> String {
        format!(
            "hot: every launch on the same buffers; cold: launches take turns over copies of all buffers, and at least \
             {:.3} MB, twice the L2 cache, are read between two uses of one",
            2.0 * self.l2_bytes as f64 / 1e6
        )
    }

    /// Copies of the case of `choice`, each with random inputs of its own, and the launches over them.
    fn rotation(&self, choice: &Choice, options: &Options) -> Result<Rotation> {
        let copy = |index: u64| {
            let mut prepared = prepare(&choice.case, self.device.clone(), options.seed.wrapping_add(index))?;
            // The launches are on another stream than the uploads.
            prepared.rig.stream().synchronize()?;
            Ok(prepared)
        };
        let first: Prepared = copy(0)?;
        // What an op counts it may count more than once, as the evaluations of flow_chain do their weights.
        let touched = choice.case.bytes.min(declared_bytes(&first.node));
        let plan = Plan::new(touched, first.rig.held_bytes() as u64, self.l2_bytes, options.chain as u64);
        let mut copies = vec![first];
        for index in 1..plan.copies {
            copies.push(copy(index)?);
        }
        let mut launches = NodeList::new();
        for prepared in copies.iter().cycle().take(plan.launches as usize) {
            // Copies have nothing in common, and a graph would run them side by side.
            let mut node = prepared.node.clone();
            node.writes.push(self.total.span());
            launches.push(node);
        }
        Ok(Rotation { copies, launches, plan })
    }

    /// Times one case: with a cold cache, then with a hot one.
    pub fn run(&self, choice: &Choice, options: &Options) -> Result<[Row; 2]> {
        let Rotation { copies, launches, plan } = self.rotation(choice, options)?;
        let sm_count = self.device.info().sm_count;
        let mut stream = self.device.stream()?;
        let stream = stream.as_mut();
        let between = match plan.between {
            0 => None,
            bytes => {
                let bytes = bytes.next_multiple_of(16) as usize;
                Some(bench::sum(sm_count, self.elsewhere.span().slice(0, bytes), self.total.span())?)
            }
        };
        let executable = instantiate(stream, launches)?;
        let mut before = |stream: &mut dyn Stream| between.iter().try_for_each(|node| launch(stream, node));
        let cold =
            time(stream, &options.effort, &mut before, &mut |stream| stream.replay(executable.as_ref()))?;

        let (node, chain) = (&copies[0].node, options.chain.max(1));
        let mut list = NodeList::new();
        for _ in 0..chain {
            list.push(node.clone());
        }
        let executable = instantiate(stream, list)?;
        let hot =
            time(stream, &options.effort, &mut |_| Ok(()), &mut |stream| stream.replay(executable.as_ref()))?;

        let row = |l2: &str, samples_ms: Vec<f64>, launches: usize, note: String| Row {
            test: choice.op.name.into(),
            variant: choice.case.variant.into(),
            dtype: choice.case.dtype.name().into(),
            shape: choice.case.label.clone(),
            l2: l2.into(),
            bytes: choice.case.bytes,
            flops: choice.case.flops,
            samples_ms: samples_ms.iter().map(|ms| ms / launches as f64).collect(),
            floor: Floor::Copy,
            note,
        };
        let held: usize = copies.iter().map(|copy| copy.rig.held_bytes()).sum();
        let mb = |bytes: u64| format!("{:.3} MB", bytes as f64 / 1e6);
        let mut cold_note =
            format!("{} launches over {} copies of {} in all", plan.launches, plan.copies, mb(held as u64));
        if plan.between > 0 {
            cold_note += &format!(", {} read before", mb(plan.between));
        }
        let mut hot_note = format!("{chain} launches");
        if choice.case.bytes > self.l2_bytes {
            hot_note += ", more than the L2 cache holds";
        }
        Ok([row("cold", cold, plan.launches as usize, cold_note), row("hot", hot, chain, hot_note)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::emulated::{EmulatedDevice, EmulatedOptions};
    use crate::ops::harness::Rig;

    fn options() -> Options {
        Options {
            op: None,
            variant: None,
            shape: None,
            dtype: None,
            scale: Scale::Small,
            effort: Effort { warm_up: 0, repeats: 2, seconds: 10.0, in_flight: 1 },
            chain: 3,
            seed: 1,
        }
    }

    #[test]
    fn every_variant_is_chosen_and_filters_filter() {
        let chosen = choose(&Options { scale: Scale::Real, ..options() }).unwrap();
        for op in ops::registry() {
            for variant in op.variants {
                let found = chosen.iter().any(|c| c.op.name == op.name && c.case.variant == variant.name);
                assert!(found, "{} {}", op.name, variant.name);
            }
        }
        let one = Options { op: Some("gate_up".into()), shape: Some("rows=2,".into()), ..options() };
        let one = choose(&Options { dtype: Some(DType::Bf16), ..one }).unwrap();
        assert!(!one.is_empty());
        assert!(one.iter().all(|c| c.op.name == "gate_up" && c.case.label.contains("rows=2,")));
        assert!(choose(&Options { op: Some("nothing".into()), ..options() }).is_err());
        let odd = Options { op: Some("gate_up".into()), variant: Some("nothing".into()), ..options() };
        assert!(choose(&odd).is_err());
    }

    /// One case of every kernel.
    fn one_of_each(options: &Options) -> Vec<Choice> {
        let mut done = std::collections::BTreeSet::new();
        let mut chosen = choose(options).unwrap();
        chosen.retain(|choice| done.insert((choice.op.name, choice.case.variant, choice.case.dtype)));
        chosen
    }

    fn bench() -> Bench {
        Bench::new(Arc::new(EmulatedDevice::new(EmulatedOptions::default()).unwrap())).unwrap()
    }

    #[test]
    fn every_op_can_be_launched_again_and_again() {
        let (bench, options) = (bench(), options());
        for choice in one_of_each(&options) {
            let rows = bench.run(&choice, &options).unwrap();
            assert!(rows.iter().all(|row| row.samples_ms.len() == 2), "{}", choice.case.label);
        }
    }

    #[test]
    fn between_two_uses_of_a_copy_twice_the_cache_is_read_and_memory_is_bounded() {
        let l2 = 50 << 20;
        // The 14B's o_proj, gate_up and LM head; a table of which one row is read; counters.
        let plan = |touched, held| Plan::new(touched, held, l2, 16);
        assert_eq!(plan(52_428_800, 53_000_000), Plan { copies: 3, launches: 18, between: 0 });
        assert_eq!(plan(283_115_520, 284_000_000), Plan { copies: 2, launches: 16, between: 0 });
        assert_eq!(plan(1_557_135_360, 1_560_000_000), Plan { copies: 2, launches: 16, between: 0 });
        let table = plan(10_240, 1_557_135_360);
        assert_eq!(table, Plan { copies: 2, launches: 2, between: 2 * l2 - 10_240 });
        assert_eq!(plan(8, 4096), Plan { copies: 16, launches: 16, between: 2 * l2 - 120 });
        for (touched, l2, chain) in
            [0, 1, 1000, 1 << 20, 1 << 30].into_iter().flat_map(|t| [(t, 0, 1), (t, 1 << 15, 5), (t, l2, 64)])
        {
            for held in [touched, touched + 4096, 1 << 31, 1 << 40] {
                let plan = Plan::new(touched, held, l2, chain);
                assert!(plan.copies >= 2 && plan.launches.is_multiple_of(plan.copies), "{plan:?}");
                assert!((plan.copies - 1) * touched.max(1) + plan.between >= 2 * l2, "{plan:?}");
                assert!(plan.copies * held <= COPIES_BYTES.max(2 * held), "{plan:?}");
                assert!(plan.between <= 2 * l2 && (plan.between > 0 || plan.launches >= chain), "{plan:?}");
            }
        }
    }

    #[test]
    fn every_cold_launch_uses_the_next_copy_and_every_copy_has_its_own_right_result() {
        let (bench, options) = (bench(), options());
        let mut in_one_run = 0;
        for choice in one_of_each(&options) {
            let name = format!("{} {} {}", choice.op.name, choice.case.variant, choice.case.label);
            let Rotation { mut copies, launches, plan } = bench.rotation(&choice, &options).unwrap();
            let order = bench.total.span();
            let nodes = launches.nodes();
            assert_eq!((nodes.len(), copies.len()), (plan.launches as usize, plan.copies as usize), "{name}");
            for (index, node) in nodes.iter().enumerate() {
                // One after another, and nothing but their order in common with the others of a turn.
                assert!(index == 0 || launches.deps(index).contains(&(index - 1)), "{name}");
                let own = || node.reads.iter().chain(&node.writes).filter(|span| **span != order);
                for other in &nodes[index + 1..(index + copies.len()).min(nodes.len())] {
                    let shared =
                        |span: &Span| other.reads.iter().chain(&other.writes).any(|o| o.overlaps(span));
                    assert!(!own().any(shared), "{name}");
                }
            }
            let mut stream = bench.device.stream().unwrap();
            let executable = instantiate(stream.as_mut(), launches).unwrap();
            stream.replay(executable.as_ref()).unwrap();
            stream.synchronize().unwrap();
            in_one_run += usize::from(plan.between == 0);
            let mut results = Vec::new();
            for (index, copy) in copies.iter_mut().enumerate() {
                let seed = options.seed + index as u64;
                // The case itself says whether what it computes of these inputs is right ...
                let mut judged = Rig::new(bench.device.clone(), seed).unwrap();
                let checks = (choice.case.run)(&mut judged).unwrap();
                assert!(!checks.is_empty() && checks.iter().all(|check| check.ok), "{name}: {checks:?}");
                // ... and this is the same, launched as often.
                let mut alone = prepare(&choice.case, bench.device.clone(), seed).unwrap();
                for _ in 0..plan.launches / plan.copies {
                    alone.rig.run(&alone.node).unwrap();
                }
                copy.rig.check_guards().unwrap();
                let mut written = Vec::new();
                for (&of_copy, &of_alone) in copy.node.writes.iter().zip(&alone.node.writes) {
                    written.push(copy.rig.read_bytes(of_copy).unwrap());
                    assert!(
                        written.last() == Some(&alone.rig.read_bytes(of_alone).unwrap()),
                        "{name}: copy {index}"
                    );
                }
                results.push(written);
            }
            // The comparison would take copies with the same inputs for one another; of these ops no seed decides them.
            let fixed = ["advance", "randn", "to_rgb8"].contains(&choice.op.name);
            assert!(fixed || results.iter().skip(1).all(|other| *other != results[0]), "{name}");
        }
        // Both ways of getting cold were taken.
        assert!(in_one_run > 5, "{in_one_run}");
    }
}
